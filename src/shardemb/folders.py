"""Where the folders of a store's tables lie, and how they get there.

The manifest says which tables there are and what they are called; the folders follow it. A new table's folder
waits under ``.shardemb/tables/UUID`` until the commit that makes it part of the store, and a dropped one ends
there. Whatever a crash leaves in between, `arrange` puts every folder in its place by the uuid that it carries.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from shardemb import files, layout
from shardemb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from shardemb.manifest import TableRecord

_PRIVATE = ".shardemb"


def private(store: Path) -> Path:
    """Folder of what is not zarr."""
    return store / _PRIVATE


def manifest(store: Path) -> Path:
    """File that says what the others mean."""
    return private(store) / "manifest.json"


def lock(store: Path) -> Path:
    """File whose lock the writer holds."""
    return private(store) / "lock"


def parked(store: Path, uuid: str) -> Path:
    """Folder of a table that is not, or no longer, part of the store."""
    return private(store) / "tables" / uuid


def foreign(store: Path) -> list[str]:
    """Names in a folder that would not be there if it were empty, or a store whose creation was cut short."""
    if not store.exists():
        return []
    group = store / layout.DOCUMENT
    own = {_PRIVATE, files.staged(group).name}
    with contextlib.suppress(FormatError):
        layout.store_uuid(_read(group) or b"")
        own.add(group.name)
    return sorted(entry.name for entry in store.iterdir() if entry.name not in own)


def documents(directory: Path) -> dict[str, bytes]:
    """Read a table's zarr documents, those that are there."""
    paths = (layout.DOCUMENT, *(f"{name}/{layout.DOCUMENT}" for name in (layout.ROWS, layout.PRESENT)))
    return {path: data for path in paths if (data := _read(directory / path)) is not None}


def locate(store: Path, tables: Iterable[TableRecord]) -> dict[str, Path]:
    """Find each table's folder, wherever it is.

    Raises
    ------
    FormatError
        A table has no folder.
    """
    found = {}
    for table in tables:
        candidates = (store / table.name, parked(store, table.uuid), *_children(store))
        directory = next((path for path in candidates if _uuid(path) == table.uuid), None)
        if directory is None:
            msg = f"the folder of table {table.name!r} is missing from {store}; restore it from a copy of the store"
            raise FormatError(msg)
        found[table.uuid] = directory
    return found


def require_places(store: Path, tables: Iterable[TableRecord], dropped: Iterable[str] = ()) -> None:
    """Check that nothing foreign stands where the folder of a table belongs.

    Raises
    ------
    FormatError
        Something does; it is never moved or deleted.
    """
    tables = list(tables)
    ours = {table.uuid for table in tables} | set(dropped)
    for table in tables:
        place = store / table.name
        if os.path.lexists(place) and _uuid(place) not in ours:
            msg = (
                f"{place} stands where table {table.name!r} belongs and is none of the store's; "
                f"move it away, or give the table another name"
            )
            raise FormatError(msg)


def arrange(store: Path, tables: Iterable[TableRecord], dropped: Iterable[str] = ()) -> dict[str, Path]:
    """Put the folders of all tables under their names and remove those of no table; return where they are.

    Can be cut short anywhere and done again.

    Raises
    ------
    FormatError
        A table has no folder, or something else has its name.
    """
    tables = list(tables)
    found = locate(store, tables)
    misplaced = [table for table in tables if found[table.uuid] != store / table.name]
    going = set(dropped)
    require_places(store, tables, going)
    moves = [(found[table.uuid], parked(store, table.uuid)) for table in misplaced]
    moves += [
        (path, parked(store, uuid)) for path in _children(store) if going and (uuid := _uuid(path)) in going
    ]
    # Aside first: two tables may have exchanged their names.
    _move(store, [(source, target) for source, target in moves if source != target])
    for table in misplaced:
        if (store / table.name).exists():
            msg = (
                f"{store / table.name} is not the folder of that table; move it away and open the store again"
            )
            raise FormatError(msg)
    _move(store, [(parked(store, table.uuid), store / table.name) for table in misplaced])
    for path in _children(private(store) / "tables"):
        files.remove_tree(path)
    return {table.uuid: store / table.name for table in tables}


def _move(store: Path, moves: list[tuple[Path, Path]]) -> None:
    if not moves:
        return
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
        if path.name != _PRIVATE and path.is_dir() and not path.is_symlink()
    )


def _uuid(directory: Path) -> str | None:
    document = _read(directory / layout.DOCUMENT)
    return None if document is None else layout.table_uuid(document)


def _read(path: Path) -> bytes | None:
    try:
        return files.read(path)
    except (OSError, ValueError):
        return None
