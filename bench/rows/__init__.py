"""One module for each row of the table: `measure(plan)` answers its lines."""
