"""Which pages of a mapped file are in memory, and advice to the kernel to read those that are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import types as nb

from shardemb.base.sizes import PAGE
from shardemb.compute.compiler import kernel
from shardemb.compute.row_index import place_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array


# Called from kernels, so without the GIL, and without the cost of a call from Python for each page.
_madvise = nb.ExternalFunction("madvise", nb.int32(nb.uintp, nb.uintp, nb.int32))
_mincore = nb.ExternalFunction("mincore", nb.int32(nb.uintp, nb.uintp, nb.uintp))


@kernel
def sample_resident(
    base: int,
    record_bytes: int,
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    slots: int,
    present: NDArray[np.uint8],
    ids: Int64Array,
    samples: int,
) -> int:
    """Of `samples` ids spread over the batch, count those whose page is in memory; -1 if mincore fails.

    Rows that are in slots need no page, and neither do rows that were never written according to `present`: they count
    as if their page were in memory.
    """
    answer = np.zeros(1, np.uint8)
    resident = 0
    for k in range(samples):
        row = ids[k * ids.size // samples]
        if (present.size and not (present[row >> 3] >> (row & 7)) & 1) or place_of(
            directory, branches, leaves, slots, row
        ) != row:
            resident += 1
            continue
        # Only the first page of the record: this is a sample.
        page = (base + row * record_bytes) & -PAGE
        if _mincore(page, PAGE, answer.ctypes.data) != 0:
            return -1
        resident += answer[0] & 1
    return resident


@kernel
def count_resident(address: int, nbytes: int) -> int:
    """Count the pages of a range of whole pages that are in memory; 0 if mincore fails."""
    answer = np.zeros(nbytes // PAGE, np.uint8)
    if _mincore(address, nbytes, answer.ctypes.data) != 0:
        return 0
    resident = 0
    for page in answer:
        resident += int(page & 1)
    return resident


@kernel
def advise_range(address: int, nbytes: int, advice: int, most: int) -> int:
    """Give `advice` on a range of memory, up to `most` bytes in a call; return how many calls failed."""
    failed = 0
    for start in range(0, nbytes, most):
        failed += _madvise(address + start, min(most, nbytes - start), advice) != 0
    return failed


@kernel
def advise(
    base: int,
    record_bytes: int,
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    slots: int,
    present: NDArray[np.uint8],
    sorted_ids: Int64Array,
    advice: int,
    most_pages: int,
    start: int,
    stop: int,
) -> int:
    """Give `advice` on the pages of ascending ids, up to `most_pages` in a call; return how many calls failed.

    Rows that are in slots are skipped, and so are rows that were never written according to `present`. If `present` is
    empty, nothing is known about that.
    """
    # The pages from first to last are one run that has not been advised on yet; at the beginning it is empty.
    first, last, failed = np.int64(0), np.int64(-2), 0
    for i in range(start, stop):
        row = sorted_ids[i]
        # The bit first, because it costs less than the way through the index.
        if present.size and not (present[row >> 3] >> (row & 7)) & 1:
            continue
        if place_of(directory, branches, leaves, slots, row) != row:
            continue
        low, high = row * record_bytes // PAGE, ((row + 1) * record_bytes - 1) // PAGE
        if low > last + 1:  # a gap ends the run; one call for a run costs less than one for each page
            failed += advise_range(
                base + int(first) * PAGE, int(last + 1 - first) * PAGE, advice, most_pages * PAGE
            )
            first = low
        last = max(last, high)
    return failed + advise_range(
        base + int(first) * PAGE, int(last + 1 - first) * PAGE, advice, most_pages * PAGE
    )
