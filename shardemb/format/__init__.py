"""The disk as data: what stands in each document and record, and where each file lies. See docs/reference/FORMAT.md.

Dataclasses that are persisted, checks that believe nothing that a file says, layouts and paths; and zarr, which writes
its metadata in memory. Nothing here opens a file.
"""
