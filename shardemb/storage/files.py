"""Every system call on files: opening, writing, syncing, renaming, locking.

Nothing else in the package touches a disk, so a simulator that replaces these functions sees everything that happens.
That is why callers write ``files.name(...)`` and do not import single functions. Each function checks the result of its
system call. "Disk full" becomes `DiskFullError`; other errors stay `OSError`.

A store may come from anyone. So no symbolic link is followed on the way to a file, wherever in the path it stands
(``openat2``; before Linux 5.6 only the last name is checked), and what is neither a file nor a folder is not opened: a
named pipe would wait for ever. Callers therefore resolve the paths that users give (``Path.resolve``).

Linux only (``flock``, ``fallocate``, ``syncfs``). Mapping files into memory is in ``address_space.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from shardemb.base.forks import usable_in_child
from shardemb.errors import DiskFullError, FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator


ADVISED = 128 * 2**10
"""Most bytes for one call of advice: Linux silently ignores what exceeds read_ahead_kb, which is 128 by default."""

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_TMPFS_MAGIC = 0x01021994
_SYS_OPENAT2, _AT_FDCWD, _RESOLVE_NO_SYMLINKS = 437, -100, 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
_libc.syscall.restype = ctypes.c_long
_renameat2 = getattr(_libc, "renameat2", None)  # some C libraries lack it
_RENAME_EXCHANGE = 2


class _OpenHow(ctypes.Structure):
    """The ``struct open_how`` of ``openat2``."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class Counters:
    """Counts what this process has done to files since it started, for statistics and benchmarks."""

    def __init__(self) -> None:
        # Reentrant: the garbage collector can run within `add` and unmap a range, which calls `add`.
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._renew_lock)
        self.bytes_written = 0
        self.writes = 0
        self.syncs = 0
        self.mappings = 0

    def _renew_lock(self) -> None:
        self._lock = usable_in_child(self._lock)

    def add(self, *, bytes_written: int = 0, writes: int = 0, syncs: int = 0, mappings: int = 0) -> None:
        """Add to the counters. Safe from any thread."""
        with self._lock:
            self.bytes_written += bytes_written
            self.writes += writes
            self.syncs += syncs
            self.mappings += mappings


counters = Counters()


@contextlib.contextmanager
def _disk_errors(path: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            msg = f"no space left on the disk while writing {path}; free some space and call again"
            raise DiskFullError(error.errno, msg) from error
        if error.errno == errno.EFBIG:  # refused like a write to a full disk: nothing of it was done
            msg = (
                f"{path} would be larger than this process may write (ulimit -f) or the file system holds; raise the "
                f"limit, or choose smaller files (rows_per_shard, log_bytes), and call again"
            )
            raise DiskFullError(error.errno, msg) from error
        if error.errno == errno.EROFS:
            msg = f"{path} cannot be written, because its file system is read-only; choose another place"
            raise OSError(error.errno, msg) from error
        raise


@contextlib.contextmanager
def _not_synced(path: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"{path} cannot be synced: {os.strerror(error.errno or 0)}"
        raise OSError(error.errno, msg) from error


# ---- folders --------------------------------------------------------------------------------------------------


def make_directory(path: Path) -> None:
    """Create a folder and its parents; existing ones are fine, but not a link in place of it."""
    with _disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with _folder(path):
        pass


def make_new_directory(path: Path) -> None:
    """Create a folder; raise `FileExistsError` if anything is there."""
    with _disk_errors(path), _folder(path.parent) as above:
        os.mkdir(path.name, dir_fd=above)


def entries(folder: Path) -> list[Path]:
    """List what is in a folder, sorted by name; nothing if there is no such folder.

    Raises
    ------
    FormatError
        The folder is a link, or no folder.
    """
    try:
        with _folder(folder) as descriptor:
            return [folder / name for name in sorted(os.listdir(descriptor))]
    except FileNotFoundError:
        return []


def is_directory(path: Path) -> bool:
    """Return whether there is a folder; a link to one is none."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def sync_directory(path: Path) -> None:
    """Make the names in a folder durable."""
    sync_file(path)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder; a file at `target` is replaced atomically."""
    with _disk_errors(target), _folder(source.parent) as here, _folder(target.parent) as there:
        os.rename(source.name, target.name, src_dir_fd=here, dst_dir_fd=there)


def exchange(one: Path, other: Path) -> None:
    """Let two files or folders change places, atomically.

    Raises
    ------
    OSError
        With the error EINVAL, the file system cannot do that.
    """
    with _disk_errors(other), _folder(one.parent) as here, _folder(other.parent) as there:
        names = os.fsencode(one.name), os.fsencode(other.name)
        if _renameat2 is None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(one))
        check(
            _renameat2(here, names[0], there, names[1], _RENAME_EXCHANGE),
            f"exchange of {one} and {other}",
        )


def link(source: Path, target: Path) -> bool:
    """Give a file a second name, which must not exist; return False if the file system does not support it."""
    with _disk_errors(target), _folder(source.parent) as here, _folder(target.parent) as there:
        try:
            os.link(source.name, target.name, src_dir_fd=here, dst_dir_fd=there, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            return False
    return True


def copy_link(source: Path, target: Path) -> None:
    """Create a symbolic link to what another one leads to, without following either."""
    with _disk_errors(target):
        target.symlink_to(source.readlink())


def remove(path: Path) -> None:
    """Remove a file; a missing one is fine. A link is removed, not followed."""
    with contextlib.suppress(FileNotFoundError), _folder(path.parent) as folder:
        os.unlink(path.name, dir_fd=folder)


def remove_tree(path: Path) -> None:
    """Remove a folder with everything in it, or a file; a missing one is fine. Links are removed, not followed."""
    if not is_directory(path):
        if os.path.lexists(path):  # on a read-only file system, removing nothing is an error too
            remove(path)
        return
    with contextlib.suppress(FileNotFoundError), _folder(path.parent) as folder:
        shutil.rmtree(path.name, dir_fd=folder)


def sync_tree(path: Path) -> None:
    """Make a folder, everything in it and its own name durable, in one call for any number of files.

    It syncs the whole file system, so it also waits for what other processes have written there. For 2,048 new files
    that takes 0.2 s, against 9 s for one sync per file.
    """
    with opened(path, os.O_RDONLY) as descriptor:
        counters.add(syncs=1)
        check(_libc.syncfs(descriptor), f"syncfs of {path}")


# ---- whole files ----------------------------------------------------------------------------------------------


def read(path: Path, limit: int = 16 * 2**20) -> bytes:
    """Read a small file.

    Raises
    ------
    ValueError
        The file is larger than `limit` bytes.
    """
    with opened(path, os.O_RDONLY) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
        # Not more than there is: to read 16 MiB takes a mapping, which the little that remains of it keeps.
        data = file.read(min(os.fstat(descriptor).st_size, limit) + 1)
    if len(data) > limit:
        msg = f"{path} is larger than {limit} bytes"
        raise ValueError(msg)
    return data


def size(path: Path) -> int | None:
    """Size in bytes of a regular file; None if there is no such file."""
    return None if (status := _status(path)) is None else status.st_size


def names(path: Path) -> tuple[int, tuple[int, int]]:
    """Return how many names a file has, and what tells it from other files, whatever their names.

    Raises
    ------
    FileNotFoundError
        There is no regular file.
    """
    status = _status(path)
    if status is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return status.st_nlink, (status.st_dev, status.st_ino)


def copy_mode(source: Path, target: Path) -> None:
    """Give a file or folder the permissions, and if possible the owner, of what it is to replace, if that exists."""
    with _disk_errors(target), contextlib.suppress(FileNotFoundError):
        found = os.stat(source, follow_symlinks=False)
        with contextlib.suppress(PermissionError):
            os.chown(target, found.st_uid, found.st_gid, follow_symlinks=False)
        os.chmod(target, stat.S_IMODE(found.st_mode))


def is_open_file(path: Path, descriptor: int) -> bool:
    """Return whether a path still leads to an open file: it was not moved, removed or replaced."""
    found, here = _status(path), os.fstat(descriptor)
    return found is not None and (found.st_dev, found.st_ino) == (here.st_dev, here.st_ino)


def allocated(path: Path) -> int:
    """Bytes that a file, or a folder with everything in it, takes on disk; holes take none, nor do second names."""
    found: dict[tuple[int, int], int] = {}
    for each in (path, *path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
            found |= {((status := each.lstat()).st_dev, status.st_ino): 512 * status.st_blocks}
    return sum(found.values())


def free_space(folder: Path) -> int:
    """Bytes that this process may still write to the file system of a folder."""
    return shutil.disk_usage(folder).free


def walk(folder: Path) -> Iterator[Path]:
    """Yield the regular files in a folder and in the folders in it, without following links."""
    for parent, _, found in os.walk(folder):
        yield from (path for name in found if size(path := Path(parent, name)) is not None)


def write_new(path: Path, data: bytes) -> None:
    """Create a file, which must not exist, with the given content. Not synced."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        write(descriptor, data, 0, path)


def staged(path: Path) -> Path:
    """Path at which the next content of a file is staged."""
    return path.with_name(path.name + ".tmp")


def stage(path: Path, data: bytes | memoryview) -> None:
    """Write a file's next content durably to a temporary file next to it; `publish` puts it in place."""
    temporary = staged(path)
    remove(temporary)
    try:
        with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            write(descriptor, data, 0, path)
            sync(descriptor, path)
    except BaseException:
        remove(temporary)
        raise


def publish(path: Path) -> None:
    """Put the staged content of a file in place, atomically and durably."""
    rename(staged(path), path)
    sync_directory(path.parent)


def replace(path: Path, data: bytes | memoryview) -> None:
    """Replace a file's content atomically and durably."""
    stage(path, data)
    publish(path)


def create_sparse(path: Path, nbytes: int) -> None:
    """Create a file of `nbytes` zero bytes that takes no disk space. It must not exist. Not synced.

    On a tmpfs all of its memory is allocated immediately: there, reading a hole through a mapping allocates memory, and
    kills the process (SIGBUS) if there is none.

    Raises
    ------
    DiskFullError, OSError
        The file was not created.
    """
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        try:
            with _disk_errors(path):
                os.ftruncate(descriptor, nbytes)
            if nbytes and _is_on_tmpfs(descriptor):
                _fallocate(descriptor, 0, 0, nbytes, path)
        except BaseException:
            remove(path)
            raise


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with opened(path, os.O_RDONLY) as descriptor:
        sync(descriptor, path)


# ---- open files -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file for the length of a with block.

    Raises
    ------
    FormatError
        It is a link or behind one, or neither a file nor a folder.
    """
    with _disk_errors(path):
        descriptor = _open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write(descriptor: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    with _disk_errors(path):
        while view:
            done = os.pwrite(descriptor, view, offset)
            counters.add(bytes_written=done, writes=1)
            view, offset = view[done:], offset + done


def overwrite(path: Path, data: bytes) -> None:
    """Overwrite the beginning of a file in place, which its mappings see. Creates a missing file. Not synced.

    Raises
    ------
    FormatError
        The file has another name, so it may be part of something else.
    """
    with opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
        _require_one_name(descriptor, path)
        write(descriptor, data, 0, path)


def open_direct(path: Path, flags: int = os.O_RDWR) -> int:
    """Open a file for reads and writes that bypass the page cache, if its file system supports that.

    Buffers must then be aligned in memory, and ranges must begin and end in the file, at multiples of 4,096 bytes.
    """
    with _disk_errors(path):
        try:
            return _open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return _open(path, flags)


@contextlib.contextmanager
def opened_direct(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file as `open_direct` does, for the length of a with block."""
    descriptor = open_direct(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, nbytes: int, offset: int, path: Path) -> bytearray:
    """Read exactly `nbytes` at `offset`.

    Raises
    ------
    OSError
        The file ends earlier, or cannot be read.
    """
    data = bytearray(nbytes)
    read_into(descriptor, memoryview(data), offset, path)
    return data


def read_into(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill memory with the bytes at `offset`; raises as `read_at`."""
    while view:
        done = os.preadv(descriptor, [view], offset)
        if done == 0:
            raise OSError(errno.EIO, f"{path} ends at {offset}")
        view, offset = view[done:], offset + done


def will_need(descriptor: int, offset: int, nbytes: int) -> None:
    """Advise the kernel that a range of a file will soon be read; it reads ahead in the background."""
    end = offset + nbytes
    for start in range(offset, end, ADVISED):
        os.posix_fadvise(descriptor, start, min(ADVISED, end - start), os.POSIX_FADV_WILLNEED)


def open_unnamed(folder: Path) -> int:
    """Create and open an unnamed file in a folder. It disappears when its descriptor is closed."""
    with _disk_errors(folder):
        try:
            return _open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
    # The file system has no unnamed files: create one and remove its name.
    path = folder / f"scratch-{os.getpid()}"
    remove(path)  # of a process that died, and whose number this one has now
    with _disk_errors(folder):
        descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    remove(path)
    return descriptor


def truncate(descriptor: int, nbytes: int) -> None:
    """Cut an open file to `nbytes`."""
    os.ftruncate(descriptor, nbytes)


def allocate(descriptor: int, offset: int, nbytes: int, path: Path) -> None:
    """Allocate the disk space of a range, so that writing it cannot fail for lack of space. Content is unchanged.

    On a file system without ``fallocate`` this does nothing, and a later write may still find the disk full.
    """
    _fallocate(descriptor, _FALLOC_FL_KEEP_SIZE, offset, nbytes, path)


def holes(descriptor: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range of a file that take no disk space, as offsets ``(start, stop)``."""
    while (hole := _seek(descriptor, start, os.SEEK_HOLE, stop)) < stop:
        start = _seek(descriptor, hole, os.SEEK_DATA, stop)
        yield hole, start


def data(descriptor: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range of a file that are not holes, as offsets ``(start, stop)``."""
    for hole_start, hole_stop in (*holes(descriptor, start, stop), (stop, stop)):
        if start < hole_start:
            yield start, hole_start
        start = hole_stop


def punch(descriptor: int, offset: int, nbytes: int, path: Path) -> bool:
    """Release the disk space of a range, which reads as zeros from then on; return False if that is not supported."""
    return _fallocate(descriptor, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, nbytes, path)


def sync(descriptor: int, path: Path) -> None:
    """Make an open file durable.

    Raises
    ------
    OSError
        It is not durable, and what the disk holds is unknown. So this is never `DiskFullError`, whatever the code.
    """
    counters.add(syncs=1)
    with _not_synced(path):
        os.fsync(descriptor)


def sync_data(descriptor: int, path: Path) -> None:
    """Make the content of an open file durable, but not its timestamps; otherwise like `sync`."""
    counters.add(syncs=1)
    with _not_synced(path):
        os.fdatasync(descriptor)


def begin_write_back(descriptor: int, offset: int, nbytes: int) -> None:
    """Start writing a range back to disk, so that a later sync waits for less."""
    # Linux answers this advice by writing dirty pages back, and by evicting clean ones from the page cache.
    os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def drop_cached(descriptor: int) -> None:
    """Drop a synced file's pages from the page cache."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def lock(path: Path, *, shared: bool) -> int | None:
    """Try to lock a file, without waiting; return a descriptor that holds the lock, or None if it is taken.

    Closing the descriptor releases the lock, and so does the end of the process.
    """
    with _disk_errors(path):
        descriptor = _open(path, os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT)
    return descriptor if _is_locked(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX) else None


def hold(path: Path) -> int | None:
    """Lock a file or folder that exists as `lock` does, without writing to it; None also if it was just removed."""
    with _disk_errors(path):
        descriptor = _open(path, os.O_RDONLY)
    if not _is_locked(descriptor, fcntl.LOCK_EX):
        return None
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


def _is_locked(descriptor: int, kind: int) -> bool:
    """Lock an open file without waiting; close it if that fails."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return False
        raise
    return True


def overwrite_text(descriptor: int, text: str, path: Path) -> None:
    """Replace the content of an open file by a text for people to read. Not synced. Raises as `overwrite`."""
    _require_one_name(descriptor, path)
    os.ftruncate(descriptor, 0)
    write(descriptor, text.encode(), 0, path)


def close(descriptor: int) -> None:
    """Close a descriptor."""
    os.close(descriptor)


def check(result: int, what: str) -> None:
    """Raise the `OSError` of a C library call unless its result is 0."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _open(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a file or a folder; follow no link and wait for nothing."""
    try:
        descriptor = openat2(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            msg = f"{path} is a symbolic link or behind one, which is not followed; put what it leads to in its place"
            raise FormatError(msg) from error
        if error.errno == errno.ENOTDIR and flags & os.O_DIRECTORY and os.path.lexists(path):
            msg = f"{path} is a symbolic link or a file, and not a folder; put what it leads to in its place"
            raise FormatError(msg) from error
        if error.errno == errno.ENXIO:  # a pipe that nobody reads, a device that is not there
            _refuse_kind(path, error)
        raise
    status = os.fstat(descriptor)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        os.close(descriptor)
        _refuse_kind(path)
    return descriptor


def _refuse_kind(path: Path, error: BaseException | None = None) -> NoReturn:
    msg = f"{path} is neither a file nor a folder (a named pipe, a socket or a device?); remove it or restore the file"
    raise FormatError(msg) from error


def openat2(path: Path, flags: int, mode: int) -> int:
    """Open a file as ``os.open`` does, but follow no link; an older kernel follows all but the last."""
    # With any other flag, a mode is refused.
    creates = flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE
    how = _OpenHow(flags, mode if creates else 0, _RESOLVE_NO_SYMLINKS)
    while True:
        found = _libc.syscall(
            _SYS_OPENAT2,
            _AT_FDCWD,
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if found >= 0:
            return int(found)
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EPERM):  # an older kernel, or a container that does not know the call
            return os.open(path, flags, mode)
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code), str(path))


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[int]:
    """Open a folder for the length of a with block."""
    descriptor = _open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _status(path: Path) -> os.stat_result | None:
    """Return the status of a regular file; None if there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _require_one_name(descriptor: int, path: Path) -> None:
    if os.fstat(descriptor).st_nlink > 1:
        msg = f"{path} has another name (a hard link), which would change with it; replace it by a copy"
        raise FormatError(msg)


def _seek(descriptor: int, position: int, kind: int, end: int) -> int:
    """Find the next hole or the next data at or after a position, or `end` if that comes first."""
    try:
        return min(os.lseek(descriptor, position, kind), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end  # the file ends first


def _is_on_tmpfs(descriptor: int) -> bool:
    status = (ctypes.c_long * 32)()  # larger than struct statfs, whose first word is the type
    check(_libc.fstatfs(descriptor, status), "fstatfs")
    return status[0] == _TMPFS_MAGIC


def _fallocate(descriptor: int, flags: int, offset: int, nbytes: int, path: Path) -> bool:
    code = errno.EINTR
    while code == errno.EINTR:  # Python has handled the signal; nothing repeats calls made through ctypes
        code = 0 if _libc.fallocate(descriptor, flags, offset, nbytes) == 0 else ctypes.get_errno()
    if code not in (0, errno.EOPNOTSUPP, errno.ENOSYS):
        with _disk_errors(path):
            raise OSError(code, os.strerror(code), str(path))
    return code == 0
