"""The set of a store's tables: as it is now, and as of the last commit."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from shardemb.engine import shards
from shardemb.engine.batch import Training
from shardemb.engine.table_state import TableState
from shardemb.errors import FormatError, TableExistsError, TableNotFoundError
from shardemb.format import store_paths
from shardemb.format.spec import is_internal
from shardemb.format.table_files import TableLocation
from shardemb.storage import files, folders, table_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from shardemb.base.progress import Progress
    from shardemb.base.validation import Rows
    from shardemb.engine.overlay import Overlay
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.format.manifest import TableEntry
    from shardemb.format.spec import TableSpec
    from shardemb.storage.log_reader import Replay


class Kept(NamedTuple):
    """A table of the last commit, and its memory as of then: of one that was resized since, what it had before."""

    table: TableState
    shards: Shards


class TableCatalog:
    """The tables of a store. Everything that changes it is under the store's lock.

    Attributes
    ----------
    now : dict of str to TableState
        By name.
    committed : dict of str to Kept
        Those of the last commit, by uuid.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.now: dict[str, TableState] = {}
        self.committed: dict[str, Kept] = {}

    # ---- what there is

    def shown(self) -> dict[str, TableState]:
        """Return the tables of now by name, without those that hold keys."""
        return {name: table for name, table in tuple(self.now.items()) if not is_internal(name)}

    def find(self, name: str) -> TableState:
        """Return the table of a name.

        Raises
        ------
        TableNotFoundError
            There is none, or it holds keys.
        """
        if name in self.now and not is_internal(name):
            return self.now[name]
        names = ", ".join(map(repr, self.shown())) or "none"
        msg = f"the store {self._runtime.path} has no table {name!r}; its tables: {names}"
        raise TableNotFoundError(msg)

    def entries(self) -> tuple[TableEntry, ...]:
        """Return what a commit would say about them."""
        return tuple(table.entry for table in self.now.values())

    def differ(self) -> bool:
        """Tell whether anything about them is not as the last commit says."""
        changed = any(table.shards.changes for table in self.now.values())
        return changed or self.entries() != self._runtime.committed.tables

    def memory(self) -> dict[str, Shards]:
        """Return the memory of all tables by uuid: of those of the last commit, and of those that it does not know."""
        committed = {uuid: kept.shards for uuid, kept in self.committed.items()}
        return committed | {table.spec.uuid: table.shards for table in self.now.values()}

    def overlays(self) -> list[Overlay]:
        """Return the rows in memory of all tables."""
        return [each.overlay for each in self.memory().values()]

    def locations(self) -> dict[str, TableLocation]:
        """Return where those of the last commit lie, by uuid."""
        return {
            uuid: TableLocation(kept.shards.spec, kept.shards.directory)
            for uuid, kept in self.committed.items()
        }

    def bound_to(self, vocabulary: str) -> list[TableState]:
        """Return the tables whose rows a vocabulary gives out, by its uuid."""
        return [table for table in self.now.values() if table.vocabulary == vocabulary]

    def chosen(self, names: Sequence[str] | None) -> dict[str, Kept]:
        """Return those of the last commit, by uuid; or those that have these names.

        Raises
        ------
        TableNotFoundError
            It has none of that name.
        """
        unknown = set(names or ()) - {kept.table.name for kept in self.committed.values()}
        if unknown:
            msg = f"the last commit of the store {self._runtime.path} has no table {min(unknown)!r}"
            raise TableNotFoundError(msg)
        return {
            uuid: kept for uuid, kept in self.committed.items() if names is None or kept.table.name in names
        }

    def require_free(self, name: str) -> None:
        """Raise `TableExistsError` if there is a table of that name."""
        if name in self.now:
            path = self._runtime.path
            msg = f"the store {path} already has a table {name!r}; use store[{name!r}], or drop it first"
            raise TableExistsError(msg)

    def free_stream(self, name: str) -> str:
        """Return what keeps a new table's initial values apart from those of every other one."""
        taken = {each.spec.stream for each in self.memory().values()}
        streams = (name if number == 1 else f"{name}#{number}" for number in count(1))
        return next(stream for stream in streams if stream not in taken)

    # ---- opening, creating, dropping

    def load(self, newer: Replay | None, *, may_miss: bool) -> None:
        """Open the tables of the last commit, and place over their files what the log holds of them."""
        entries = self._runtime.committed.tables
        directories = folders.locate(self._runtime.path, entries)
        for entry in entries:
            table = self._open_table(entry, directories[entry.uuid], may_miss=may_miss)
            if newer is not None:
                table.shards.load_images(newer.images(table.spec), self._runtime.budget)
            self.now[entry.name] = table
        self.mark_committed()

    def _open_table(self, entry: TableEntry, directory: Path, *, may_miss: bool) -> TableState:
        with table_folder.naming(entry.name, directory):
            mapped = shards.open_existing(directory, may_miss=may_miss, may_create=self._runtime.writable)
            if type(mapped.spec.optimizer) is not type(entry.optimizer):
                msg = f"it was created for {mapped.spec.optimizer}, but the commit says {entry.optimizer}"
                raise FormatError(msg)
        training = Training(entry.optimizer, entry.step)
        return TableState(self._runtime, entry.name, mapped, training, entry.vocabulary)

    def create(
        self,
        name: str,
        spec: TableSpec,
        *,
        rows: Rows | None = None,
        progress: Progress = None,
        vocabulary: str | None = None,
    ) -> TableState:
        """Make a table's folder, and add the table to those of now; nothing is left of one that cannot be."""
        directory = store_paths.parked(self._runtime.path, spec.uuid)
        mapped = shards.create(spec, directory, rows, progress)
        self.require_free(name)  # a function that computed rows may have done anything
        table = TableState(self._runtime, name, mapped, Training(spec.optimizer, 0), vocabulary)
        self.now[name] = table
        return table

    def set_name(self, table: TableState, name: str) -> None:
        """Give a table a name that no other has."""
        self.now = {name if each is table else key: each for key, each in self.now.items()}
        table.name = name

    def drop(self, name: str) -> None:
        """Remove a table from those of now."""
        table = self.now.pop(name)
        table.dropped = True
        self._abandon(table)

    def _abandon(self, table: TableState) -> None:
        """Remove the folder of a table, if no commit knows it as it is."""
        if table.spec.uuid not in self.committed:
            files.remove_tree(table.shards.directory)
            table.release()

    # ---- commits, rollbacks, refreshes

    def mark_committed(self) -> None:
        """Take the tables of now as those of the last commit."""
        self._release(kept.table for kept in self.committed.values() if kept.table not in self.now.values())
        self.committed = {table.spec.uuid: Kept(table, table.shards) for table in self.now.values()}

    def restore(self, newer: Replay) -> None:
        """Go back to the last commit. If it fails half way, it can be done again."""
        before, entries = list(self.now.values()), self._runtime.committed.tables
        self.now = {each.name: self.committed[each.uuid].table for each in entries}
        for table in before:
            if table not in self.now.values():
                self._abandon(table)
            elif table.spec.uuid not in self.committed:
                # Lookups continue in its memory until it has that of before.
                files.remove_tree(table.shards.directory)
        for entry in entries:
            table, mapped = self.committed[entry.uuid]
            mapped.forget_changes(newer.images(mapped.spec), self._runtime.budget)
            table.restore(entry.name, mapped, Training(entry.optimizer, entry.step))

    def abandon_new(self) -> None:
        """Remove those that no commit knows."""
        for name, table in tuple(self.now.items()):
            if table.spec.uuid not in self.committed:
                self._abandon(table)
                del self.now[name]

    def adopt(self, fresh: TableCatalog) -> None:
        """Become the tables of a newer opening; those that were here already stay the same objects."""
        # A table that was resized has another uuid, and still the stream that no other table of a store has.
        known = {kept.shards.spec.stream: kept.table for kept in self.committed.values()}
        for name, newer in fresh.now.items():
            here = known.pop(newer.spec.stream, None)
            fresh.now[name] = newer if here is None else here.adopt(newer)
        self._release(known.values())
        self.now, fresh.now, fresh.committed = fresh.now, {}, {}
        for table in self.now.values():
            table.runtime = self._runtime
        self.committed = {table.spec.uuid: Kept(table, table.shards) for table in self.now.values()}

    def release(self) -> None:
        """Release the memory of all of them."""
        self._release((*self.now.values(), *(kept.table for kept in self.committed.values())))
        self.committed = {}

    @staticmethod
    def _release(tables: Iterable[TableState]) -> None:
        for table in tables:
            table.release()
