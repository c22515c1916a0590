"""The rules by which the partitions of one store commit together or not at all: machines without I/O."""
