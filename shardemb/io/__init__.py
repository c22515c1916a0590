"""Vectors in and out, one module for each format: Arrow record batches, parquet.

Each takes any source of rows, not only a table, and works in bounded memory. A new format is a new module here.
"""
