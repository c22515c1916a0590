"""Search for the rows that are nearest to a vector: exactly, through an index, and by key."""
