"""Bytes on disk: every system call on files, the folders of tables, the checksums of their blocks.

Everything that reaches a disk goes through ``files.py``, and everything that maps a file through ``address_space.py``,
so that tests can replace both.
"""
