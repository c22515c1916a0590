"""Where an export goes: what may be there before, where it is written, and how it gets its name.

Everything is written and synced under a temporary name, ``.shardemb-*.tmp``, on the file system of the target. Then it
is renamed. If anything fails before that, Ctrl-C included, the target is unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
from typing import TYPE_CHECKING

from shardemb.base.interrupts import signals_deferred
from shardemb.base.paths import local_path
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_IGNORED = re.compile(r"lost\+found|\.shardemb-[0-9a-f]{16}\.tmp")
"""What an empty folder may hold: what mkfs makes, and what a killed export has left."""

_CANNOT_LEAVE = (errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of a rename from within a folder to its parent: it is a mount point, or the parent may not be changed."""


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
    if target.exists() and not (target.is_dir() and not _content(target) if folder else target.is_file()):
        need = "parts need a new or an empty folder" if folder else "that is a folder or no regular file"
        msg = f"{what}: {need}; choose another name, or remove what is there"
        raise FileExistsError(msg)
    return target


@contextlib.contextmanager
def staged(target: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary path for a file, or for a folder of the files `names`; publish it at the end of the block.

    For a folder that exists, it is in that folder, which may be the root of a file system of its own. If the block
    raises, the temporary path is removed, and the target is unchanged.
    """
    # Not derived from the target's name, which may have the maximum length already.
    name = f".shardemb-{secrets.token_hex(8)}.tmp"
    temporary, above = (target / name if target.is_dir() else target.with_name(name)), target.with_name(name)
    try:
        yield temporary
        if temporary == above or _hoisted(temporary, above):
            _rename(above, target)
            files.sync_directory(target.parent)
        else:
            _move_in(temporary, target, names)
    except BaseException:
        files.remove_tree(temporary)
        files.remove_tree(above)
        raise


def _content(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if not _IGNORED.fullmatch(each.name))


def _hoisted(temporary: Path, above: Path) -> bool:
    """Move a temporary folder out of its target, next to it, so that one rename can replace the target."""
    if list(temporary.parent.iterdir()) != [temporary]:
        return False  # only an empty folder can be replaced
    try:
        files.rename(temporary, above)
    except OSError as error:
        if error.errno in _CANNOT_LEAVE:
            return False
        raise
    return True


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
        if _content(target):
            msg = f"cannot export to {target}: there are files in it that were not there before"
            raise FileExistsError(errno.EEXIST, msg)
        try:
            for name in reversed(names):
                if name == names[0]:
                    files.sync_directory(target)
                if not files.link(temporary / name, target / name):
                    files.rename(temporary / name, target / name)
                placed.append(target / name)
            files.sync_directory(target)
        except BaseException:
            for path in placed:
                files.remove(path)
            raise
    files.remove_tree(temporary)
