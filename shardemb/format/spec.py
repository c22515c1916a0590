"""What is fixed about a table, and the arithmetic of where a row lies.

A `TableSpec` is fixed when its table is created, and is stored in the table's zarr metadata. What a commit can change
about a table is in ``manifest.py``.

One row is one **record**: the weight, then each state column, side by side, as float32. A row-shard is
`rows_per_shard` records, one zarr chunk, one file.
"""

from __future__ import annotations

import math
import re
import unicodedata
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
        Number of rows, and number of float32 values in the weight of each.
    rows_per_shard : int
        A multiple of `shard_rows_multiple`.
    optimizer : Optimizer or None
        As of creation; it determines the state columns. The current hyper-parameters are in the `TableEntry`.
    initializer : Initializer
        Gives the weights of rows that were never written.
    counters : bool
        Whether each row counts its updates, in columns ``count`` and ``last_step`` after those of the optimizer.
    padding_idx : int or None
        The row of padding, whose gradients are dropped.
    """

    uuid: str
    stream: str
    num_embeddings: int
    embedding_dim: int
    rows_per_shard: int
    optimizer: optim.Optimizer | None
    initializer: initializers.Initializer
    counters: bool = False
    padding_idx: int | None = None

    @cached_property
    def columns(self) -> dict[str, tuple[int, int]]:
        """Maps each column's name to its half-open range of values in the record; ``"weight"`` is the first."""
        return record_columns(self.embedding_dim, self.optimizer, counters=self.counters)

    @cached_property
    def width(self) -> int:
        """Number of float32 values in a record."""
        return max(stop for _, stop in self.columns.values())

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
        """Bytes of all records, including those that take no disk space."""
        return self.num_embeddings * self.record_bytes

    @cached_property
    def initial_state(self) -> Float32Array:
        """Initial values of the state columns of a row, float32, shape (width - embedding_dim,)."""
        state = np.zeros(self.width, np.float32)
        if self.optimizer is not None:
            for name, value in self.optimizer.initial_state().items():
                state[slice(*self.columns[name])] = value
        return state[self.embedding_dim :]

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
        document: dict[str, object] = {
            "format_version": FORMAT_VERSION,
            "uuid": self.uuid,
            "stream": self.stream,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "rows_per_shard": self.rows_per_shard,
            "columns": {name: list(bounds) for name, bounds in self.columns.items()},
            "optimizer": optim.to_json(self.optimizer) if self.optimizer else None,
            "initializer": serialization.to_json(self.initializer),
        }
        if self.counters:
            document["counters"] = True
        if self.padding_idx is not None:
            document["padding_idx"] = self.padding_idx
        return document | {"crc32": crc32(document)}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> TableSpec:
        """Build a spec from the table's attributes, trusting none of them.

        Raises
        ------
        FormatError
            The version is newer, a value is missing or impossible, the columns disagree with the optimizer, or the
            checksum is wrong. (The first stores had no checksum.)
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
        if "padding_idx" in document:
            row = int_field(document, "padding_idx", spec.num_embeddings - 1, minimum=0)
            spec = replace(spec, padding_idx=row)
        columns = {name: list(bounds) for name, bounds in spec.columns.items()}
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
    padding_idx: int | None = None,
    rows_per_shard: int | None,
    max_shards: int,
) -> TableSpec:
    """Make the spec of a new table from a name, a shape and a row of padding that were checked already.

    Raises
    ------
    TypeError, ValueError
        The optimizer or the number of rows per shard is invalid.
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
        padding_idx=padding_idx,
    )


def reshaped_spec(
    spec: TableSpec, *, optimizer: object, rows_per_shard: int | None, max_shards: int, commit_id: str
) -> TableSpec:
    """Make the spec of a table with other shards or another optimizer.

    Equal arguments give the same uuid, so that an interrupted rewrite is continued and not started again. `commit_id`
    identifies the commit whose rows are copied.

    Raises
    ------
    TypeError, ValueError
        As `new_spec`.
    """
    shape = spec.num_embeddings, spec.embedding_dim
    wanted = spec.rows_per_shard if rows_per_shard is None else rows_per_shard
    checked, rows = _checked(shape, optimizer, wanted, max_shards, counters=spec.counters)
    identity = uuid.uuid5(uuid.UUID(spec.uuid), f"{commit_id} {rows} {checked!r}")
    return replace(spec, uuid=str(identity), rows_per_shard=rows, optimizer=checked)


def _checked(
    shape: tuple[int, int], optimizer: object, rows_per_shard: int | None, max_shards: int, *, counters: bool
) -> tuple[optim.Optimizer | None, int]:
    """Check an optimizer and a number of rows per shard; return the optimizer, and the number rounded or chosen."""
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
    """Return the layout of a record: the half-open range of values of the weight and of each state column, in order."""
    columns, start = {"weight": (0, embedding_dim)}, embedding_dim
    states = optimizer.state_columns(embedding_dim) if optimizer else {}
    if counters:
        states.pop(
            LAST_STEP, None
        )  # an optimizer that catches up has this column too: there is one of it, the last
        states |= dict.fromkeys(COUNTERS, 1)
    for name, width in states.items():
        columns[name] = (start, start + width)
        start += width
    return columns


def shard_rows_multiple(record_bytes: int) -> int:
    """Return the number of which `rows_per_shard` must be a multiple.

    Only then does a shard take whole words of the presence bitmap and whole pages of its file.
    """
    return math.lcm(ROWS_PER_WORD, PAGE // math.gcd(PAGE, record_bytes))


def choose_rows_per_shard(num_embeddings: int, record_bytes: int, wanted: int | None, max_shards: int) -> int:
    """Choose the rows per shard: `wanted` rounded up, or an automatic number.

    An automatic shard takes 64 to 512 MiB; more if the table would otherwise have more than `max_shards` shards (the
    mappings still free in this process), and less if the whole table is smaller.
    """
    multiple = shard_rows_multiple(record_bytes)
    if wanted is None:
        smallest, largest = SHARD_BYTES
        total = num_embeddings * record_bytes
        size = max(min(max(-(-total // MAX_SHARDS), smallest), largest), -(-total // max(max_shards, 1)))
        wanted = -(-size // record_bytes)
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
