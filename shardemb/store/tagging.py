"""Keeps the last commit of a store under a name, gives it up, and goes back to it.

Going back changes rows in memory as training does, and ends with one commit: all of it or nothing. Only rows in blocks
that were overwritten since are looked at, wherever a table still has the files that the tag has. What has another form
by now, or was dropped, is copied.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardemb.base.interrupts import signals_deferred
from shardemb.base.sizes import PAGE
from shardemb.commits import rewrite, tags, undo
from shardemb.engine import filling, shards
from shardemb.engine.table_state import TableState
from shardemb.engine.training import Training
from shardemb.errors import FormatError, ShardEmbError, TagExistsError
from shardemb.format import store_paths
from shardemb.format.manifest import TagEntry
from shardemb.format.spec import BYTES, KEYS, check_name, normalized
from shardemb.format.table_files import TableLocation
from shardemb.memory import past_blocks
from shardemb.storage import address_space, checksums, files, folders, table_folder
from shardemb.vocabulary import key_records, key_tables, keys
from shardemb.vocabulary.key_rows import SLICE_ROWS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.engine.shards import Shards
    from shardemb.format.manifest import Commit, Manifest, TableEntry, VocabularyEntry
    from shardemb.session.session import Session
    from shardemb.vocabulary.key_records import Words
    from shardemb.vocabulary.key_rows import KeyRows

BLOCKS = 4096
"""Blocks whose rows are compared at a time."""


# ---- keeping ----------------------------------------------------------------------------------------------------


def tag(session: Session, name: str, *, replaces: bool) -> Commit:
    """Keep the last commit; see `Store.tag`."""
    runtime, name = session.runtime, check_name(name)
    with session.settled(runtime.writing):
        journal = session.journal
        _require_new(session, name, replaces=replaces)
        journal.drain()  # so that the files are exactly the last commit
        _require_new(session, name, replaces=replaces)  # again: this has released the lock
        commit = session.last_commit
        if commit is None:
            msg = f"the store {runtime.path} has no commit yet that could be kept; call commit() first"
            raise ShardEmbError(msg)
        for each in session.tables.committed.values():
            filling.take_back(runtime, each.shards)  # or the tag would have them with the files
        entry = TagEntry(name, str(uuid.uuid4()))
        folder = tags.make(runtime.path, entry.uuid, runtime.committed, session.tables.locations())
        others = tuple(each for each in session.tag_entries() if each.name != name)
        with signals_deferred():
            try:
                runtime.undo.add(entry.uuid, tags.keeper(runtime.path, entry))
                journal.base.set_tags((*others, entry))
            except BaseException:
                if entry not in session.tag_entries():
                    runtime.undo.retain({each.uuid for each in session.tag_entries()})
                    files.remove_tree(folder)
                raise
            _forget_others(session)
        return commit


def _require_new(session: Session, name: str, *, replaces: bool) -> None:
    if not replaces and any(each.name == name for each in session.tag_entries()):
        msg = f"the store {session.runtime.path} already has a tag {name!r}; pass replace=True to move it, or untag it"
        raise TagExistsError(msg)


def untag(session: Session, name: str) -> None:
    """Keep a commit no longer; see `Store.untag`."""
    runtime = session.runtime
    with session.settled(runtime.writing):
        session.journal.wait()  # for a fold, which may be keeping something
        runtime.check_sound()  # after it
        entry = tags.find(runtime.path, session.tag_entries(), normalized(name))
        with signals_deferred():
            session.journal.base.set_tags(tuple(each for each in session.tag_entries() if each != entry))
            _forget_others(session)


def _forget_others(session: Session) -> None:
    """Give up what the base does not name any more. What is left after an error, the next opening removes."""
    runtime, known = session.runtime, session.tag_entries()
    runtime.undo.retain({each.uuid for each in known})
    tags.sweep(runtime.path, known)


# ---- going back -------------------------------------------------------------------------------------------------


class _Then(NamedTuple):
    """A table as a tag has it.

    Attributes
    ----------
    entry : TableEntry
    number : int
        Its position in the manifest of the tag.
    location : TableLocation
        In the tag's folder.
    shards : Shards
        Its files, and over them what was kept.
    blocks : ndarray of int64
        The blocks that are kept.
    """

    entry: TableEntry
    number: int
    location: TableLocation
    shards: Shards
    blocks: Int64Array


def restore(session: Session, name: str) -> Commit:
    """Go back to a commit that was kept; see `Store.restore`."""
    runtime = session.runtime
    runtime.check_whole()
    with session.settled(session.vocabularies.all_locked):
        runtime.check_publishable()
        entry = tags.find(runtime.path, session.tag_entries(), normalized(name))
        session.journal.drain()
        session.rollback()
        entry = tags.find(runtime.path, session.tag_entries(), entry.name)  # draining has released the lock
        folder = store_paths.tag(runtime.path, entry.uuid)
        held, before = tags.read_manifest(folder), runtime.committed.commit
        assert held.commit is not None
        metadata = {**held.commit.metadata, "restored": {"tag": entry.name, "commit": held.commit.id}}
        with session.vocabularies.reassigning():
            try:
                _go_back(session, folder, held)
                commit = session.commit(held.commit.step, metadata)
            except BaseException:
                # But not if it was committed, or if it may have been, which the next opening finds out.
                if runtime.committed.commit is before and not runtime.poisoned:
                    session.rollback()
                raise
            try:
                session.vocabularies.reindex()
            except BaseException as error:  # keys would not be found
                runtime.poisoned = f"its keys could not be indexed ({error})"
                raise
        return commit


def _go_back(session: Session, folder: Path, held: Manifest) -> None:
    """Let tables and vocabularies be what they were, in memory, and in new folders."""
    known = {each.spec.stream: each for each in session.tables.current.values()}
    tables: dict[str, TableState] = {}
    for then in _tables_of(folder, held):
        table = known.get(then.shards.spec.stream)
        if table is not None and _takes_form(table, then):
            _take_back_rows(table, then)
        else:
            table = _copied(session, folder, then)
        entry = then.entry
        table.restore(entry.name, table.shards, Training(entry.optimizer, entry.step, entry.frozen))
        tables[entry.name] = table
    session.tables.replace(tables)
    session.vocabularies.go_back(held.vocabularies)


# ---- comparing --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _compared_with(session: Session, name: str) -> Iterator[tuple[Path, Manifest]]:
    """Keep a store as it is while it is compared with a tag; yield the folder of the tag, and its manifest.

    In a writer, nothing is folded meanwhile. What another process folds after this began may or may not be found.
    """
    runtime = session.runtime
    with session.settled(runtime.writing) if runtime.writable else runtime.lock:
        if runtime.writable:
            session.journal.drain()
        entry = tags.find(runtime.path, session.tag_entries(), normalized(name))
        folder = store_paths.tag(runtime.path, entry.uuid)
        yield folder, tags.read_manifest(folder)


def changed_rows(session: Session, table: TableState, name: str) -> Int64Array:
    """List the rows of a table whose vectors differ from those of a commit that was kept; see `Store.changed_rows`."""
    with _compared_with(session, name) as (folder, held):
        now = table.live()
        found = _tables_of(folder, held, stream=now.spec.stream)
        then = found[0] if found else None
        if then is None or not _is_comparable(now, then):
            return np.arange(now.spec.num_embeddings)
        shared = min(now.spec.num_embeddings, then.shards.spec.num_embeddings)
        dirty = now.overlay.dirty_rows()
        pieces = [_differing(now, then, dirty[dirty < shared])]
        pieces += [_differing(now, then, rows[rows < shared]) for rows in _rows_to_compare(now, then)]
        pieces.append(np.arange(shared, now.spec.num_embeddings))
        return np.unique(np.concatenate(pieces))


@dataclass(frozen=True)
class KeyChanges:
    """How a vocabulary differs from what it was.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
        Rows with a key that they had not then, ascending: those of new keys, and of keys that have moved.
    removed : ndarray of int64, or of str or bytes objects, shape (m,)
        Keys that have no row any more, in the order of the rows that they had.
    """

    rows: Int64Array
    removed: NDArray[Any]


def changed_keys(session: Session, vocabulary: KeyRows, name: str) -> KeyChanges:
    """Compare which key has which row with a commit that was kept; see `Store.changed_keys`."""
    with _compared_with(session, name) as (folder, held):
        vocabulary.check_live()
        what = vocabulary.entry
        was = held.vocabulary(what.uuid)
        if was is None:
            return KeyChanges(vocabulary.live_rows(0, what.rows), vocabulary.keys_of(np.empty(0, np.int64)))
        tables = [
            session.tables.current[f"{what.name}@{kind}"].live()
            for kind in what.table_kinds
            if kind in (KEYS, BYTES)
        ]
        then = [_tables_of(folder, held, stream=each.spec.stream)[0] for each in tables]
        rows, gone = [np.empty(0, np.int64)], dict[int, Any]()
        for some in _rows_of_keys(tables[0], then[0], was.rows, what.rows):
            before, had = _key_records(then[0].shards, some, was)
            after, have = _key_records(tables[0], some, what)
            same = had & have & key_records.have_equal_keys(before, after)
            rows.append(some[have & ~same])
            lost = had & ~same
            found = keys.restored(
                key_tables.keys_in(before[lost], partial(_cells, then[-1].shards)), vocabulary.key_type
            )
            missing = vocabulary.lookup(found) < 0
            gone.update(zip(some[lost][missing].tolist(), found[missing].tolist(), strict=True))
        removed = keys.array_of([gone[row] for row in sorted(gone)], vocabulary.key_type)
        return KeyChanges(np.unique(np.concatenate(rows)), removed)


def _rows_of_keys(now: Shards, then: _Then, before: int, after: int) -> Iterator[Int64Array]:
    """Yield all rows that may have another key, some at a time, of `before` rows then and of `after` rows now."""
    yield now.overlay.dirty_rows()
    yield from _rows_to_compare(now, then)
    first, last = sorted((before, after))
    for start in range(first, last, SLICE_ROWS):
        yield np.arange(start, min(start + SLICE_ROWS, last))


def _key_records(of: Shards, rows: Int64Array, entry: VocabularyEntry) -> tuple[Words, NDArray[np.bool_]]:
    """Read the records of keys of rows, some of which may not be there; return also which of the rows have a key."""
    words = np.zeros((rows.size, of.spec.width), np.uint32)
    there = (rows >= entry.reserved) & (rows < min(entry.rows, of.spec.num_embeddings))
    words[there] = _records(of, rows[there]).view(np.uint32)
    return words, there & key_records.are_live(words)


def _cells(of: Shards, rows: Int64Array) -> Words:
    """Read rows of the bytes of strings; a damaged record may ask for some that are not there."""
    words: Words = _records(of, np.minimum(rows, of.spec.num_embeddings - 1)).view(np.uint32)
    return words


def _is_comparable(now: Shards, then: _Then) -> bool:
    """Return whether a table has the form that it had, but for the number of rows."""
    wanted = then.shards.spec
    like = replace(now.spec, uuid=wanted.uuid, num_embeddings=wanted.num_embeddings)
    return replace(like, padding_idx=wanted.padding_idx) == wanted


def _differing(now: Shards, then: _Then, rows: Int64Array) -> Int64Array:
    """Return those of some rows whose vectors differ."""
    width = now.spec.weight_width
    vectors = [
        np.ascontiguousarray(_records(of, rows)[:, :width]).view(np.uint8) for of in (now, then.shards)
    ]
    found: Int64Array = rows[(vectors[0] != vectors[1]).any(axis=1)]
    return found


def _tables_of(folder: Path, held: Manifest, stream: str | None = None) -> list[_Then]:
    """Open the tables of a tag, or the one of a stream, with what was kept of them over their files.

    Raises
    ------
    FormatError
        Something of the tag is lost, or not what was written.
    """
    places, kept = tags.locations(folder, held), tags.kept_sums(folder)
    nothing = np.empty(0, np.int64), np.empty(0, np.uint64)
    found = {}
    for number, (entry, location) in enumerate(zip(held.tables, places, strict=True)):
        if stream is not None and location.spec.stream != stream:
            continue
        blocks, sums = kept.get(number, nothing)
        written = checksums.read_sums(location.checksums_path, 0, location.spec.num_blocks)[blocks]
        if (checksums.content_sums(written) != sums).any():
            msg = f"what the tag has kept of table {entry.name!r} is not what was written; see verify() of the tag"
            raise FormatError(msg)
        view = shards.open_existing(location.directory, may_miss=False, may_create=False)
        found[number] = _Then(entry, number, location, view, blocks)
    for records in undo.read(folder):
        for number, blocks, content in tags.by_table(records):
            if number not in found:
                continue
            view = found[number].shards
            past_blocks.put_back(view.spec, view.bytes, view.present, blocks, content)
    return list(found.values())


def _takes_form(table: TableState, then: _Then) -> bool:
    """Give a table the number of rows that it had; return whether it then has the form that it had."""
    now, wanted = table.shards.spec, then.shards.spec
    if now.num_embeddings == wanted.num_embeddings:
        return replace(now, uuid=wanted.uuid) == wanted
    if replace(rewrite.resized(now, wanted.num_embeddings), uuid=wanted.uuid) != wanted:
        return False
    nothing = np.empty((0, now.width), now.element)
    table.resize_and_write(wanted.num_embeddings, np.empty(0, np.int64), nothing)
    return True


def _take_back_rows(table: TableState, then: _Then) -> None:
    """Let rows that differ from what they were be that again, as changed rows."""
    now = table.shards
    for rows in _rows_to_compare(now, then):
        records = _records(then.shards, rows)
        differ = (records.view(np.uint8) != _records(now, rows).view(np.uint8)).any(axis=1)
        now.adopt_records(rows[differ], records[differ], table.runtime.budget)


def _rows_to_compare(now: Shards, then: _Then) -> Iterator[Int64Array]:
    """Yield all rows that may differ, some at a time: those in blocks that were kept, and in files that are others."""
    spec = then.shards.spec
    size, count, per_shard = spec.record_bytes, spec.num_embeddings, spec.shard_bytes // PAGE
    blocks = then.blocks[then.blocks < spec.num_shards * per_shard]
    for start in range(0, blocks.size, BLOCKS):
        some = blocks[start : start + BLOCKS]
        first, last = some * PAGE // size, (some * PAGE + PAGE - 1) // size
        most = int((last - first).max()) + 1
        rows = np.unique(np.minimum(first[:, None] + np.arange(most), last[:, None]))
        yield rows[rows < count]
    for number in range(spec.num_shards):
        file = then.location.shard(number)
        if files.names(file.path)[1] == files.names(now.shard_path(number))[1]:
            continue
        _require_intact(then, number)
        step = BLOCKS * max(1, PAGE // size)
        for begin in range(*file.rows, step):
            yield np.arange(begin, min(begin + step, file.rows[1]))


def _require_intact(then: _Then, number: int) -> None:
    """Compare a file of a tag with its checksums, where it was not overwritten."""
    file = then.location.shard(number)
    memory = address_space.AddressRange(folders.WINDOW_BYTES)
    memory.map_zeros(0, folders.WINDOW_BYTES)
    for start in range(0, file.nbytes, folders.WINDOW_BYTES):
        stop = min(start + folders.WINDOW_BYTES, file.nbytes)
        differing = checksums.differing_blocks(then.location, file, start, stop, memory)
        if np.setdiff1d(differing, then.blocks).size:
            msg = f"{file.path} is damaged; verify() of the tag lists the rows"
            raise FormatError(msg)


def _records(of: Shards, rows: Int64Array) -> NDArray[Any]:
    """Copy the records of rows; those that were never written have their initial ones."""
    records = np.empty((rows.size, of.spec.width), of.spec.element)
    of.overlay.pack(rows, records.ctypes.data)
    fresh = np.flatnonzero((of.overlay.places(rows) == rows) & ~of.were_written(rows))
    if fresh.size:
        records[fresh] = of.initial_records(rows[fresh])
    return records


def _copied(session: Session, folder: Path, then: _Then) -> TableState:
    """Make a table again from a tag's, in a folder of its own."""
    runtime, entry = session.runtime, then.entry
    spec = replace(then.shards.spec, uuid=str(uuid.uuid4()))
    new = TableLocation(spec, store_paths.parked(runtime.path, spec.uuid))
    try:
        documents = folders.new_documents(spec, then.location.directory)
        table_folder.write_documents(new.directory, documents)
        for source, target in _file_pairs(then.location, new):
            files.create_sparse(target, files.size(source) or 0)
            folders.copy_data(source, target, files.size(source) or 0)
        tags.put_back(folder, {then.number: (then.location, new)})
        mapped = shards.open_existing(new.directory, may_miss=False, may_create=False)
    except BaseException:
        files.remove_tree(new.directory)
        raise
    training = Training(entry.optimizer, entry.step, entry.frozen)
    return TableState(runtime, entry.name, mapped, training, entry.vocabulary)


def _file_pairs(old: TableLocation, new: TableLocation) -> Iterable[tuple[Path, Path]]:
    pairs = zip(old.expected_files(), new.expected_files(), strict=True)
    return ((source, target) for (source, _), (target, _) in pairs)
