"""An index of a table: a graph of codes in a file of the user's. It finds candidates, and the table has the scores.

The file holds the graph, then the checksums that the blocks of the table had when it was built, then the rows that
changed meanwhile, and then a document that describes all this. Whatever may have changed since is searched exactly, so
an index is never out of date; it only becomes slower.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base import validation
from shardemb.base.paths import local_path
from shardemb.base.progress import track
from shardemb.errors import FormatError, ShardEmbError
from shardemb.exports import targets
from shardemb.format import documents
from shardemb.search import changed_rows
from shardemb.search.candidates import NOTHING, Candidates, hold_values
from shardemb.search.changed_rows import ChangedRows
from shardemb.search.exact import Asked, SearchResult, find, score_again, shown, written
from shardemb.search.graph import Encoder, Graph, require_usearch
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from shardemb.base.progress import Progress
    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.engine.shards import Shards
    from shardemb.engine.table_state import TableState
    from shardemb.search.metrics import MetricName

LINKS, EFFORT = 7, 256
"""Links of a row in the graph by default, and candidates among which they are chosen.

Fewer links than usearch has, because they would take more bytes than the codes; what that costs in recall, better
chosen ones and more candidates give back.
"""

CANDIDATES = 96
"""Rows that the graph proposes for each query, unless k or the size of the graph asks for more."""

SAMPLE, ENOUGH = 16_384, 1024
"""Rows by which the scale of the codes is chosen, and how many of them must not be zeros."""

BLOCK_ROWS = 16_384
"""Rows that are added at a time."""

MANY = 0.05
"""The share of changed rows from which the index says that it should be built again."""

_MAGIC = b"shardemb index 1"
_END = 32
"""Bytes at the end of the file: the length of the document, its checksum, and the magic."""


@dataclass(frozen=True)
class Header:
    """What an index says about itself.

    Attributes
    ----------
    table : str
        The uuid of the table.
    commit, step : int
        The last commit when it was built, 0 for none; the step of the table.
    rows : int
        Rows of the table.
    encoder : Encoder
    graph_bytes : int
    blocks, changing : int
        How many checksums follow the graph, and how many rows follow these.
    """

    table: str
    commit: int
    step: int
    rows: int
    encoder: Encoder
    graph_bytes: int
    blocks: int
    changing: int

    def to_bytes(self) -> bytes:
        """Return the document with what follows it."""
        document = json.dumps({**vars(self), "encoder": self.encoder.to_json()}).encode()
        numbers = np.array([len(document), documents.checksum(document)], np.uint64)
        return document + numbers.tobytes() + _MAGIC

    @classmethod
    def read(cls, path: Path) -> Header:
        """Read and check the document of a file.

        Raises
        ------
        FileNotFoundError, OSError
            The file cannot be read.
        FormatError
            It is no index, or damaged.
        """
        size = files.size(path)
        if size is None:
            msg = f"there is no index {path}; make one with table.build_index"
            raise FileNotFoundError(msg)
        with files.opened(path, os.O_RDONLY) as descriptor:
            end = bytes(files.read_at(descriptor, _END, size - _END, path)) if size >= _END else b""
            length, checksum = np.frombuffer(end[:16].ljust(16), np.uint64).tolist()
            if end[16:] != _MAGIC or length > size - _END:
                msg = f"{path} is no index of a table, or only a part of one; build it again"
                raise FormatError(msg)
            document = bytes(files.read_at(descriptor, length, size - _END - length, path))
        if documents.checksum(document) != checksum:
            msg = f"the index {path} is damaged; build it again"
            raise FormatError(msg)
        content = json.loads(document)
        found = cls(**{**content, "encoder": Encoder.from_json(content["encoder"])})
        if found.graph_bytes + 8 * (found.blocks + found.changing) + length + _END != size:
            msg = f"the index {path} is damaged: it does not have the size that it says; build it again"
            raise FormatError(msg)
        return found


# ---- building -----------------------------------------------------------------------------------------------------


def build(table: TableState, path: object, metric: MetricName, links: int, progress: Progress) -> Index:
    """Build an index of a table's last commit; see `Table.build_index`."""
    require_usearch()
    _require_indexable(table, metric)
    links = validation.count(links, "links", minimum=2, maximum=1024)
    target = targets.checked(path, table.name, folder=False)
    shards = _folded(table)
    then = np.concatenate([changed_rows.sums(shards, *each) for each in changed_rows.windows(shards)])
    commit, step = table.runtime.committed.commit, table.training.step
    encoder = Encoder.of(_sample(table), metric)
    graph, changing = _graph(table, Graph.empty(encoder.dim, links, EFFORT), encoder, progress)
    if table.live() is not shards:
        msg = f"table {table.name!r} was resized or resharded while its index was built; build it again"
        raise ShardEmbError(msg)
    with targets.staged(target, ()) as temporary:
        graph.write_to(temporary)
        nbytes = files.size(temporary) or 0
        header = Header(
            table=shards.spec.uuid,
            commit=commit.id if commit else 0,
            step=step,
            rows=shards.spec.num_embeddings,
            encoder=encoder,
            graph_bytes=nbytes,
            blocks=then.size,
            changing=changing.size,
        )
        with files.opened(temporary, os.O_RDWR) as descriptor:
            files.write(
                descriptor, then.tobytes() + changing.tobytes() + header.to_bytes(), nbytes, temporary
            )
            files.sync(descriptor, temporary)
    return open_index(table, target)


def _require_indexable(table: TableState, metric: MetricName) -> None:
    spec = table.live().spec
    validation.choice(metric, ("cosine", "dot", "l2"), "metric", table.name)
    if spec.precision.is_raw:
        msg = f"table {table.name!r} holds raw bytes, which cannot be compared"
        raise ValueError(msg)
    if spec.is_caught_up:
        msg = (
            f"table {table.name!r} has an optimizer with dense_equivalent=True, by which each step changes all rows: "
            f"an index would be out of date after the next one; use search()"
        )
        raise ValueError(msg)


def _folded(table: TableState) -> Shards:
    """Return the memory of a table whose files hold all of it.

    Raises
    ------
    ShardEmbError
        Changes are not committed.
    """
    runtime = table.runtime
    if table.changed_rows:
        msg = (
            f"table {table.name!r} has {table.changed_rows} changed rows that are not committed; commit first"
        )
        raise ShardEmbError(msg)
    if runtime.writable and runtime.owned:
        with runtime.writing():
            runtime.folds.drain()
    return table.live()


def _blocks(table: TableState) -> Iterator[tuple[Int64Array, Float32Array, Int64Array]]:
    """Yield the rows that were written, a block at a time: ids, rows, and the ids of those that change meanwhile.

    The latter are left out: a rollback could undo what was read of them, and no checksum would tell.
    """
    shards, candidates = table.live(), Candidates.checked(table, None)
    for block in candidates.blocks(BLOCK_ROWS):
        ids = candidates.ids(block, BLOCK_ROWS)
        while True:
            version = shards.overlay.version
            dirty = shards.overlay.are_dirty(ids)
            rows = table.read_here("weight", ids)
            dirty |= shards.overlay.are_dirty(ids)
            if version is None or version == shards.overlay.version:
                break
        good = ~dirty & hold_values(shards, ids) & np.isfinite(rows).all(axis=1)
        yield ids[good], rows[good], ids[dirty]


def _sample(table: TableState) -> Float32Array:
    """Return rows that are not zeros, evenly spread; if there are few such rows, the first ones."""
    count = table.live().spec.num_embeddings
    ids = np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64))
    ids = ids[hold_values(table.live(), ids)]
    rows = _not_zeros(table.read("weight", ids))
    if len(rows) > ENOUGH:
        return rows
    first = [rows[:0]]
    for _, some, _ in _blocks(table):
        first.append(_not_zeros(some))
        if sum(map(len, first)) > ENOUGH:
            break
    return np.concatenate(first)


def _not_zeros(rows: Float32Array) -> Float32Array:
    good: Float32Array = rows[np.isfinite(rows).all(axis=1) & rows.any(axis=1)]
    return good


def _graph(table: TableState, graph: Graph, encoder: Encoder, progress: Progress) -> tuple[Graph, Int64Array]:
    """Add the rows of a table to a graph; return it, and the rows that changed meanwhile."""
    changing = [np.empty(0, np.int64)]
    count = table.live().spec.num_embeddings
    with track(count, "building the index", progress=progress) as advance:
        for ids, rows, dirty in _blocks(table):
            directed = rows.any(axis=1) if encoder.metric == "cosine" else np.ones(ids.size, np.bool_)
            graph.add(ids[directed], encoder.rows(rows[directed]), table.runtime.threads)
            changing.append(dirty)
            advance(min(BLOCK_ROWS, count))
            count -= BLOCK_ROWS
    return graph, np.concatenate(changing)


# ---- using it -----------------------------------------------------------------------------------------------------


def open_index(table: TableState, path: object) -> Index:
    """Open an index of a table; see `Table.open_index`."""
    found = local_path(path, f"table {table.name!r}: its index")
    header = Header.read(found)
    index = Index(table, found, header, Graph.view(found))
    index.check()
    return index


@dataclass
class Index:
    """An index of a table, as `Table.build_index` and `Table.open_index` return it.

    Its file is mapped, not loaded. Safe from any thread, also concurrently with changes of the table.

    Attributes
    ----------
    path : Path
    metric : str
        What it compares rows by.
    """

    _table: TableState = field(repr=False)
    path: Path
    _header: Header = field(repr=False)
    _graph: Graph = field(repr=False)
    _warned: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self._changing = _changing(self.path, self._header)
        self._changed = ChangedRows(self._table, partial(_sums, self.path, self._header))

    @property
    def metric(self) -> MetricName:
        """What it compares rows by."""
        return self._header.encoder.metric

    def __len__(self) -> int:
        """Return the number of rows in it."""
        return len(self._graph)

    def check(self) -> None:
        """Raise `ShardEmbError` if the index is one of another table, or of another form of this one."""
        spec = self._table.live().spec
        if (spec.uuid, spec.num_embeddings) != (self._header.table, self._header.rows):
            msg = (
                f"the index {self.path} was not built for table {self._table.name!r} as it is now, with "
                f"{spec.num_embeddings} rows: it was resized or resharded, or is another one; build the index again"
            )
            raise ShardEmbError(msg)

    def changed_rows(self) -> Int64Array:
        """List the rows that may have changed since the index was built, which a search looks at one by one.

        Returns
        -------
        ndarray of int64, shape (n,)
            Ascending. Rows that share a block of 4 KiB of the files with a changed one are among them.

        Raises
        ------
        ShardEmbError, StoreClosedError, TableNotFoundError, OSError
            As `search`.
        """
        self.check()
        return np.union1d(self._changing, self._changed.list())

    def search(self, queries: ArrayLike, k: int, *, candidates: int | None = None) -> SearchResult:
        """Find the k rows that are nearest to each query: probably all of them, with exact scores.

        Parameters
        ----------
        queries : array_like of float, shape (q, embedding_dim), or (embedding_dim,) for one
            As for `Table.search`.
        k : int
            How many rows to find for each query.
        candidates : int, optional
            How many rows the graph proposes for each query; they are looked up in one call, and the best are returned.
            More of them find more of the nearest rows, and take longer. By default 96, but at least 4 times `k`, and at
            least a quarter of the square root of the number of rows: 250 for 1,000,000.

        Returns
        -------
        SearchResult
            As for `Table.search`, by the metric of the index. A row of zeros is not found by cosine.

        Raises
        ------
        TypeError, ValueError
            As `Table.search`; `candidates` is less than `k`.
        ShardEmbError
            The table was resized or resharded since: build the index again.
        StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `Table.lookup`.

        Warns
        -----
        RuntimeWarning
            Once, if so many rows have changed that the index should be built again.

        Notes
        -----
        Rows that changed since the index was built are compared one by one, so they are found as they are now.
        """
        asked = Asked.checked(self._table, queries, k, self.metric)
        if candidates is None:
            # In a larger graph, ways to the nearest rows are longer: 96 find 98 % of them in 100,000 rows, and 90 % in
            # 1,000,000.
            candidates = max(CANDIDATES, 4 * asked.k, math.isqrt(len(self)) // 4)
        candidates = validation.count(candidates, "candidates", minimum=asked.k, maximum=2**31 - 1)
        changed = self.changed_rows()
        self._warn_if_many(changed.size)
        by, threads = asked.by, self._table.runtime.threads
        proposed = self._graph.search(self._header.encoder.queries(asked.queries), candidates, threads)
        proposed[_among(proposed, changed)] = -1
        if changed.size:
            found = find(self._table, by, asked.k, written(self._table, changed), NOTHING)
            proposed = np.hstack([proposed, found.ids])
        return asked.shaped(shown(by, score_again(self._table, by, proposed), asked.k))

    def _warn_if_many(self, changed: int) -> None:
        if changed > MANY * self._header.rows and not self._warned:
            self._warned = True
            msg = (
                f"{changed} of the {self._header.rows} rows of table {self._table.name!r} have changed since the index "
                f"{self.path} was built, and are compared one by one; build it again"
            )
            warnings.warn(msg, RuntimeWarning, stacklevel=3)


def _sums(path: Path, header: Header, first: int, count: int) -> NDArray[np.uint64]:
    """Read the checksums of blocks when the index was built."""
    with files.opened(path, os.O_RDONLY) as descriptor:
        return np.frombuffer(
            files.read_at(descriptor, 8 * count, header.graph_bytes + 8 * first, path), np.uint64
        )


def _changing(path: Path, header: Header) -> Int64Array:
    """Read which rows changed while the index was built."""
    begin = header.graph_bytes + 8 * header.blocks
    with files.opened(path, os.O_RDONLY) as descriptor:
        return np.frombuffer(files.read_at(descriptor, 8 * header.changing, begin, path), np.int64)


def _among(ids: Int64Array, ascending: Int64Array) -> NDArray[np.bool_]:
    if not ascending.size:
        return np.zeros(ids.shape, np.bool_)
    at = np.minimum(np.searchsorted(ascending, ids), ascending.size - 1)
    found: NDArray[np.bool_] = ascending[at] == ids
    return found
