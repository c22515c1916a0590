"""What a person sees at a glance: lines for the terminal, tables for notebooks. Text out, no decisions."""

from __future__ import annotations

import contextlib
import html
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.formatting import plural, size
from shardemb.base.sizes import PAGE
from shardemb.commits import tags
from shardemb.compute import file_blocks, plan
from shardemb.engine import batch
from shardemb.errors import FormatError
from shardemb.exports import targets
from shardemb.format import store_paths
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike

    from shardemb.engine.table_state import TableState
    from shardemb.format.manifest import Commit, PartitionIdentity, TagEntry
    from shardemb.vocabulary.keyed_rows import KeyedRows


@dataclass(frozen=True)
class Facts:
    """What is shown about a table.

    Attributes
    ----------
    name : str
    num_embeddings, embedding_dim : int
    optimizer, initializer : str
        As they print.
    step : int
        Number of updates so far.
    state_columns : tuple of str
    rows_per_shard, num_shards : int
    nbytes : int
        Bytes of all rows with their state, whether they take disk space or not.
    changed_rows : int or None
        Number of rows that differ from the last commit; None if the table is closed.
    bytes_on_disk : int or None
        Disk space that the table takes; None if it was not measured.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    optimizer: str
    initializer: str
    step: int
    state_columns: tuple[str, ...]
    rows_per_shard: int
    num_shards: int
    nbytes: int
    changed_rows: int | None
    bytes_on_disk: int | None = None
    dtype: str = "float32"
    row_bytes: int = 0


@dataclass(frozen=True)
class Explanation:
    """What a lookup of a batch involves, see `Table.explain`; prints as a few lines.

    Attributes
    ----------
    ids, rows : int
        Ids of the batch, and the distinct rows among them.
    rows_in_memory, rows_out, rows_never_written : int
        How many of these rows changed and are in memory, changed and are in the spill file, and were never written. The
        last get their initial values without any access to the disk.
    shards, pages, pages_resident : int
        All other rows are read from that many shards, on that many pages of 4,096 bytes, of which `pages_resident` are
        in memory now.
    bytes_useful, bytes_read : int
        Bytes of the result that come from these pages, counting each row once, and bytes that have to be read from disk
        for them.
    path : {"warm", "cold", "paged"}
        Warm batches are gathered as they are. Cold ones are sorted, and all of their pages are requested ahead. While
        the table has rows in the spill file, a batch is processed part by part, and the rows of each are reloaded.
    tasks : int
        Tasks that the gathering is cut into.
    warming : float or None
        While the table is read into memory in the background: the share that this has been through.
    """

    ids: int
    rows: int
    rows_in_memory: int
    rows_out: int
    rows_never_written: int
    shards: int
    pages: int
    pages_resident: int
    bytes_useful: int
    bytes_read: int
    path: str
    tasks: int
    warming: float | None = None

    def __str__(self) -> str:
        read = (
            f"{self.bytes_read / self.bytes_useful:.1f} x as much" if self.bytes_useful else "nothing to read"
        )
        lines = [
            f"{plural(self.ids, 'id')}, {plural(self.rows, 'distinct row')}: "
            f"{self.rows_in_memory:,} changed and in memory, {self.rows_out:,} in the spill file, "
            f"{self.rows_never_written:,} never written",
            f"the rest is in {plural(self.shards, 'shard')}, on {plural(self.pages, 'page')}, "
            f"{self.pages_resident:,} of them in memory",
            f"{size(self.bytes_useful)} of them are needed; to read {size(self.bytes_read)} ({read})",
            f"{self.path}, in {plural(self.tasks, 'task')}",
        ]
        if self.warming is not None:
            lines.append(f"the table is being read into memory in the background: {self.warming:.0%} so far")
        return "\n".join(lines)


@dataclass(frozen=True)
class VocabularyFacts:
    """What is shown about a vocabulary.

    Attributes
    ----------
    name, key_type : str
    keys : int
        Number of keys that have a row.
    rows : int
        Number of rows given out so far.
    tables : tuple of str
        The tables whose rows it gives out.
    bytes_on_disk : int
        Disk space that keys and index take.
    """

    name: str
    key_type: str
    keys: int
    rows: int
    tables: tuple[str, ...]
    bytes_on_disk: int


@dataclass(frozen=True)
class TagFacts:
    """What is shown about a tag.

    Attributes
    ----------
    name : str
    commit : Commit
        The commit that it keeps.
    bytes_kept : int
        Disk space that it alone takes: what was overwritten or dropped since.
    """

    name: str
    commit: Commit
    bytes_kept: int


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds, see `Store.info`.

    Attributes
    ----------
    path : str
    uuid : str
        Identity of the store.
    commit : Commit or None
        The last commit.
    bytes_on_disk : int
        Disk space that the store takes.
    tables : tuple of Facts
    vocabularies : tuple of VocabularyFacts
    abandoned_exports : tuple of str
        What exports that were killed have left in the store's folder or next to it. The next export to the same target
        removes it.
    tags : tuple of TagFacts
    partition : PartitionIdentity or None
        Which part of a distributed store it is; prints as ``partition 3 of 16 of the store UUID``.
    """

    path: str
    uuid: str
    commit: Commit | None
    bytes_on_disk: int
    tables: tuple[Facts, ...]
    vocabularies: tuple[VocabularyFacts, ...] = ()
    abandoned_exports: tuple[str, ...] = ()
    tags: tuple[TagFacts, ...] = ()
    partition: PartitionIdentity | None = None


def tag_facts(store: Path, tagged: Sequence[TagEntry]) -> tuple[TagFacts, ...]:
    """Return what is shown about tags; without those that are being released, or are lost."""
    facts = []
    for each in tagged:
        folder = store_paths.tag(store, each.uuid)
        with contextlib.suppress(FormatError, FileNotFoundError):
            commit = tags.read_manifest(folder).commit
            assert commit is not None
            facts.append(TagFacts(each.name, commit, tags.bytes_kept(folder)))
    return tuple(facts)


def facts(table: TableState, *, measured: bool = False) -> Facts:
    """Return what is shown about a table; the disk space that it takes only if `measured`."""
    spec, training = table.spec, table.training
    return Facts(
        name=table.name,
        num_embeddings=spec.num_embeddings,
        embedding_dim=spec.embedding_dim,
        optimizer=repr(training.optimizer) if training.optimizer else "no optimizer",
        initializer=repr(spec.initializer),
        step=training.step,
        state_columns=tuple(spec.states),
        rows_per_shard=spec.rows_per_shard,
        num_shards=spec.num_shards,
        nbytes=spec.nbytes,
        changed_rows=table.changed_rows,
        dtype=spec.precision.dtype.label,
        row_bytes=spec.record_bytes,
        bytes_on_disk=files.allocated(table.shards.directory) if measured else None,
    )


def keyed_facts(keyed: KeyedRows, *, measured: bool = False) -> Facts:
    """Return what is shown about a table that is used by key: it has the rows given out, whatever room it has."""
    rows = keyed.num_rows
    nbytes = rows * keyed.table.spec.record_bytes
    return replace(facts(keyed.table, measured=measured), num_embeddings=rows, nbytes=nbytes)


def not_folded(path: Path, problem: Exception) -> str:
    """Return the warning of a store that closes with commits that are only in its log."""
    return (
        f"what is committed in {path} is safe in the log, but not in the shards yet ({problem}); "
        f"the next opening folds it"
    )


def lost(path: Path, commit: Commit | None) -> str:
    """Return the warning of a store that closes with uncommitted changes."""
    since = f"since commit {commit.id} (step {commit.step})" if commit else "(there was no commit)"
    return f"the changes of {path} {since} are lost: close() never commits; call commit()"


def one_line(facts: Facts) -> str:
    """Describe a table in one line.

    Examples
    --------
    >>> one_line(Facts("tokens", 1000, 8, "SGD(lr=0.1)", "Constant(value=0.0)", 3, (), 1024, 1, 32_000, 5))
    "Table 'tokens': 1,000 x 8 float32, SGD(lr=0.1), step 3, 1 shard, 5 changed rows not committed"
    """
    parts = [
        f"{facts.num_embeddings:,} x {facts.embedding_dim} {facts.dtype}",
        facts.optimizer,
        f"step {facts.step:,}",
        plural(facts.num_shards, "shard"),
    ]
    if facts.changed_rows is None:
        parts.append("closed")
    elif facts.changed_rows:
        parts.append(f"{plural(facts.changed_rows, 'changed row')} not committed")
    return f"Table {facts.name!r}: {', '.join(parts)}"


def describe(info: StoreInfo) -> str:
    """Describe a store in lines for a terminal."""
    commit = info.commit
    lines = [
        f"Store   {info.path}",
        f"Commit  {f'{commit.id} at step {commit.step}' if commit else 'none yet'}",
        f"Disk    {size(info.bytes_on_disk)}",
        *[f"Part    {info.partition}"] * bool(info.partition),
    ]
    if commit and commit.metadata:
        lines.append(f"Job     {json.dumps(commit.metadata)}")
    for facts in info.tables:
        lines += [
            "",
            f"Table   {facts.name}",
            f"  rows         {facts.num_embeddings:,} x {facts.embedding_dim} {facts.dtype}, "
            f"{facts.row_bytes:,} bytes each with state",
            f"  optimizer    {facts.optimizer}, step {facts.step:,}",
            f"  state        {', '.join(facts.state_columns) or 'none'}",
            f"  initializer  {facts.initializer}",
            f"  shards       {facts.num_shards:,} of {facts.rows_per_shard:,} rows",
            f"  size         {size(facts.nbytes)}, {size(facts.bytes_on_disk or 0)} on disk",
        ]
    for each in info.vocabularies:
        lines += [
            "",
            f"Vocabulary   {each.name}",
            f"  keys         {each.keys:,} {each.key_type}, {plural(each.rows, 'row')} given out",
            f"  tables       {', '.join(each.tables) or 'none'}",
            f"  size         {size(each.bytes_on_disk)} on disk",
        ]
    for tag in info.tags:
        lines += [
            "",
            f"Tag     {tag.name}",
            f"  commit       {tag.commit.id} at step {tag.commit.step}",
            f"  size         {size(tag.bytes_kept)} kept on disk for it",
        ]
    if info.abandoned_exports:
        lines += ["", "Left by killed exports; the next one to the same target removes it:"]
        lines += [f"  {path}" for path in info.abandoned_exports]
    return "\n".join(lines)


def abandoned_exports(store: Path) -> tuple[str, ...]:
    """Return the paths of what killed exports have left in a store's folder or next to it."""
    return tuple(str(path) for folder in (store.parent, store) for path in targets.abandoned(folder))


def headline(path: Path, num_tables: int, commit: Commit | None, state: str) -> str:
    """Describe a store in one line, with its state if that is not empty."""
    since = f"commit {commit.id} at step {commit.step}" if commit else "no commit yet"
    parts = [plural(num_tables, "table"), since, *[state] * bool(state)]
    return f"Store {str(path)!r}: {', '.join(parts)}"


def html_table(tables: Sequence[Facts], caption: str = "") -> str:
    """Describe tables as an HTML table, one row each."""
    head = ("table", "rows", "dim", "optimizer", "step", "shards", "size", "changed rows")
    rows = [
        (
            facts.name,
            f"{facts.num_embeddings:,}",
            str(facts.embedding_dim),
            facts.optimizer,
            f"{facts.step:,}",
            f"{facts.num_shards:,}",
            size(facts.nbytes),
            "closed" if facts.changed_rows is None else f"{facts.changed_rows:,}",
        )
        for facts in tables
    ]
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}{_row('th', head)}{''.join(_row('td', row) for row in rows)}</table>"


def heat_map(shares: Sequence[float], width: int = 64) -> list[str]:
    """Draw how full shards are: one character for each shard, in lines of `width` characters.

    If there are too many shards for 16 lines, several share a character.

    Examples
    --------
    >>> heat_map([0.0, 0.001, 0.3, 0.6, 1.0], width=3)
    [' ·░', '▓█']
    """
    per_cell = -(-len(shares) // (16 * width))
    cells = [shares[start : start + per_cell] for start in range(0, len(shares), per_cell)]
    text = "".join(_shade(sum(cell) / len(cell)) for cell in cells)
    return [text[start : start + width] for start in range(0, len(text), width)]


def _shade(share: float) -> str:
    return " " if share == 0 else "·░▒▓█"[min(4, int(5 * share))]


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def explanation(table: TableState, given: ArrayLike) -> Explanation:
    """Describe what a lookup of the weights of a batch involves."""
    runtime, shards, ids = table.runtime, table.live(), table.plan_read("weight", given).ids
    rows = plan.group(ids, shards.spec.num_embeddings).rows
    with runtime.lock:
        places = shards.overlay.places(rows)
        path = "paged" if shards.overlay.spilled else "cold" if shards.is_cold(ids, batch.SAMPLES) else "warm"
    in_files, written = places == rows, shards.were_written(rows)
    read = rows[in_files & written]
    pages = file_blocks.pages(read, shards.spec.record_bytes)
    resident, row_bytes = shards.count_resident(pages), shards.codec.shape_of("weight", "raw")[0]
    return Explanation(
        ids=ids.size,
        rows=rows.size,
        rows_in_memory=int(np.count_nonzero(places > rows)),
        rows_out=int(np.count_nonzero(places < 0)),
        rows_never_written=int(np.count_nonzero(in_files & ~written)),
        shards=np.unique(read // shards.spec.rows_per_shard).size,
        pages=pages.size,
        pages_resident=resident,
        bytes_useful=read.size * row_bytes,
        bytes_read=(pages.size - resident) * PAGE,
        path=path,
        tasks=batch.count_tasks(runtime, shards, ids),
        warming=runtime.warming.progress(shards),
    )
