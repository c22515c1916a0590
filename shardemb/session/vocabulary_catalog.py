"""The set of a store's vocabularies: as it is now, and as a rollback may restore it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from shardemb import initializers
from shardemb.base import validation
from shardemb.commits.verify import Damage
from shardemb.errors import ShardEmbError, VocabularyExistsError, VocabularyNotFoundError
from shardemb.format import store_paths
from shardemb.format.spec import MAX_ROWS, SHARD_BYTES, check_shape, new_spec, normalized
from shardemb.optim import Optimizer
from shardemb.session.display import VocabularyFacts
from shardemb.storage import address_space, folders
from shardemb.vocabulary.key_rows import KeyRows
from shardemb.vocabulary.key_tables import table_shapes
from shardemb.vocabulary.keyed_rows import KeyedRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardemb.base.validation import FirstRows
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.table_state import TableState
    from shardemb.format.manifest import VocabularyEntry
    from shardemb.format.spec import TableSpec
    from shardemb.session.table_catalog import TableCatalog, TableRequest

INDEX_IS_WRONG = (
    "is not what was written, or does not lead to all keys; "
    "close the store and remove it: the next opening rebuilds it"
)
"""Problem that `Store.verify` reports of an index."""


class VocabularyCatalog:
    """The vocabularies of a store. Everything that changes it runs under the store's lock.

    Attributes
    ----------
    current : dict of str to KeyRows
        The vocabularies as they are now, by name.
    """

    def __init__(self, runtime: Runtime, tables: TableCatalog) -> None:
        self._runtime, self._tables = runtime, tables
        self.current: dict[str, KeyRows] = {}
        self._committed: dict[str, KeyRows] = {}
        self._outdated: list[KeyRows] = []  # whose index does not find their keys yet

    # ---- what there is

    def find(self, name: str) -> KeyRows:
        """Return the vocabulary of a name.

        Raises
        ------
        VocabularyNotFoundError
            There is none.
        """
        found = self.current.get(normalized(name))
        if found is None:
            names = ", ".join(map(repr, self.current)) or "none"
            msg = f"the store {self._runtime.path} has no vocabulary {name!r}; its vocabularies: {names}"
            raise VocabularyNotFoundError(msg)
        return found

    def keyed(self, table: TableState) -> KeyedRows | None:
        """Return a table with the vocabulary that gives out its rows, if one does."""
        if table.vocabulary is None:
            return None
        known = self._committed.get(table.vocabulary)
        if known is None:  # the vocabulary is new
            known = next(each for each in self.current.values() if each.entry.uuid == table.vocabulary)
        return KeyedRows(table, known)

    def entries(self) -> tuple[VocabularyEntry, ...]:
        """Return what a commit would record about the current vocabularies."""
        return tuple(each.entry for each in self.current.values())

    def facts(self) -> tuple[VocabularyFacts, ...]:
        """Return what is shown about the vocabularies."""
        facts = []
        for name, each in self.current.items():
            stats, tables = each.stats(), self._tables.bound_to(each.entry.uuid)
            facts.append(
                VocabularyFacts(
                    name=name,
                    key_type=each.key_type,
                    keys=len(each),
                    rows=each.entry.rows,
                    tables=tuple(table.name for table in tables),
                    bytes_on_disk=stats["bytes_on_disk"] + stats["index_bytes_on_disk"],
                )
            )
        return tuple(facts)

    def damage(self, tables: Sequence[str] | None) -> list[Damage]:
        """List the damaged indexes: of all vocabularies, or of those whose ``NAME@keys`` is among `tables`."""
        return [
            Damage(
                name,
                None,
                None,
                str(store_paths.index(self._runtime.path, each.entry.uuid)),
                INDEX_IS_WRONG,
            )
            for name, each in ((f"{name}@keys", each) for name, each in self.current.items())
            if (tables is None or name in tables) and not each.check_index()
        ]

    @contextlib.contextmanager
    def all_locked(self) -> Iterator[None]:
        """Hold the locks of all vocabularies and then the store's lock.

        No vocabulary is being changed within the block, not even by a thread that released the store's lock to wait for
        a fold. Otherwise keys that are being added could get rows that a rollback takes away, or that a table bound
        meanwhile does not have.
        """
        with self.none_changing(), self._runtime.changing():
            yield

    @contextlib.contextmanager
    def none_changing(self) -> Iterator[None]:
        """As `all_locked`, also in a store that is open for reading."""
        while True:
            known = self._all()
            with contextlib.ExitStack() as stack:
                for each in known:
                    stack.enter_context(each.lock)
                stack.enter_context(self._runtime.lock)
                # Another thread may have created or dropped a vocabulary before the store's lock was taken.
                if self._all() == known:
                    yield
                    return

    @contextlib.contextmanager
    def reassigning(self) -> Iterator[None]:
        """Make lookups by key wait, while all rows may change hands; see `KeyRows.reassigning`."""
        with contextlib.ExitStack() as stack:
            for each in self._all():
                stack.enter_context(each.reassigning())
            yield

    # ---- opening, creating, dropping

    def load(self) -> None:
        """Open the vocabularies of the last commit; their tables are open already."""
        for entry in self._runtime.committed.vocabularies:
            self._open_vocabulary(entry).load_index()
        self._committed = self.snapshot()
        if self._runtime.writable:
            folders.keep_indexes(self._runtime.path, self._committed)

    def require_free(self, name: str) -> None:
        """Raise `VocabularyExistsError` if there is a vocabulary of that name."""
        if name in self.current:
            msg = f"the store {self._runtime.path} already has a vocabulary {name!r}"
            raise VocabularyExistsError(msg)

    def set_name(self, key_rows: KeyRows, name: str) -> None:
        """Rename a vocabulary, and its tables with it."""
        self.require_free(name)
        for what in key_rows.entry.table_kinds:
            table = self._tables.current[f"{key_rows.entry.name}@{what}"]
            self._tables.set_name(table, f"{name}@{what}")
        key_rows.entry = replace(key_rows.entry, name=name)
        self.current = {each.entry.name: each for each in self.current.values()}

    def create(self, entry: VocabularyEntry) -> KeyRows:
        """Create a vocabulary and its tables. It becomes part of the store with the next commit."""
        self.require_free(entry.name)
        max_shards = address_space.mappings_left()
        made: list[str] = []
        try:
            for what, (rows, width, rows_per_shard) in table_shapes(entry).items():
                name = f"{entry.name}@{what}"
                spec = new_spec(
                    self._tables.unused_stream(name),
                    (rows, width),
                    initializer=initializers.Constant(0.0),
                    optimizer=None,
                    rows_per_shard=rows_per_shard,
                    max_shards=max_shards,
                )
                self._tables.create(name, spec)
                made.append(name)
        except BaseException:
            for name in made:
                self._tables.drop(name)
            raise
        return self._open_vocabulary(entry)

    def drop(self, name: str) -> None:
        """Remove a vocabulary from the current ones.

        Raises
        ------
        ShardEmbError
            Tables are bound to it.
        """
        key_rows = self.find(name)
        bound = [table.name for table in self._tables.bound_to(key_rows.entry.uuid)]
        if bound:
            msg = f"tables {', '.join(map(repr, bound))} are bound to vocabulary {name!r}; drop them first"
            raise ShardEmbError(msg)
        key_rows.drop()
        name = key_rows.entry.name
        del self.current[name]
        for what in table_shapes(key_rows.entry):
            self._tables.drop(f"{name}@{what}")

    # ---- commits, rollbacks, refreshes

    def snapshot(self) -> dict[str, KeyRows]:
        """Return the current vocabularies by uuid, which do not change with `current`."""
        return {each.entry.uuid: each for each in self.current.values()}

    def mark_committed(self, vocabularies: dict[str, KeyRows]) -> None:
        """Record vocabularies, see `snapshot`, as those of the last commit."""
        self._committed = vocabularies

    def rebuild_stale_indexes(self) -> None:
        """Rebuild indexes that are damaged or mostly outdated."""
        for each in list(self.current.values()):
            each.renew_index()

    def checkpoint(self) -> None:
        """Save what an opening would take long to index again. Called without the store's lock."""
        for each in list(self.current.values()):
            each.checkpoint()

    def restore(self) -> None:
        """Go back to the vocabularies of the last commit."""
        entries = self._runtime.committed.vocabularies
        committed = {entry.uuid for entry in entries}
        for each in self.current.values():
            if each.entry.uuid not in committed:  # only these refuse lookups
                each.drop()
        self.current = {entry.name: self._committed[entry.uuid] for entry in entries}
        for entry in entries:
            self.current[entry.name].restore(entry)

    def go_back(self, entries: Sequence[VocabularyEntry]) -> None:
        """Let these be the current vocabularies. Their tables are what they were then; `reindex` follows the commit.

        Raises
        ------
        OSError
            Files of an index that finds other keys are left. This can be repeated.
        """
        known = {each.entry.uuid: each for each in self.current.values()}
        self.current, self._outdated = {}, []
        for entry in entries:
            here = known.get(entry.uuid)
            same = here is not None and here.entry.counts == entry.counts
            if here is not None and here.tables.are(self._tables_of(entry)):
                here.restore(entry)
                self.current[entry.name] = here
                del known[entry.uuid]
            else:
                here, same = self._open_vocabulary(entry), False
            if not same:
                here.retire_index()
                self._outdated.append(here)
        for gone in known.values():
            gone.drop()

    def reindex(self) -> None:
        """Index the keys of vocabularies that `go_back` has changed, which are committed by now."""
        for each in self._outdated:
            each.reindex()
        self._outdated = []

    def adopt(self, fresh: VocabularyCatalog) -> None:
        """Become the vocabularies of a newer opening. Vocabularies that exist in both stay the same objects."""
        known = dict(self._committed)
        self.current = {}
        for each in fresh.current.values():
            here = known.pop(each.entry.uuid, None)
            self.current[each.entry.name] = here = each if here is None else here.adopt(each)
            here.join(self._runtime, self._tables.bound_to)
        for gone in known.values():
            gone.drop()
        self._committed = self.snapshot()
        fresh.clear()  # closing it must not close what was adopted

    def clear(self) -> None:
        """Forget all vocabularies without closing them: another catalog owns them now."""
        self.current, self._committed = {}, {}

    def detach_in_child(self) -> None:
        """Be readable in a forked child."""
        for each in self._all():
            each.detach_in_child()

    def release(self) -> None:
        """Release the memory of all vocabularies and of all tables."""
        for each in self._all():
            each.release()
        self._tables.release()

    def _all(self) -> list[KeyRows]:
        """List all vocabularies in the order in which to lock them, also dropped ones that a rollback may restore."""
        found = {each.entry.uuid: each for each in (*self._committed.values(), *self.current.values())}
        return [found[uuid] for uuid in sorted(found)]

    def _open_vocabulary(self, entry: VocabularyEntry) -> KeyRows:
        path = store_paths.index(self._runtime.path, entry.uuid)
        key_rows = KeyRows(self._runtime, entry, self._tables_of(entry), path)
        key_rows.join(self._runtime, self._tables.bound_to)
        self.current[entry.name] = key_rows
        return key_rows

    def _tables_of(self, entry: VocabularyEntry) -> dict[str, TableState]:
        return {what: self._tables.current[f"{entry.name}@{what}"] for what in table_shapes(entry)}


def check_optimizer(optimizer: object, table: str) -> None:
    """Refuse an optimizer for a table whose rows a vocabulary gives out.

    Raises
    ------
    ValueError
        It is to be equivalent to a dense one, which would have changed the rows of keys before these came.
    """
    if isinstance(optimizer, Optimizer) and optimizer.dense_equivalent and optimizer.changes_fresh_rows:
        msg = (
            f"table {table!r}: dense_equivalent with {optimizer!r} would change the row of a key in all steps before "
            f"it came; leave out its weight decay, max_norm and constraint, or dense_equivalent"
        )
        raise ValueError(msg)


def first_spec(
    key_rows: KeyRows | None, wanted: TableRequest, name: str, stream: str
) -> tuple[TableSpec, FirstRows | None]:
    """Check what is wanted of a new table; return its spec, and its first rows if they are given as such.

    Raises
    ------
    TypeError, ValueError
        Something about it is impossible.
    """
    if key_rows is not None:
        check_optimizer(wanted.optimizer, name)
    shape, rows_per_shard = _first_shape(key_rows, wanted)
    count = shape[0] if key_rows is None else key_rows.entry.rows
    kind, rows = initializers.resolve(wanted.initializer, shape, count)
    spec = new_spec(
        stream,
        shape,
        initializer=kind,
        optimizer=wanted.optimizer,
        counters=wanted.counters,
        rows_per_shard=rows_per_shard,
        max_shards=address_space.mappings_left(),
        precision=wanted.precision.checked(trains=wanted.optimizer is not None),
    )
    return replace(spec, padding_idx=_first_padding(key_rows, wanted.padding_idx, shape[0], name)), rows


def _first_shape(key_rows: KeyRows | None, wanted: TableRequest) -> tuple[tuple[int, int], int | None]:
    """Check the shape of a new table. If a vocabulary makes it grow, choose how many rows it begins with: whole shards.

    Raises
    ------
    TypeError, ValueError
        A number is impossible, or not exactly one of rows and vocabulary is given.
    """
    rows_per_shard = wanted.rows_per_shard
    if (key_rows is None) == (wanted.num_embeddings is None):
        msg = "pass either num_embeddings or the vocabulary that assigns the table's rows"
        raise ValueError(msg)
    if key_rows is None:
        return check_shape(wanted.num_embeddings, wanted.embedding_dim), rows_per_shard
    rows, dim = check_shape(max(1, key_rows.entry.rows), wanted.embedding_dim)
    if rows_per_shard is None:
        rows_per_shard = max(1, SHARD_BYTES[0] // (4 * dim))
    rows_per_shard = validation.count(rows_per_shard, "rows_per_shard", maximum=MAX_ROWS)
    return (-(-rows // rows_per_shard) * rows_per_shard, dim), rows_per_shard


def _first_padding(
    key_rows: KeyRows | None, padding_idx: object, num_embeddings: int, table: str
) -> int | None:
    """Check the row of padding of a new table; with a vocabulary, a row that no key gets.

    Raises
    ------
    TypeError, ValueError
        There is no such row.
    """
    if padding_idx is None:
        return None
    row = validation.padding_row(padding_idx, num_embeddings, table)
    if key_rows is not None and (row != padding_idx or row >= key_rows.entry.reserved):
        msg = (
            f"table {table!r}: padding_idx {padding_idx} is not among the {key_rows.entry.reserved} rows that "
            f"vocabulary {key_rows.entry.name!r} reserves: create it with reserved=1 or more, for rows without keys"
        )
        raise ValueError(msg)
    return row
