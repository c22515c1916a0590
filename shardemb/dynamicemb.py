"""A store as the external storage of NVIDIA's dynamicemb: rows that fit neither the GPU's memory nor the host's.

dynamicemb keeps the rows that are in use in the GPU's memory, takes optimizer steps there, and hands the rows that it
evicts to a *storage*, from which it takes them again. `external_storage` makes one of tables in a store. The user
imports this module; it needs torch, and never imports dynamicemb, whose interface it has.

>>> import torch
>>> import shardemb.dynamicemb
>>> from types import SimpleNamespace
>>> store = shardemb.open(tmp / "clicks.zarr")
>>> kind = shardemb.dynamicemb.external_storage(store, "clicks")

dynamicemb then makes the storage. Its options and its optimizer are imitated here:

>>> options = [SimpleNamespace(dim=4, embedding_dtype=torch.float32)]
>>> optimizer = SimpleNamespace(get_state_dim=lambda dim: dim, get_initial_optim_states=lambda: 0.0)
>>> storage = kind(options, optimizer)
>>> storage.insert(torch.tensor([7, -3]), torch.tensor([0, 0]), torch.ones(2, 8))
>>> found = storage.find(torch.tensor([-3, 5]), torch.tensor([0, 0]), "embedding")
>>> found.num_missing, found.missing_keys, found.values[0]
(1, tensor([5]), tensor([1., 1., 1., 1.]))
>>> commit = store.commit(step=1)
>>> store.close()
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypedDict

import numpy as np
import torch

from shardemb.storage import files
from shardemb.store.keyed_table import KeyedTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Unpack

    from numpy.typing import NDArray

    from shardemb.store.store import Store

__all__ = ["external_storage"]

_KEYS_AT_ONCE = 65_536
_SCORE_BYTES = 8
_DTYPES = ("int64", "float32", "int64", "float32")


class Options(Protocol):
    """What a storage reads of dynamicemb's options of a table."""

    dim: int
    embedding_dtype: torch.dtype


class Optimizer(Protocol):
    """What a storage asks of dynamicemb's optimizer."""

    def get_state_dim(self, emb_dim: int) -> int:
        """Return the number of values of state that a row has."""

    def get_ckpt_state_dim(self, emb_dim: int) -> int:
        """Return how many of these are written to checkpoints: the rest is there for the alignment of rows."""

    def get_initial_optim_states(self) -> float:
        """Return what these are at first."""

    def get_opt_args(self) -> dict[str, Any]:
        """Return the name and the hyper-parameters of the optimizer."""

    def set_opt_args(self, args: dict[str, Any]) -> None:
        """Take over hyper-parameters."""


class Found(NamedTuple):
    """What a storage has of some keys, in the order in which dynamicemb unpacks it."""

    num_missing: int
    missing_keys: torch.Tensor
    missing_indices: torch.Tensor
    missing_table_ids: torch.Tensor
    missing_scores: torch.Tensor | None
    founds: torch.Tensor
    scores: torch.Tensor
    values: torch.Tensor


class DumpOptions(TypedDict, total=False):
    """What dynamicemb passes to `dump` by name."""

    include_optim: bool
    include_meta: bool
    current_score: int | None
    timestamp: int


def external_storage(store: Store, name: str = "dynamicemb") -> type[TableStorage]:
    """Make what dynamicemb takes as the ``external_storage`` of its options.

    Parameters
    ----------
    store : Store
        Where the rows go. It is open for writing, and stays so for as long as dynamicemb uses it.
    name : str
        Of the tables and vocabularies in the store: the first of dynamicemb's tables is ``name + "0"``. They are
        created when dynamicemb makes the storage, or are found as the last commit left them.

    Returns
    -------
    type
        A subclass of `TableStorage`; dynamicemb makes the storage from it, with its options and its optimizer.

    Notes
    -----
    Rows are durable as of `Store.commit`, which is yours to call: after ``flush`` of dynamicemb's module, which writes
    back what its cache has. A process that opens the store again finds these rows, without dynamicemb's ``load``.

    The interface is that of ``dynamicemb.types.Storage`` (NVIDIA/recsys-examples) in July 2026. A row of a table is
    the embedding, then the state of dynamicemb's optimizer, and the scores, if the strategy of eviction has any, are
    in a table of their own. Call it from one thread, as dynamicemb does.

    Examples
    --------
    >>> import shardemb.dynamicemb
    >>> store = shardemb.open(tmp / "store.zarr")
    >>> shardemb.dynamicemb.external_storage(store, "clicks").name
    'clicks'
    >>> store.close()
    """
    return type("StoreStorage", (TableStorage,), {"store": store, "name": name})


class TableStorage:
    """The rows of dynamicemb's tables, in tables of a store; see `external_storage`.

    Parameters
    ----------
    options : sequence of DynamicEmbTableOptions
        One for each table.
    optimizer : BaseDynamicEmbeddingOptimizer
        The one that trains them.

    Raises
    ------
    ValueError
        The store has a table of that name with rows of another width.
    """

    store: ClassVar[Store]
    name: ClassVar[str]

    def __init__(self, options: Sequence[Options], optimizer: Optimizer) -> None:
        self._state = None  # dynamicemb's own storages have one, and it looks into that of any storage
        self._options, self._optimizer = options, optimizer
        self._dims = [each.dim for each in options]
        self._widths = [dim + optimizer.get_state_dim(dim) for dim in self._dims]
        self._dtype = options[0].embedding_dtype
        self._tables = [self._table(number, width) for number, width in enumerate(self._widths)]

    def find(
        self,
        unique_keys: torch.Tensor,
        table_ids: torch.Tensor,
        copy_mode: object,
        lfu_accumulated_frequency: torch.Tensor | None = None,
    ) -> Found:
        """Look up the rows of keys.

        Parameters
        ----------
        unique_keys, table_ids : torch.Tensor of int64, shape (n,)
            Which keys of which tables.
        copy_mode : CopyMode or str
            ``"embedding"``, or ``"value"`` for the optimizer's state too.
        lfu_accumulated_frequency : torch.Tensor of int64, shape (n,), optional
            Scores of the keys, returned for those that are missing.

        Returns
        -------
        Found
            `values` has shape (n, max_embedding_dim) or (n, max_value_dim): the embedding from column 0 on, the state
            from column `max_embedding_dim` on, zeros for what is missing. Everything is on the device of the keys.
        """
        device, given = unique_keys.device, lfu_accumulated_frequency
        whole = getattr(copy_mode, "value", copy_mode) != "embedding"
        width = self.max_value_dim() if whole else self.max_embedding_dim()
        keys, tables = _int64(unique_keys), _int64(table_ids)
        values = np.zeros((keys.size, width), np.float32)
        scores, founds = np.zeros(keys.size, np.int64), np.zeros(keys.size, bool)
        for number in np.unique(tables):
            places = np.flatnonzero(tables == number)
            rows = self._tables[number].vocabulary.lookup(keys[places])
            places, rows = places[rows >= 0], rows[rows >= 0]
            founds[places] = True
            self._spread(values, places, self._tables[number].rows.lookup(rows), number)
            scores[places] = _scores_of(self._scores(number), rows)
        missing = torch.from_numpy(np.flatnonzero(~founds)).to(device)
        return Found(
            missing.numel(),
            unique_keys[missing],
            missing,
            table_ids.to(device)[missing],
            None if given is None else given[missing.to(given.device)],
            torch.from_numpy(founds).to(device),
            torch.from_numpy(scores).to(device),
            torch.from_numpy(values).to(device, self._dtype),
        )

    def insert(
        self,
        keys: torch.Tensor,
        table_ids: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor | None = None,
        preserve_existing: bool = False,
    ) -> None:
        """Write the rows of keys; new keys get rows.

        Parameters
        ----------
        keys, table_ids : torch.Tensor of int64, shape (n,)
            Which keys of which tables.
        values : torch.Tensor of float, shape (n, max_value_dim)
            In the layout that `find` returns.
        scores : torch.Tensor of int64, shape (n,), optional
            Kept for `find`.
        preserve_existing : bool
            Keys that have rows keep them, with new values. It makes no difference here: they always do.

        Raises
        ------
        ValueError
            There are several scores for each key.
        """
        if scores is not None and scores.dim() > 1:
            msg = f"a key has one score here, got scores of shape {tuple(scores.shape)}: choose another score_strategy"
            raise ValueError(msg)
        names, tables = _int64(keys), _int64(table_ids)
        rows = values.detach().to("cpu", torch.float32).numpy()
        ranks = None if scores is None or not scores.numel() else _int64(scores)
        for number in np.unique(tables):
            places = np.flatnonzero(tables == number)
            self._tables[number].write(names[places], self._gathered(rows[places], number), create=True)
            if ranks is not None:
                table = self._scores(number) or self._new_scores(number)
                table.write(names[places], ranks[places, None].view(np.uint8))

    def dump(
        self,
        table_id: int,
        meta_file_path: str,
        emb_key_path: str,
        embedding_file_path: str,
        score_file_path: str | None,
        opt_file_path: str | None,
        **options: Unpack[DumpOptions],
    ) -> None:
        """Write a table to files in dynamicemb's layout, in bounded memory.

        Parameters
        ----------
        table_id : int
            Which table.
        meta_file_path, emb_key_path, embedding_file_path, score_file_path, opt_file_path : str or None
            Where JSON, keys (int64), embeddings (float32), scores (int64) and optimizer state (float32) go.
        **options
            ``include_optim`` and ``include_meta``: whether to write state, and JSON. Others have no effect.
        """
        if options.get("include_meta"):
            meta = self._optimizer.get_opt_args() | {"dist_type": self._dist_type(table_id)}
            _append(_emptied(meta_file_path), 0, np.frombuffer(json.dumps(meta).encode(), np.uint8))
        state = opt_file_path if options.get("include_optim") else None
        given = (emb_key_path, embedding_file_path, score_file_path, state)
        paths = [_emptied(each) if each else None for each in given]
        shown = self._optimizer.get_ckpt_state_dim(self._dims[table_id]) if state else 0
        done = 0
        for keys, embeddings, states, scores in self.export_keys_values(
            torch.device("cpu"), _KEYS_AT_ONCE, table_id
        ):
            parts = (keys, embeddings, scores, None if states is None else states[:, :shown].contiguous())
            for path, part in zip(paths, parts, strict=True):
                if path is not None and part is not None:
                    _append(path, done, part.numpy())
            done += keys.numel()

    def load(
        self,
        table_id: int,
        meta_file_path: str,
        emb_key_path: str,
        embedding_file_path: str,
        score_file_path: str | None,
        opt_file_path: str | None,
        include_optim: bool = False,
        timestamp: int = 0,
    ) -> None:
        """Insert what `dump`, or another storage of dynamicemb, has written; see `dump` for the parameters.

        Without state in the files, or with that of another optimizer, rows begin with `init_optimizer_state`.

        Raises
        ------
        ValueError
            The files do not have the same number of rows, or are of a table with another ``dist_type``.
        """
        dim, initial = self._dims[table_id], self._optimizer.get_initial_optim_states()
        states = opt_file_path if include_optim and self._takes_over(meta_file_path, table_id) else None
        shown = self._optimizer.get_ckpt_state_dim(dim)
        found = [emb_key_path, embedding_file_path, score_file_path, states if shown else None]
        columns = [
            _Column(path, width, dtype)
            for path, width, dtype in zip(found, (1, dim, 1, shown), _DTYPES, strict=True)
        ]
        rows = _length(columns)
        for start in range(0, rows, _KEYS_AT_ONCE):
            count = min(_KEYS_AT_ONCE, rows - start)
            keys, embeddings, scores, state = (each.read(start, count) for each in columns)
            values = np.full((count, self.max_value_dim()), initial, np.float32)
            values[:, :dim] = embeddings
            if state is not None:
                first = self.max_embedding_dim()
                values[:, first : first + shown] = state
            ranks = None if scores is None else torch.from_numpy(scores[:, 0])
            ids = torch.full((count,), table_id)
            self.insert(torch.from_numpy(np.asarray(keys).reshape(-1)), ids, torch.from_numpy(values), ranks)

    def export_keys_values(
        self, device: torch.device, batch_size: int = _KEYS_AT_ONCE, table_id: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """Yield all keys of a table with their embeddings, their state (None if there is none) and their scores.

        Parameters
        ----------
        device : torch.device
            Where the tensors are to be.
        batch_size : int
            How many keys at a time, at most.
        table_id : int
            Which table.

        Yields
        ------
        tuple of torch.Tensor
            int64 (n,), float32 (n, dim), float32 (n, state) or None, int64 (n,).
        """
        table, dim = self._tables[table_id], self._dims[table_id]
        kept = self._scores(table_id)
        for batch in table.to_arrow_batches():
            for start in range(0, batch.num_rows, batch_size):
                part = batch.slice(start, batch_size)
                rows = np.array(part["id"])
                values = (
                    torch.from_numpy(np.array(part["embedding"].flatten())).view(len(rows), -1).to(device)
                )
                yield (
                    torch.from_numpy(np.array(part["key"])).to(device),
                    values[:, :dim].contiguous(),
                    values[:, dim:].contiguous() if self._widths[table_id] > dim else None,
                    torch.from_numpy(_scores_of(kept, rows)).to(device),
                )

    # ---- shapes

    def embedding_dtype(self) -> torch.dtype:
        """Return the dtype of the values that `find` returns."""
        return self._dtype

    def embedding_dim(self, table_id: int) -> int:
        """Return the number of values of an embedding of a table."""
        return self._dims[table_id]

    def value_dim(self, table_id: int) -> int:
        """Return the number of values of a row of a table: the embedding and the optimizer's state."""
        return self._widths[table_id]

    def max_embedding_dim(self) -> int:
        """Return the greatest `embedding_dim` of all tables."""
        return max(self._dims)

    def max_value_dim(self) -> int:
        """Return the number of columns of values: the greatest embedding, and the greatest state."""
        return max(self._widths)

    def embedding_dims(self, on_device: bool = False) -> torch.Tensor:
        """Return `embedding_dim` of all tables, int64; on the GPU if asked for."""
        dims = torch.tensor(self._dims)
        return dims.cuda() if on_device else dims

    def all_dims_vec4(self) -> bool:
        """Return whether all widths are multiples of 4, for kernels that copy four values at a time."""
        return all(each % 4 == 0 for each in (*self._dims, *self._widths))

    def init_optimizer_state(self) -> float:
        """Return the optimizer's state of new rows."""
        return self._optimizer.get_initial_optim_states()

    def size(self) -> int:
        """Return the number of keys of all tables."""
        return sum(len(each) for each in self._tables)

    # ---- tables

    def _table(self, number: int, width: int) -> KeyedTable:
        """Return the table of that number, which is created if it is missing."""
        name = f"{self.name}{number}"
        if name not in self.store:
            if name not in self.store.vocabularies:
                self.store.create_vocabulary(name, key_type="int64")
            self.store.create_table(name, vocabulary=name, embedding_dim=width)
        table = self.store[name]
        if not isinstance(table, KeyedTable) or table.embedding_dim != width:
            msg = (
                f"table {name!r} in {self.store.path} does not hold rows by key of {width} values, which dynamicemb's "
                "options and optimizer need; give external_storage another name, or drop the table"
            )
            raise ValueError(msg)
        return table

    def _scores(self, number: int) -> KeyedTable | None:
        """Return the table of scores of a table, if it has any."""
        found = self.store.get(f"{self.name}{number}_scores")
        return found if isinstance(found, KeyedTable) else None

    def _new_scores(self, number: int) -> KeyedTable:
        name = f"{self.name}{number}_scores"
        vocabulary = f"{self.name}{number}"
        self.store.create_table(name, vocabulary=vocabulary, embedding_dim=_SCORE_BYTES, dtype="raw")
        table = self.store[name]
        assert isinstance(table, KeyedTable)
        return table

    def _spread(self, values: NDArray[Any], places: NDArray[Any], rows: NDArray[Any], number: int) -> None:
        """Put rows of a table into values of all tables, whose state begins at the same column."""
        dim, first = self._dims[number], self.max_embedding_dim()
        values[places, :dim] = rows[:, :dim]
        if values.shape[1] > first:
            values[places, first : first + rows.shape[1] - dim] = rows[:, dim:]

    def _gathered(self, values: NDArray[Any], number: int) -> NDArray[Any]:
        """Return rows of a table out of values of all tables."""
        dim, first = self._dims[number], self.max_embedding_dim()
        if dim == first:
            return values[:, : self._widths[number]]
        return np.concatenate(
            [values[:, :dim], values[:, first : first + self._widths[number] - dim]], axis=1
        )

    def _dist_type(self, number: int) -> str:
        return str(getattr(self._options[number], "dist_type", "roundrobin"))

    def _takes_over(self, meta_file_path: str, number: int) -> bool:
        """Return whether the state in a checkpoint is that of this optimizer, whose hyper-parameters are then its."""
        path = Path(meta_file_path).resolve()
        if files.size(path) is None:
            return True
        meta = json.loads(files.read(path))
        kind, ours = meta.get("dist_type", "roundrobin"), self._dist_type(number)
        if kind != ours:
            msg = f"{path} is of a table with dist_type={kind!r}, and table {number} has {ours!r}: load it with that"
            raise ValueError(msg)
        if meta.get("opt_type") not in (None, self._optimizer.get_opt_args().get("opt_type")):
            return False
        self._optimizer.set_opt_args(meta)
        return True


# ---- arrays and files


def _int64(tensor: torch.Tensor) -> NDArray[np.int64]:
    """Return keys, scores or numbers of tables as an array; dynamicemb has some as unsigned numbers."""
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array.view(np.int64) if array.dtype == np.uint64 else array.astype(np.int64, copy=False)


def _scores_of(table: KeyedTable | None, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the scores of rows: zeros where there is none."""
    if table is None:
        return np.zeros(rows.size, np.int64)
    return table.rows.lookup(rows).view(np.int64)[:, 0]


def _emptied(path: str) -> Path:
    """Create a file, or remove what is in it."""
    real = Path(path).resolve()
    with files.opened(real, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
        return real


def _append(path: Path, rows_before: int, data: NDArray[Any]) -> None:
    """Write rows behind those that are in a file."""
    with files.opened(path, os.O_WRONLY) as descriptor:
        files.write(descriptor, data.data, rows_before * data[:1].nbytes, path)


class _Column:
    """A file with so many numbers of each row; nothing if there is no such file."""

    def __init__(self, path: str | None, width: int, dtype: str) -> None:
        self._path = Path(path).resolve() if path else None
        self._width, self._dtype = width, np.dtype(dtype)
        size = files.size(self._path) if self._path else None
        self.rows: int | None = None
        self._rest = 0
        if size is not None:
            self.rows, self._rest = divmod(size, width * self._dtype.itemsize)

    def read(self, start: int, count: int) -> NDArray[Any] | None:
        """Return some rows, shape (count, width)."""
        if self.rows is None or self._path is None:
            return None
        row = self._width * self._dtype.itemsize
        with files.opened(self._path, os.O_RDONLY) as descriptor:
            data = files.read_at(descriptor, count * row, start * row, self._path)
        return np.frombuffer(data, self._dtype).reshape(count, self._width)

    def require(self, rows: int) -> None:
        """Raise ValueError if the file has another number of rows."""
        if self.rows is not None and (self.rows != rows or self._rest):
            msg = (
                f"{self._path} does not hold {rows:,} rows of {self._width} numbers, as the keys beside it ask for: "
                "the checkpoint is incomplete, or of a table of another width or optimizer"
            )
            raise ValueError(msg)


def _length(columns: Sequence[_Column]) -> int:
    """Return the number of rows that all files of a checkpoint have."""
    rows = columns[0].rows
    if rows is None:
        msg = "there are no keys at emb_key_path: give the path that dump was given"
        raise FileNotFoundError(msg)
    for each in columns:
        each.require(rows)
    return rows
