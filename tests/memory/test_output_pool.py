"""The memory of results is used again once nobody holds it any more, and not before."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from shardemb.memory import output_pool
from shardemb.memory.output_pool import MAX_BYTES, MIN_BYTES, OutputPool

ROWS = MIN_BYTES // 256
SHAPE = ROWS, 64


def address(array):
    return array.__array_interface__["data"][0]


def test_an_array_is_what_np_empty_makes():
    for shape in (0, 64), (3, 5), SHAPE, (2, ROWS, 64), (ROWS * 64,):
        got = OutputPool().empty(shape)
        assert (got.shape, got.dtype, type(got)) == (shape, np.float32, np.ndarray)
        assert got.flags.c_contiguous
        assert got.flags.writeable
        assert got.flags.aligned
        got[...] = 1.0
        assert got.sum() == got.size


def test_memory_is_used_again_once_the_last_view_is_gone():
    pool = OutputPool()
    first = pool.empty(SHAPE)
    where, view = address(first), first[5:, ::2].T
    del first
    assert pool.nbytes == 0
    assert address(pool.empty(SHAPE)) != where
    del view
    assert address(pool.empty(SHAPE)) == where


@pytest.mark.parametrize(
    "alive", [np.asarray, memoryview, lambda a: a.view(np.int32), lambda a: a.reshape(-1)]
)
def test_whatever_refers_to_the_array_keeps_its_memory(alive):
    pool = OutputPool()
    array = pool.empty(SHAPE)
    array[:] = 7.0
    kept = alive(array)
    del array
    for _ in range(3):
        pool.empty(SHAPE)[:] = 9.0
    assert (np.asarray(kept).view(np.float32) == 7.0).all()


def test_a_tensor_keeps_its_memory():
    torch = pytest.importorskip("torch")
    pool = OutputPool()
    tensor = torch.from_numpy(pool.empty(SHAPE)).fill_(7.0)
    for _ in range(3):
        pool.empty(SHAPE)[:] = 9.0
    assert (tensor == 7.0).all()


def test_two_arrays_never_share_memory():
    pool = OutputPool()
    for _ in range(3):
        some = [pool.empty(SHAPE) for _ in range(4)]
        for i, each in enumerate(some):
            each[:] = i
        assert [each.min() == each.max() == i for i, each in enumerate(some)] == [True] * 4


def test_the_smallest_that_is_large_enough_is_taken():
    pool = OutputPool()
    large, small = pool.empty((8 * ROWS, 64)), pool.empty((3 * ROWS, 64))
    expected = address(small)
    del large, small
    assert address(pool.empty(SHAPE)) == expected


def test_no_more_is_kept_than_the_limit():
    pool = OutputPool()
    some = [pool.empty((MAX_BYTES // 4 // 64, 64)) for _ in range(6)]
    last = address(some[-1])
    while some:
        some.pop(0)
        assert pool.nbytes <= MAX_BYTES
    assert pool.nbytes == MAX_BYTES
    assert last in [each.address for each in pool._free]  # the oldest went


def test_small_and_huge_results_are_not_kept():
    pool = OutputPool()
    pool.empty((ROWS - 1, 64))
    pool.empty((MAX_BYTES // 256 + 1, 64))
    assert pool.nbytes == 0


def test_nothing_is_kept_once_it_is_closed():
    pool = OutputPool()
    alive, _gone = pool.empty(SHAPE), pool.empty(SHAPE)
    del _gone
    pool.close()
    assert pool.nbytes == 0
    alive[:] = 1.0
    del alive
    assert pool.nbytes == 0


def test_it_may_be_collected_as_part_of_a_cycle():
    pool = OutputPool()
    cycle = [pool.empty(SHAPE)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.nbytes > 0


def test_threads_never_get_the_same_memory(monkeypatch):
    monkeypatch.setattr(output_pool, "MIN_BYTES", 1)
    pool, wrong = OutputPool(), []

    def work(number):
        for _ in range(300):
            some = [pool.empty((64, 64)) for _ in range(3)]
            for k, each in enumerate(some):
                each[:] = 10 * number + k
            wrong.extend(each for k, each in enumerate(some) if (each != 10 * number + k).any())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []


FLOAT32 = np.dtype(np.float32)
SHAPES = [(3, 64), (0, 64), (ROWS // 2, 64), (64,), (2, 5, 7), (ROWS, 64)]


@pytest.mark.parametrize("shapes", [[], SHAPES[:2], SHAPES, [(MAX_BYTES // 256, 64), SHAPE]], ids=len)
def test_arrays_that_are_made_together_are_what_np_empty_makes(shapes):
    arrays = OutputPool().empty_together([(each, FLOAT32) for each in shapes])
    assert [each.shape for each in arrays] == shapes
    for number, each in enumerate(arrays):
        assert (each.dtype, type(each)) == (np.float32, np.ndarray)
        assert each.flags.c_contiguous
        assert each.flags.writeable
        each[...] = number
    assert [(each == number).all() for number, each in enumerate(arrays)] == [True] * len(shapes)


def test_arrays_that_are_made_together_are_contiguous_until_the_last_is_gone():
    pool = OutputPool()
    arrays = pool.empty_together([(each, FLOAT32) for each in SHAPES])
    first = address(arrays[0])
    ends = [address(each) + each.nbytes - first for each in arrays]
    assert [(address(each) - first) % 64 for each in arrays] == [0] * len(arrays)
    assert max(ends) < sum(each.nbytes for each in arrays) + 64 * len(arrays)
    arrays[1:-1] = []
    del arrays[0]
    assert pool.nbytes == 0
    arrays.clear()
    assert address(pool.empty((ends[-1] // 4,))) == first


def test_lookups_of_several_tables_use_it(store):
    for name in "abc":
        store.create_table(name, num_embeddings=ROWS, embedding_dim=64)
    ids = dict.fromkeys("abc", np.arange(ROWS // 2))
    rows = store.lookup(ids)
    where, nbytes = address(rows["a"]), rows["a"].nbytes
    assert [address(each) for each in rows.values()] == [where, where + nbytes, where + 2 * nbytes]
    assert address(store.lookup(ids)["a"]) != where
    del rows
    assert address(store.lookup(ids)["a"]) == where


def test_lookups_use_it(store):
    table = store.create_table("t", num_embeddings=2 * ROWS, embedding_dim=64)
    first = table.lookup(np.arange(ROWS))
    where = address(first)
    assert address(table.lookup(np.arange(ROWS))) != where  # the first is still here
    del first
    assert address(table.lookup(np.arange(ROWS))) == where
    later = table.lookup(np.arange(ROWS))
    store.commit()
    store.close()
    assert (later == 0).all()


def test_temporary_arrays_of_batches_use_memory_again():
    code = """
import resource
import numpy as np
from shardemb.memory.output_pool import OutputPool
{}

def batch():
    for _ in range(5):
        kept = [np.ones(400_000) for _ in range(5)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

batch()
before = faults()
batch()
print(faults() - before)
"""
    found, usual = {}, {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    for name, line in (("with", "pool = OutputPool()"), ("without", "")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(line)], env=usual, capture_output=True, text=True, check=True
        )
        found[name] = int(done.stdout)
    assert found["with"] < 500 < found["without"]
