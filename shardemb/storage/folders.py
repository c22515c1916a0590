"""Finds the folders of a store's tables, and moves them to where they belong.

The manifest says which tables exist and what they are named; the folders follow it. The folder of a new table waits at
``.shardemb/tables/UUID`` for the commit that makes it part of the store. The folder of a dropped table is moved there
and removed. After a crash at any point, `arrange` puts every folder in its place, by the uuid in its documents.
"""

from __future__ import annotations

import contextlib
import os
import re
from itertools import islice
from typing import TYPE_CHECKING

from shardemb.errors import FormatError, TableExistsError
from shardemb.format import zarr_metadata
from shardemb.format.store_paths import PRIVATE, log, parked, private, rebuilt
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from pathlib import Path

    from shardemb.base.progress import Advance
    from shardemb.format.manifest import TableEntry
    from shardemb.format.spec import TableSpec
    from shardemb.format.table_files import TableLocation

    Carried = tuple[Path, Path]  # what another program has put somewhere, and where it is to be

WINDOW_BYTES = 4 * 2**20
"""Most bytes that are copied in one step."""

_CHUNK = re.compile(r"c(\.\d+)+(\.tmp)?$")
"""Matches the names of a table's chunks, also of those that were not finished."""


def refuse_links(store: Path) -> None:
    """Raise `FormatError` if something else is in the place of one of a store's own folders: a link, for example."""
    for folder in (
        private(store),
        log(store),
        *(private(store) / name for name in ("tables", "tags", "vocabularies")),
    ):
        files.entries(folder)
    files.entries(rebuilt(store))


def tables(store: Path) -> list[Path]:
    """List the folders in a store that hold tables, whether or not they are part of it."""
    return [path for path in _children(store) if _uuid(path) is not None]


def holding(store: Path, uuids: Collection[str]) -> set[Path]:
    """Return the folders in a store that hold tables with these uuids."""
    return {path for path in tables(store) if _uuid(path) in uuids} if uuids else set()


def keep_indexes(store: Path, uuids: Collection[str]) -> None:
    """Remove all indexes except those of the vocabularies with these uuids."""
    for path in files.entries(private(store) / "vocabularies"):
        if path.name not in uuids:
            files.remove_tree(path)


def keep_rebuilt(store: Path, uuid: str) -> None:
    """Remove every unfinished rebuild of a table except the one with this uuid."""
    for path in _children(rebuilt(store)):
        if path.name != uuid:
            # First, and synced: where the document exists, all files but the shards are complete.
            files.remove(path / zarr_metadata.DOCUMENT)
            files.sync_directory(path)
            files.remove_tree(path)


def foreign(store: Path) -> list[str]:
    """Return the names in a folder that are not those of a store whose creation was interrupted."""
    if not store.exists():
        return []
    group = store / zarr_metadata.DOCUMENT
    own = {PRIVATE, files.staged(group).name}
    with contextlib.suppress(FormatError):
        zarr_metadata.store_uuid(_read(group) or b"")
        own.add(group.name)
    return [entry.name for entry in files.entries(store) if entry.name not in own]


def require_free(store: Path, name: str, is_own: Callable[[str], bool]) -> None:
    """Check that a new table's folder can get its name: that the file system takes it, and nothing foreign has it.

    Parameters
    ----------
    store : Path
    name : str
    is_own : callable
        Returns whether the table of a uuid is, or was, the store's: its folder leaves before the name is used.

    Raises
    ------
    TableExistsError
        Something foreign has the name.
    ValueError
        The file system takes no such name.
    """
    place = store / name
    try:
        place.lstat()
    except FileNotFoundError:
        return
    except (OSError, UnicodeError) as error:  # too long, or not in its encoding
        msg = f"{name!r} cannot be a table's name, because the file system of {store} refuses it: {error}"
        raise ValueError(msg) from error
    uuid = _uuid(place)
    if uuid is None or not is_own(uuid):
        msg = (
            f"{place} is not part of the store, and is where the folder of {name!r} would be; move it away, "
            f"or choose another name"
        )
        raise TableExistsError(msg)


def foreign_to_table(directory: Path) -> list[Path]:
    """List what other programs have put into a table's folder: files, and folders without what is in them."""
    arrays = [directory / name for name in zarr_metadata.ARRAYS]
    own = {zarr_metadata.DOCUMENT, files.staged(directory / zarr_metadata.DOCUMENT).name}
    inside = [path for array in arrays for path in files.entries(array) if not _CHUNK.match(path.name)]
    found = (*files.entries(directory), *inside)
    return sorted(path for path in found if path not in arrays and path.name not in own)


def foreign_to_store(store: Path, tables: Collection[Path]) -> list[Path]:
    """List what is in a store's folder besides the store's own files and the folders of its tables."""
    own = {PRIVATE, zarr_metadata.DOCUMENT, files.staged(store / zarr_metadata.DOCUMENT).name}
    return [path for path in files.entries(store) if path.name not in own and path not in tables]


def documents(directory: Path) -> dict[str, bytes]:
    """Read those of a table's zarr documents that exist."""
    paths = (zarr_metadata.DOCUMENT, *(f"{name}/{zarr_metadata.DOCUMENT}" for name in zarr_metadata.ARRAYS))
    return {path: data for path in paths if (data := _read(directory / path)) is not None}


def locate(store: Path, tables: Iterable[TableEntry]) -> dict[str, Path]:
    """Find each table's folder: under its name, parked, or under a former name.

    Raises
    ------
    FormatError
        A table has no folder, or several, of which any may be the right one.
    """
    found = {}
    for table in tables:
        own = (store / table.name, parked(store, table.uuid))
        directories = list(islice((path for path in own if _uuid(path) == table.uuid), 1))
        directories = directories or [path for path in _children(store) if _uuid(path) == table.uuid]
        if not directories:
            for path in own:
                _read(path / zarr_metadata.DOCUMENT)  # says so if the folder is a link
            msg = f"the folder of table {table.name!r} is missing from {store}; restore it from a copy of the store"
            raise FormatError(msg)
        if len(directories) > 1:
            msg = (
                f"{' and '.join(map(str, directories))} are copies of one table, {table.name!r}; "
                f"move the copies out of the store"
            )
            raise FormatError(msg)
        found[table.uuid] = directories[0]
    return found


def check_locations(
    store: Path, tables: Collection[TableEntry], dropped: Iterable[TableEntry] = ()
) -> dict[str, Path]:
    """Find each table's folder, as `locate` does, and check that nothing foreign is in the place where it belongs.

    Raises
    ------
    FormatError
        As `locate`, or something foreign is in such a place. It is never moved or deleted.
    """
    found = locate(store, tables)
    leaving = set(found.values()) | {store / table.name for table in dropped}
    for table in tables:
        place = store / table.name
        if os.path.lexists(place) and place != found[table.uuid] and place not in leaving:
            msg = (
                f"{place} is where table {table.name!r} belongs, but is not part of the store; "
                f"move it away, or give the table another name"
            )
            raise FormatError(msg)
    return found


def arrange(
    store: Path,
    tables: Iterable[TableEntry],
    dropped: Iterable[TableEntry] = (),
    keep: Collection[str] = (),
) -> dict[str, Path]:
    """Move the folders of all tables to their names and remove those of dropped tables; return the folders by uuid.

    Parked folders are removed, except those whose uuids are in `keep`. After an interruption at any point, calling this
    again completes it.

    Raises
    ------
    FormatError
        As `check_locations`.
    """
    tables = list(tables)
    dropped = [table for table in dropped if _uuid(store / table.name) == table.uuid]
    found = check_locations(store, tables, dropped)
    misplaced = [table for table in tables if found[table.uuid] != store / table.name]
    aside = [(found[table.uuid], parked(store, table.uuid)) for table in misplaced]
    aside += [(store / table.name, parked(store, table.uuid)) for table in dropped]
    # All are moved aside before any gets its name: two tables may have swapped names.
    aside = [(source, target) for source, target in aside if source != target]
    if aside or misplaced:  # a folder found aside may be there only in the page cache: sync that move too
        _move(store, aside)
    if misplaced:
        _move(store, [(parked(store, table.uuid), store / table.name) for table in misplaced])
    for path in _children(private(store) / "tables"):
        if path.name not in keep:
            files.remove_tree(path)
    return {table.uuid: store / table.name for table in tables}


def _move(store: Path, moves: list[tuple[Path, Path]]) -> None:
    """Move folders, and make these moves and all earlier ones durable."""
    files.make_directory(parked(store, ""))
    for source, target in moves:
        files.rename(source, target)
    for directory in (store, parked(store, "")):
        files.sync_directory(directory)


# ---- what other programs have added ---------------------------------------------------------------------------


def new_documents(spec: TableSpec, before: Path) -> dict[str, bytes]:
    """Return the documents of a table that replaces, or is a copy of, the one in a folder."""
    return zarr_metadata.table_documents(spec, documents(before))


def foreign_of_table(old: TableLocation, new: TableLocation) -> list[Carried]:
    """List what other programs have put into a table's folder, each with its path in the new folder."""
    left_out = None if new.spec.has_presence else old.directory / zarr_metadata.PRESENT
    return walked(
        (path, new.directory / path.relative_to(old.directory))
        for path in foreign_to_table(old.directory)
        if path.parent != left_out
    )


def walked(entries: Iterable[Carried], without: Path | None = None) -> list[Carried]:
    """List files and links, and folders with everything in them. Each folder comes before what is in it."""
    found, waiting = [], list(entries)
    while waiting:
        source, target = waiting.pop()
        found.append((source, target))
        if files.is_directory(source):
            waiting += [(path, target / path.name) for path in files.entries(source) if path != without]
    return found


def carry(entries: Iterable[Carried], *, share: bool, advance: Advance = lambda steps: None) -> None:
    """Copy files and folders of other programs; links stay links. Pipes, sockets and devices stay behind.

    Nothing is durable yet. With `share`, a file gets a second name where the file system can do that.
    """
    for source, target in entries:
        if source.is_symlink():
            files.copy_link(source, target)
        elif files.is_directory(source):
            files.make_directory(target)
        elif (nbytes := files.size(source)) is not None:
            if not (share and files.link(source, target)):
                files.create_sparse(target, nbytes)
                copy_data(source, target, nbytes)
            advance(nbytes)


def copy_data(source: Path, target: Path, nbytes: int) -> None:
    """Copy the beginning of a file, except its holes, into another file that is all zeros there."""
    with files.opened(source, os.O_RDONLY) as reading, files.opened(target, os.O_WRONLY) as writing:
        for start, stop in windows(reading, nbytes):
            data = memoryview(files.read_at(reading, stop - start, start, source))
            files.write(writing, data, start, target)


def windows(descriptor: int, nbytes: int) -> list[tuple[int, int]]:
    """Cut the data at the beginning of a file, without its holes, into pieces of at most `WINDOW_BYTES`."""
    return [
        (start, min(start + WINDOW_BYTES, last))
        for first, last in files.data(descriptor, 0, nbytes)
        for start in range(first, last, WINDOW_BYTES)
    ]


# ---- reading folders --------------------------------------------------------------------------------------------


def _children(directory: Path) -> list[Path]:
    return [path for path in files.entries(directory) if path.name != PRIVATE and files.is_directory(path)]


def _uuid(directory: Path) -> str | None:
    """Return the uuid of the table in a folder; None if it holds none, or is a link."""
    try:
        document = _read(directory / zarr_metadata.DOCUMENT)
    except FormatError:
        return None
    return None if document is None else zarr_metadata.table_uuid(document)


def _read(path: Path) -> bytes | None:
    try:
        return files.read(path)
    except FormatError:  # a link, which is named and not taken for a missing file
        raise
    except (OSError, ValueError):
        return None
