"""What the records of a table mean: numbers out of their bytes, bytes out of numbers, and steps of its optimizer."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb import dtypes
from shardemb.base.sampling import stream_key
from shardemb.base.validation import FirstRows
from shardemb.compute import row_kernels
from shardemb.precision import coded_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.compute.plan import Grouped
    from shardemb.format.spec import TableSpec
    from shardemb.optim import Optimizer

    Bytes = NDArray[np.uint8]

    TakeStep = Callable[[Grouped, Float32Array, Int64Array, int, int], None]
    """``step(batch, gradients, places, start, stop)`` changes the distinct rows ``start:stop``, which are at places."""

WRITTEN, UPDATED = "@written", "@updated"
"""What is added to a table's stream for the random words that round writes, and updates. No table has such a name."""


def first_rows(spec: TableSpec, rows: FirstRows | None) -> FirstRows | None:
    """Return the first rows of a table, if there are any, as the elements of its records.

    They raise `ValueError` if the table holds raw bytes and the values are none.
    """
    if rows is None or not spec.precision.is_coded:
        return rows
    given = rows.read

    def read(start: int, stop: int) -> NDArray[Any]:
        values = given(start, stop)
        if not spec.precision.is_raw:
            return RecordCodec(spec).encoded(values)
        found = values.astype(np.uint8)
        if not np.array_equal(found, values):
            msg = f"initializer: rows {start} to {stop - 1} hold values that are no bytes: pass integers from 0 to 255"
            raise ValueError(msg)
        return found

    return FirstRows(rows.count, read)


def converted(
    old: TableSpec, new: TableSpec, records: NDArray[Any], written: NDArray[np.bool_], *, keep_state: bool
) -> NDArray[Any]:
    """Return records of a table as those of a table with another precision or another optimizer.

    Rows that were never `written` become zeros. Unless `keep_state`, state is freshly initialised.
    """
    made = np.zeros((len(records), new.width), new.element)
    same = old.precision == new.precision
    if same:
        columns = new.width if keep_state else new.weight_width
        made[written, :columns] = records[written, :columns]
        made[written, columns:] = new.initial_state[columns - new.weight_width :]
        return made
    source, target = RecordCodec(old), RecordCodec(new)
    some = records[written].view(np.uint8)
    rows = np.empty((len(some), new.width), new.element)
    rows[:, : new.weight_width] = target.encoded(source.decoded(some))
    rows[:, new.weight_width :] = new.initial_state
    if keep_state:
        for name in new.states:
            target.put(rows.view(np.uint8), name, source.decoded(some, name))
    made[written] = rows
    return made


class RecordCodec:
    """How numbers become the records of a table, and the reverse. Safe from any thread.

    Parameters
    ----------
    spec : TableSpec
    """

    def __init__(self, spec: TableSpec) -> None:
        self._spec = spec
        self._precision = spec.precision

    # ---- reading

    def shape_of(self, column: str, form: str) -> tuple[int, np.dtype[Any]]:
        """Return how many values of what dtype a lookup of a column returns for a row."""
        first, last = self._spec.columns[column]
        if form == dtypes.RAW:
            return (last - first) * self._spec.element.itemsize, np.dtype(np.uint8)
        return self._count(column), dtypes.numpy_dtype(form)

    def gather(
        self, records: Bytes, places: Int64Array, column: str, form: str, out: NDArray[Any], start: int
    ) -> None:
        """Set ``out[start + i]`` to a column of the record at ``places[i]``, in one of the forms of a lookup.

        Parameters
        ----------
        records : ndarray of uint8, shape (n, record_bytes)
        places : ndarray of int64
            A place below 0 leaves a gap.
        column, form : str
            The form is the name of a float type or ``"raw"``.
        out : ndarray, shape (m, width)
            Of the form's dtype, or its bytes.
        start : int
        """
        size = self._spec.element.itemsize
        first, last = (size * each for each in self._spec.columns[column])
        target = out.view(np.uint8)
        dtype = self._dtype(column)
        if form in (dtypes.RAW, getattr(dtype, "kind", None)):  # as it is stored: nothing to decode
            address = target.ctypes.data + start * target.shape[1]
            row_kernels.copy_from(
                records.ctypes.data + first, records.shape[1], places, address, last - first
            )
            return
        kernel = coded_rows.gather(dtype, form)
        kernel(records, places, first, last - first, self._count(column), dtype.block_size, target, start)

    def decoded(self, records: Bytes, column: str = "weight") -> Float32Array:
        """Return a column of records as float32."""
        out = np.empty((len(records), self._count(column)), np.float32)
        self.gather(records, np.arange(len(records)), column, "float32", out, 0)
        return out

    def _count(self, column: str) -> int:
        return self._spec.parts[column].count

    def _dtype(self, column: str) -> dtypes.Dtype:
        return self._precision.dtype if column == "weight" else dtypes.Plain(self._spec.parts[column].dtype)

    # ---- writing

    def encoded(self, weights: Float32Array, rows: Int64Array | None = None, step: int = 0) -> NDArray[Any]:
        """Return the bytes of weights, shape (n, bytes of a weight).

        They are rounded to nearest, or, if the `rows` that they are written to are given, as the table rounds.
        """
        out = np.empty((len(weights), self._spec.weight_width), self._spec.element)
        self.encode(weights, out, rows, step, 0, len(weights))
        return out

    def encode(
        self,
        weights: Float32Array,
        out: NDArray[Any],
        rows: Int64Array | None,
        step: int,
        start: int,
        stop: int,
    ) -> None:
        """Set ``out[start:stop]`` to the bytes of weights; see `encoded`."""
        if not self._precision.is_coded:
            out[start:stop] = weights[start:stop]
            return
        dtype = self._precision.dtype
        drawn = rows is not None and self._precision.rounding is not None
        # To round to nearest, none is looked at.
        numbers = np.zeros(len(weights), np.int64) if rows is None else self._spec.numbers_of(rows)
        kernel = coded_rows.encode_rows(dtype, drawn=drawn)
        kernel(weights, out, numbers, self._key(WRITTEN), step, dtype.block_size, start, stop)

    def put(self, records: Bytes, column: str, values: Float32Array) -> None:
        """Set a column of state of records, rounded to nearest."""
        part = self._spec.parts[column]
        data = values.astype(dtypes.numpy_dtype(part.dtype))
        records[:, part.offset : part.stop] = data.view(np.uint8).reshape(len(records), -1)

    # ---- training

    @cached_property
    def _states(self) -> Int64Array:
        """First byte, number of values and bytes of a value of each column of the optimizer's state."""
        optimizer, dim = self._spec.optimizer, self._spec.embedding_dim
        names = optimizer.state_columns(dim) if optimizer else {}
        parts = [self._spec.parts[name] for name in names]
        flat = [
            number for part in parts for number in (part.offset, part.count, dtypes.ITEM_BYTES[part.dtype])
        ]
        return np.array(flat or [0, 0, 4], np.int64)

    def step(self, optimizer: Optimizer, number: int, factor: float, records: Bytes) -> TakeStep:
        """Return what takes the table's `number`-th step on records, with gradients times a factor."""
        spec, precision = self._spec, self._precision
        plain = factor == 1 and not optimizer.has_options
        kernel = coded_rows.step(
            type(optimizer),
            precision.dtype,
            precision.state_dtype,
            drawn=precision.rounding is not None,
            with_options=not plain,
        )
        scalars = optimizer.scalars_of(number)
        options = optimizer.options_of(number, spec.embedding_dim, factor)
        what = self._states, spec.weight_width, precision.dtype.block_size, self._key(UPDATED)
        counting = number if spec.counters else 0

        def take_step(
            batch: Grouped, gradients: Float32Array, places: Int64Array, start: int, stop: int
        ) -> None:
            rows = records, places, spec.numbers_of(batch.rows), batch.starts, batch.order
            kernel(*rows, gradients, scalars, options, *what, number, counting, start, stop)

        return take_step

    def _key(self, what: str) -> np.uint64:
        rounding = self._precision.rounding
        return np.uint64(0 if rounding is None else stream_key(rounding.seed, self._spec.stream + what))
