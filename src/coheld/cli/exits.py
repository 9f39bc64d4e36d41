"""Exit statuses of the command, as env, timeout and flock have them. A subcommand's own are in its help."""

NO_SUCH_RESOURCE = 1
LOST = 123  # the lock was lost while the command ran
NOT_GOT = 124  # the lock could not be had in the time given
FAILED = 125  # coheld itself failed: wrong usage, a nested run, no place for a segment
NOT_EXECUTABLE = 126
NOT_FOUND = 127
BY_SIGNAL = 128  # plus the number of the signal
