"""What is fixed about a table, and the arithmetic of where a row lies.

A `TableSpec` is fixed when its table is created; it stands in the table's zarr metadata. What a commit can change
about a table is in ``manifest.py``.

One row is one **record**: the weight, then each state column, side by side, as float32. A row-shard is
`rows_per_shard` records, one zarr chunk, one file.
"""

from __future__ import annotations

import math
import re
import uuid
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb import initializers, optim
from shardemb.base import serialization, validation
from shardemb.base.sizes import PAGE, round_up
from shardemb.errors import FormatError
from shardemb.format.documents import FORMAT_VERSION, crc32, field, int_field, require_version, uuid_field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardemb.base.validation import Float32Array


ROWS_PER_WORD = 64
"""Shards begin at multiples of this, so two of them never share a word of the presence bitmap."""

SHARD_BYTES = 64 * 2**20, 512 * 2**20
MAX_SHARDS = 1024
"""The automatic size lets a shard grow within `SHARD_BYTES` to keep a table below `MAX_SHARDS`.

To make a file takes 30 us, and a millisecond where many were removed just before.
"""

PRESENCE_BYTES = 4 * 2**20
"""Largest chunk of the presence bitmap."""

MAX_ROWS = 2**48
MAX_DIM = 2**16

COUNTERS = COUNT, LAST_STEP = "count", "last_step"
"""Columns of a table that counts: how often a row was updated, and in which step of the table last."""

KEY_TYPES = "int64", "string", "bytes"
"""What the keys of a vocabulary may be."""

INTERNAL = KEYS, BYTES, FREED, SKETCH = "keys", "bytes", "freed", "sketch"
"""What the tables of a vocabulary are for; they are called ``VOCABULARY@keys`` and so on, and are not shown."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_INTERNAL_NAME = re.compile(_NAME.pattern + rf"@({'|'.join(INTERNAL)})")


@dataclass(frozen=True)
class TableSpec:
    """Everything about a table that never changes.

    Attributes
    ----------
    uuid : str
        Identity of the table; names can change.
    stream : str
        Selects the stream of its initial values: the name under which the table was created, with ``#2``, ``#3``
        and so on behind it where a table of the store had that stream already.
    num_embeddings, embedding_dim : int
        Rows, and float32 values of weight in a row.
    rows_per_shard : int
        A multiple of `shard_rows_multiple`.
    optimizer : Optimizer or None
        As of creation: decides the state columns. The hyper-parameters of today are in the `TableEntry`.
    initializer : Initializer
        Weights of rows never written.
    counters : bool
        Whether each row counts its updates: columns ``count`` and ``last_step``, behind those of the optimizer.
    """

    uuid: str
    stream: str
    num_embeddings: int
    embedding_dim: int
    rows_per_shard: int
    optimizer: optim.Optimizer | None
    initializer: initializers.Initializer
    counters: bool = False

    @cached_property
    def columns(self) -> dict[str, tuple[int, int]]:
        """Column name to its first and one-past-last value in the record, ``"weight"`` first."""
        return record_columns(self.embedding_dim, self.optimizer, counters=self.counters)

    @cached_property
    def width(self) -> int:
        """Values in a record."""
        return max(stop for _, stop in self.columns.values())

    def is_row_wise(self, column: str) -> bool:
        """Whether a state column is one number a row, whatever the dim."""
        if column in COUNTERS:
            return True
        assert self.optimizer is not None
        return self.optimizer.state_columns(self.embedding_dim + 1)[column] == 1

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return 4 * self.width

    @property
    def num_shards(self) -> int:
        """Number of shard files."""
        return -(-self.num_embeddings // self.rows_per_shard)

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard file: a whole number of pages."""
        return self.rows_per_shard * self.record_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all records, whether they take disk or not."""
        return self.num_embeddings * self.record_bytes

    @cached_property
    def initial_state(self) -> Float32Array:
        """Values of a fresh row's state columns, float32, shape (width - embedding_dim,)."""
        state = np.zeros(self.width, np.float32)
        if self.optimizer is not None:
            for name, value in self.optimizer.initial_state().items():
                state[slice(*self.columns[name])] = value
        return state[self.embedding_dim :]

    @cached_property
    def has_presence(self) -> bool:
        """Whether a presence bitmap is kept: unless a fresh record is all zero bytes, as a hole in a file reads."""
        weight = self.initializer.value if isinstance(self.initializer, initializers.Constant) else math.nan
        zero = np.float32(weight).tobytes() == bytes(4)
        return not zero or any(self.initial_state.tobytes())

    @property
    def presence_bytes(self) -> int:
        """Bytes of the presence bitmap: bit r is row r, little bit order."""
        return -(-self.num_embeddings // 8)

    @property
    def presence_chunk_bytes(self) -> int:
        """Bytes of a chunk of the presence bitmap: a whole number of pages."""
        return min(round_up(self.presence_bytes, PAGE), PRESENCE_BYTES)

    @property
    def num_presence_chunks(self) -> int:
        """Number of presence files."""
        return -(-self.presence_bytes // self.presence_chunk_bytes) if self.has_presence else 0

    @property
    def num_blocks(self) -> int:
        """Number of pages that all files take together, each of which has a checksum."""
        presence = self.num_presence_chunks * self.presence_chunk_bytes
        return (self.num_shards * self.shard_bytes + presence) // PAGE

    def to_json(self) -> dict[str, object]:
        """Return the table's attributes in zarr, with a checksum over everything else."""
        document: dict[str, object] = {
            "format_version": FORMAT_VERSION,
            "uuid": self.uuid,
            "stream": self.stream,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "rows_per_shard": self.rows_per_shard,
            "columns": {name: list(bounds) for name, bounds in self.columns.items()},
            "optimizer": serialization.to_json(self.optimizer) if self.optimizer else None,
            "initializer": serialization.to_json(self.initializer),
        }
        if self.counters:
            document["counters"] = True
        return document | {"crc32": crc32(document)}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> TableSpec:
        """Build a spec from the table's attributes, believing none of them.

        Raises
        ------
        FormatError
            A newer version, a missing or impossible value, columns that disagree with the optimizer, a wrong
            checksum (the first stores had none).
        """
        require_version(document)
        optimizer = field(document, "optimizer", (dict, type(None)))
        spec = TableSpec(
            uuid=uuid_field(document),
            stream=field(document, "stream", str),
            num_embeddings=int_field(document, "num_embeddings", MAX_ROWS),
            embedding_dim=int_field(document, "embedding_dim", MAX_DIM),
            rows_per_shard=int_field(document, "rows_per_shard", MAX_ROWS),
            optimizer=None if optimizer is None else optim.from_json(optimizer),
            initializer=initializers.from_json(field(document, "initializer", dict)),
            counters="counters" in document and field(document, "counters", bool),
        )
        columns = {name: list(bounds) for name, bounds in spec.columns.items()}
        if document.get("columns") != columns:
            msg = f"columns are {document.get('columns')}, but the optimizer makes them {columns}"
            raise FormatError(msg)
        if spec.rows_per_shard % shard_rows_multiple(spec.record_bytes):
            msg = f"rows_per_shard {spec.rows_per_shard} is not a multiple of {shard_rows_multiple(spec.record_bytes)}"
            raise FormatError(msg)
        if "crc32" in document and document["crc32"] != crc32(document):
            msg = "the checksum of its attributes does not match them"
            raise FormatError(msg)
        return spec


def new_spec(
    stream: str,
    shape: tuple[int, int],
    *,
    initializer: initializers.Initializer,
    optimizer: object,
    counters: bool = False,
    rows_per_shard: int | None,
    max_shards: int,
) -> TableSpec:
    """Make the spec of a new table of a checked name and shape.

    Raises
    ------
    TypeError, ValueError
        An optimizer or a size of shards that cannot be.
    """
    checked, rows = _checked(shape, optimizer, rows_per_shard, max_shards, counters=counters)
    return TableSpec(
        uuid=str(uuid.uuid4()),
        stream=stream,
        num_embeddings=shape[0],
        embedding_dim=shape[1],
        rows_per_shard=rows,
        optimizer=checked,
        initializer=initializer,
        counters=counters,
    )


def reshaped_spec(
    spec: TableSpec, *, optimizer: object, rows_per_shard: int | None, max_shards: int, instant: str
) -> TableSpec:
    """Make the spec of a table with other shards or another optimizer, the same each time for one `instant`.

    Raises
    ------
    TypeError, ValueError
        As `new_spec`.
    """
    shape = spec.num_embeddings, spec.embedding_dim
    wanted = spec.rows_per_shard if rows_per_shard is None else rows_per_shard
    checked, rows = _checked(shape, optimizer, wanted, max_shards, counters=spec.counters)
    identity = uuid.uuid5(uuid.UUID(spec.uuid), f"{instant} {rows} {checked!r}")
    return replace(spec, uuid=str(identity), rows_per_shard=rows, optimizer=checked)


def _checked(
    shape: tuple[int, int], optimizer: object, rows_per_shard: int | None, max_shards: int, *, counters: bool
) -> tuple[optim.Optimizer | None, int]:
    """Check an optimizer and a size of shards, and choose the latter."""
    if optimizer is not None and not isinstance(optimizer, optim.Optimizer):
        msg = f"optimizer must be one of shardemb.optim, for example shardemb.optim.Adam(), got {optimizer!r}"
        raise TypeError(msg)
    if rows_per_shard is not None:
        rows_per_shard = validation.count(rows_per_shard, "rows_per_shard", maximum=MAX_ROWS)
    width = max(stop for _, stop in record_columns(shape[1], optimizer, counters=counters).values())
    return optimizer, choose_rows_per_shard(shape[0], 4 * width, rows_per_shard, max_shards)


def record_columns(
    embedding_dim: int, optimizer: optim.Optimizer | None, *, counters: bool = False
) -> dict[str, tuple[int, int]]:
    """Lay out a record: the weight, then each state column, as half-open ranges of values."""
    columns, start = {"weight": (0, embedding_dim)}, embedding_dim
    states = optimizer.state_columns(embedding_dim) if optimizer else {}
    for name, width in (states | (dict.fromkeys(COUNTERS, 1) if counters else {})).items():
        columns[name] = (start, start + width)
        start += width
    return columns


def shard_rows_multiple(record_bytes: int) -> int:
    """Return what `rows_per_shard` must be a multiple of: whole words of bitmap, whole pages of file."""
    return math.lcm(ROWS_PER_WORD, PAGE // math.gcd(PAGE, record_bytes))


def choose_rows_per_shard(num_embeddings: int, record_bytes: int, wanted: int | None, max_shards: int) -> int:
    """Choose the rows of a shard: `wanted` rounded up, or an automatic size.

    The automatic one lies between 64 and 512 MiB (more where `max_shards`, the mappings still free in this
    process, asks for it), and is no larger than a small table.
    """
    multiple = shard_rows_multiple(record_bytes)
    if wanted is None:
        smallest, largest = SHARD_BYTES
        total = num_embeddings * record_bytes
        size = max(min(max(-(-total // MAX_SHARDS), smallest), largest), -(-total // max(max_shards, 1)))
        wanted = -(-size // record_bytes)
    return round_up(min(wanted, num_embeddings), multiple)


def is_internal(name: str) -> bool:
    """Whether a table is part of a vocabulary."""
    return "@" in name


def check_stored_name(name: object) -> str:
    """Check a table's name as a commit has it.

    Raises
    ------
    FormatError
        It cannot be one.
    """
    if isinstance(name, str) and _INTERNAL_NAME.fullmatch(name):
        return name
    try:
        return check_name(name)
    except (TypeError, ValueError) as error:
        raise FormatError(str(error)) from error


def check_name(name: object) -> str:
    """Check a table's name: letters, digits, ``_``, ``-`` and ``.``, at most 64, not beginning with ``.`` or ``-``.

    Raises
    ------
    TypeError
        Not a string.
    ValueError
        Other characters: a name is one folder, never a path.
    """
    if not isinstance(name, str):
        msg = f"a table's name must be a str, got {name!r}"
        raise TypeError(msg)
    if not _NAME.fullmatch(name) or name == "zarr.json":
        msg = (
            f"{name!r} cannot be a table's name: use 1 to 64 letters, digits, '_', '-' and '.', "
            f"beginning with a letter, a digit or '_' (a name is one folder of the store, not a path)"
        )
        raise ValueError(msg)
    return name


def check_shape(num_embeddings: object, embedding_dim: object) -> tuple[int, int]:
    """Check the shape of a new table.

    Raises
    ------
    TypeError, ValueError
        Not integers, or out of the limits.
    """
    return (
        validation.count(num_embeddings, "num_embeddings", maximum=MAX_ROWS),
        validation.count(embedding_dim, "embedding_dim", maximum=MAX_DIM),
    )
