"""Bytes on disk: every system call on files, the log, folds into the shards, checksums, the folders of tables.

What reaches a disk passes ``files.py``, and what maps a file passes ``address_space.py``, so that tests can replace
both. Rows that changed and are not committed yet are not known here: they are in ``engine``.
"""
