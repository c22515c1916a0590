"""The set of a store's tables: as it is now, and as of the last commit."""

from __future__ import annotations

import uuid
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from shardemb import dtypes, optim
from shardemb.commits import tags
from shardemb.engine import filling, shards
from shardemb.engine.table_state import TableState
from shardemb.engine.training import Training
from shardemb.errors import FormatError, TableExistsError, TableNotFoundError
from shardemb.format import store_paths
from shardemb.format.spec import is_internal, normalized
from shardemb.memory import past_blocks
from shardemb.storage import files, folders, table_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from shardemb import initializers
    from shardemb.base.progress import Progress
    from shardemb.base.validation import FirstRows
    from shardemb.commits.log_reader import Replay
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.format.manifest import TableEntry
    from shardemb.format.spec import TableSpec
    from shardemb.format.table_files import TableLocation
    from shardemb.memory.overlay import Overlay
    from shardemb.optim import Optimizer


_ORIGINS = uuid.UUID("5c2a9d1e-6f0b-4f6e-9a53-0d8c1b7e2f44")
"""The namespace of uuids of tables whose creation can be continued."""


class CommittedTable(NamedTuple):
    """A table of the last commit, and its memory as of then.

    Attributes
    ----------
    table : TableState
    shards : Shards
        Differs from ``table.shards`` if the table was resized since.
    """

    table: TableState
    shards: Shards


class TableRequest(NamedTuple):
    """The arguments of `Store.create_table`, none of them checked yet."""

    name: str
    num_embeddings: int | None
    embedding_dim: int
    vocabulary: str | None
    counters: bool
    initializer: initializers.Initial | None
    optimizer: Optimizer | None
    rows_per_shard: int | None
    padding_idx: int | None
    precision: dtypes.Wanted = dtypes.Wanted()


class TableCatalog:
    """The tables of a store. Everything that changes it runs under the store's lock.

    Attributes
    ----------
    current : dict of str to TableState
        The tables as they are now, by name.
    committed : dict of str to CommittedTable
        The tables of the last commit, by uuid.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.current: dict[str, TableState] = {}
        self.committed: dict[str, CommittedTable] = {}
        # The streams of all tables; None until they are asked for, and again once a table may be gone.
        self._streams: set[str] | None = None

    # ---- what there is

    def visible(self) -> dict[str, TableState]:
        """Return the current tables by name, without those that hold keys: a snapshot."""
        return {name: table for name, table in tuple(self.current.items()) if not is_internal(name)}

    def find(self, name: str) -> TableState:
        """Return the table of a name.

        Raises
        ------
        TableNotFoundError
            There is none, or it holds keys.
        """
        found = self.current.get(normalized(name))
        if found is not None and not is_internal(found.name):
            return found
        names = ", ".join(map(repr, self.visible())) or "none"
        msg = f"the store {self._runtime.path} has no table {name!r}; its tables: {names}"
        raise TableNotFoundError(msg)

    def entries(self) -> tuple[TableEntry, ...]:
        """Return what a commit would record about the current tables."""
        return tuple(table.entry for table in self.current.values())

    def differ(self) -> bool:
        """Return whether any row or table differs from the last commit."""
        changed = any(table.shards.changes for table in self.current.values())
        return changed or self.entries() != self._runtime.committed.tables

    def memory(self) -> dict[str, Shards]:
        """Return the memory of all tables by uuid: of the last commit's tables and of those created since."""
        committed = {uuid: each.shards for uuid, each in self.committed.items()}
        return committed | {uuid: table.shards for uuid, table in self._by_uuid()}

    def _by_uuid(self) -> list[tuple[str, TableState]]:
        return [(table.spec.uuid, table) for table in self.current.values()]

    def _each_memory(self) -> Iterator[Shards]:
        """Iterate over what `memory` returns, without a dict of thousands of tables."""
        yield from (each.shards for each in self.committed.values())
        yield from (table.shards for uuid, table in self._by_uuid() if uuid not in self.committed)

    def overlays(self) -> list[Overlay]:
        """Return the rows in memory of all tables."""
        return [each.overlay for each in self._each_memory()]

    def locations(self) -> dict[str, TableLocation]:
        """Return the spec and folder of each table of the last commit, by uuid."""
        return {uuid: each.shards.location for uuid, each in self.committed.items()}

    def bound_to(self, vocabulary: str) -> list[TableState]:
        """Return the tables whose rows a vocabulary, given by its uuid, gives out."""
        return [table for table in self.current.values() if table.vocabulary == vocabulary]

    def select(self, names: Sequence[str] | None) -> dict[str, CommittedTable]:
        """Return the tables of the last commit by uuid: all, or those of the given names.

        Raises
        ------
        TableNotFoundError
            The last commit has no table of such a name.
        """
        unknown = set(names or ()) - {each.table.name for each in self.committed.values()}
        if unknown:
            msg = f"the last commit of the store {self._runtime.path} has no table {min(unknown)!r}"
            raise TableNotFoundError(msg)
        return {
            uuid: each for uuid, each in self.committed.items() if names is None or each.table.name in names
        }

    def require_free(self, name: str) -> None:
        """Raise `TableExistsError` if there is a table of that name."""
        if name in self.current:
            path = self._runtime.path
            msg = f"the store {path} already has a table {name!r}; use store[{name!r}], or drop it first"
            raise TableExistsError(msg)

    def unused_stream(self, name: str) -> str:
        """Return a stream for a new table, which makes its initial values differ from those of all other tables."""
        if self._streams is None:
            self._streams = {each.spec.stream for each in self._each_memory()}
        streams = (name if number == 1 else f"{name}#{number}" for number in count(1))
        return next(stream for stream in streams if stream not in self._streams)

    # ---- opening, creating, dropping

    def load(self, replay: Replay | None, *, may_miss: bool) -> None:
        """Open the tables of the last commit, and load the log's images of them into memory."""
        entries = self._runtime.committed.tables
        directories = folders.locate(self._runtime.path, entries)
        for entry in entries:
            table = self._open_table(entry, directories[entry.uuid], may_miss=may_miss)
            if replay is not None:
                self._show(table.shards, replay)
            self.current[entry.name] = table
        self.mark_committed(self.snapshot())
        if self._runtime.past is not None:
            self._runtime.past.show(
                partial(_put_back, [self.current[entry.name].shards for entry in entries])
            )

    def _show(self, mapped: Shards, replay: Replay) -> None:
        """Show in a reader what the log has of a table, and nothing of what a writer has filled since."""
        images = replay.images(mapped.spec)
        mapped.filled.show_committed(images.fills)
        mapped.load_images(images, self._runtime.budget)
        mapped.hidden = self._runtime.hidden
        if mapped.hidden is not None:
            mapped.hidden.show(mapped.spec, images.fills)
            mapped.hidden.look(mapped.spec)

    def _open_table(self, entry: TableEntry, directory: Path, *, may_miss: bool) -> TableState:
        with table_folder.naming(entry.name, directory):
            mapped = shards.open_existing(directory, may_miss=may_miss, may_create=self._runtime.writable)
            if not optim.same_columns(mapped.spec.optimizer, entry.optimizer):
                msg = f"it was created for {mapped.spec.optimizer}, but the commit says {entry.optimizer}"
                raise FormatError(msg)
        training = Training(entry.optimizer, entry.step, entry.frozen)
        return TableState(self._runtime, entry.name, mapped, training, entry.vocabulary)

    def create(
        self,
        name: str,
        spec: TableSpec,
        *,
        rows: FirstRows | None = None,
        progress: Progress = None,
        vocabulary: str | None = None,
        origin: str | None = None,
    ) -> TableState:
        """Create a table's folder and add the table to the current ones; if that fails, nothing is left of it.

        But with an `origin`, a description of where the rows come from, those that are complete wait for another call
        with the same origin and spec after the same commit.
        """
        path = self._runtime.path
        if origin is not None:
            last = self._runtime.committed
            facts = [origin, last.uuid, str(last.commit), str(replace(spec, uuid=""))]
            spec = replace(spec, uuid=str(uuid.uuid5(_ORIGINS, "\n".join(facts))))
            folders.keep_rebuilt(path, spec.uuid)
        directory, staged = store_paths.parked(path, spec.uuid), store_paths.rebuilt(path) / spec.uuid
        keep = rows is not None and self._runtime.warming.has_room(rows.count * spec.record_bytes)
        place = None if origin is None else staged
        mapped = shards.create(spec, directory, rows, progress, stays_cached=keep, staged=place)
        try:
            self.require_free(name)  # again: a function that computed rows may have created such a table
        except BaseException:
            files.remove_tree(directory)
            raise
        table = TableState(self._runtime, name, mapped, Training(spec.optimizer, 0), vocabulary)
        self.current[name] = table
        if self._streams is not None:
            self._streams.add(spec.stream)
        if spec.padding_idx is not None and rows is None:
            try:
                table.clear(spec.padding_idx)
            except BaseException:
                self.drop(name)
                raise
        return table

    def take_in(self, name: str, spec: TableSpec, training: Training) -> TableState:
        """Add a table whose folder is complete, among those that are being rebuilt.

        Raises
        ------
        TableExistsError
            There is one of that name.
        """
        self.require_free(name)
        path = self._runtime.path
        directory = store_paths.parked(path, spec.uuid)
        files.make_directory(directory.parent)
        files.rename(store_paths.rebuilt(path) / spec.uuid, directory)
        table = TableState(self._runtime, name, shards.Shards(spec, directory), training)
        self.current[name] = table
        self._streams = None
        return table

    def set_name(self, table: TableState, name: str) -> None:
        """Rename a table; no other table has the new name."""
        self.current = {name if each is table else key: each for key, each in self.current.items()}
        table.name = name

    def drop(self, name: str) -> None:
        """Remove a table from the current ones."""
        table = self.current.pop(name)
        table.dropped = True
        self._discard_if_new(table)

    def _discard_if_new(self, table: TableState) -> None:
        """Remove the folder and memory of a table that no commit has in this form."""
        self._streams = None
        if table.spec.uuid not in self.committed:
            files.remove_tree(table.shards.directory)
            table.release()

    # ---- commits, rollbacks, refreshes

    def snapshot(self) -> dict[str, CommittedTable]:
        """Return what `committed` will be after a commit of the current tables."""
        return {table.spec.uuid: CommittedTable(table, table.shards) for table in self.current.values()}

    def mark_committed(self, tables: dict[str, CommittedTable]) -> None:
        """Record tables, see `snapshot`, as those of the last commit."""
        self._streams = None
        used = {id(table) for table in (*self.current.values(), *(each.table for each in tables.values()))}
        self._release(each.table for each in self.committed.values() if id(each.table) not in used)
        self.committed = tables

    def restore(self, replay: Replay) -> None:
        """Go back to the last commit. If it fails half way, it can be called again."""
        self._streams = None
        before, entries = list(self.current.values()), self._runtime.committed.tables
        self.current = {each.name: self.committed[each.uuid].table for each in entries}
        current = set(map(id, self.current.values()))
        for table in before:
            if id(table) not in current:
                self._discard_if_new(table)
            elif table.spec.uuid not in self.committed:
                # Lookups continue in the table's new memory until `table.restore` below gives it the old one back.
                files.remove_tree(table.shards.directory)
        for entry in entries:
            table, mapped = self.committed[entry.uuid]
            mapped.forget_changes(replay.images(mapped.spec), self._runtime.budget)
            table.restore(entry.name, mapped, Training(entry.optimizer, entry.step, entry.frozen))

    def replace(self, tables: dict[str, TableState]) -> None:
        """Let these be the current tables, by name; what is not among them is dropped."""
        kept = set(map(id, tables.values()))
        for name, table in tuple(self.current.items()):
            if id(table) not in kept:
                self.drop(name)
        self.current = tables
        self._streams = None

    def discard_new(self) -> None:
        """Remove the current tables that no commit has."""
        for name, table in tuple(self.current.items()):
            if table.spec.uuid not in self.committed:
                self._discard_if_new(table)
                del self.current[name]

    def undo_fills(self) -> OSError | None:
        """Undo what was written to the files of the last commit's tables and is not part of it.

        Returns the error if that failed: what is left is noted, and the next opening undoes it.
        """
        try:
            for each in self.committed.values():
                filling.undo(each.shards, tuple(each.shards.filled.uncommitted))
        except OSError as error:
            return error
        return None

    def adopt(self, fresh: TableCatalog) -> None:
        """Become the tables of a newer opening. Tables that exist in both stay the same objects."""
        self._streams = None
        # Not by uuid: a table that was resized has another one, but keeps its stream, which is unique in a store.
        known = {each.shards.spec.stream: each.table for each in self.committed.values()}
        for name, newer in fresh.current.items():
            here = known.pop(newer.spec.stream, None)
            fresh.current[name] = newer if here is None else here.adopt(newer)
        self._release(known.values())
        self.current, fresh.current, fresh.committed = fresh.current, {}, {}
        for table in self.current.values():
            table.runtime = self._runtime
        self.committed = self.snapshot()

    def detach_in_child(self) -> None:
        """Be readable in a forked child."""
        for each in self.memory().values():
            each.totals.detach_in_child()

    def release(self) -> None:
        """Release the memory of all tables."""
        self._release((*self.current.values(), *(each.table for each in self.committed.values())))
        self.committed = {}

    @staticmethod
    def _release(tables: Iterable[TableState]) -> None:
        for table in tables:
            table.release()


def _put_back(tables: Sequence[Shards], records: NDArray[np.void]) -> None:
    """Put what a tag has kept over the files of its tables."""
    for number, blocks, content in tags.by_table(records):
        mapped = tables[number]
        past_blocks.put_back(mapped.spec, mapped.bytes, mapped.present, blocks, content)
