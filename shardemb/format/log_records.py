"""The binary layout of the image log: segment headers, record headers and record types."""

from __future__ import annotations

import struct

MAGIC, RECORD_MAGIC = b"shardlog", b"srec"

LOG_VERSION, PARTITION_LOG_VERSION = 2, 3
"""Of the headers of segments. Version 1 had no fills; a program that does not know them must not replay the log.

Version 3 is for the log of a partition, which may hold a prepared record.
"""

HEADER = struct.Struct("<8sQQQQQ16s16sQ")
"""Of a segment: magic, format version, epoch, number of the segment, sequence number of its first record, bytes of the
file, uuid of the store, salt, checksum of all this."""

RECORD = struct.Struct("<4sIQQQQQQ16sQQ")
"""Of a record: magic, type, bytes of the payload, epoch, sequence number, highest sequence number known to be synced,
attempt, count, uuid of the table, checksum of the payload, checksum of all this with the store's uuid and the salt."""

IMAGES, COMMIT, END, FILL, PREPARED = 1, 2, 3, 4, 5
"""Types of records."""

NO_TABLE = bytes(16)
"""Stands for the uuid of a table in records that are about no table."""

SUFFIX = ".log"
"""Of the file names of segments."""
