"""Where the folders of a store's tables lie, and how they get there.

The manifest says which tables there are and what they are called; the folders follow it. A new table's folder
waits under ``.shardemb/tables/UUID`` until the commit that makes it part of the store, and a dropped one ends
there. Whatever a crash leaves in between, `arrange` puts every folder in its place by the uuid that it carries.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from shardemb.errors import FormatError
from shardemb.format import zarr_metadata
from shardemb.format.store_paths import PRIVATE, parked, private, rebuilt
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from shardemb.format.manifest import TableEntry


def keep_indexes(store: Path, uuids: Collection[str]) -> None:
    """Remove the indexes of other vocabularies."""
    folder = private(store) / "vocabularies"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name not in uuids:
            files.remove_tree(path)


def keep_rebuilt(store: Path, uuid: str) -> None:
    """Remove what was begun to be made anew, but for one table."""
    for path in _children(rebuilt(store)):
        if path.name != uuid:
            files.remove(path / zarr_metadata.DOCUMENT)  # first: where that is, all but the shards is whole
            files.sync_directory(path)
            files.remove_tree(path)


def foreign(store: Path) -> list[str]:
    """Names in a folder that would not be there if it were empty, or a store whose creation was cut short."""
    if not store.exists():
        return []
    group = store / zarr_metadata.DOCUMENT
    own = {PRIVATE, files.staged(group).name}
    with contextlib.suppress(FormatError):
        zarr_metadata.store_uuid(_read(group) or b"")
        own.add(group.name)
    return sorted(entry.name for entry in store.iterdir() if entry.name not in own)


def documents(directory: Path) -> dict[str, bytes]:
    """Read a table's zarr documents, those that are there."""
    paths = (zarr_metadata.DOCUMENT, *(f"{name}/{zarr_metadata.DOCUMENT}" for name in zarr_metadata.ARRAYS))
    return {path: data for path in paths if (data := _read(directory / path)) is not None}


def locate(store: Path, tables: Iterable[TableEntry]) -> dict[str, Path]:
    """Find each table's folder: under its name, parked, or under the name that it had before.

    Raises
    ------
    FormatError
        A table has no folder, or it cannot be told which of several is it.
    """
    found = {}
    for table in tables:
        own = (store / table.name, parked(store, table.uuid))
        directories = [path for path in own if _uuid(path) == table.uuid][:1]
        directories = directories or [path for path in _children(store) if _uuid(path) == table.uuid]
        if not directories:
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
    """Find each table's folder, as `locate`, and check that nothing foreign stands where it belongs.

    Raises
    ------
    FormatError
        Something does; it is never moved or deleted.
    """
    found = locate(store, tables)
    leaving = set(found.values()) | {store / table.name for table in dropped}
    for table in tables:
        place = store / table.name
        if os.path.lexists(place) and place != found[table.uuid] and place not in leaving:
            msg = (
                f"{place} stands where table {table.name!r} belongs and is none of the store's; "
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
    """Put the folders of all tables under their names and remove those of dropped ones; return where they are.

    What is parked goes, but for the tables whose uuids are in `keep`. Can be cut short anywhere and done again.

    Raises
    ------
    FormatError
        A table has no folder, or something else has its name.
    """
    tables = list(tables)
    dropped = [table for table in dropped if _uuid(store / table.name) == table.uuid]
    found = check_locations(store, tables, dropped)
    misplaced = [table for table in tables if found[table.uuid] != store / table.name]
    aside = [(found[table.uuid], parked(store, table.uuid)) for table in misplaced]
    aside += [(store / table.name, parked(store, table.uuid)) for table in dropped]
    # Aside first: two tables may have exchanged their names.
    aside = [(source, target) for source, target in aside if source != target]
    if aside or misplaced:  # those that were found aside may be there in the page cache alone
        _move(store, aside)
    if misplaced:
        _move(store, [(parked(store, table.uuid), store / table.name) for table in misplaced])
    for path in _children(private(store) / "tables"):
        if path.name not in keep:
            files.remove_tree(path)
    return {table.uuid: store / table.name for table in tables}


def _move(store: Path, moves: list[tuple[Path, Path]]) -> None:
    """Move folders; durable are these moves then, and those before them."""
    files.make_directory(parked(store, ""))
    for source, target in moves:
        files.rename(source, target)
    for directory in (store, parked(store, "")):
        files.sync_directory(directory)


def _children(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(
        path
        for path in directory.iterdir()
        if path.name != PRIVATE and path.is_dir() and not path.is_symlink()
    )


def _uuid(directory: Path) -> str | None:
    document = _read(directory / zarr_metadata.DOCUMENT)
    return None if document is None else zarr_metadata.table_uuid(document)


def _read(path: Path) -> bytes | None:
    try:
        return files.read(path)
    except (OSError, ValueError):
        return None
