"""The paths of a store's own files and folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PRIVATE = ".shardemb"


def private(store: Path) -> Path:
    """Folder of everything that is not zarr."""
    return store / PRIVATE


def manifest(store: Path) -> Path:
    """File that gives all other files their meaning."""
    return private(store) / "manifest.json"


def lock(store: Path) -> Path:
    """File on which the writer holds a lock."""
    return private(store) / "lock"


def log(store: Path) -> Path:
    """Folder of the log's segments."""
    return private(store) / "log"


def epoch(store: Path) -> Path:
    """File by which readers notice that another writer has opened the store. Nothing else relies on it."""
    return private(store) / "epoch"


def origin(store: Path) -> Path:
    """File of a copy that says which store it was made from."""
    return private(store) / "copied-from.json"


def fills(store: Path) -> Path:
    """File that names the parts of shards which a writer has written and no commit may have yet."""
    return private(store) / "fills.json"


def parked(store: Path, uuid: str) -> Path:
    """Folder of a table that is not part of the store: not yet, or no longer."""
    return private(store) / "tables" / uuid


def tags(store: Path) -> Path:
    """Folder of the tags, each a folder named by its uuid."""
    return private(store) / "tags"


def tag(store: Path, uuid: str) -> Path:
    """Folder of a tag. Within it, folders of tables and of indexes have the same places as in a store."""
    return tags(store) / uuid


def tag_manifest(tag: Path) -> Path:
    """File in the folder of a tag that says what its commit was. It is no store, so it has no `manifest`."""
    return private(tag) / "tag.json"


def undo(tag: Path) -> Path:
    """File in the folder of a tag with the old content of blocks that were overwritten since."""
    return private(tag) / "undo"


def index(store: Path, uuid: str) -> Path:
    """Folder of a vocabulary's index, which can be rebuilt from the keys."""
    return private(store) / "vocabularies" / uuid


def rebuilt(store: Path) -> Path:
    """Folder of tables that are being rebuilt, which can take long and be interrupted."""
    return private(store) / "rebuilt"
