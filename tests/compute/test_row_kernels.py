import ctypes
import inspect
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks, grouping, plan, residency, row_index, row_kernels
from shardemb.engine import slots
from shardemb.initializers import Constant, Uniform
from shardemb.optim import SGD, Adagrad, Adam
from shardemb.storage import address_space, files
from shardemb.vocabulary import hashing, index_kernels, key_kernels

NOTHING = np.empty(0, np.uint8)
NO_INDEX = *[np.empty(0, np.int32)] * 3, 0


def int64(values):
    return np.array(values, np.int64).reshape(-1)


# ---- how they are compiled --------------------------------------------------------------------------------------


WITH_KERNELS = (
    row_kernels,
    row_index,
    residency,
    grouping,
    file_blocks,
    hashing,
    index_kernels,
    key_kernels,
    slots,
)


def is_kernel(each):
    """Not what is only a part of others."""
    return hasattr(each, "py_func") and each.targetoptions.get("inline") != "always"


def dispatchers():
    specialised = [
        row_kernels.step(Adam),
        row_kernels.gather_or_fill(Uniform),
        row_kernels.copy_or_fill(Uniform),
    ]
    named = [each for module in WITH_KERNELS for each in vars(module).values() if is_kernel(each)]
    return {each.py_func.__name__: each for each in (*named, *specialised)}


def test_every_kernel_is_cached_releases_the_gil_and_keeps_ieee_arithmetic():
    found = dispatchers()
    assert {"sort_rows", "gather", "scatter", "advise", "patch_bits", "places_of"} <= set(found)
    for name, each in found.items():
        options = each.targetoptions
        assert options["nogil"], name
        assert options["error_model"] == "numpy", name
        assert not options.get("fastmath"), name
        assert not options.get("parallel"), name
        assert each._cache.cache_path, name


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE_EVERYTHING = """
    import sys
    import numpy as np
    import shardemb
    from shardemb.compute import file_blocks, grouping, plan, residency, row_index, row_kernels
    from shardemb.engine import slots
    from shardemb.vocabulary import hash_index, hashing, index_kernels, key_kernels
    from shardemb.initializers import Uniform
    from shardemb.optim import Adam

    plan.TASK_BYTES = 1000  # small batches are cut into tasks too

    def batches():
        ids = np.arange(6, dtype=np.int64)
        read_only = ids.copy()
        read_only.flags.writeable = False
        yield from ([], [1], [[1, 2], [2, 1]], ids, ids[::2], ids.astype(np.uint8), read_only, ids[:0], np.int32(3))

    path = sys.argv[1]
    with shardemb.open(path, memory_budget=0) as store:
        for name, more in {"plain": {}, "drawn": {"initializer": Uniform(-1, 1)}}.items():
            store.create_table(name, num_embeddings=70_000, embedding_dim=3, optimizer=Adam(), **more)
        for table in store.values():
            for ids in batches():
                rows = table.lookup(ids)
                table.lookup(ids, out=np.empty_like(rows))
                table.lookup_unique(ids)
                table.state("exp_avg", ids)
                for kind in (np.float16, np.float32, np.float64):
                    table.update(ids, rows.astype(kind))
                    table.write(ids, np.asfortranarray(rows.astype(kind)))
                table.prefetch(ids, for_update=True)
        store.commit()
        repr(store)
        for ids in (np.arange(60_000), np.arange(10)):
            store["plain"].write(ids, np.ones((ids.size, 3), np.float32))  # beyond the budget: rows go out
        store["plain"].lookup([50_000])
        store.commit()
        store["plain"].write([5], [[1.0, 2, 3]])
        store.rollback()
        store["plain"].write([5, 6, 7], np.ones((3, 3)))
        over = store["plain"]._state.shards.overlay
        over.drop(over.slots.owner[np.flatnonzero(over.slots.state)[:1]])
        over.compact()
        store.rollback()
    with shardemb.open(path + "2") as store:
        table = store.create_table("plain", num_embeddings=10, embedding_dim=3, initializer=Uniform(-1, 1))
        store.commit()
        for value in (1, 2):
            table.write([5], np.full((1, 3), value, np.float32))
            table.lookup(np.arange(100) % 10)
            value == 1 and store.commit()
        store.rollback()
        words = store.create_vocabulary("words", key_type="int64")
        for count in (500, 2000):  # the second do not find room in the slots of the first
            words.add(np.arange(count))
        store.rollback()
    hash_index.OPEN_PAIRS = 2, 4
    with shardemb.open(path + "3") as store:
        given = {"int64": list(range(3000)), "string": ["", "a", "bc" * 9], "bytes": [b"", b"x" * 99]}
        for kind, keys in given.items():
            words = store.create_vocabulary(kind, key_type=kind, admission=shardemb.Admission(after=2))
            table = store.create_table(
                kind, vocabulary=kind, embedding_dim=3, optimizer=Adam(), counters=True, initializer=Uniform(-1, 1)
            )
            for some in (keys, keys[:1], np.array(keys), keys[:0]):
                table.lookup(some, create=True, missing="initial")
            words.add(keys)
            table.update(keys, np.ones((len(keys), 3)))
            store.commit()
            table.evict(keep=1)
            words.keys(words.lookup(list(words)))
            store.commit()
            words.add(keys)
            words.add(keys)
            words.remove(keys[:1])
            words.lookup(keys)
        store.commit()
    with shardemb.open(path + "3", mode="r") as store:
        [list(each) for each in store.vocabularies.values()]
    with shardemb.open(path, mode="r") as store:
        for table in store.values():
            for ids in batches():
                table.lookup(ids)
                table.prefetch(ids)
            list(table.to_arrow_batches())
    modules = row_kernels, row_index, residency, grouping, file_blocks, hashing, index_kernels, key_kernels, slots
    inner = hashing._rotate_left, hashing._sip_round, index_kernels.bucket_of, index_kernels._filter_bit
    inner += index_kernels.first_bits, index_kernels._bucket_in_part
    inner += row_index._take_node, row_index._free_if_empty, residency._advise_pages
    inner += row_kernels._copy_from, row_kernels._stream_from
    found = [each for module in modules for each in vars(module).values() if hasattr(each, "py_func")]
    found = [each for each in found if each.targetoptions.get("inline") != "always"]
    found += [row_kernels.step(Adam), row_kernels.gather_or_fill(Uniform), row_kernels.copy_or_fill(Uniform)]
    found = [each for each in found if each not in inner]  # for kernels alone
    assert len(found) > 12
    print({each.py_func.__name__: len(each.signatures) for each in found if len(each.signatures) != 1})
"""


def test_every_kernel_is_compiled_for_one_kind_of_arguments_whatever_a_caller_passes(tmp_path):
    """Every other kind would be compiled for seconds, in the middle of somebody's training."""
    assert run_python(USE_EVERYTHING.replace("sys.argv[1]", repr(str(tmp_path / "store")))).strip() == "{}"


COUNT_CACHE_HITS = """
    import numpy as np
    from shardemb import optim
    from shardemb.compute import grouping, row_kernels
    one, none = np.ones((1, 1), np.float32), np.zeros(1, np.int64)
    step = row_kernels.step(optim.Adam)
    record, scalars = np.zeros((1, 3), np.float32), np.ones(4, np.float32)
    step(record, none, np.array([0, 1]), none, one, scalars, one[0].copy(), 0, 0, 1)
    grouping.sort_rows(none, 1, 1)
    for kernel in (step, grouping.sort_rows):
        print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def test_a_second_process_finds_the_kernels_compiled(tmp_path):
    """Also those made for one optimizer: compiling again in every process would take seconds."""
    first, second = (run_python(COUNT_CACHE_HITS, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first.split() == ["0", "1", "0", "1"]
    assert second.split() == ["1", "0", "1", "0"]


LOOK_UP = """
    import numpy as np
    from shardemb import initializers
    from shardemb.compute import row_kernels
    made = {"Uniform": (0.0, 1.0), "Normal": (), "TruncatedNormal": ()}
    no_index = *[np.empty(0, np.int32)] * 3, 0
    for name in NAMES:
        each = getattr(initializers, name)(*made[name])
        got, expected = np.empty((1, 3), np.float32), np.empty((1, 3), np.float32)
        parameters = np.array(each.parameters(), np.float64)
        row_kernels.gather_or_fill(type(each))(
            got, *no_index, np.zeros(1, np.uint8), 0, np.zeros(1, np.int64), got, np.uint64(5), parameters, 0, 1)
        each.fill_rows(expected, np.zeros(1, int), np.zeros(1, int), np.uint64(5), parameters)
        assert (got == expected).all(), (name, got, expected)
"""


def test_kernels_of_different_processes_do_not_get_into_each_others_way(tmp_path):
    """Each is compiled in a process of its own; one that loads both gets each one's code, not the first's twice."""
    for names in (["Uniform"], ["Normal"], ["TruncatedNormal"], ["Uniform", "Normal", "TruncatedNormal"]):
        code = textwrap.dedent(LOOK_UP).replace("NAMES", repr(names))
        run_python(code, NUMBA_CACHE_DIR=str(tmp_path))


# ---- grouping ---------------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    num_rows = draw(st.sampled_from([1, 2, 63, 2048, 2049, 2**22, 2**22 + 1, 2**31 + 5, 2**48]))
    few = st.sampled_from(draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=5)))
    ids = draw(st.lists(few | st.integers(0, num_rows - 1), max_size=60))
    return num_rows, int64(ids)


def sort_rows(ids, num_rows):
    """Sort as `plan.group` does; return the ids, and where each stood."""
    bits = max(ids.size - 1, 0).bit_length()
    words = grouping.sort_rows(ids, bits, (num_rows - 1).bit_length())
    assert words.dtype == np.uint64
    return (words >> np.uint64(bits)).astype(np.int64), (words & np.uint64(2**bits - 1)).astype(np.int64)


@given(batches())
@example((2**63, int64([2**63 - 1])))  # one id of all bits that there are
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


def test_no_kernel_returns_a_tuple():
    """Where a signal is pending while numba makes one for Python, the process crashes."""
    functions = {
        name: getattr(each, "py_func", each) for module in WITH_KERNELS for name, each in vars(module).items()
    }
    returns = {
        name: each.__annotations__["return"]
        for name, each in functions.items()
        if inspect.isfunction(each) and each.__module__ in [module.__name__ for module in WITH_KERNELS]
    }
    assert {"sort_rows", "_step", "_gather_or_fill"} <= set(returns)
    assert [name for name, kind in returns.items() if "tuple" in kind] == []


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
    """An array of -1 that begins so many bytes past the beginning of a cache line."""
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
    """Rows that are nowhere keep what the caller had there, until they are looked for again."""
    count = row_kernels._STREAMED_BYTES // 256 + 2
    records, places = table(3000, 64), np.random.default_rng(0).integers(0, 3000, count)
    places[[0, 7, count - 1]] = -1
    out = aligned((count, 64), 0)
    row_kernels._copy_from(records.ctypes.data, 256, places, out.ctypes.data, 256)
    gaps = places < 0
    np.testing.assert_array_equal(out[~gaps], records[places[~gaps]])
    assert (out[gaps] == -1).all()


def test_gather_or_fill_reads_only_rows_that_are_present():
    records, ids = table(), int64([5, 0, 299, 5, 17])
    out = np.full((5, 3), -1, np.float32)
    kernel = row_kernels.gather_or_fill(Constant)
    kernel(records, *NO_INDEX, bitmap([5, 299], 300), 2, ids, out, np.uint64(0), np.array([0.5]), 0, 4)
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
        records, present, rows, places, state, np.uint64(0), np.array([0.5]), 0, 4
    )
    before[[290, 292]] = before[[8, 10]]
    before[[291, 293]] = [0.5, 0.5, 7, 9]
    np.testing.assert_array_equal(records, before)
    np.testing.assert_array_equal(present, bitmap([8, 10], 300))


def test_step_sums_the_gradients_of_a_row_in_the_order_of_the_batch():
    """In float32 the order shows: here only the right one leaves 1."""
    big = np.float32(2**25)
    gradients = np.array([[big], [3], [-big], [5], [1]], np.float32)
    records = np.zeros((300, 1), np.float32)
    rows, starts, order = grouped([6, 2, 6, 2, 6])
    scalars, scratch = np.array([-1], np.float32), np.empty(1, np.float32)
    row_kernels.step(SGD)(records, rows, starts, order, gradients, scalars, scratch, 0, 0, 2)
    assert records[[6, 2], 0].tolist() == [1, 8]
    assert not records[[0, 1, 3, 4, 5, 7]].any()


def test_step_touches_only_its_part_of_the_rows():
    records = np.zeros((300, 1), np.float32)
    rows, starts, order = grouped([1, 2, 3, 4])
    gradients, scratch = np.ones((4, 1), np.float32), np.empty(1, np.float32)
    row_kernels.step(SGD)(
        records, rows, starts, order, gradients, np.array([1], np.float32), scratch, 0, 1, 3
    )
    assert np.flatnonzero(records).tolist() == [2, 3]


def test_a_division_by_zero_in_a_formula_is_nan_and_no_exception():
    records = np.zeros((300, 2), np.float32)
    rows, starts, order = grouped([1, 2])
    gradients, scratch = np.array([[0], [1]], np.float32), np.empty(1, np.float32)
    scalars = np.array(Adagrad(lr=1, eps=0).scalars(1), np.float32)
    row_kernels.step(Adagrad)(records, rows, starts, order, gradients, scalars, scratch, 0, 0, 2)
    np.testing.assert_array_equal(records[:4], [[0, 0], [np.nan, 0], [-1, 1], [0, 0]])


# ---- what is in memory ------------------------------------------------------------------------------------------

PAGES = 64
RECORD = 1024  # four rows a page
MOST_PAGES = files.ADVISED // PAGE


class Mapped:
    """A file, mapped."""

    def __init__(self, path, content):
        path.write_bytes(content)
        self.pages = len(content) // PAGE
        self.path = path
        self.memory = address_space.AddressRange(self.pages * PAGE)
        self.memory.map_file(0, path, self.pages * PAGE)
        self.memory.advise(0, self.pages * PAGE, address_space.MADV_RANDOM)
        self.drop()

    def drop(self):
        """Let all of it leave memory."""
        self.memory.advise(0, self.pages * PAGE, address_space.MADV_DONTNEED)
        with self.path.open("rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def touch(self, *pages):
        for page in pages:
            assert self.memory.bytes(page * PAGE, 1)[0] is not None

    def resident(self):
        """The pages that are in memory, as mincore tells without any help of ours."""
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


def test_sample_resident_looks_at_so_many_spread_over_the_batch(mapped):
    mapped.touch(0)
    assert mapped.sample([0] * 50 + [100] * 50, samples=10) == 5


def test_rows_never_written_need_no_page(mapped):
    assert mapped.sample([1, 2, 3, 200], present=bitmap([2, 200], 4 * PAGES)) == 2
    assert mapped.resident() == set()


def test_advise_brings_in_the_pages_of_the_rows_and_no_others(mapped):
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


def test_advise_passes_over_rows_never_written(mapped):
    present = bitmap([12, 160], 4 * PAGES)
    assert mapped.advise([0, 12, 100, 160], address_space.MADV_POPULATE_WRITE, present=present) == 0
    assert mapped.resident() == {3, 40}


def test_willneed_reads_all_of_a_long_stretch(tmp_path):
    """Of more than the device's read_ahead_kb in one call, Linux reads the beginning."""
    mapped = Mapped(tmp_path / "rows", bytes(40 * 2**20))
    if mapped.resident():
        pytest.skip("this file system keeps its files in memory")
    # Linux drops a request that it has no memory for at once, and pages that nobody uses; so again, until each page was
    # seen. One that is too long it cuts off each time.
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


def test_sample_resident_says_if_the_kernel_will_not_tell():
    nowhere = 2**46 + 2**45  # an address at which nothing is mapped
    assert residency.sample_resident(nowhere, RECORD, *NO_INDEX, NOTHING, int64([0]), 1) == -1
