"""Vectors out of a store, one module for each format.

Each takes any source of rows, not only a table, and works in bounded memory. A new format is a new module here.
"""
