"""Ranges of address space into which files are mapped, and advice to the kernel about them.

Linux only: it maps at fixed addresses and uses ``MADV_DONTNEED`` on private memory. Like ``files.py`` this module makes
system calls: callers write ``address_space.name(...)``, so that tests can replace it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import sizes
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from numpy.typing import DTypeLike, NDArray

MADV_RANDOM, MADV_WILLNEED, MADV_DONTNEED, MADV_POPULATE_READ, MADV_POPULATE_WRITE = 1, 3, 4, 22, 23

HUGE_PAGE = sizes.HUGE_PAGE

SMALL_BYTES = 64 * 2**10
"""Arrays up to this size are not worth a mapping of their own."""

TABLE_MAPPINGS = 6
"""Mappings that an open table takes in addition to one for each of its files, see `Shards` and `Overlay`."""

_MADV_HUGEPAGE = 14
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_WRITE_BACK, _WRITE_BACK_AND_WAIT = 2, 7  # SYNC_FILE_RANGE_WRITE; _WAIT_BEFORE | _WRITE | _WAIT_AFTER
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_uint]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_LARGEST_KEPT = 2**25 - 2**16
"""Bytes of the largest array after whose release the C library changes what it does, less a margin."""


def keep_freed_memory() -> None:
    """Let the C library keep arrays of up to 32 MiB that are freed, for those that come next.

    glibc takes a large array from the kernel and gives it back when it is freed, until one of that size has been freed;
    from then on it keeps up to twice as much. Without this, each batch of 400,000 ids takes 3,000 page faults for its
    temporary arrays, which cost as much as the batch. The array here is never touched, so it costs 10 us and no memory.
    Programs that have chosen their own limits (``MALLOC_TRIM_THRESHOLD_``, ``mallopt``) keep them.
    """
    np.empty(_LARGEST_KEPT, np.uint8)


def _kernels_limit() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 65_530


MAX_MAPPINGS: int = _kernels_limit() * 7 // 8
"""With how many mappings a process creates tables: the kernel allows more (``vm.max_map_count``), for all else."""

MAX_MAPPINGS_OPENING: int = _kernels_limit() * 15 // 16
"""With how many it opens them. More, so that what one process has created another one can open."""


def mappings_left() -> int:
    """Return how many files one more table may have, for this process to map them all."""
    return MAX_MAPPINGS - files.counters.mappings - TABLE_MAPPINGS


class AddressRange:
    """A range of address space into which files are mapped privately; aligned to 2 MiB unless it is smaller.

    It takes no address space but its own, so that a process has enough mappings for thousands of tables. Memory in
    which nothing is mapped must not be accessed. The range is unmapped when the last array over it is deleted, so a
    thread that still reads from such an array is safe whatever other threads do.

    Parameters
    ----------
    nbytes : int
        A whole number of pages.

    Raises
    ------
    OSError
        The address space cannot be reserved.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.address = nbytes, HUGE_PAGE  # an address to which nothing is ever mapped
        if nbytes == 0:
            return
        spare = HUGE_PAGE if nbytes >= HUGE_PAGE else 0
        start = _mmap(0, nbytes + spare, _PROT_NONE, -1)
        self.address = -(-start // HUGE_PAGE) * HUGE_PAGE if spare else start
        for first, last in ((start, self.address), (self.address + nbytes, start + nbytes + spare)):
            if first < last:
                _libc.munmap(first, last - first)
        self._reserved = nbytes  # in which nothing is mapped yet
        self._mappings = [0]
        weakref.finalize(self, _unmap, self.address, nbytes, self._mappings).atexit = False
        self._count(1)

    def map_file(self, offset: int, path: Path, nbytes: int, start: int = 0) -> None:
        """Map `nbytes` of a file, from `start` on, at `offset`. Reads see the file; writes stay in this process."""
        with files.opened(path, os.O_RDONLY) as descriptor:
            _mmap(self.address + offset, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, descriptor, start)
        self._note_mapped(nbytes)

    def map_files(self, paths: Iterable[Path], file_bytes: int, missing: Collection[Path]) -> None:
        """Map files of one size one after the other; those that are missing are zeros."""
        for number, path in enumerate(paths):
            if path in missing:
                self.map_zeros(number * file_bytes, file_bytes)
            else:
                self.map_file(number * file_bytes, path, file_bytes)

    def map_zeros(self, offset: int, nbytes: int) -> None:
        """Map zero bytes, which take memory only once they are written."""
        _mmap(self.address + offset, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, -1)
        self._note_mapped(nbytes)

    def _note_mapped(self, nbytes: int) -> None:
        """Count a mapping, which may take the place of the last that was only reserved."""
        self._reserved -= nbytes
        self._count(1 if self._reserved else 0)

    def _count(self, more: int) -> None:
        self._mappings[0] += more
        files.counters.add(mappings=more)

    def array(self, dtype: DTypeLike, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Return an array over the range, from the byte `offset` on. It keeps the range mapped."""
        view = _View(self, np.dtype(dtype).str, shape, offset)
        return np.asarray(view)

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """Return a view of a part of the range as bytes. It keeps the range mapped."""
        return self.array(np.uint8, (self.nbytes,)).data[offset : offset + nbytes]

    def advise(self, offset: int, nbytes: int, advice: int) -> None:
        """Advise the kernel about a part of the range.

        Raises
        ------
        OSError
            The kernel refused the advice.
        """
        files.check(_libc.madvise(self.address + offset, nbytes, advice), f"madvise({advice})")

    def release(self, offset: int, nbytes: int) -> None:
        """Return private memory to the kernel. Where it accepts, the content is that of the file again, or zeros.

        Where it refuses, the content is unchanged.
        """
        with contextlib.suppress(OSError):  # the memory is locked, for example
            self.advise(offset, nbytes, MADV_DONTNEED)

    def prefer_huge_pages(self, offset: int, nbytes: int) -> None:
        """Let a part of the range use huge pages if the kernel has them: fewer faults and faster random reads."""
        with contextlib.suppress(OSError):
            self.advise(offset, nbytes, _MADV_HUGEPAGE)


class _View:
    """Describes a range to NumPy, and keeps it mapped as long as an array uses it."""

    def __init__(self, owner: AddressRange, typestr: str, shape: tuple[int, ...], offset: int) -> None:
        self._owner = owner
        self.__array_interface__ = {
            "data": (owner.address + offset, False),
            "typestr": typestr,
            "shape": shape,
            "version": 3,
        }


def zeros(dtype: DTypeLike, count: int) -> NDArray[Any]:
    """Make an array of zeros that takes memory only page by page, as it is written, unless it is small."""
    return zeros_together([(dtype, count)])[0]


def zeros_together(wanted: Sequence[tuple[DTypeLike, int]]) -> list[NDArray[Any]]:
    """Make several arrays of zeros, given by type and length, that share one mapping; see `zeros`."""
    sizes = [
        -(-max(count * np.dtype(dtype).itemsize, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        for dtype, count in wanted
    ]
    if sum(sizes) <= SMALL_BYTES:
        return [np.zeros(count, dtype) for dtype, count in wanted]
    memory = AddressRange(sum(sizes))
    memory.map_zeros(0, memory.nbytes)
    offsets = accumulate(sizes, initial=0)
    return [
        memory.array(dtype, (count,), offset) for (dtype, count), offset in zip(wanted, offsets, strict=False)
    ]


def read_in_huge_pages(path: Path, start: int, nbytes: int) -> None:
    """Read a part of a file into the page cache in pages of 2 MiB, if kernel and file system support them.

    Read-ahead by advice gives small pages instead, for each of which a lookup has to walk the page table.

    Parameters
    ----------
    path : Path
        The file.
    start, nbytes : int
        Multiples of `HUGE_PAGE`, within the file.
    """
    memory = AddressRange(nbytes)
    memory.map_file(0, path, nbytes, start)
    memory.prefer_huge_pages(0, nbytes)
    memory.advise(0, nbytes, MADV_POPULATE_READ)


def cached_share(descriptor: int, offset: int, nbytes: int) -> float:
    """Return the share of a range of a file that is in the page cache, 0 to 1, without reading any of it."""
    answer = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    address = _libc.mmap(0, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
    if address == _FAILED:
        return 0.0
    try:
        if _libc.mincore(address, nbytes, answer) != 0:
            return 0.0
        return sum(page & 1 for page in answer) / len(answer)
    finally:
        _libc.munmap(address, nbytes)


def write_back(descriptor: int, offset: int, nbytes: int, path: Path) -> None:
    """Write what the page cache holds of a range of a file back to disk, and wait for that.

    It is not durable before a sync, which then has less to do.

    Raises
    ------
    OSError
        As by `files.sync`, which does not report the same error once more.
    """
    done = _libc.sync_file_range(descriptor, offset, nbytes, _WRITE_BACK_AND_WAIT)
    files.check(done, f"{path} cannot be synced")


def begin_write_back(descriptor: int, offset: int, nbytes: int) -> None:
    """Begin what `write_back` does, and do not wait for it. The page cache keeps the range. A sync tells of errors."""
    _libc.sync_file_range(descriptor, offset, nbytes, _WRITE_BACK)


def _mmap(address: int, nbytes: int, protection: int, descriptor: int, start: int = 0) -> int:
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    flags |= mmap.MAP_ANONYMOUS if descriptor < 0 else 0
    flags |= _MAP_FIXED if address else 0
    result = _libc.mmap(address, nbytes, protection, flags, descriptor, start)
    if result == _FAILED:
        code = ctypes.get_errno()
        msg = (
            f"cannot map {nbytes} bytes ({os.strerror(code)}); a limit on address space (ulimit -v), "
            f"vm.overcommit_memory=2 or vm.max_map_count may be in the way"
        )
        raise OSError(code, msg)
    return int(result)


def _unmap(address: int, nbytes: int, mapped: list[int]) -> None:
    files.counters.add(mappings=-mapped[0])
    _libc.munmap(address, nbytes)
