"""The base of a store that is open for writing: the manifest file, which says what the shards hold.

It is replaced when a fold ends. Then the folders of tables move to where it says they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shardemb.errors import DiskFullError
from shardemb.format import store_paths
from shardemb.storage import files, folders

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.format.manifest import Manifest, TableEntry, TagEntry


class Base:
    """The base. All methods are called with the store's lock held.

    Parameters
    ----------
    runtime : Runtime
    manifest : Manifest
        What the shards hold. It is not published yet.
    tables : callable
        Returns all tables of the store by uuid, also those that no commit has yet.

    Attributes
    ----------
    manifest : Manifest
        The last one published.
    """

    def __init__(
        self, runtime: Runtime, manifest: Manifest, tables: Callable[[], Mapping[str, Shards]]
    ) -> None:
        self._runtime, self._tables = runtime, tables
        self.manifest = manifest
        self._path = store_paths.manifest(runtime.path)
        self._names = files.names(self._path)[1]

    def publish(self, manifest: Manifest) -> None:
        """Record durably what the shards hold, then move the folders of tables to where that says. The tags stay."""
        self._publish(replace(manifest, tags=self.manifest.tags))

    def set_tags(self, tags: tuple[TagEntry, ...]) -> None:
        """Record durably which tags there are, while no fold is running.

        Raises
        ------
        DiskFullError
            They are what `manifest` says.
        OSError
            They may be either: the store is poisoned.
        """
        try:
            self._publish(replace(self.manifest, tags=tags))
        except DiskFullError:
            raise
        except OSError as error:
            self._runtime.poisoned = f"writing failed ({error})"
            raise

    def _publish(self, manifest: Manifest) -> None:
        self.check_in_place()
        path, tables = self._runtime.path, self._tables()
        try:
            files.replace(self._path, manifest.to_bytes())
        finally:  # the new one is there also if only the sync of its folder has failed
            self._names = files.names(self._path)[1]
        self.manifest = manifest
        try:
            self._update_directories(
                folders.arrange(path, manifest.tables, manifest.dropped, keep=tables.keys())
            )
        except OSError:  # some folders have moved already
            self._update_directories(folders.locate(path, manifest.tables))
            raise
        self.manifest = replace(manifest, dropped=())  # their folders are gone

    def _update_directories(self, directories: Mapping[str, Path]) -> None:
        """Tell the tables where their folders are now."""
        tables = self._tables()
        for uuid in directories.keys() & tables.keys():
            tables[uuid].directory = directories[uuid]

    def is_own(self, uuid: str) -> bool:
        """Return whether a table is the store's, or was: then its folder is removed, or moved, by the next fold."""
        return uuid in self._tables() or any(
            each.uuid == uuid for each in (*self.manifest.tables, *self.manifest.dropped)
        )

    def dropped(self, manifest: Manifest) -> tuple[TableEntry, ...]:
        """List the tables whose folders go once `manifest` is the base."""
        named = {each.uuid for each in manifest.tables}
        gone = tuple(each for each in self.manifest.tables if each.uuid not in named)
        return (*self.manifest.dropped, *gone)

    def check_in_place(self) -> None:
        """As `Runtime.check_in_place`, and check that no other program has replaced the manifest."""
        self._runtime.check_in_place()
        try:
            found = files.names(self._path)[1]
        except FileNotFoundError:
            found = None
        if found != self._names:
            self._runtime.poisoned = "its manifest was replaced by another program while it was open"
            self._runtime.check_sound()
