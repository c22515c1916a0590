"""The note of what is written before its commit, what recovery makes of it, and fills in the log."""
