"""The one table of delays, in seconds. COHELD_TEST_SCALE multiplies it: slow machines, sanitizers."""

import os

SCALE = float(os.environ.get("COHELD_TEST_SCALE", "1"))

TICK = 0.002  # between two looks at something observable; not scaled, as it decides nothing
SHORT = 0.05 * SCALE  # a time-out that is meant to pass
MEDIUM = 0.5 * SCALE  # a time-out that must outlast something SHORT
LONG = 20.0 * SCALE  # the bound of anything that must happen; reaching it is a failure
HANG = 180.0 * SCALE  # the bound of a whole test; reaching it dumps all stacks and ends the run
