"""Bytes on disk: every system call on files, the log, folds into the shards, checksums, the folders of tables.

Everything that reaches a disk goes through ``files.py``, and everything that maps a file through ``address_space.py``,
so that tests can replace both. Rows with uncommitted changes are not known here; they are in ``engine``.
"""
