"""Vectors in and out, one file a format: Arrow record batches, parquet.

Each takes any source of rows, not a table, and works in bounded memory. A new format is a new file here.
"""
