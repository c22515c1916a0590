"""How the numbers of a row are stored: as float32, in fewer bytes, or as bytes that nothing here interprets.

Plain types are written as their names: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"float8_e4m3fn"``,
``"float8_e5m2"``, and ``"raw"``. Those with scales are small dataclasses, `ScaledInt8` and `BlockScaled`.

Whatever a table stores, its arithmetic is float32: a row is decoded, changed and encoded again. ``precision/codecs.py``
has the formulas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from shardemb.base import serialization, validation
from shardemb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BlockScaled", "ScaledInt8", "Stochastic"]

ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "uint8": 1,
    "int8": 1,
}
"""Bytes of one number of each type that a column can have."""

FLOATS = "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"
"""Types of which a row can consist, and as which a lookup can return it."""

RAW = "raw"
STATES = "float32", "bfloat16"

MAX_BLOCK = 2**16


@dataclass(frozen=True)
class Part:
    """Where a column lies in a record: its first byte, and the type and number of its values."""

    offset: int
    dtype: str
    count: int

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.offset + self.count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Dtype(ABC):
    """What the weight of a row is stored as. Users write a string, or one of the public subclasses."""

    @abstractmethod
    def columns(self, embedding_dim: int) -> dict[str, tuple[str, int]]:
        """Return type and number of the values of each column, in order; the first is ``weight``."""

    @abstractmethod
    def to_json(self) -> object:
        """Return it as it is stored."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What people read."""

    @property
    def block_size(self) -> int:
        """Values that share a scale; 0 if it has no blocks."""
        return 0


@dataclass(frozen=True)
class Plain(Dtype):
    """Values of one type, or bytes, without anything else."""

    kind: str

    def columns(self, embedding_dim: int) -> dict[str, tuple[str, int]]:
        return {"weight": ("uint8" if self.kind == RAW else self.kind, embedding_dim)}

    def to_json(self) -> object:
        return self.kind

    @property
    def label(self) -> str:
        return "raw bytes" if self.kind == RAW else self.kind


@dataclass(frozen=True)
class _Scaled(Dtype):
    """Values with scales: these are stored by their names and fields."""

    def to_json(self) -> object:
        return serialization.to_json(self)

    @property
    def label(self) -> str:
        return repr(self)


@dataclass(frozen=True)
class ScaledInt8(_Scaled):
    """One byte a value, with a scale for each row: a quarter of the bytes of float32, and errors below half a scale.

    Parameters
    ----------
    bias : bool
        True: ``x = q * scale + bias`` with `q` from 0 to 255, which covers a row from its minimum to its maximum. The
        bytes are those of FBGEMM's fused 8-bit row: the values, then scale and bias as float32, ``embedding_dim + 8``
        in all; ``bias = min``, ``scale = (max - min) / 255``, ``q = round((x - min) * 255 / (max - min + 1e-8))``.
        False: ``x = q * scale`` with `q` from -127 to 127, ``scale = max(abs(x)) / 127``, ``embedding_dim + 4`` bytes.

    Notes
    -----
    A row with NaN or infinity becomes NaN as a whole, and so does one whose range float32 cannot hold.

    Examples
    --------
    >>> import shardemb
    >>> table = store.create_table(
    ...     "small", num_embeddings=1000, embedding_dim=2, dtype=shardemb.dtypes.ScaledInt8(bias=True)
    ... )
    >>> table.write([3], [[-1.0, 0.5]])
    >>> table.lookup([3])
    array([[-1. ,  0.5]], dtype=float32)
    """

    bias: bool = True

    def __post_init__(self) -> None:
        given: object = self.bias
        if not isinstance(given, bool):
            msg = f"ScaledInt8: bias must be True or False, got {given!r}"
            raise TypeError(msg)

    def columns(self, embedding_dim: int) -> dict[str, tuple[str, int]]:  # noqa: D102
        values = {"weight": ("uint8" if self.bias else "int8", embedding_dim), "scale": ("float32", 1)}
        return values | ({"bias": ("float32", 1)} if self.bias else {})


@dataclass(frozen=True)
class BlockScaled(_Scaled):
    """One byte a value, with a power of two as the scale of each block of values: the layout of LLM tables.

    The values of a row come first, then one byte for each block: 256 values in blocks of 32 take 264 bytes.

    Parameters
    ----------
    values : {"float8_e4m3fn", "float8_e5m2"}
        Type of the values.
    block : int
        Values that share a scale; the last block of a row may have fewer.

    Notes
    -----
    Scales are float8_e8m0fnu (of the OCP Microscaling formats): byte `s` means ``2**(s - 127)``. The smallest scale is
    chosen with which the largest value of the block does not overflow. A block with NaN or infinity becomes NaN.

    Examples
    --------
    >>> import shardemb
    >>> table = store.create_table(
    ...     "ngrams", num_embeddings=1000, embedding_dim=256,
    ...     dtype=shardemb.dtypes.BlockScaled("float8_e4m3fn", block=32),
    ... )
    >>> table.lookup([1, 2], dtype="raw").shape
    (2, 264)
    """

    values: Literal["float8_e4m3fn", "float8_e5m2"] = "float8_e4m3fn"
    block: int = 32

    def __post_init__(self) -> None:
        if self.values not in ("float8_e4m3fn", "float8_e5m2"):
            msg = f'BlockScaled: values must be "float8_e4m3fn" or "float8_e5m2", got {self.values!r}'
            raise ValueError(msg)
        block = validation.count(self.block, "BlockScaled: block", maximum=MAX_BLOCK)
        object.__setattr__(self, "block", block)

    @property
    def block_size(self) -> int:  # noqa: D102
        return self.block

    def columns(self, embedding_dim: int) -> dict[str, tuple[str, int]]:  # noqa: D102
        return {
            "weight": (self.values, embedding_dim),
            "scale": ("float8_e8m0fnu", -(-embedding_dim // self.block)),
        }


@dataclass(frozen=True)
class Stochastic:
    """Round up or down at random, so that the mean of many roundings is the number itself.

    Small steps are not lost then, as they are with rounding to nearest once they are below half of what the type can
    tell apart.

    Parameters
    ----------
    seed : int
        Which of two neighbours a number becomes is a function of this seed, the table's name at creation, the row, the
        column and the step, so a run repeats bit for bit.

    Notes
    -----
    Updates and writes draw different numbers. Several writes of a row between two updates draw the same ones.

    Examples
    --------
    >>> import shardemb
    >>> table = store.create_table(
    ...     "trained", num_embeddings=1000, embedding_dim=8, dtype="bfloat16",
    ...     rounding=shardemb.dtypes.Stochastic(seed=1), optimizer=shardemb.optim.SGD(lr=0.1),
    ... )
    """

    seed: int = 0

    def __post_init__(self) -> None:
        seed = validation.count(self.seed, "Stochastic: seed", minimum=0, maximum=2**64 - 1)
        object.__setattr__(self, "seed", seed)


DtypeLike: TypeAlias = "str | Dtype | np.dtype[Any] | type[Any]"
"""What may be given as the dtype of a table."""

RoundingLike: TypeAlias = 'Literal["nearest", "stochastic"] | Stochastic'
"""What may be given as the rounding of a table."""


@dataclass(frozen=True)
class Precision:
    """How the records of a table are stored.

    Attributes
    ----------
    dtype : Dtype
        Of the weight.
    state_dtype : str
        Of the columns of optimizer state, except those that have one number a row, which are float32.
    rounding : Stochastic or None
        How numbers are rounded; None means to nearest, ties to even.
    """

    dtype: Dtype = Plain("float32")
    state_dtype: str = "float32"
    rounding: Stochastic | None = None

    @property
    def is_coded(self) -> bool:
        """Whether a record is anything else than a row of float32."""
        return self.dtype != Plain("float32") or self.state_dtype != "float32"

    @property
    def is_raw(self) -> bool:
        """Whether the weight is bytes that nothing here interprets."""
        return self.dtype == Plain(RAW)

    def parts(
        self, embedding_dim: int, states: Mapping[str, int], counters: tuple[str, ...]
    ) -> dict[str, Part]:
        """Return where each column of a record lies: weight and scales, state columns, counters."""
        columns = self.dtype.columns(embedding_dim)
        for name, count in states.items():
            columns[name] = ("float32" if count == 1 else self.state_dtype, count)
        columns |= dict.fromkeys(counters, ("float32", 1))
        parts: dict[str, Part] = {}
        end = 0
        for name, (kind, count) in columns.items():
            # The scales of a row follow its values directly: other programs have them so.
            align = ITEM_BYTES[kind] if name in states or name in counters else 1
            parts[name] = Part(-(-end // align) * align, kind, count)
            end = parts[name].stop
        return parts

    def record_bytes(self, parts: Mapping[str, Part]) -> int:
        """Return the bytes of a record, so many that every column of the next one is as aligned as in the first."""
        first = next(iter(parts.values()))
        rest = [ITEM_BYTES[part.dtype] for name, part in parts.items() if name not in ("scale", "bias")]
        align = max(ITEM_BYTES[first.dtype], *rest)
        end = max(part.stop for part in parts.values())
        return -(-end // align) * align

    @property
    def public_dtype(self) -> str | Dtype:
        """The dtype as users write it."""
        return self.dtype.kind if isinstance(self.dtype, Plain) else self.dtype

    @property
    def exported(self) -> str:
        """As what the weight leaves in Arrow and parquet, which have neither bfloat16 nor float8."""
        kept = (Plain("float16"), Plain(RAW))
        return str(self.public_dtype) if self.dtype in kept else "float32"

    def with_dtype(self, dtype: Dtype) -> Precision:
        """Return the same with another dtype of the weight."""
        changed = replace(self, dtype=dtype)
        return changed if changed.is_coded else replace(changed, rounding=None)

    def to_json(self) -> dict[str, object]:
        """Return it as the members of a table's document."""
        rounding = None if self.rounding is None else serialization.to_json(self.rounding)
        return {"dtype": self.dtype.to_json(), "state_dtype": self.state_dtype, "rounding": rounding}


def from_json(document: Mapping[str, object]) -> Precision:
    """Read what `Precision.to_json` returned, trusting nothing.

    Raises
    ------
    FormatError
        This version does not know it.
    """
    given, state, rounding = (document.get(name) for name in ("dtype", "state_dtype", "rounding"))
    if isinstance(given, dict):
        found: Dtype = serialization.from_json("dtype", _SCALED, given)
    elif given in (*FLOATS, RAW):
        found = Plain(str(given))
    else:
        msg = f"dtype is {given!r}"
        raise FormatError(msg)
    if state not in STATES or not isinstance(rounding, dict | None):
        msg = f"state_dtype is {state!r}, and rounding is {rounding!r}"
        raise FormatError(msg)
    how = (
        None
        if rounding is None
        else serialization.from_json("rounding", {"Stochastic": Stochastic}, rounding)
    )
    return Precision(found, str(state), how)


_SCALED: dict[str, type[_Scaled]] = {"ScaledInt8": ScaledInt8, "BlockScaled": BlockScaled}


# ---- what users give ------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """How the rows of a new table are to be stored, as users say it; nothing is checked yet."""

    dtype: object = "float32"
    state_dtype: object = "float32"
    rounding: object = "nearest"

    def checked(self, *, trains: bool) -> Precision:
        """Check it for a table that has an optimizer, which `trains` it, or has none.

        Raises
        ------
        TypeError, ValueError
            A name is unknown, or they do not fit together.
        """
        state = _name_of(self.state_dtype)
        if state not in STATES:
            msg = f"state_dtype must be one of {', '.join(STATES)}, got {self.state_dtype!r}"
            raise ValueError(msg)
        precision = Precision(checked_dtype(self.dtype), state, _checked_rounding(self.rounding))
        if precision.is_raw and (trains or precision.rounding or state != "float32"):
            msg = (
                'a table with dtype="raw" holds bytes that are not numbers: it has no optimizer, state or rounding; '
                "choose a dtype that is one, such as BlockScaled for rows with scales"
            )
            raise ValueError(msg)
        if state != "float32" and not trains:
            msg = f"state_dtype={state!r}: the table has no optimizer, so there is no state; leave it out"
            raise ValueError(msg)
        if precision.rounding and not precision.is_coded:
            msg = "rounding: a float32 table with float32 state rounds nothing; leave it out, or choose another dtype"
            raise ValueError(msg)
        return precision


def checked_dtype(given: object) -> Dtype:
    """Check the dtype of a table.

    Raises
    ------
    TypeError, ValueError
        It is none that a table can have.
    """
    if isinstance(given, _Scaled):
        return given
    name = given.kind if isinstance(given, Plain) else _name_of(given)
    if name in (*FLOATS, RAW):
        return Plain(name)
    scaled = "ScaledInt8(bias=True), BlockScaled('float8_e4m3fn', block=32)"
    msg = f"dtype must be one of {', '.join((*FLOATS, RAW))}, or of shardemb.dtypes: {scaled}; got {given!r:.80}"
    if name in ("int8", "uint8"):
        msg += f"; without a scale, {name} cannot hold weights"
    raise (ValueError if isinstance(given, str) else TypeError)(msg)


def converted(now: Precision, dtype: object, optimizer: object, table: str) -> Precision:
    """Check a dtype to convert a table to, None for its own; return the precision that it has then.

    Raises
    ------
    TypeError, ValueError
        The dtype is none that a table can have; raw bytes would be made, converted or trained.
    """
    if optimizer is None:
        now = replace(now, state_dtype="float32").with_dtype(now.dtype)
    wanted = now.dtype if dtype is None else checked_dtype(dtype)
    if wanted != now.dtype and Plain(RAW) in (wanted, now.dtype):
        msg = f"table {table!r} is {now.dtype.label}: raw bytes are neither made nor converted, got {dtype!r}"
        raise ValueError(msg)
    if now.is_raw and optimizer not in ("keep", None):
        msg = f"table {table!r} holds raw bytes, which no optimizer can train"
        raise ValueError(msg)
    return now if wanted == now.dtype else now.with_dtype(wanted)


def checked_form(given: object, stored: Dtype, table: str) -> str:
    """Check as what a lookup is to return rows: the name of a float type, or ``"raw"``.

    Raises
    ------
    TypeError, ValueError
        It is neither, or the table holds nothing but bytes.
    """
    raw = stored == Plain(RAW)
    if given is None:
        return RAW if raw else "float32"
    name = stored.kind if given == stored and isinstance(stored, Plain) else _name_of(given)
    if name == RAW or (raw and name == "uint8"):
        return RAW
    if raw:
        msg = f"table {table!r} holds raw bytes: look them up with dtype='raw', which is the default; got {given!r}"
        raise ValueError(msg)
    if name not in FLOATS:
        ways = f"{', '.join(FLOATS)}, or 'raw' for the bytes as stored"
        msg = f"table {table!r}: a lookup returns {ways}; got {given!r:.80}"
        raise (ValueError if isinstance(given, str) else TypeError)(msg)
    return name


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of that name, those of the package ml_dtypes included; uint8 for ``"raw"``."""
    if name in ("float32", "float16", "uint8", "int8"):
        return np.dtype(name)
    if name == RAW:
        return np.dtype(np.uint8)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


def _checked_rounding(given: object) -> Stochastic | None:
    if isinstance(given, Stochastic):
        return given
    if isinstance(given, str) and given in ("nearest", "stochastic"):
        return None if given == "nearest" else Stochastic()
    msg = (
        f'rounding must be "nearest", "stochastic" or shardemb.dtypes.Stochastic(seed=...), got {given!r:.80}'
    )
    raise (ValueError if isinstance(given, str) else TypeError)(msg)


def _name_of(given: object) -> str:
    """Return the name of a type, given as that, or as the type that NumPy, ml_dtypes, torch or JAX have for it."""
    if isinstance(given, str):
        return given
    text = str(given)
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    try:
        return np.dtype(given).name if given is not None else ""  # type: ignore[call-overload]
    except TypeError:
        return ""
