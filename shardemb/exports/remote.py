"""Folders of parts without renames: on file systems that are reached by a URL, and those that are continued.

What stands for the rename is a manifest, ``_SUCCESS``, that is written last: a folder without it is not complete. An
export that may be continued keeps a journal besides, ``_PARTS``: which parts are complete, of which commit and
selection.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from shardemb.exports import targets
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_log = logging.getLogger("shardemb")

SUCCESS, JOURNAL = "_SUCCESS", "_PARTS"


class Folder(Protocol):
    """Where parts are written. Safe from several threads, which write different parts."""

    def place(self, name: str) -> Path | str:
        """Return the path or URL of a part."""

    def sink(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Open a new part, for Arrow to write to; it is complete at the end of the block."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small file."""

    def get(self, name: str) -> bytes | None:
        """Read a small file; None if there is none."""

    def delete(self, name: str) -> None:
        """Remove a file; a missing one is fine."""

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file, by name."""

    def sync(self) -> None:
        """Make the names of the parts durable, where that is not so already."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine, which is there."""

    path: Path

    def place(self, name: str) -> Path:
        """See `Folder`."""
        return self.path / name

    @contextlib.contextmanager
    def sink(self, name: str) -> Iterator[targets.Sink]:
        """See `Folder`. What an interrupted export has left under that name is replaced."""
        path = self.place(name)
        files.make_directory(path.parent)
        files.remove(path)
        with targets.new_file(path) as sink:
            yield sink

    def put(self, name: str, data: bytes) -> None:
        """See `Folder`. Atomic and durable."""
        files.replace(self.place(name), data)

    def get(self, name: str) -> bytes | None:
        """See `Folder`."""
        nbytes = files.size(self.place(name))
        return None if nbytes is None else files.read(self.place(name))

    def delete(self, name: str) -> None:
        """See `Folder`. A folder in it that becomes empty goes too."""
        path = self.place(name)
        files.remove(path)
        if path.parent != self.path and not files.entries(path.parent):
            files.remove_tree(path.parent)

    def sizes(self) -> dict[str, int]:
        """See `Folder`."""
        found = {path.relative_to(self.path).as_posix(): files.size(path) for path in files.walk(self.path)}
        return {name: nbytes for name, nbytes in found.items() if nbytes is not None}

    def sync(self) -> None:
        """See `Folder`."""
        for folder in {path.parent for path in files.walk(self.path)} | {self.path}:
            files.sync_directory(folder)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder on a file system of Arrow's or fsspec's.

    Attributes
    ----------
    filesystem : pyarrow.fs.FileSystem
    root : str
        The folder, as that file system names it.
    url : str
        The folder, as the user named it.
    """

    filesystem: fs.FileSystem
    root: str
    url: str

    def place(self, name: str) -> str:
        """See `Folder`."""
        base, _, options = self.url.partition("?")
        return f"{base.rstrip('/')}/{name}{'?' * bool(options)}{options}"

    @contextlib.contextmanager
    def sink(self, name: str) -> Iterator[Any]:
        """See `Folder`."""
        path = self._at(name)
        self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with self.filesystem.open_output_stream(path) as stream:
            yield stream

    def put(self, name: str, data: bytes) -> None:
        """See `Folder`."""
        with self.sink(name) as stream:
            stream.write(data)

    def get(self, name: str) -> bytes | None:
        """See `Folder`."""
        if self.filesystem.get_file_info(self._at(name)).type != fs.FileType.File:
            return None
        with self.filesystem.open_input_stream(self._at(name)) as stream:
            data: bytes = stream.read()
        return data

    def delete(self, name: str) -> None:
        """See `Folder`."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self._at(name))

    def sizes(self) -> dict[str, int]:
        """See `Folder`."""
        wanted = fs.FileSelector(self.root, recursive=True, allow_not_found=True)
        found = self.filesystem.get_file_info(wanted)
        base = self.root.strip("/")
        return {
            each.path.strip("/").removeprefix(base).strip("/"): each.size
            for each in found
            if each.type == fs.FileType.File
        }

    def sync(self) -> None:
        """See `Folder`: a part is there for good when its stream is closed."""

    def _at(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"


def is_url(given: object) -> bool:
    """Return whether a target is not on the file systems of this machine."""
    return isinstance(given, str) and "://" in given


def local_part(url: str) -> str | None:
    """Return the path that a ``file://`` URL stands for, where renames are atomic; None for another URL."""
    parts = urlsplit(url)
    return unquote(parts.path) if parts.scheme.lower() == "file" else None


def parent_of(url: str, table: str) -> tuple[str, str]:
    """Split a URL into that of the folder above and a name.

    Raises
    ------
    ValueError
        There is no folder above.

    Examples
    --------
    >>> parent_of("s3://bucket/nightly/items/?region=eu", "items")
    ('s3://bucket/nightly?region=eu', 'items')
    """
    base, mark, options = url.partition("?")
    above, _, name = base.rstrip("/").rpartition("/")
    if not name or above.endswith("/"):
        msg = f"table {table!r}: removed keys are written beside {url}, which has no folder above it: name one in it"
        raise ValueError(msg)
    return f"{above}{mark}{options}", name


def folder_at(url: str, table: str) -> RemoteFolder:
    """Return the folder of a URL: of Arrow's file systems, or of those of fsspec if Arrow does not know the scheme.

    Raises
    ------
    ValueError
        Neither knows it.
    OSError
        It cannot be reached.
    """
    what = f"table {table!r}: cannot export to {url}"
    try:
        return RemoteFolder(*_filesystem(url), url)
    except (ImportError, ValueError) as error:
        way_out = (
            "Arrow knows file, s3, gs, abfs and hdfs; for others install fsspec and what it needs for them"
        )
        msg = f"{what}: {error}; {way_out}"
        raise ValueError(msg) from error
    except OSError as error:
        msg = f"{what}: {error}"
        raise OSError(error.errno, msg) from error


def _filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URL, and the path there."""
    try:
        filesystem, root = fs.FileSystem.from_uri(url)
    except pa.ArrowInvalid as of_arrow:
        from fsspec.core import url_to_fs

        try:
            found, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            msg = f"{of_arrow}; {error}"
            raise ValueError(msg) from error
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(found))
    return filesystem, root


@dataclass(frozen=True)
class Part:
    """What is known about a complete part."""

    name: str
    rows: int
    bytes: int


@dataclass
class Parts:
    """The parts of one export, in a folder.

    Attributes
    ----------
    folder : Folder
    facts : mapping
        What the parts are of, as JSON values: equal if they have the same bytes.
    journalled : bool
        Whether each part is recorded, so that another export can continue this one.
    complete : dict of str to Part
    """

    folder: Folder
    facts: Mapping[str, object] = field(default_factory=dict)
    journalled: bool = False
    complete: dict[str, Part] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, name: str, rows: int, nbytes: int) -> None:
        """Note that a part is complete."""
        with self._lock:
            self.complete[name] = Part(name, rows, nbytes)
            if self.journalled:
                self.folder.put(JOURNAL, self._document())

    def report(self, path: Path | str, names: list[str]) -> targets.ExportReport:
        """Report the parts, in the order of their names."""
        some = [self.complete[name] for name in names if name in self.complete]
        rows, nbytes = sum(each.rows for each in some), sum(each.bytes for each in some)
        return targets.ExportReport(path, tuple(self.folder.place(each.name) for each in some), rows, nbytes)

    def take_over(self, sizes: Mapping[str, int]) -> None:
        """Take over what another export has completed, if it was of the same rows."""
        journal = self.folder.get(JOURNAL) or self.folder.get(SUCCESS)
        if journal is None:
            return
        try:
            document = json.loads(journal)
            found = {each["name"]: Part(**each) for each in document["files"]}
            facts = {name: document[name] for name in self.facts}
        except (ValueError, KeyError, TypeError):
            found, facts = {}, {}
        differ = [name for name in self.facts if facts.get(name) != self.facts[name]]
        if differ or self.facts.get("commit") is None:
            why = f"another {', another '.join(differ)}" if differ else "a table with uncommitted changes"
            _log.warning("the parts in %s are of %s: the export starts over", self.folder.place(""), why)
            return
        self.complete = {name: each for name, each in found.items() if sizes.get(name) == each.bytes}

    def finish(self) -> None:
        """Write the manifest, which says that nothing is missing."""
        self.folder.sync()
        self.folder.put(SUCCESS, self._document())
        if self.journalled:
            self.folder.delete(JOURNAL)

    def clean_up(self) -> None:
        """Remove what is not complete, or all of it if nobody can continue; as far as that is possible."""
        kept = {*self.complete, JOURNAL} if self.journalled else set()
        with contextlib.suppress(OSError):
            for name in set(self.folder.sizes()) - kept:
                with contextlib.suppress(OSError):
                    self.folder.delete(name)

    def _document(self) -> bytes:
        some = [self.complete[name] for name in sorted(self.complete)]
        totals = {"rows": sum(each.rows for each in some), "bytes": sum(each.bytes for each in some)}
        return json.dumps(
            {**self.facts, **totals, "files": [asdict(each) for each in some]}, indent=1
        ).encode()


@contextlib.contextmanager
def parts_in_place(folder: Folder, facts: Mapping[str, object], *, resume: bool) -> Iterator[Parts]:
    """Write parts under their final names; if the block ends without an error, write the manifest.

    If it raises, nothing is left, or with `resume` what is complete. What an earlier export has left there is removed
    first, except for what is taken over.

    Raises
    ------
    FileExistsError
        There is something else in the folder.
    """
    sizes = folder.sizes()
    others = sorted(name for name in sizes if not targets.is_of_export(name, sizes[name]))
    if others:
        msg = (
            f"cannot export to {folder.place('')}: there is {others[0]!r}, which is no part of an export; choose "
            f"another folder, or remove it"
        )
        raise FileExistsError(msg)
    parts = Parts(folder, facts, journalled=resume)
    if resume:
        parts.take_over(sizes)
    # The manifest goes first: from here on the folder is not complete.
    for name in sorted(set(sizes) - set(parts.complete), key=lambda name: name != SUCCESS):
        folder.delete(name)
    try:
        yield parts
        parts.finish()
    except BaseException:
        parts.clean_up()
        raise
