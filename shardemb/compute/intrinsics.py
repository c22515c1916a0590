"""Instructions of the processor that neither Python nor numba offers, for use within kernels.

Addresses and numbers of bytes are plain integers; nothing here checks them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types as nb
from numba.core import cgutils
from numba.extending import intrinsic

_BYTE, _WORD, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()

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


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing_context: Any, address: Any) -> Any:  # noqa: ANN401
    """Let the processor fetch the cache line at an address, without waiting for it. Any address will do."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        pointer = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _WORD, _WORD, _WORD])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # For reading, into all levels of the cache, and into that of data rather than of instructions.
        read, keep, data = _WORD(0), _WORD(3), _WORD(1)
        builder.call(function, [builder.inttoptr(args[0], pointer), read, keep, data])
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
