"""The paths of a store's own files and folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


PRIVATE = ".shardemb"


def private(store: Path) -> Path:
    """Folder of what is not zarr."""
    return store / PRIVATE


def manifest(store: Path) -> Path:
    """File that says what the others mean."""
    return private(store) / "manifest.json"


def lock(store: Path) -> Path:
    """File whose lock the writer holds."""
    return private(store) / "lock"


def log(store: Path) -> Path:
    """Folder of the log's segments."""
    return private(store) / "log"


def epoch(store: Path) -> Path:
    """File that tells readers when another writer has come; nothing else relies on it."""
    return private(store) / "epoch"


def parked(store: Path, uuid: str) -> Path:
    """Folder of a table that is not, or no longer, part of the store."""
    return private(store) / "tables" / uuid


def index(store: Path, uuid: str) -> Path:
    """Folder of a vocabulary's index, which can be made anew."""
    return private(store) / "vocabularies" / uuid


def rebuilt(store: Path) -> Path:
    """Folder of tables that are being made anew, which may take long and be cut short."""
    return private(store) / "rebuilt"
