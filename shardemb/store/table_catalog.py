"""The set of a store's tables: as it is now, and as of the last commit."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from shardemb import files, folders, shards
from shardemb.batch import Training
from shardemb.errors import TableExistsError, TableNotFoundError
from shardemb.manifest import TableRecord
from shardemb.rebuild import Place
from shardemb.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from shardemb.arrays import Rows
    from shardemb.manifest import Manifest
    from shardemb.overlay import Room
    from shardemb.progress import Progress
    from shardemb.replay import Replay
    from shardemb.runtime import Runtime
    from shardemb.shards import Shards
    from shardemb.spec import TableSpec


class Kept(NamedTuple):
    """A table of the last commit, and its memory as of then: of one that was resized since, what it had before."""

    table: Table
    shards: Shards


class Tables:
    """The tables of a store. Everything that changes it is under the store's lock.

    Attributes
    ----------
    now : dict of str to Table
        By name.
    committed : dict of str to Kept
        Those of the last commit, by uuid.
    """

    def __init__(self) -> None:
        self.now: dict[str, Table] = {}
        self.committed: dict[str, Kept] = {}

    def records(self) -> tuple[TableRecord, ...]:
        """Return what a commit would say about them."""
        return tuple(
            TableRecord(table._spec.uuid, name, table.step, table.optimizer, table._vocabulary)
            for name, table in self.now.items()
        )

    def differ(self, manifest: Manifest) -> bool:
        """Tell whether anything about them is not as a commit says, which is the last one."""
        return self.records() != manifest.tables or any(table._mapped.changes for table in self.now.values())

    def mapped(self) -> dict[str, Shards]:
        """Return the memory of all of them, by uuid: of those of the last commit, and of those it does not know."""
        committed = {uuid: kept.shards for uuid, kept in self.committed.items()}
        return committed | {table._spec.uuid: table._mapped for table in self.now.values()}

    def places(self) -> dict[str, Place]:
        """Return where those of the last commit lie, by uuid."""
        return {uuid: Place(kept.shards.spec, kept.shards.directory) for uuid, kept in self.committed.items()}

    def require_free(self, name: str, store: Path) -> None:
        """Raise `TableExistsError` if there is a table of that name."""
        if name in self.now:
            msg = f"the store {store} already has a table {name!r}; use store[{name!r}], or drop it first"
            raise TableExistsError(msg)

    def create(
        self,
        runtime: Runtime,
        name: str,
        spec: TableSpec,
        *,
        rows: Rows | None = None,
        progress: Progress = None,
        vocabulary: str | None = None,
    ) -> Table:
        """Make a table's folder, and add the table to those of now; nothing is left of one that cannot be."""
        mapped = shards.create(spec, folders.parked(runtime.path, spec.uuid), rows, progress)
        self.require_free(name, runtime.path)  # a function that computed rows may have done anything
        self.now[name] = Table(runtime, name, mapped, Training(spec.optimizer, 0), vocabulary)
        return self.now[name]

    def free_stream(self, name: str) -> str:
        """Return what keeps a new table's initial values apart from those of every other one."""
        taken = {each.spec.stream for each in self.mapped().values()}
        streams = (name if number == 1 else f"{name}#{number}" for number in count(1))
        return next(stream for stream in streams if stream not in taken)

    def settle(self) -> None:
        """Take those of now as those of the last commit."""
        self._release(kept.table for kept in self.committed.values() if kept.table not in self.now.values())
        self.committed = {table._spec.uuid: Kept(table, table._mapped) for table in self.now.values()}

    def restore(self, manifest: Manifest, newer: Replay, room: Room) -> None:
        """Go back to the last commit. Where it breaks off, it can be done again."""
        before = list(self.now.values())
        self.now = {each.name: self.committed[each.uuid].table for each in manifest.tables}
        for table in before:
            if table not in self.now.values():
                self.abandon(table)
            elif table._spec.uuid not in self.committed:
                # Lookups go on in its memory until it has that of before.
                files.remove_tree(table._mapped.directory)
        for record in manifest.tables:
            table, mapped = self.committed[record.uuid]
            mapped.forget_changes(newer.images(mapped.spec), room)
            table._restore(record.name, mapped, Training(record.optimizer, record.step))

    def give_name(self, table: Table, name: str) -> None:
        """Give a table a name that none has."""
        self.now = {name if each is table else key: each for key, each in self.now.items()}
        table._name = name

    def drop(self, name: str) -> None:
        """Take a table out of those of now."""
        table = self.now.pop(name)
        table._dropped = True
        self.abandon(table)

    def abandon(self, table: Table) -> None:
        """Remove the folder of a table, if no commit knows it as it is."""
        if table._spec.uuid not in self.committed:
            files.remove_tree(table._mapped.directory)
            table._release()

    def abandon_new(self) -> None:
        """Remove those that no commit knows."""
        for name, table in tuple(self.now.items()):
            if table._spec.uuid not in self.committed:
                self.abandon(table)
                del self.now[name]

    def chosen(self, names: Sequence[str] | None, store: Path) -> dict[str, Kept]:
        """Return those of the last commit, by uuid; or those that have these names.

        Raises
        ------
        TableNotFoundError
            It has none of that name.
        """
        unknown = set(names or ()) - {kept.table.name for kept in self.committed.values()}
        if unknown:
            msg = f"the last commit of the store {store} has no table {min(unknown)!r}"
            raise TableNotFoundError(msg)
        return {
            uuid: kept for uuid, kept in self.committed.items() if names is None or kept.table.name in names
        }

    def adopt(self, fresh: Tables) -> None:
        """Become the tables of a newer opening; those that were here already stay the same objects."""
        # A table that was resized has another uuid, and still the stream that no other table of a store has.
        known = {kept.shards.spec.stream: kept.table for kept in self.committed.values()}
        for name, newer in fresh.now.items():
            here = known.pop(newer._spec.stream, None)
            fresh.now[name] = newer if here is None else here._adopt(newer)
        self._release(known.values())
        self.now, fresh.now, fresh.committed = fresh.now, {}, {}
        self.committed = {table._spec.uuid: Kept(table, table._mapped) for table in self.now.values()}

    def release(self) -> None:
        """Let go of the memory of all of them."""
        self._release((*self.now.values(), *(kept.table for kept in self.committed.values())))
        self.committed = {}

    @staticmethod
    def _release(tables: Iterable[Table]) -> None:
        for table in tables:
            table._release()
