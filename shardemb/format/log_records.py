"""The layout of the image log: headers, records and their types."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


MAGIC, RECORD_MAGIC = b"shardlog", b"srec"


HEADER = struct.Struct("<8sQQQQQ16s16sQ")


RECORD = struct.Struct("<4sIQQQQQQ16sQQ")


IMAGES, COMMIT, END = 1, 2, 3


NO_TABLE = bytes(16)


SUFFIX = ".log"
