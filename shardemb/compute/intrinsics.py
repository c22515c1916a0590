"""Instructions of the processor that neither Python nor numba offers, for use within kernels.

Addresses and numbers of bytes are plain integers; nothing here checks them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import types as nb
from numba.core import cgutils
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

_BYTE, _SHORT, _WORD, _LONG, _FLOAT = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
)

STREAMED = 32
"""Bytes that one `stream` writes; their address must be a multiple. Half a cache line is faster than more or less."""


@intrinsic  # type: ignore[untyped-decorator]
def copy(typing_context: Any, target: Any, source: Any, nbytes: Any) -> Any:  # noqa: ANN401
    """Copy bytes from one address to another, with one call of memcpy.

    A loop over the values of a row would keep the processor busy with that row, so that its cache misses would not
    overlap with those of the next row: gathering 65,536 random rows of 256 bytes takes 8-10 times as long.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        target, source = (builder.inttoptr(address, _BYTE.as_pointer()) for address in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], itemsize=1)
        return context.get_dummy_value()

    return nb.void(nb.intp, nb.intp, nb.intp), generate


def _prefetch(builder: Any, address: Any) -> None:  # noqa: ANN401
    pointer = _BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _WORD, _WORD, _WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # For reading, into all levels of the cache, and into that of data rather than of instructions.
    read, keep, data = _WORD(0), _WORD(3), _WORD(1)
    builder.call(function, [builder.inttoptr(address, pointer), read, keep, data])


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing_context: Any, address: Any) -> Any:  # noqa: ANN401
    """Let the processor fetch the cache line at an address, without waiting for it. Any address will do."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        _prefetch(builder, args[0])
        return context.get_dummy_value()

    return nb.void(nb.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def stream(typing_context: Any, target: Any, source: Any) -> Any:  # noqa: ANN401
    """Copy `STREAMED` bytes past the caches: they need not fetch what is overwritten, nor evict anything for it.

    Other threads see the bytes after a `fence`.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        pointer = ir.VectorType(_FLOAT, STREAMED // 4).as_pointer()
        target, source = (builder.inttoptr(address, pointer) for address in args)
        # A source may begin at any float; a store past the caches needs an aligned target.
        store = builder.store(builder.load(source, align=4), target, align=STREAMED)
        store.set_metadata("nontemporal", builder.module.add_metadata([_WORD(1)]))
        return context.get_dummy_value()

    return nb.void(nb.intp, nb.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def fence(typing_context: Any) -> Any:  # noqa: ANN401
    """Make everything written before visible to other threads before anything that is written after."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        # On x86 a weaker fence is no instruction at all, and would not order stores past the caches.
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return nb.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_to_eight(typing_context: Any, target: Any, source: Any, number: Any) -> Any:  # noqa: ANN401
    """Write eight int32 to `target`: those at `source` plus a number. numba does not vectorise a loop for this."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        eight = ir.VectorType(_WORD, 8)
        target, source = (builder.inttoptr(address, eight.as_pointer()) for address in args[:2])
        number = builder.trunc(args[2], _WORD)
        numbers = ir.Constant(eight, ir.Undefined)
        for k in range(8):
            numbers = builder.insert_element(numbers, number, _WORD(k))
        builder.store(builder.add(builder.load(source, align=4), numbers), target, align=4)
        return context.get_dummy_value()

    return nb.void(nb.intp, nb.intp, nb.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def sum_of_eights(typing_context: Any, source: Any, count: Any) -> Any:  # noqa: ANN401
    """Return the sum of the squares of `count` times eight float32, in eight interleaved parts, added pairwise.

    They are added as ``optim.options.sum_of_squares`` does it, of which LLVM makes one addition at a time.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        eight = ir.VectorType(_FLOAT, 8)
        vectors = builder.inttoptr(args[0], eight.as_pointer())
        parts = cgutils.alloca_once_value(builder, ir.Constant(eight, [0.0] * 8))
        with cgutils.for_range(builder, args[1], intp=_LONG) as loop:
            values = builder.load(builder.gep(vectors, [loop.index]), align=4)
            builder.store(builder.fadd(builder.load(parts), builder.fmul(values, values)), parts)
        summed = [builder.extract_element(builder.load(parts), _WORD(k)) for k in range(8)]
        while len(summed) > 1:
            summed = [builder.fadd(one, other) for one, other in zip(summed[::2], summed[1::2], strict=True)]
        return summed[0]

    return nb.float32(nb.int64, nb.int64), generate


# ---- many rows into one -----------------------------------------------------------------------------------------

_LANES, _LINE, _AHEAD = 8, 64, 12
"""Columns in one register, bytes of a cache line, and how many rows ahead one is prefetched."""


class _Rows:
    """The loop over some columns of the rows at some places, with accumulators in registers.

    numba's own loop would read and write the sum of a bag in memory for each row, and check each time whether it is
    part of the row. That takes more than twice as long, because fewer cache misses of rows overlap.
    """

    def __init__(self, builder: Any, columns: int, args: Any) -> None:  # noqa: ANN401
        self._builder, self._registers = builder, range(columns // _LANES)
        self.target, self._source, self._places, self._record_bytes, self._count, self._known = args
        self._lines = range(0, 4 * columns, _LINE)

    def load(self, address: Any, kind: Any) -> list[Any]:  # noqa: ANN401
        """Return accumulators with the numbers at an address."""
        vectors, found = self._vectors(address, kind), []
        for k in self._registers:
            found.append(cgutils.alloca_once(self._builder, ir.VectorType(kind, _LANES)))
            self._builder.store(self._vector(vectors, k), found[-1])
        return found

    def store(self, accumulators: list[Any], address: Any, kind: Any) -> None:  # noqa: ANN401
        """Store accumulators at an address."""
        vectors = self._vectors(address, kind)
        for k in self._registers:
            value = self._builder.load(accumulators[k])
            self._builder.store(value, self._builder.gep(vectors, [_LONG(k)]), align=4)

    def each(self, use: Callable[[Any, list[Any]], None]) -> None:
        """Call ``use(number, vectors)`` for each row, with its number and its values."""
        builder = self._builder
        last = builder.sub(self._known, _LONG(1))
        with cgutils.for_range(builder, self._count, intp=_LONG) as loop:
            ahead = builder.add(loop.index, _LONG(_AHEAD))
            ahead = self._row(builder.select(builder.icmp_signed("<", ahead, last), ahead, last))
            for line in self._lines:
                _prefetch(builder, builder.add(ahead, _LONG(line)))
            row = self._vectors(self._row(loop.index), _FLOAT)
            use(loop.index, [self._vector(row, k) for k in self._registers])

    def everywhere(self, value: Any) -> Any:  # noqa: ANN401
        """Return a vector that has the same number everywhere."""
        vector = ir.Constant(ir.VectorType(value.type, _LANES), ir.Undefined)
        for k in range(_LANES):
            vector = self._builder.insert_element(vector, value, _WORD(k))
        return vector

    def _row(self, number: Any) -> Any:  # noqa: ANN401
        places = self._builder.inttoptr(self._places, _LONG.as_pointer())
        place = self._builder.load(self._builder.gep(places, [number]))
        return self._builder.add(self._source, self._builder.mul(place, self._record_bytes))

    def _vectors(self, address: Any, kind: Any) -> Any:  # noqa: ANN401
        return self._builder.inttoptr(address, ir.VectorType(kind, _LANES).as_pointer())

    def _vector(self, vectors: Any, k: int) -> Any:  # noqa: ANN401
        return self._builder.load(self._builder.gep(vectors, [_LONG(k)]), align=4)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_rows(
    typing_context: Any,  # noqa: ANN401
    columns: Any,  # noqa: ANN401
    target: Any,  # noqa: ANN401
    source: Any,  # noqa: ANN401
    places: Any,  # noqa: ANN401
    record_bytes: Any,  # noqa: ANN401
    count: Any,  # noqa: ANN401
    known: Any,  # noqa: ANN401
    weights: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Add some columns of `count` rows to the numbers at `target`, in the order of the rows.

    `columns` is a constant, a multiple of 8. `source` is where these columns of the first record are, `places` where
    the places of the rows are, and `known` how many of these there are, also beyond the `count`, to prefetch from.
    `weights` is where the rows' factors are, or the constant 0.
    """
    weighted = not isinstance(weights, nb.IntegerLiteral)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        rows = _Rows(builder, columns.literal_value, args[1:7])
        totals = rows.load(rows.target, _FLOAT)

        def use(number: Any, values: list[Any]) -> None:  # noqa: ANN401
            if weighted:
                factors = builder.inttoptr(args[7], _FLOAT.as_pointer())
                factor = rows.everywhere(builder.load(builder.gep(factors, [number])))
                values = [builder.fmul(factor, value) for value in values]
            for total, value in zip(totals, values, strict=True):
                builder.store(builder.fadd(builder.load(total), value), total)

        rows.each(use)
        rows.store(totals, rows.target, _FLOAT)
        return context.get_dummy_value()

    return nb.void(columns, *[nb.int64] * 6, nb.int64 if weighted else weights), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def max_rows(
    typing_context: Any,  # noqa: ANN401
    columns: Any,  # noqa: ANN401
    target: Any,  # noqa: ANN401
    source: Any,  # noqa: ANN401
    places: Any,  # noqa: ANN401
    record_bytes: Any,  # noqa: ANN401
    count: Any,  # noqa: ANN401
    known: Any,  # noqa: ANN401
    winners: Any,  # noqa: ANN401
    first: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Take the greater ones of some columns of rows and the numbers at `target`; see `add_rows`.

    `winners` is where int32 are that become `first` plus the number of the row wherever it is greater, or the constant
    0.
    """
    telling = not isinstance(winners, nb.IntegerLiteral)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        rows = _Rows(builder, columns.literal_value, args[1:7])
        greatest = rows.load(rows.target, _FLOAT)
        numbers = rows.load(args[7], _WORD) if telling else []

        def use(number: Any, values: list[Any]) -> None:  # noqa: ANN401
            wins = [
                builder.fcmp_ordered(">", value, builder.load(best))
                for value, best in zip(values, greatest, strict=True)
            ]
            within = rows.everywhere(builder.trunc(builder.add(number, args[8]), _WORD))
            for each, won in zip(numbers, wins, strict=False):
                builder.store(builder.select(won, within, builder.load(each)), each)
            for best, value, won in zip(greatest, values, wins, strict=True):
                builder.store(builder.select(won, value, builder.load(best)), best)

        rows.each(use)
        rows.store(greatest, rows.target, _FLOAT)
        if telling:
            rows.store(numbers, args[7], _WORD)
        return context.get_dummy_value()

    return nb.void(columns, *[nb.int64] * 6, nb.int64 if telling else winners, nb.int64), generate


# ---- float8 to bfloat16 -----------------------------------------------------------------------------------------

CONVERTED = 32
"""Numbers that one `float8_to_bfloat16` converts: one register of bytes, and two of 16 bits."""

_ALTERNATE = [at for k in range(CONVERTED) for at in (k, k + CONVERTED)]


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def float8_to_bfloat16(
    typing_context: Any,  # noqa: ANN401
    mantissa: Any,  # noqa: ANN401
    target: Any,  # noqa: ANN401
    source: Any,  # noqa: ANN401
    added: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Convert `CONVERTED` numbers of a float8 with so many bits of mantissa, a constant, to bfloat16.

    With 3 bits it is float8_e4m3fn, which has no infinity, and with 2 float8_e5m2, which has one. `added` is what is
    added to each exponent; none but that of 0 may leave the range of normal numbers of bfloat16. numba would convert
    as many numbers of 16 bits at a time as of 32, and not know that the source is not changed.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        bits, added = mantissa.literal_value, builder.trunc(args[3], _SHORT)
        codes = builder.load(builder.inttoptr(args[2], _vector(_BYTE).as_pointer()), align=1)
        normalised = _normalised(builder, builder.and_(codes, _all(_BYTE, 0x7F)), bits)
        # Byte by byte: to extend the bytes of both to 16 bits would take twice as many instructions.
        both = builder.shuffle_vector(
            normalised, codes, ir.Constant(ir.VectorType(_WORD, 2 * CONVERTED), _ALTERNATE)
        )
        both = builder.bitcast(both, _vector(_SHORT))
        exponent = builder.ashr(builder.shl(both, _all(_SHORT, 8)), _all(_SHORT, 1 + bits))
        number = builder.add(exponent, _everywhere(builder, added))

        def choose(relation: str, code: int, value: int) -> Any:  # noqa: ANN401
            # With a number that LLVM does not know, so that it does not compare bytes, which it would have to extend.
            limit = _everywhere(builder, builder.add(added, _SHORT(code << (7 - bits))))
            return builder.select(builder.icmp_signed(relation, number, limit), _all(_SHORT, value), known)

        known = number
        known = choose("==", -bits << bits, 0)  # what `_normalised` makes of 0
        if bits == 2:
            known = choose("==", 0x7C, 0x7F80)
            known = choose(">", 0x7C, 0x7FC0)
        else:
            known = choose("==", 0x7F, 0x7FC0)
        signed = builder.or_(known, builder.and_(both, _all(_SHORT, 0x8000)))
        builder.store(signed, builder.inttoptr(args[1], _vector(_SHORT).as_pointer()), align=2)
        return context.get_dummy_value()

    return nb.void(mantissa, nb.int64, nb.int64, nb.int64), generate


def _vector(kind: Any) -> Any:  # noqa: ANN401
    return ir.VectorType(kind, CONVERTED)


def _all(kind: Any, value: int) -> Any:  # noqa: ANN401
    return ir.Constant(_vector(kind), [value] * CONVERTED)


def _everywhere(builder: Any, value: Any) -> Any:  # noqa: ANN401
    first = builder.insert_element(ir.Constant(_vector(value.type), ir.Undefined), value, _WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_WORD, CONVERTED), [0] * CONVERTED))


def _normalised(builder: Any, magnitude: Any, bits: int) -> Any:  # noqa: ANN401
    """Return magnitudes as if no number were subnormal: the exponent goes below 0 instead.

    A subnormal number ``m`` of 3 bits becomes the least of ``m``, ``2m - 8``, ``4m - 16`` and ``8m - 24``: of these
    lines, each is the lowest from one power of two to the next. In terms of ``8 - m``, they are differences that begin
    at 0 for the least normal number, so that others need no condition.
    """
    saturating = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(_vector(_BYTE), [_vector(_BYTE), _vector(_BYTE)]),
        f"llvm.usub.sat.v{CONVERTED}i8",
    )
    below = builder.call(saturating, [_all(_BYTE, 1 << bits), magnitude])
    lost, line, drop = below, below, 1 << bits
    for k in range(1, bits):  # of 3 bits: below, 3 * below - 8, 7 * below - 32
        line = builder.add(builder.add(line, line), below)
        less = builder.sub(line, _all(_BYTE, drop))
        lost = builder.select(builder.icmp_signed(">", less, lost), less, lost)
        drop = 2 * drop + (1 << bits << k)
    return builder.sub(magnitude, lost)
