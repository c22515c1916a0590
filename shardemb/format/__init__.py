"""The disk as data: the content of every document and record, and the path of every file. See docs/reference/FORMAT.md.

Dataclasses that are persisted, parsers that trust nothing they read, layouts and paths; and zarr, which writes its
metadata into memory. Nothing here opens a file.
"""
