"""Where an export goes: what may be there before, where it is written, and how it gets its name.

Everything is written and synced under a temporary name, ``.shardemb-*.tmp``, on the file system of the target. Then it
is renamed. If anything fails before that, Ctrl-C included, the target is unchanged. What a killed process leaves is
removed by the next export to the same target: the first half of the temporary name is a hash of the target's, and an
export holds a lock on what it writes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from shardemb.base.interrupts import signals_deferred
from shardemb.base.paths import local_path
from shardemb.format.documents import checksum
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_TEMPORARY = re.compile(r"\.shardemb-[0-9a-f]{16}\.tmp")

_PART = re.compile(
    r"part-\d{5}\.parquet|(shard|bucket)=\d+|(_SUCCESS|_PARTS)(\.tmp)?"
    r"|(tensors|metadata)\.tsv|tensors\.bytes|projector_config\.(pbtxt|json)"
)
"""What a folder holds that an export has made."""

_IGNORED = re.compile(rf"lost\+found|{_TEMPORARY.pattern}")
"""What an empty folder may hold: what mkfs makes, and what a killed export has left."""

PATIENCE_S = 5.0
"""How long an export waits while another is published next to it: longer than a few renames take."""

_CANNOT_LEAVE = (errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of a rename from within a folder to its parent: it is a mount point, or the parent may not be changed."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes
    ----------
    path : Path or str
        The file or folder, with symbolic links resolved; a URL as it was given.
    files : tuple of Path or of str
        Its files, in the order of the rows.
    num_rows, nbytes : int
        Rows in these files, and the size of the files in bytes.
    removed_path : Path, str or None
        A parquet file beside them with the keys that were removed since the tag that was asked for; None without one.
    num_removed : int
        How many keys are in it.
    """

    path: Path | str
    files: tuple[Path | str, ...]
    num_rows: int
    nbytes: int
    removed_path: Path | str | None = None
    num_removed: int = 0

    @classmethod
    def of(cls, written: Sequence[Path], num_rows: int, folder: Path | None = None) -> ExportReport:
        """Report files that were published, in a folder if there is one; else the first stands for all."""
        return cls(
            folder or written[0], tuple(written), num_rows, sum(each.stat().st_size for each in written)
        )


class Sink:
    """An open file, with the methods that Arrow writes through. One thread at a time writes."""

    closed = False

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor, self.path = descriptor, path
        self._position = self._begun = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write at the end."""
        files.write(self.descriptor, data, self._position, self.path)
        self._position += memoryview(data).nbytes

    def tell(self) -> int:
        """Return where the end is."""
        return self._position

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def begin_write_back(self) -> None:
        """Start to write back what came since the last call, while the next data are encoded."""
        files.begin_write_back(self.descriptor, self._begun, self._position - self._begun)
        self._begun = self._position


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Sink]:
    """Open a staged file for writing, create it if it is in a folder, and sync it at the end of the block."""
    with files.opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
        yield Sink(descriptor, path)
        files.sync(descriptor, path)


def checked(path: object, table: str, *, folder: bool) -> Path:
    """Check where the export of a table shall go; return the path with symbolic links resolved.

    Raises
    ------
    TypeError, ValueError
        No local path.
    FileNotFoundError, FileExistsError
        The folder above is missing, or what exists there must not be replaced.
    """
    target = local_path(path, f"table {table!r}: the target of an export").resolve()
    what = f"table {table!r}: cannot export to {target}"
    if not target.parent.is_dir():
        msg = f"{what}: there is no folder {target.parent}; create it first"
        raise FileNotFoundError(msg)
    if target.exists() and not (target.is_dir() and not _others(target) if folder else target.is_file()):
        need = "parts need a new or an empty folder, or the parts of an export"
        need = need if folder else "that is a folder or no regular file"
        msg = f"{what}: {need}; choose another name, or remove what is there"
        raise FileExistsError(msg)
    return target


@contextlib.contextmanager
def staged(target: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary path, of an empty file or of a folder for files; publish it at the end of the block.

    For a folder that exists, it is in that folder, which may be the root of a file system of its own. If the block
    raises, the temporary path is removed, and the target is unchanged.
    """
    folder = target if target.is_dir() else target.parent
    for place in {folder, target.parent}:
        for path in _abandoned(place, _prefix(target)):
            with contextlib.suppress(OSError):  # that of another user
                files.remove_tree(path)
    with _alone(target.parent):
        temporary, held = _new_temporary(folder, target, is_folder=bool(names))
    above = target.with_name(temporary.name)
    try:
        yield temporary
        with _alone(target.parent), signals_deferred():
            files.copy_mode(target, temporary)
            if temporary == above or _hoisted(temporary, above):
                _replace(above, target)
                files.sync_directory(target.parent)
                files.remove_tree(above)  # the parts that were there before
            else:
                _move_in(temporary, target, names)
    except BaseException:
        files.remove_tree(temporary)
        files.remove_tree(above)
        raise
    finally:
        files.close(held)


def abandoned(folder: Path) -> list[Path]:
    """List what exports that were killed have left in a folder."""
    return list(_abandoned(folder, ".shardemb-"))


def _abandoned(folder: Path, prefix: str) -> Iterator[Path]:
    """Yield what killed exports have left in a folder, each while its lock is held: nobody takes it up then."""
    try:
        found = files.entries(folder)
    except OSError:  # it may not be listed
        return
    for path in found:
        if path.name.startswith(prefix) and _TEMPORARY.fullmatch(path.name) and not path.is_symlink():
            held = None
            with contextlib.suppress(OSError):  # that of another user, or of an export that has just ended
                held = files.hold(path)
            if held is not None:
                try:
                    yield path
                finally:
                    files.close(held)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other exports from beginning or being published next to this one, if the folder can be locked."""
    held, until = None, time.monotonic() + PATIENCE_S
    with contextlib.suppress(OSError):  # it may not be read
        while (held := files.hold(folder)) is None and time.monotonic() < until:
            time.sleep(0.002)
    try:
        yield
    finally:
        if held is not None:
            files.close(held)


def _prefix(target: Path) -> str:
    # Not the target's name itself, which may have the maximum length already.
    return f".shardemb-{checksum(target.name.encode(errors='surrogateescape')) >> 32:08x}"


def _new_temporary(folder: Path, target: Path, *, is_folder: bool) -> tuple[Path, int]:
    """Make a file or a folder under a temporary name; return it with a descriptor that holds the lock on it."""
    while True:
        path = folder / f"{_prefix(target)}{secrets.token_hex(4)}.tmp"
        if is_folder:
            files.make_directory(path)
        else:
            files.create_sparse(path, 0)
        held = files.hold(path)
        if held is not None:
            return path, held
        files.remove_tree(path)  # another export took it for abandoned, just then


def _content(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if not _IGNORED.fullmatch(each.name))


def is_of_export(name: str, nbytes: int | None) -> bool:
    """Return whether a file of some size could be one that an export to a folder makes, perhaps in a folder of it."""
    # Other programs mark what they have completed by an empty file; it is not ours to replace.
    return (
        all(map(_PART.fullmatch, name.split("/")))
        and nbytes is not None
        and (nbytes > 0 or name != "_SUCCESS")
    )


def _others(folder: Path) -> list[str]:
    """List what is in a folder besides the files of an export."""
    return [name for name in _content(folder) if not _PART.fullmatch(name) or not _is_ours(folder / name)]


def _is_ours(path: Path) -> bool:
    """Return whether something that has the name is what an export makes: a file, or a partition with files."""
    if "=" not in path.name:
        return is_of_export(path.name, files.size(path))
    return files.is_directory(path) and not _others(path)


def _hoisted(temporary: Path, above: Path) -> bool:
    """Move a temporary folder out of its target, next to it, so that one rename can replace the target."""
    besides = {each.name for each in temporary.parent.iterdir()} - {temporary.name}
    if _others(temporary.parent) or not besides <= set(_content(temporary.parent)):
        return False  # what mkfs makes, for example, or what another export is writing
    try:
        files.rename(temporary, above)
    except OSError as error:
        if error.errno in _CANNOT_LEAVE:
            return False
        raise
    return True


def _replace(temporary: Path, target: Path) -> None:
    """Give what is complete its name, in one step. Parts that were there before get the temporary name."""
    if not (target.is_dir() and _content(target)):
        _rename(temporary, target)
        return
    try:
        files.exchange(temporary, target)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EBUSY):
            raise
        _refuse_parts(target)
    if _others(temporary):
        files.exchange(temporary, target)
        _refuse(target)


def _refuse(target: Path) -> NoReturn:
    msg = f"cannot export to {target}: there are files in it that were not there before"
    raise FileExistsError(errno.EEXIST, msg)


def _refuse_parts(target: Path) -> NoReturn:
    msg = (
        f"cannot replace the parts in {target} in one step: it is a mount point, or another export to it is running; "
        f"remove them first, or wait"
    )
    raise FileExistsError(errno.EEXIST, msg)


def _rename(temporary: Path, target: Path) -> None:
    try:
        files.rename(temporary, target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        msg = f"cannot replace {target}: it is a mount point; export to a name in a folder"
        raise OSError(errno.EBUSY, msg) from error


def _move_in(temporary: Path, target: Path, names: Sequence[str]) -> None:
    """Move files into a folder that cannot be replaced, such as the root of a file system.

    The first file comes last, so that it is there only if all are: also after a crash, because the others are synced
    before it.
    """
    placed = []
    # Links, because a rename would replace what another export has put there meanwhile.
    with signals_deferred():
        if _others(target):
            _refuse(target)
        if _content(target):
            _refuse_parts(target)
        try:
            for name in reversed(names):
                if name == names[0]:
                    files.sync_directory(target)
                files.make_directory((target / name).parent)
                if not files.link(temporary / name, target / name):
                    files.rename(temporary / name, target / name)
                placed.append(target / name)
            files.sync_directory(target)
        except BaseException:
            for path in placed:
                files.remove(path)
            for name in {name.partition("/")[0] for name in names if "/" in name}:
                files.remove_tree(target / name)
            raise
    files.remove_tree(temporary)
