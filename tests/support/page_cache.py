"""What the kernel holds of a table's files."""

import ctypes
import mmap
import os

from . import inside


def drop_caches(table):
    """Drop a committed table's pages from this process's memory and the kernel's; return whether they are gone."""
    mapped = inside.shards(table)
    mapped.overlay.evict(mapped.overlay.slots.count)
    mapped.release_pages(0, mapped.spec.num_shards * mapped.spec.rows_per_shard)
    left = 0
    for shard in range(mapped.spec.num_shards):
        with mapped.shard_path(shard).open("r+b") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left += pages_in_memory(file)
    return left == 0


def pages_in_memory(file):
    """Count the pages of a file that the kernel holds."""
    with mmap.mmap(file.fileno(), 0) as view:
        pages = (ctypes.c_ubyte * (len(view) // mmap.PAGESIZE))()
        address = ctypes.c_char.from_buffer(view)
        result = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(len(view)), pages
        )
        assert result == 0
        del address
        return sum(page & 1 for page in pages)
