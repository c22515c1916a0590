"""Vectors from files of other programs, one module for each layout.

Each turns a file, or what stands for one, into a stream of blocks of rows, in memory that does not depend on its size
nor on what its header claims. What becomes of the blocks is the caller's: nothing here knows a table.
"""
