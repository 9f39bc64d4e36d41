"""What others ask of a lock."""
