"""The set of a store's vocabularies: as it is now, and as of the last commit; and the tables that are bound to them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from shardemb import folders
from shardemb.errors import ShardEmbError, VocabularyExistsError, VocabularyNotFoundError
from shardemb.initializers import Constant
from shardemb.keyed import KeyedTable
from shardemb.keystore import table_shapes
from shardemb.report import Damage, VocabularyFacts
from shardemb.spec import new_spec
from shardemb.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardemb.manifest import Manifest, VocabularyRecord
    from shardemb.runtime import Runtime
    from shardemb.table import Table
    from shardemb.tables import Tables


INDEX_IS_WRONG = "is not what was written; close the store and remove it: the next opening makes it anew"


class Vocabularies:
    """The vocabularies of a store. Everything that changes it is under the store's lock.

    Attributes
    ----------
    now : dict of str to Vocabulary
        By name.
    """

    def __init__(self, runtime: Runtime, tables: Tables) -> None:
        self._runtime, self._tables = runtime, tables
        self.now: dict[str, Vocabulary] = {}
        self._committed: dict[str, Vocabulary] = {}
        self._keyed: dict[Table, KeyedTable] = {}

    def take_up(self, manifest: Manifest) -> None:
        """Take up those of a commit; their tables are here already."""
        number = manifest.commit.id if manifest.commit else 0
        for record in manifest.vocabularies:
            opened = self._join(record)
            opened._settle(number)
            opened._take_up(number)
        self._committed = {each._record().uuid: each for each in self.now.values()}
        if self._runtime.writable:
            folders.keep_indexes(self._runtime.path, self._committed)

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Hold the store's lock while no vocabulary is being changed, not even by one that waits for room.

        Keys that were being added could otherwise have rows that are gone, or that a table bound meanwhile has not.
        """
        while True:
            those = self._all()
            with contextlib.ExitStack() as stack:
                for each in those:
                    stack.enter_context(each._lock)
                stack.enter_context(self._runtime.changing())
                if self._all() == those:
                    yield
                    return

    def create(self, record: VocabularyRecord, max_shards: int) -> Vocabulary:
        """Make a vocabulary and its tables; part of the store with the next commit."""
        if record.name in self.now:
            msg = f"the store {self._runtime.path} already has a vocabulary {record.name!r}"
            raise VocabularyExistsError(msg)
        made: list[str] = []
        try:
            for what, (rows, width, rows_per_shard) in table_shapes(record).items():
                name = f"{record.name}@{what}"
                spec = new_spec(
                    self._tables.free_stream(name),
                    (rows, width),
                    initializer=Constant(0.0),
                    optimizer=None,
                    rows_per_shard=rows_per_shard,
                    max_shards=max_shards,
                )
                self._tables.create(self._runtime, name, spec)
                made.append(name)
        except BaseException:
            for name in made:
                self._tables.drop(name)
            raise
        return self._join(record)

    def drop(self, name: str) -> None:
        """Take a vocabulary out of those of now, to which no table is bound."""
        vocabulary = self.find(name)
        bound = [table.name for table in self._bound(vocabulary._record().uuid)]
        if bound:
            msg = f"tables {', '.join(map(repr, bound))} are bound to vocabulary {name!r}; drop them first"
            raise ShardEmbError(msg)
        vocabulary._drop()
        del self.now[name]
        for what in table_shapes(vocabulary._record()):
            self._tables.drop(f"{name}@{what}")

    def find(self, name: str) -> Vocabulary:
        """Return the vocabulary of a name.

        Raises
        ------
        VocabularyNotFoundError
            There is none.
        """
        if name not in self.now:
            names = ", ".join(map(repr, self.now)) or "none"
            msg = f"the store {self._runtime.path} has no vocabulary {name!r}; its vocabularies: {names}"
            raise VocabularyNotFoundError(msg)
        return self.now[name]

    def keyed(self, table: Table) -> Table | KeyedTable:
        """Return a table as its users see it: by keys, where it is bound to a vocabulary."""
        if table._vocabulary is None:
            return table
        if table not in self._keyed:
            found = next(each for each in self.now.values() if each._record().uuid == table._vocabulary)
            self._keyed[table] = KeyedTable(table, found)
        return self._keyed[table]

    def damage(self, tables: Sequence[str] | None) -> list[Damage]:
        """Tell whose index is not what was written, of all or those whose tables are named."""
        return [
            Damage(
                name, None, None, str(folders.index(self._runtime.path, each._record().uuid)), INDEX_IS_WRONG
            )
            for name, each in ((f"{name}@keys", each) for name, each in self.now.items())
            if (tables is None or name in tables) and not each._check_index()
        ]

    def facts(self) -> tuple[VocabularyFacts, ...]:
        """Return what is told about them."""
        facts = []
        for name, each in self.now.items():
            stats, tables = each.stats(), self._bound(each._record().uuid)
            facts.append(
                VocabularyFacts(
                    name=name,
                    key_type=each.key_type,
                    keys=len(each),
                    rows=each.num_rows,
                    tables=tuple(table.name for table in tables),
                    bytes_on_disk=stats["bytes_on_disk"] + stats["index_bytes_on_disk"],
                )
            )
        return tuple(facts)

    def records(self) -> tuple[VocabularyRecord, ...]:
        """Return what a commit would say about them."""
        return tuple(each._record() for each in self.now.values())

    def settle(self, commit: int) -> None:
        """Take those of now as those of a commit."""
        for each in self.now.values():
            each._settle(commit)
        self._committed = {each._record().uuid: each for each in self.now.values()}

    def checkpoint(self) -> None:
        """Write down what an opening would take long to learn again; not under the store's lock."""
        for each in list(self.now.values()):
            each._checkpoint()

    def restore(self, records: Sequence[VocabularyRecord]) -> None:
        """Go back to those of the last commit."""
        kept = {record.uuid for record in records}
        for each in self.now.values():
            if each._record().uuid not in kept:  # lookups of the others go on
                each._drop()
        self.now = {record.name: self._committed[record.uuid] for record in records}
        for record in records:
            self.now[record.name]._restore(record)

    def adopt(self, fresh: Vocabularies) -> None:
        """Become those of a newer opening; those that were here already stay the same objects."""
        known = dict(self._committed)
        self.now = {}
        for each in fresh.now.values():
            here = known.pop(each._record().uuid, None)
            self.now[each.name] = here = each if here is None else here._adopt(each)
            here._join(self._runtime, self._bound)
        for gone in known.values():
            gone._drop()
        self._committed = {each._record().uuid: each for each in self.now.values()}
        fresh.now, fresh._committed = {}, {}  # they stay open when that is closed

    def release(self) -> None:
        """Let go of the memory of all of them, and of all tables."""
        for each in self._all():
            each._release()
        self._tables.release()

    def _all(self) -> list[Vocabulary]:
        """List them, also those that were dropped since the last commit, in an order that all threads have."""
        found = {each._record().uuid: each for each in (*self._committed.values(), *self.now.values())}
        return [found[uuid] for uuid in sorted(found)]

    def _join(self, record: VocabularyRecord) -> Vocabulary:
        tables = {what: self._tables.now[f"{record.name}@{what}"] for what in table_shapes(record)}
        path = folders.index(self._runtime.path, record.uuid)
        vocabulary = Vocabulary(self._runtime, record, tables, path)
        vocabulary._join(self._runtime, self._bound)
        self.now[record.name] = vocabulary
        return vocabulary

    def _bound(self, identity: str) -> list[Table]:
        return [table for table in self._tables.now.values() if table._vocabulary == identity]
