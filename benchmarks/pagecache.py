"""Dropping files from the page cache, and checking that they are gone: else a cold benchmark would be a warm one.

Also, what the kernel has read from the disk for this process.
"""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def require_cold(folder):
    """Drop every file under a folder from the page cache.

    Raises
    ------
    NotImplementedError
        Pages stay (a file system in memory, a sandbox, another user's files). asv then skips the benchmark.
    """
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    for path in files:
        _drop(path)
    warm = {path.name: pages for path in files if (pages := resident_pages(path))}
    if warm:
        raise NotImplementedError(f"the page cache cannot be dropped here: {warm}")


def resident_pages(path):
    """Count the pages of a file that are in memory."""
    return int(np.count_nonzero(residency(path)))


def residency(path):
    """Return for each page of a file whether it is in memory."""
    with path.open("rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes == 0:
            return np.zeros(0, bool)
        with mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ) as mapping:
            return _residency(mapping, nbytes)


def bytes_read():
    """Return how many bytes this process has made the kernel read from the disk; what was in memory does not count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def _residency(mapping, nbytes):
    view = np.frombuffer(mapping, np.uint8)
    answer = np.zeros(-(-nbytes // mmap.PAGESIZE), np.uint8)
    if _libc.mincore(view.ctypes.data, nbytes, answer.ctypes.data) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return (answer & 1).astype(bool)


def _drop(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # a page that is not on disk yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
