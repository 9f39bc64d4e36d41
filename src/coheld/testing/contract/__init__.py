"""The definition of what a Lockable does, on every backend."""
