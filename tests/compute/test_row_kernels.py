import ctypes
import os
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardemb.base.sizes import PAGE
from shardemb.compute import grouping, plan, residency, row_kernels
from shardemb.initializers import Constant
from shardemb.optim import SGD, Adagrad
from shardemb.optim.options import sum_of_squares
from shardemb.storage import address_space, files

NOTHING = np.empty(0, np.uint8)
NO_INDEX = *[np.empty(0, np.int32)] * 3, 0


def int64(values):
    return np.array(values, np.int64).reshape(-1)


# ---- grouping ---------------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    num_rows = draw(st.sampled_from([1, 2, 63, 2048, 2049, 2**22, 2**22 + 1, 2**31 + 5, 2**48]))
    few = st.sampled_from(draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=5)))
    ids = draw(st.lists(few | st.integers(0, num_rows - 1), max_size=60))
    return num_rows, int64(ids)


def sort_rows(ids, num_rows):
    """Sort as `plan.group` does; return the ids, and the position that each had."""
    bits = max(ids.size - 1, 0).bit_length()
    words = grouping.sort_rows(ids, bits, (num_rows - 1).bit_length())
    assert words.dtype == np.uint64
    return (words >> np.uint64(bits)).astype(np.int64), (words & np.uint64(2**bits - 1)).astype(np.int64)


@given(batches())
@example((2**63, int64([2**63 - 1])))  # an id that takes all bits
def test_sort_rows_is_a_stable_argsort(batch):
    num_rows, ids = batch
    sorted_ids, order = sort_rows(ids, num_rows)
    expected = np.argsort(ids, kind="stable")
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(sorted_ids, ids[expected])


@pytest.mark.parametrize(
    "num_rows", [1, 1_000, 2**12, 2**12 + 1, 400_000, 2**30, 2**45]
)  # one to four passes
@pytest.mark.parametrize("size", [200_000, 2**17, 2**17 + 1])
def test_sort_rows_on_a_large_batch(num_rows, size):
    ids = np.random.default_rng(0).zipf(1.2, size) % num_rows
    sorted_ids, order = sort_rows(ids, num_rows)
    np.testing.assert_array_equal(order, np.argsort(ids, kind="stable"))
    np.testing.assert_array_equal(sorted_ids, np.sort(ids))


@given(batches())
@example((5, int64([])))
def test_what_is_read_off_sorted_words_is_np_unique(batch):
    num_rows, ids = batch
    bits, n = max(ids.size - 1, 0).bit_length(), ids.size
    words = grouping.sort_rows(ids, bits, (num_rows - 1).bit_length())
    rows, starts, order, again, inverse = (np.full(size, -1) for size in (n, n + 1, n, n, n))
    expected, places, counts = np.unique(ids, return_inverse=True, return_counts=True)
    assert grouping.list_groups(words, bits, rows, starts, order) == expected.size
    assert grouping.list_inverse(words, bits, again, inverse) == expected.size
    np.testing.assert_array_equal(rows[: expected.size], expected)
    np.testing.assert_array_equal(again[: expected.size], expected)
    np.testing.assert_array_equal(starts[: expected.size + 1], np.concatenate([[0], np.cumsum(counts)]))
    np.testing.assert_array_equal(order, np.argsort(ids, kind="stable"))
    np.testing.assert_array_equal(inverse, places)


# ---- reading ----------------------------------------------------------------------------------------------------


def table(num_rows=300, width=7):
    return np.arange(num_rows * width, dtype=np.float32).reshape(num_rows, width)


def bitmap(rows, num_rows):
    bits = np.zeros(-(-num_rows // 8) * 8, np.bool_)
    bits[rows] = True
    return np.packbits(bits, bitorder="little")


@pytest.mark.parametrize(("column", "width"), [(0, 7), (0, 1), (3, 2), (6, 1)])
def test_gather_copies_the_column_of_its_part_of_the_batch(column, width):
    records, ids = table(), int64([5, 0, 299, 5, 17])
    out = np.full((5, width), -1, np.float32)
    row_kernels.gather(records, *NO_INDEX, column, ids, out, 1, 4)
    np.testing.assert_array_equal(out[1:4], records[ids[1:4], column : column + width])
    assert (out[[0, 4]] == -1).all()


def aligned(shape, offset):
    """Return an array of -1 that begins `offset` bytes after the start of a cache line."""
    memory = np.full(np.prod(shape) + 32, -1, np.float32)
    first = ((offset - memory.ctypes.data) % 64) // 4
    return memory[first : first + np.prod(shape)].reshape(shape)


@pytest.mark.parametrize("offset", [0, 32, 16, 4])
@pytest.mark.parametrize(("width", "column"), [(64, 0), (64, 1), (8, 3), (72, 2), (7, 0)])
def test_a_large_result_is_the_same_past_the_caches(width, column, offset):
    count = row_kernels._STREAMED_BYTES // (4 * width) + 2
    records, ids = table(3000, 75), np.random.default_rng(0).integers(0, 3000, count)
    out = aligned((count, width), offset)
    row_kernels.gather(records, *NO_INDEX, column, ids, out, 0, count)
    np.testing.assert_array_equal(out, records[ids, column : column + width])


def test_a_large_result_has_the_gaps_of_a_small_one():
    """Rows without a place leave the caller's memory as it is, until the lookup retries."""
    count = row_kernels._STREAMED_BYTES // 256 + 2
    records, places = table(3000, 64), np.random.default_rng(0).integers(0, 3000, count)
    places[[0, 7, count - 1]] = -1
    out = aligned((count, 64), 0)
    row_kernels.copy_from(records.ctypes.data, 256, places, out.ctypes.data, 256)
    gaps = places < 0
    np.testing.assert_array_equal(out[~gaps], records[places[~gaps]])
    assert (out[gaps] == -1).all()


def test_gather_or_fill_reads_only_rows_that_are_present():
    records, ids = table(), int64([5, 0, 299, 5, 17])
    out = np.full((5, 3), -1, np.float32)
    kernel = row_kernels.gather_or_fill(Constant)
    kernel(records, *NO_INDEX, bitmap([5, 299], 300), 2, ids, out, np.uint64(0), np.array([0.5]), 0, 1, 0, 4)
    np.testing.assert_array_equal(out[[0, 2, 3]], records[[5, 299, 5], 2:5])
    assert (out[1] == 0.5).all()
    assert (out[4] == -1).all()


# ---- changing ---------------------------------------------------------------------------------------------------


def grouped(ids, num_rows=300):
    batch = plan.group(int64(ids), num_rows)
    return batch.rows, batch.starts, batch.order


def test_scatter_takes_the_last_of_duplicates_and_leaves_state_alone():
    records, before = table(), table()
    values = np.arange(100, 110, dtype=np.float32).reshape(5, 2)
    rows, starts, order = grouped([9, 4, 9, 250, 4])
    row_kernels.scatter(records, rows, starts, order, values, 0, 2)  # rows 4 and 9, but not 250
    before[4, :2], before[9, :2] = values[4], values[2]
    np.testing.assert_array_equal(records, before)


def test_copy_or_fill_copies_what_the_files_hold_and_gives_the_others_their_first_record():
    records, before = table(width=4), table(width=4)
    present = bitmap([8, 10], 300)
    state = np.array([7, 9], np.float32)
    rows, places = int64([8, 9, 10, 11, 70]), int64([290, 291, 292, 293, 294])
    row_kernels.copy_or_fill(Constant)(
        records, present, rows, places, state, np.uint64(0), np.array([0.5]), 0, 1, 0, 4
    )
    before[[290, 292]] = before[[8, 10]]
    before[[291, 293]] = [0.5, 0.5, 7, 9]
    np.testing.assert_array_equal(records, before)
    np.testing.assert_array_equal(present, bitmap([8, 10], 300))


NO_OPTIONS = SGD().options_of(1, 1)


def test_step_sums_the_gradients_of_a_row_in_the_order_of_the_batch():
    """In float32 the order matters: only the right one results in 1."""
    big = np.float32(2**25)
    gradients = np.array([[big], [3], [-big], [5], [1]], np.float32)
    records = np.zeros((300, 1), np.float32)
    rows, starts, order = grouped([6, 2, 6, 2, 6])
    scalars, scratch = np.array([[-1, 0, 1, 1, 0]], np.float32), np.empty(1, np.float32)
    row_kernels.step(SGD, with_options=False)(
        records, rows, starts, order, gradients, scalars, NO_OPTIONS, scratch, 0, 0, 2
    )
    assert records[[6, 2], 0].tolist() == [1, 8]
    assert not records[[0, 1, 3, 4, 5, 7]].any()


def test_step_touches_only_its_part_of_the_rows():
    records = np.zeros((300, 1), np.float32)
    rows, starts, order = grouped([1, 2, 3, 4])
    gradients, scratch = np.ones((4, 1), np.float32), np.empty(1, np.float32)
    scalars = SGD(lr=1).scalars_of(1)
    row_kernels.step(SGD, with_options=False)(
        records, rows, starts, order, gradients, scalars, NO_OPTIONS, scratch, 0, 1, 3
    )
    assert np.flatnonzero(records).tolist() == [2, 3]


def test_a_division_by_zero_in_a_formula_is_nan_and_no_exception():
    records = np.zeros((300, 2), np.float32)
    rows, starts, order = grouped([1, 2])
    gradients, scratch = np.array([[0], [1]], np.float32), np.empty(1, np.float32)
    scalars = Adagrad(lr=1, eps=0).scalars_of(1)
    row_kernels.step(Adagrad, with_options=False)(
        records, rows, starts, order, gradients, scalars, NO_OPTIONS, scratch, 0, 0, 2
    )
    np.testing.assert_array_equal(records[:4], [[0, 0], [np.nan, 0], [-1, 1], [0, 0]])


# ---- what is in memory ------------------------------------------------------------------------------------------

PAGES = 64
RECORD = 1024  # four rows a page
MOST_PAGES = files.ADVISED // PAGE


class Mapped:
    """A mapped file."""

    def __init__(self, path, content):
        path.write_bytes(content)
        self.pages = len(content) // PAGE
        self.path = path
        self.memory = address_space.AddressRange(self.pages * PAGE)
        self.memory.map_file(0, path, self.pages * PAGE)
        self.memory.advise(0, self.pages * PAGE, address_space.MADV_RANDOM)
        self.drop()

    def drop(self):
        """Drop all of it from memory."""
        self.memory.advise(0, self.pages * PAGE, address_space.MADV_DONTNEED)
        with self.path.open("rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def touch(self, *pages):
        for page in pages:
            assert self.memory.bytes(page * PAGE, 1)[0] is not None

    def resident(self):
        """The pages that are in memory, by a call of mincore that does not use our code."""
        answer = (ctypes.c_ubyte * self.pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        assert libc.mincore(self.memory.address, self.pages * PAGE, answer) == 0
        return {page for page in range(self.pages) if answer[page] & 1}

    def sample(self, ids, samples=None, present=NOTHING):
        return residency.sample_resident(
            self.memory.address, RECORD, *NO_INDEX, present, int64(ids), samples or len(ids)
        )

    def advise(self, ids, advice, *, record_bytes=RECORD, present=NOTHING):
        return residency.advise(
            self.memory.address, record_bytes, *NO_INDEX, present, int64(ids), advice, MOST_PAGES, 0, len(ids)
        )


@pytest.fixture
def mapped(tmp_path):
    mapped = Mapped(tmp_path / "rows", os.urandom(PAGES * PAGE))
    if mapped.resident():
        pytest.skip("this file system keeps its files in memory")
    yield mapped
    mapped.memory = None


def test_sample_resident_counts_rows_whose_page_is_in_memory(mapped):
    every_page = range(0, 4 * PAGES, 4)
    assert mapped.sample(every_page) == 0
    mapped.touch(3, 40)
    assert mapped.resident() == {3, 40}
    assert mapped.sample(every_page) == 2
    assert mapped.sample([12, 13, 14, 15, 16, 160]) == 5
    mapped.drop()
    assert mapped.sample(every_page) == 0


def test_sample_resident_looks_at_that_many_spread_over_the_batch(mapped):
    mapped.touch(0)
    assert mapped.sample([0] * 50 + [100] * 50, samples=10) == 5


def test_rows_never_written_need_no_page(mapped):
    assert mapped.sample([1, 2, 3, 200], present=bitmap([2, 200], 4 * PAGES)) == 2
    assert mapped.resident() == set()


def test_advise_loads_the_pages_of_the_rows_and_no_others(mapped):
    rows = int64([0, 1, 8, 12, 15, 16, 160, 200])
    failed = residency.advise(
        mapped.memory.address,
        RECORD,
        *NO_INDEX,
        NOTHING,
        rows,
        address_space.MADV_POPULATE_WRITE,
        MOST_PAGES,
        1,
        7,
    )
    assert failed == 0
    assert mapped.resident() == {0, 2, 3, 4, 40}


def test_advise_skips_rows_that_were_never_written(mapped):
    present = bitmap([12, 160], 4 * PAGES)
    assert mapped.advise([0, 12, 100, 160], address_space.MADV_POPULATE_WRITE, present=present) == 0
    assert mapped.resident() == {3, 40}


def test_willneed_reads_all_of_a_long_stretch(tmp_path):
    """If a call is longer than the device's read_ahead_kb, Linux reads only the beginning."""
    mapped = Mapped(tmp_path / "rows", bytes(40 * 2**20))
    if mapped.resident():
        pytest.skip("this file system keeps its files in memory")
    # Linux drops a request if it has no memory for it at once, and it drops pages that nobody uses. So this repeats it,
    # until each page was seen. A request that is too long would be cut off every time.
    seen, deadline = set(), time.monotonic() + 30
    while len(seen) < mapped.pages and time.monotonic() < deadline:
        assert mapped.advise(range(1, 4 * mapped.pages), address_space.MADV_WILLNEED) == 0
        time.sleep(0.1)
        seen |= mapped.resident()
    assert seen == set(range(mapped.pages))


def test_willneed_reads_ahead(mapped):
    assert mapped.advise([20, 80], address_space.MADV_WILLNEED) == 0
    deadline = time.monotonic() + 30
    while not {5, 20} <= mapped.resident() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert {5, 20} <= mapped.resident()


def test_a_record_that_lies_on_two_pages_gets_both(mapped):
    assert mapped.advise([1, 9], address_space.MADV_POPULATE_WRITE, record_bytes=5000) == 0
    assert mapped.resident() == {1, 2, 10, 11, 12}


def test_what_the_kernel_refuses_is_counted_and_not_raised():
    hole = address_space.AddressRange(64 * PAGE)  # reserved, but nothing is mapped there
    rows = int64([0, 1, 16, 100])  # pages 0, 4 and 25: three calls
    for advice in (address_space.MADV_POPULATE_WRITE, 12345):
        given = hole.address, RECORD, *NO_INDEX, NOTHING, rows, advice, MOST_PAGES, 0, 4
        assert residency.advise(*given) == 3


def test_sample_resident_says_so_if_mincore_fails():
    nowhere = 2**46 + 2**45  # an address at which nothing is mapped
    assert residency.sample_resident(nowhere, RECORD, *NO_INDEX, NOTHING, int64([0]), 1) == -1


@pytest.mark.parametrize("dim", [1, 7, 8, 33, 64])
def test_squares_are_summed_as_optimizers_sum_them(dim):
    rows = np.random.default_rng(dim).normal(size=(50, dim)).astype(np.float32)
    found = np.empty(50)
    row_kernels.sum_squares(rows, found, 0, 50)
    np.testing.assert_array_equal(found, [sum_of_squares(row) for row in rows])


def test_squares_that_overflow_are_summed_in_float64():
    rows = np.full((1, 9), 1e30, np.float32)
    found = np.empty(1)
    row_kernels.sum_squares(rows, found, 0, 1)
    assert found[0] == pytest.approx(9e60)
    rows[0, 3] = np.nan
    row_kernels.sum_squares(rows, found, 0, 1)
    assert np.isnan(found[0])
