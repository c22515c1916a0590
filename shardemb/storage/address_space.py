"""Address space into which files are mapped, and what the kernel is told about it.

Linux only: mappings at fixed addresses, ``MADV_DONTNEED`` on memory of this process. Like ``files.py`` this is a door to
the outside: callers use it as ``address_space.name(...)``, so that tests can replace it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.storage import files

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import DTypeLike, NDArray

MADV_RANDOM, MADV_WILLNEED, MADV_DONTNEED, MADV_POPULATE_READ, MADV_POPULATE_WRITE = 1, 3, 4, 22, 23

MAX_MAPPINGS = 32_768
"""Files that all open tables of a process may map; the kernel allows 65,530 mappings of any kind."""

HUGE_PAGE = 2 * 2**20

_MADV_HUGEPAGE = 14
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def mappings_left() -> int:
    """How many more files this process may map."""
    return MAX_MAPPINGS - files.counters.mappings


class AddressRange:
    """A stretch of address space, 2 MiB aligned, into which files are mapped privately.

    Until something is mapped there, it cannot be touched. It is unmapped when the last array over it goes, so a
    thread that still reads from one is safe whatever the others do.

    Parameters
    ----------
    nbytes : int
        A whole number of pages.

    Raises
    ------
    OSError
        The address space is not to be had.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        length = nbytes + HUGE_PAGE
        start = _mmap(0, length, _PROT_NONE, -1)
        self.address = -(-start // HUGE_PAGE) * HUGE_PAGE
        self._files = [0]
        weakref.finalize(self, _unmap, start, length, self._files).atexit = False

    def map_file(self, offset: int, path: Path, nbytes: int, start: int = 0) -> None:
        """Map `nbytes` of a file, from `start` on, at `offset`: reads see the file, writes stay in this process."""
        with files.opened(path, os.O_RDONLY) as descriptor:
            _mmap(self.address + offset, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, descriptor, start)
        self._files[0] += 1
        files.counters.add(mappings=1)

    def map_zeros(self, offset: int, nbytes: int) -> None:
        """Map zero bytes that take memory once they are written."""
        _mmap(self.address + offset, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, -1)

    def array(self, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        """View the beginning of the range as an array, which keeps the range mapped."""
        view = _View(self, np.dtype(dtype).str, shape)
        return np.asarray(view)

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """View a part of the range as bytes, which keeps the range mapped."""
        return self.array(np.uint8, (self.nbytes,)).data[offset : offset + nbytes]

    def advise(self, offset: int, nbytes: int, advice: int) -> None:
        """Advise the kernel about a part of the range.

        Raises
        ------
        OSError
            The kernel refused.
        """
        files.check(_libc.madvise(self.address + offset, nbytes, advice), f"madvise({advice})")

    def release(self, offset: int, nbytes: int) -> None:
        """Let memory of this process go, if the kernel takes it; what lay there is zeros, or as it was."""
        with contextlib.suppress(OSError):  # locked memory, for example
            self.advise(offset, nbytes, MADV_DONTNEED)

    def prefer_huge_pages(self, offset: int, nbytes: int) -> None:
        """Let a part of the range lie in huge pages, where the kernel has them: fewer faults, faster random reads."""
        with contextlib.suppress(OSError):
            self.advise(offset, nbytes, _MADV_HUGEPAGE)


class _View:
    """What NumPy needs to know to make an array over a range."""

    def __init__(self, owner: AddressRange, typestr: str, shape: tuple[int, ...]) -> None:
        self._owner = owner
        self.__array_interface__ = {
            "data": (owner.address, False),
            "typestr": typestr,
            "shape": shape,
            "version": 3,
        }


def zeros(dtype: DTypeLike, count: int) -> NDArray[Any]:
    """Make an array of zeros that takes memory page by page, as it is written."""
    nbytes = -(-max(count * np.dtype(dtype).itemsize, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = AddressRange(nbytes)
    memory.map_zeros(0, nbytes)
    return memory.array(dtype, (count,))


def read_in_huge_pages(path: Path, start: int, nbytes: int) -> None:
    """Read a part of a file into the page cache in pages of 2 MiB, if the kernel and the file system have them.

    What is advised page by page lies in small ones, for each of which a lookup has to walk the page table.

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
    """Tell how much of a range the page cache holds, 0 to 1, without reading any of it."""
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
