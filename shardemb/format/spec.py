"""What is fixed about a table, and the arithmetic of where a row lies.

A `TableSpec` is fixed when its table is created, and is stored in the table's zarr metadata. What a commit can change
about a table is in ``manifest.py``.

One row is one **record**: the weight, then each state column, side by side. A row-shard is `rows_per_shard` records,
one zarr chunk, one file. A record is an array of *elements*: of float32, or of bytes if the table stores anything else
than float32, see ``dtypes.py``.
"""

from __future__ import annotations

import math
import re
import unicodedata
import uuid
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb import dtypes, initializers, optim
from shardemb.base import serialization, validation
from shardemb.base.sizes import HUGE_PAGE, PAGE, round_up
from shardemb.errors import FormatError
from shardemb.format.documents import (
    CODED_VERSION,
    FORMAT_VERSION,
    NUMBERED_VERSION,
    crc32,
    field,
    int_field,
    require_version,
    uuid_field,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.dtypes import Part, Precision


ROWS_PER_WORD = 64
"""Shards begin at multiples of this, so that no two share a word of the presence bitmap."""

SHARD_BYTES = 64 * 2**20, 512 * 2**20
MAX_SHARDS = 1024
"""The automatic size of a shard grows, within `SHARD_BYTES`, to keep a table at or below `MAX_SHARDS` shards.

Creating a file takes 30 us, or a millisecond soon after many files were removed.
"""

PRESENCE_BYTES = 4 * 2**20
"""Largest chunk of the presence bitmap."""

MAX_ROWS = 2**48
MAX_DIM = 2**16

COUNTERS = COUNT, LAST_STEP = "count", "last_step"
"""Columns of a table with counters: how often a row was updated, and the step of the table that last updated it."""

KEY_TYPES = "int64", "string", "bytes"
"""Types that the keys of a vocabulary may have."""

INTERNAL = KEYS, BYTES, FREED, SKETCH = "keys", "bytes", "freed", "sketch"
"""Kinds of the internal tables of a vocabulary. They are named ``VOCABULARY@keys`` and so on, and are not shown."""

NAME_CHARACTERS, NAME_BYTES = 64, 192
"""Most characters of a table's name, and most bytes of it in UTF-8. Every file system takes it, also with a suffix."""

FLOAT32 = dtypes.Precision()

_FLOAT32, _BYTE = np.dtype(np.float32), np.dtype(np.uint8)

_STORED_NAME = re.compile(r"(?![.-])[A-Za-z0-9_.\-\u00a1-\ud7ff\ue000-\U0010ffff]+")
_INTERNAL_NAME = re.compile(rf"(.*)@({'|'.join(INTERNAL)})")


@dataclass(frozen=True)
class TableSpec:
    """Everything about a table that never changes.

    Attributes
    ----------
    uuid : str
        Identity of the table; its name can change.
    stream : str
        Selects the stream of its initial values: the name under which the table was created, followed by ``#2``,
        ``#3`` and so on if a table of the store already had that stream.
    num_embeddings, embedding_dim : int
        Number of rows, and number of values in the weight of each.
    rows_per_shard : int
        A multiple of `shard_rows_multiple`.
    optimizer : Optimizer or None
        As of creation; it determines the state columns. The current hyper-parameters are in the `TableEntry`.
    initializer : Initializer
        Gives the weights of rows that were never written.
    counters : bool
        Whether each row counts its updates, in columns ``count`` and ``last_step`` after those of the optimizer.
    precision : Precision
        How the numbers of a record are stored.
    padding_idx : int or None
        The row of padding, whose gradients are dropped.
    first, stride : int
        Row ``r`` stands for the row ``first + r * stride`` of the whole table, if this is a part of one: its initial
        value, and what rounds it stochastically, are that row's.
    """

    uuid: str
    stream: str
    num_embeddings: int
    embedding_dim: int
    rows_per_shard: int
    optimizer: optim.Optimizer | None
    initializer: initializers.Initializer
    counters: bool = False
    precision: Precision = FLOAT32
    padding_idx: int | None = None
    first: int = 0
    stride: int = 1

    def __post_init__(self) -> None:
        if self.first + (self.num_embeddings - 1) * self.stride >= MAX_ROWS:
            msg = f"{self.num_embeddings} rows from {self.first} on, {self.stride} apart, end past row {MAX_ROWS - 1}"
            raise ValueError(msg)

    def numbers_of(self, rows: Int64Array) -> Int64Array:
        """Return which rows of the whole table some rows stand for."""
        return rows if (self.first, self.stride) == (0, 1) else self.first + rows * self.stride

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Maps the name of each column to where it lies in the record, in bytes; scales are columns of their own."""
        states = self.optimizer.state_columns(self.embedding_dim) if self.optimizer else {}
        if self.counters:
            # An optimizer that catches up has this column too: there is one of it, the last.
            states.pop(LAST_STEP, None)
        return self.precision.parts(self.embedding_dim, states, COUNTERS if self.counters else ())

    @cached_property
    def columns(self) -> dict[str, tuple[int, int]]:
        """Maps each column's name to its half-open range of elements in the record.

        ``"weight"`` is the first; it includes the scales.
        """
        scales = list(self.precision.dtype.columns(self.embedding_dim))
        size, parts = self.element.itemsize, self.parts
        ranges = {"weight": (0, parts[scales[-1]].stop // size)}
        rest = {name: part for name, part in parts.items() if name not in scales}
        return ranges | {name: (part.offset // size, part.stop // size) for name, part in rest.items()}

    @property
    def states(self) -> list[str]:
        """Names of the columns of state, counters included."""
        return list(self.columns)[1:]

    @property
    def element(self) -> np.dtype[Any]:
        """NumPy's dtype of the elements of a record."""
        return _BYTE if self.precision.is_coded else _FLOAT32

    @cached_property
    def width(self) -> int:
        """Number of elements in a record."""
        return self.precision.record_bytes(self.parts) // self.element.itemsize

    @cached_property
    def weight_width(self) -> int:
        """Number of elements in a record's weight."""
        return self.columns["weight"][1]

    @property
    def is_caught_up(self) -> bool:
        """Whether rows that no update changes have to be caught up when they are read, because steps change them."""
        return self.optimizer is not None and self.optimizer.dense_equivalent

    def is_row_wise(self, column: str) -> bool:
        """Whether a state column holds one number per row, whatever the embedding dimension."""
        if column in COUNTERS:
            return True
        assert self.optimizer is not None
        return self.optimizer.state_columns(self.embedding_dim + 1)[column] == 1

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return self.element.itemsize * self.width

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
        """Bytes of all records, including those that take no disk space."""
        return self.num_embeddings * self.record_bytes

    @cached_property
    def initial_state(self) -> NDArray[Any]:
        """Initial elements of the state columns of a row, shape (width - weight_width,)."""
        state = np.zeros(self.width, self.element)
        if self.optimizer is not None:
            for name, value in self.optimizer.initial_state().items():
                part = self.parts[name]
                values = np.full(part.count, value, np.float32).astype(dtypes.numpy_dtype(part.dtype))
                state.view(np.uint8)[part.offset : part.stop] = values.view(np.uint8)
        return state[self.weight_width :]

    def initial_value(self, column: str) -> float:
        """Return the value that a column of state has in a fresh row."""
        values = self.optimizer.initial_state() if self.optimizer else {}
        part = self.parts[column]
        return float(np.float32(values.get(column, 0.0)).astype(dtypes.numpy_dtype(part.dtype)))

    @cached_property
    def has_presence(self) -> bool:
        """Whether the table has a presence bitmap.

        It needs none if a fresh record is all zero bytes, because that is how a hole in a file reads.
        """
        weight = self.initializer.value if isinstance(self.initializer, initializers.Constant) else math.nan
        zero = np.float32(weight).tobytes() == bytes(4)
        return not zero or any(self.initial_state.tobytes())

    @property
    def presence_bytes(self) -> int:
        """Bytes of the presence bitmap: bit r is row r, in little bit order."""
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
        """Number of pages in all shards and presence chunks together; each has a checksum."""
        presence = self.num_presence_chunks * self.presence_chunk_bytes
        return (self.num_shards * self.shard_bytes + presence) // PAGE

    def to_json(self) -> dict[str, object]:
        """Return the table's attributes in zarr, including a checksum over all the others."""
        coded, numbered = self.precision.is_coded, (self.first, self.stride) != (0, 1)
        document: dict[str, object] = {
            "format_version": NUMBERED_VERSION if numbered else CODED_VERSION if coded else FORMAT_VERSION,
            "uuid": self.uuid,
            "stream": self.stream,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "rows_per_shard": self.rows_per_shard,
            "columns": self.described_columns(),
            "optimizer": optim.to_json(self.optimizer) if self.optimizer else None,
            "initializer": serialization.to_json(self.initializer),
        }
        if self.counters:
            document["counters"] = True
        if coded:
            document |= self.precision.to_json()
        if self.padding_idx is not None:
            document["padding_idx"] = self.padding_idx
        if numbered:
            document |= {"first": self.first, "stride": self.stride}
        return document | {"crc32": crc32(document)}

    def described_columns(self) -> dict[str, object]:
        """Return the columns as the table's attributes have them."""
        if self.precision.is_coded:
            return {name: asdict(part) for name, part in self.parts.items()}
        return {name: list(bounds) for name, bounds in self.columns.items()}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> TableSpec:
        """Build a spec from the table's attributes, trusting none of them.

        Raises
        ------
        FormatError
            The version is newer, a value is missing or impossible, the columns disagree with the optimizer, or the
            checksum is wrong. (The first stores had no checksum.)
        """
        version = require_version(document, NUMBERED_VERSION)
        coded = version == CODED_VERSION or (version == NUMBERED_VERSION and "dtype" in document)
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
            precision=dtypes.from_json(document) if coded else FLOAT32,
        )
        if coded != spec.precision.is_coded:
            msg = f"format version {CODED_VERSION} is for tables that are not float32"
            raise FormatError(msg)
        if "padding_idx" in document:
            row = int_field(document, "padding_idx", spec.num_embeddings - 1, minimum=0)
            spec = replace(spec, padding_idx=row)
        try:
            if version == NUMBERED_VERSION:
                first = int_field(document, "first", MAX_ROWS, minimum=0)
                spec = replace(spec, first=first, stride=int_field(document, "stride", MAX_ROWS))
            _require_caught_up_as_float32(spec)
        except ValueError as error:
            raise FormatError(str(error)) from error
        columns = spec.described_columns()
        if document.get("columns") != columns:
            msg = f"columns are {document.get('columns')}, but those of the optimizer are {columns}"
            raise FormatError(msg)
        if spec.rows_per_shard % shard_rows_multiple(spec.record_bytes):
            msg = f"rows_per_shard {spec.rows_per_shard} is not a multiple of {shard_rows_multiple(spec.record_bytes)}"
            raise FormatError(msg)
        if "crc32" in document and document["crc32"] != crc32(document):
            msg = "the checksum of its attributes does not match"
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
    precision: Precision = FLOAT32,
) -> TableSpec:
    """Make the spec of a new table without a row of padding, from a name and a shape that were checked already.

    Raises
    ------
    TypeError, ValueError
        The optimizer or the number of rows per shard is invalid.
    """
    spec = TableSpec(
        uuid=str(uuid.uuid4()),
        stream=stream,
        num_embeddings=shape[0],
        embedding_dim=shape[1],
        rows_per_shard=1,
        optimizer=_checked_optimizer(optimizer),
        initializer=initializer,
        counters=counters,
        precision=precision,
    )
    if precision.is_raw and spec.initializer != initializers.Constant(0.0):
        msg = f"initializer: the rows of a table with dtype='raw' begin as zero bytes, got {initializer!r}"
        raise ValueError(msg)
    _require_caught_up_as_float32(spec)
    return replace(spec, rows_per_shard=_rows_per_shard(spec, rows_per_shard, max_shards))


def reshaped_spec(
    spec: TableSpec,
    *,
    optimizer: object,
    rows_per_shard: int | None,
    max_shards: int,
    commit_id: str,
    precision: Precision | None = None,
) -> TableSpec:
    """Make the spec of a table with other shards, another optimizer or another precision.

    Equal arguments give the same uuid, so that an interrupted rewrite is continued and not started again. `commit_id`
    identifies the commit whose rows are copied.

    Raises
    ------
    TypeError, ValueError
        As `new_spec`.
    """
    wanted = spec.rows_per_shard if rows_per_shard is None else rows_per_shard
    checked = _checked_optimizer(optimizer)
    new = replace(spec, optimizer=checked, precision=precision or spec.precision)
    _require_caught_up_as_float32(new)
    rows = _rows_per_shard(new, wanted, max_shards)
    named = f"{commit_id} {rows} {checked!r}" + ("" if new.precision == spec.precision else f" {precision!r}")
    identity = uuid.uuid5(uuid.UUID(spec.uuid), named)
    return replace(new, uuid=str(identity), rows_per_shard=rows)


def _checked_optimizer(optimizer: object) -> optim.Optimizer | None:
    if optimizer is not None and not isinstance(optimizer, optim.Optimizer):
        msg = f"optimizer must be one of shardemb.optim, for example shardemb.optim.Adam(), got {optimizer!r}"
        raise TypeError(msg)
    return optimizer


def _require_caught_up_as_float32(spec: TableSpec) -> None:
    """Refuse rows that are caught up and are not float32: each lookup between two updates would round them again."""
    if spec.is_caught_up and spec.precision.is_coded:
        msg = (
            f"a table whose optimizer is dense_equivalent has float32 rows and float32 state, got dtype "
            f"{spec.precision.public_dtype!r} and state_dtype {spec.precision.state_dtype!r}; "
            f"leave these out, or dense_equivalent"
        )
        raise ValueError(msg)


def _rows_per_shard(spec: TableSpec, wanted: int | None, max_shards: int) -> int:
    """Check a number of rows per shard; return it rounded or chosen."""
    if wanted is not None:
        wanted = validation.count(wanted, "rows_per_shard", maximum=MAX_ROWS)
    return choose_rows_per_shard(spec.num_embeddings, spec.record_bytes, wanted, max_shards)


def shard_rows_multiple(record_bytes: int) -> int:
    """Return the number of which `rows_per_shard` must be a multiple.

    Only then does a shard take whole words of the presence bitmap and whole pages of its file.
    """
    return math.lcm(ROWS_PER_WORD, PAGE // math.gcd(PAGE, record_bytes))


def choose_rows_per_shard(num_embeddings: int, record_bytes: int, wanted: int | None, max_shards: int) -> int:
    """Choose the rows per shard: `wanted` rounded up, or an automatic number.

    An automatic shard takes 64 to 512 MiB; more if the table would otherwise have more than `max_shards` shards (the
    mappings still free in this process), and less if the whole table is smaller. It is a whole number of huge pages,
    in which the processor finds random rows faster, unless it would become too large for that.
    """
    multiple = shard_rows_multiple(record_bytes)
    if wanted is None:
        smallest, largest = SHARD_BYTES
        total = num_embeddings * record_bytes
        size = max(min(max(-(-total // MAX_SHARDS), smallest), largest), -(-total // max(max_shards, 1)))
        wanted = -(-size // record_bytes)
        huge = round_up(wanted, math.lcm(multiple, HUGE_PAGE // math.gcd(HUGE_PAGE, record_bytes)))
        if huge <= num_embeddings and huge * record_bytes <= largest:
            return huge
    return round_up(min(wanted, num_embeddings), multiple)


def is_internal(name: str) -> bool:
    """Whether a name is that of an internal table of a vocabulary."""
    return "@" in name


def check_stored_name(name: object) -> str:
    """Check a table's name that was read from a commit; internal tables are allowed.

    It only has to be safe as the name of one folder. What is a letter is not asked, because that depends on the version
    of Unicode that the program which wrote it knew.

    Raises
    ------
    FormatError
        It is not a valid name.
    """
    internal = _INTERNAL_NAME.fullmatch(name) if isinstance(name, str) else None
    plain = internal[1] if internal else name
    if not isinstance(plain, str) or not _STORED_NAME.fullmatch(plain) or not _is_short(plain):
        raise FormatError(_no_name(name))
    return str(name)


def check_name(name: object) -> str:
    """Check the name of a new table or vocabulary; return it as it is stored, which is its Unicode form NFC.

    It has 1 to 64 letters, marks and digits of any script, ``_``, ``-`` and ``.``, takes at most 192 bytes in UTF-8,
    and begins with a letter, a digit or ``_``.

    Raises
    ------
    TypeError
        The name is not a string.
    ValueError
        The name has other characters or another length. It names one folder, and is never a path.
    """
    if not isinstance(name, str):
        msg = f"a table's name must be a str, got {name!r}"
        raise TypeError(msg)
    name = str(normalized(name))
    kinds = "".join("_" if character == "_" else unicodedata.category(character)[0] for character in name)
    fits = all(kind in "LMN_" or character in ".-" for character, kind in zip(name, kinds, strict=True))
    if not fits or kinds[:1] not in {"L", "N", "_"} or name == "zarr.json" or not _is_short(name):
        raise ValueError(_no_name(name))
    return name


def normalized(name: str) -> str:
    """Return a name as it would be stored: the same text may be written in several ways, such as an accent apart."""
    return unicodedata.normalize("NFC", name) if isinstance(name, str) and not name.isascii() else name


def _is_short(name: str) -> bool:
    return len(name) <= NAME_CHARACTERS and len(name.encode(errors="surrogatepass")) <= NAME_BYTES


def _no_name(name: object) -> str:
    return (
        f"{name!r} cannot be a table's name: use 1 to {NAME_CHARACTERS} letters, digits, '_', '-' and '.', in any "
        f"script and at most {NAME_BYTES} bytes of UTF-8, beginning with a letter, a digit or '_' (a name is one "
        f"folder of the store, not a path)"
    )


def check_shape(num_embeddings: object, embedding_dim: object) -> tuple[int, int]:
    """Check the shape of a new table.

    Raises
    ------
    TypeError, ValueError
        The numbers are not integers, or out of range.
    """
    return (
        validation.count(num_embeddings, "num_embeddings", maximum=MAX_ROWS),
        validation.count(embedding_dim, "embedding_dim", maximum=MAX_DIM),
    )
