"""Rows in memory, over those of the files: in slots or in the spill file, within the memory budget."""
