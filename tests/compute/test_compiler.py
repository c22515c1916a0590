"""How kernels are compiled: what they may do, for which arguments, and when the cache on disk is used."""

import contextlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import shardemb
from shardemb.compute import file_blocks, grouping, pooling, residency, row_index, row_kernels
from shardemb.imports import binary
from shardemb.initializers import Uniform
from shardemb.memory import slots
from shardemb.optim import Adam
from shardemb.vocabulary import hashing, index_kernels, key_kernels

# ---- what kernels are -------------------------------------------------------------------------------------------

WITH_KERNELS = (
    row_kernels,
    pooling,
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
    """Return whether a function is compiled by itself, and not only inlined into others."""
    return hasattr(each, "py_func") and each.targetoptions.get("inline") != "always"


def dispatchers():
    specialised = [
        row_kernels.step(Adam, with_options=False),
        row_kernels.gather_or_fill(Uniform),
        row_kernels.copy_or_fill(Uniform),
    ]
    named = [each for module in (*WITH_KERNELS, binary) for each in vars(module).values() if is_kernel(each)]
    return {each.py_func.__name__: each for each in (*named, *specialised)}


def test_every_kernel_is_cached_releases_the_gil_and_keeps_ieee_arithmetic():
    found = dispatchers()
    assert {"sort_rows", "gather", "scatter", "advise", "patch_bits", "places_of", "find_rows"} <= set(found)
    for name, each in found.items():
        options = each.targetoptions
        assert options["nogil"], name
        assert options["error_model"] == "numpy", name
        assert not options.get("fastmath"), name
        assert not options.get("parallel"), name
        assert each._cache.cache_path, name


def test_no_kernel_returns_a_tuple():
    """If a signal is pending while numba builds one for Python, the process crashes."""
    functions = {
        name: getattr(each, "py_func", each) for module in WITH_KERNELS for name, each in vars(module).items()
    }
    returns = {
        name: each.__annotations__["return"]
        for name, each in functions.items()
        if inspect.isfunction(each)
        and each.__module__ in [module.__name__ for module in WITH_KERNELS]
        and not inspect.isgeneratorfunction(each)  # never compiled
    }
    returns["find_rows"] = binary.find_rows.py_func.__annotations__["return"]  # one kernel among much else
    assert {"sort_rows", "_step", "_gather_or_fill"} <= set(returns)
    assert [name for name, kind in returns.items() if "tuple" in kind] == []


# ---- for which arguments ----------------------------------------------------------------------------------------


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
    from shardemb.compute import file_blocks, grouping, plan, pooling, residency, row_index, row_kernels
    from shardemb.distributed import routing
    from shardemb.dtypes import BlockScaled, Plain
    from shardemb.imports import binary
    from shardemb.memory import slots
    from shardemb.precision import coded_rows
    from shardemb.search import kernels
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
        drawn = {"initializer": Uniform(-1, 1)}
        short = {"dtype": "bfloat16", "rounding": "stochastic"}
        for name, more in {"plain": {}, "drawn": drawn, "short": short, "short drawn": short | drawn}.items():
            name = name.replace(" ", "_")
            store.create_table(name, num_embeddings=70_000, embedding_dim=3, optimizer=Adam(), **more)
        for table in store.values():
            for ids in batches():
                rows = table.lookup(ids)
                table.lookup(ids, out=np.empty_like(rows))
                table.lookup_unique(ids)
                table.lookup(ids, dtype="bfloat16")
                table.state("exp_avg", ids)
                for kind in (np.float16, np.float32, np.float64):
                    table.update(ids, rows.astype(kind))
                    table.write(ids, np.asfortranarray(rows.astype(kind)))
                table.prefetch(ids, for_update=True)
            for ids in ([[1, 2], [2, 1]], np.array([[3, 60_000]], np.int32), [[]]):
                grads = np.ones((len(ids), 3))
                for mode in ("sum", "mean", "sqrtn", "max"):
                    given = [None, np.ones(np.shape(ids))] if mode != "max" else [None]
                    for weights in given:
                        named = {"mode": mode, "weights": weights}
                        table.lookup_bag(ids, **named, padding_idx=2, out_of_range=np.zeros(3))
                        table.lookup_bag(ids, out=np.empty((len(ids), 3), np.float32), **named)
                        table.update_bag(ids, None, grads, **named, scale_grad_by_freq=True)
                        table.update_bag(ids, None, np.asfortranarray(grads), **named)
                        mode != "max" and table.bag_weight_gradient(ids, None, grads, **named)
        store.update({name: ([1, 2, 1], np.ones((3, 3))) for name in ("plain", "short")}, max_norm=1.0)
        blocks = store.create_table("blocks", num_embeddings=9, embedding_dim=3, dtype=BlockScaled())
        for ids in batches():
            blocks.lookup(np.minimum(np.asarray(ids, int), 8), dtype="bfloat16")
        store.drop_table("blocks")
        rested = store.create_table(
            "rested", num_embeddings=9, embedding_dim=3, initializer=Uniform(-1, 1),
            optimizer=Adam(dense_equivalent=True),
        )
        for ids in ([1], [2], [1]):
            rested.update(ids, np.ones((1, 3)))
            rested.write(ids, np.ones((1, 3)))
        rested.lookup([1, 2, 3])
        store.commit()
        repr(store)
        for ids in (np.arange(60_000), np.arange(10)):
            store["plain"].write(ids, np.ones((ids.size, 3), np.float32))  # beyond the budget: rows are spilled
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
        for count in (500, 2000):  # the second ones do not fit in the slots of the first
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
            table.warm()
            list(table.to_arrow_batches())
        for metric in ("cosine", "dot", "l2"):
            for given in ([1, 0, 1], np.eye(3), np.asfortranarray(np.ones((2, 3), np.float32))):
                for rows in (None, (5, 900), [3, 4], np.arange(9, dtype=np.uint8)):
                    store["drawn"].search(given, 3, metric=metric, rows=rows, exclude=[[1]] * len(np.atleast_2d(given)))
        for given in (np.ones((3, 2), np.float32), np.asfortranarray(np.ones((3, 2), np.float32))):
            routing.Summed.of(plan.group(np.array([1, 2, 1]), 10), given)
        kernels.dots(*[np.ones((1, 3), np.float32)] * 2, np.zeros((1, 1), int), np.ones((1, 1), np.float32))
    with shardemb.open(path + "4") as store:
        for name, begin in {"one": b"1 1", "many": b"1 3", "none": b"0 3"}.items():
            file = path + name + ".bin"
            with open(file, "wb") as target:
                target.write(begin + b"\\na " + bytes(12))
            begin[:1] != b"0" and store.import_table(name, file, "word2vec-binary")
        store.rollback()
    modules = row_kernels, pooling, row_index, residency, grouping, file_blocks, hashing, index_kernels, key_kernels
    modules += slots, kernels, binary
    inner = hashing._rotate_left, hashing._sip_round, index_kernels.bucket_of, index_kernels._filter_bit
    inner += index_kernels.first_bits, index_kernels._bucket_in_part
    inner += row_index._take_node, row_index._free_if_empty
    inner += pooling._add_some, pooling._max_some
    inner += row_kernels.copy_from, row_kernels._stream_from, row_kernels._lowest, file_blocks._first_from
    found = [each for module in modules for each in vars(module).values() if hasattr(each, "py_func")]
    found = [each for each in found if each.targetoptions.get("inline") != "always"]
    short = Plain("bfloat16")
    found += [coded_rows.gather(short, "float32"), coded_rows.gather(Plain("float32"), "bfloat16")]
    found += [coded_rows.gather(BlockScaled(), "bfloat16")]
    found += [coded_rows.encode_rows(short, drawn=drawn) for drawn in (False, True)]
    found += [coded_rows.step(Adam, short, "float32", drawn=True, with_options=each) for each in (False, True)]
    found += [row_kernels.gather_or_fill(Uniform), row_kernels.copy_or_fill(Uniform), row_kernels.catch_up(Adam)]
    found += [row_kernels.step(Adam, with_options=each) for each in (False, True)]
    found = [each for each in found if each not in inner]  # called only by kernels
    assert len(found) > 12
    print({each.py_func.__name__: len(each.signatures) for each in found if len(each.signatures) != 1})
"""


def test_every_kernel_is_compiled_for_one_kind_of_arguments_whatever_a_caller_passes(tmp_path):
    """For any other kind, numba would compile for seconds in the middle of a training."""
    assert run_python(USE_EVERYTHING.replace("sys.argv[1]", repr(str(tmp_path / "store")))).strip() == "{}"


# ---- the cache on disk ------------------------------------------------------------------------------------------


LOOK_UP = """
    import numpy as np
    from shardemb import initializers
    from shardemb.compute import row_kernels
    made = {"Uniform": (0.0, 1.0), "Normal": ()}
    no_index = *[np.empty(0, np.int32)] * 3, 0
    for name in NAMES:
        each = getattr(initializers, name)(*made[name])
        got, expected = np.empty((1, 3), np.float32), np.empty((1, 3), np.float32)
        parameters = np.array(each.parameters(), np.float64)
        row_kernels.gather_or_fill(type(each))(
            got, *no_index, np.zeros(1, np.uint8), 0, np.zeros(1, np.int64), got, np.uint64(5), parameters, 0, 1, 0, 1)
        each.fill_rows(expected, np.zeros(1, int), np.zeros(1, int), np.uint64(5), parameters)
        assert (got == expected).all(), (name, got, expected)
"""


def test_kernels_of_different_processes_do_not_get_into_each_others_way(tmp_path):
    """Each is compiled in its own process. One that loads all must not use the first for all."""
    for names in (["Uniform"], ["Normal"], ["Uniform", "Normal"]):
        code = textwrap.dedent(LOOK_UP).replace("NAMES", repr(names))
        run_python(code, NUMBA_CACHE_DIR=str(tmp_path))


# Run in a copy of the package: call kernels on tiny arrays; print their results, cache hits and misses.
CALL_KERNEL = """
import json, sys
import numpy as np
import shardemb
from shardemb.compute import file_blocks, residency, row_kernels
from shardemb.initializers import Uniform
from shardemb.optim import Adam

zero, ones = np.zeros(1, np.int64), np.ones((1, 1), np.float32)


def step():
    kernel = row_kernels.step(Adam, with_options=False)
    record, scalars = np.zeros((1, 3), np.float32), np.ones((1, 4), np.float32)
    kernel(record, zero, np.array([0, 1]), zero, ones, scalars, ones[0], ones[0].copy(), 0, 0, 1)
    return kernel, record[0]


def fill():
    kernel, rows, parameters = row_kernels.fill(Uniform), np.zeros((1, 2), np.float32), Uniform(0, 1).parameters()
    kernel(zero, rows, np.uint64(5), np.array(parameters), 0, 1)
    return kernel, rows[0]


def sample_resident():
    index = np.ones(1, np.int32), np.ones(32, np.int32), np.ones(32, np.int32), 100  # row 0 is in the first slot
    kernel = residency.sample_resident
    return kernel, np.array([kernel(0, 4096, *index, np.empty(0, np.uint8), zero, 1)])


def copy_rows():
    kernel, records = row_kernels.copy_rows, np.array([[1, 2], [0, 0]], np.float32)
    kernel(records, zero, zero + 1, 0, 1)
    return kernel, records[1]


def patch_bits():
    kernel, target = file_blocks.patch_bits, np.zeros(8192, np.uint8)
    kernel(zero + 8 * 4096, zero + 1, target)  # the first bit of the second block, if a block is a page of 4,096 bytes
    return kernel, target[:1]


found = {}
for name in sys.argv[1:]:
    kernel, result = globals()[name]()
    hits, misses = (sum(each.values()) for each in (kernel.stats.cache_hits, kernel.stats.cache_misses))
    found[name] = result.tolist(), hits, misses
print(json.dumps([shardemb.__file__, found]))
"""


class CopiedPackage:
    """A copy of the package in a folder, and a cache of kernels that begins empty."""

    def __init__(self, folder):
        self.folder, self.package = folder, folder / "shardemb"
        shutil.copytree(
            Path(shardemb.__file__).parent, self.package, ignore=shutil.ignore_patterns("__pycache__")
        )

    def call(self, *kernels):
        """Call kernels in a new process; return their results, and how often the cache had them and had them not."""
        environment = {
            "PYTHONPATH": str(self.folder),
            "NUMBA_CACHE_DIR": str(self.folder / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1",  # Python's own cache goes by time and size too
        }
        done = subprocess.run(
            [sys.executable, "-c", CALL_KERNEL, *kernels],
            cwd=self.folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=120,
        )
        imported, answer = json.loads(done.stdout)
        assert Path(imported) == self.package / "__init__.py"
        return answer

    @contextlib.contextmanager
    def edited(self, file, old, new):
        """Replace the only occurrence of some code meanwhile; time and size of all other files stay as they are."""
        path, others = self.package / file, self.stamps(file)
        text, stamp = path.read_text(), path.stat()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        assert self.stamps(file) == others
        yield
        path.write_text(text)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    def stamps(self, but):
        paths = set(self.package.rglob("*.py")) - {self.package / but}
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def first_uniform_values():
    """By the plain function, which is not compiled."""
    rows, zero = np.zeros((1, 2), np.float32), np.zeros(1, np.int64)
    Uniform.fill_rows(rows, zero, zero, np.uint64(5), np.array(Uniform(0, 1).parameters()))
    return rows[0].tolist()


EDITS = {
    "the step of an optimizer": (
        ("step", "optim/adam.py"),
        (
            "exp_avg_sq = state[:dim], state[dim:]\n        for",
            "exp_avg_sq = state[:dim], state[dim:]\n        step_size = -step_size\n        for",
        ),
        ([-0.5, 1.0, 1.0], [0.5, 1.0, 1.0]),
    ),
    "what an initializer calls": (
        ("fill", "base/sampling.py"),
        ("(np.float64(word) + 0.5) * 2.0**-32", "0.25"),
        (first_uniform_values(), [0.25, 0.25]),
    ),
    "what a kernel inlines from another module": (
        ("sample_resident", "compute/row_index.py"),
        ("return first + entry - 1 if entry > 0 else -1", "return row"),  # of a page that is not mapped
        ([1], [-1]),
    ),
    "a constant of another folder": (
        ("patch_bits", "base/sizes.py"),
        ("PAGE = 4096", "PAGE = 8192"),
        ([1], [0]),
    ),
    "machine code": (
        ("copy_rows", "compute/intrinsics.py"),
        ("source, args[2], itemsize=1)", "source, builder.sub(args[2], args[2].type(4)), itemsize=1)"),
        ([1.0, 2.0], [1.0, 0.0]),
    ),
}


def test_another_process_finds_a_kernel_compiled_until_what_defines_it_is_edited(tmp_path):
    """numba looks only at the file that the kernel is in, and here another file is edited."""
    copied = CopiedPackage(tmp_path)
    kernels = {kernel: results[0] for (kernel, _), _, results in EDITS.values()}
    assert copied.call(*kernels) == {kernel: [before, 0, 1] for kernel, before in kernels.items()}
    assert copied.call(*kernels) == {kernel: [before, 1, 0] for kernel, before in kernels.items()}
    for what, ((kernel, file), code, (_, after)) in EDITS.items():
        with copied.edited(file, *code):
            assert copied.call(kernel) == {kernel: [after, 0, 1]}, what


TWO_KERNELS = """
    import logging, sys
    import numpy as np
    logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
    from shardemb.compute import compiler, file_blocks, row_kernels
    compiler.SILENT_SECONDS = LIMIT
    zero = np.zeros(1, np.int64)
    row_kernels.copy_rows(np.ones((2, 2), np.float32), zero, zero + 1, 0, 1)
    file_blocks.patch_bits(zero, zero + 1, np.zeros(8192, np.uint8))
"""


def test_people_are_told_once_when_compiling_takes_long(tmp_path):
    def said(seconds):
        code = textwrap.dedent(TWO_KERNELS).replace("LIMIT", seconds)
        return run_python(code, NUMBA_CACHE_DIR=str(tmp_path))

    told = said("0.001")
    assert told.startswith(f"shardemb WARNING compiling kernels, once: they are kept in {tmp_path}")
    assert told.count("\n") == 1
    assert said("0.001") == ""  # they were found
    shutil.rmtree(tmp_path)
    assert said("1000") == ""


OTHER_PEOPLES = """
    import numpy as np, numba, warnings
    from shardemb.compute import compiler
    compiler.SILENT_SECONDS = 0

    @numba.njit
    def theirs(x):
        return x + 1

    @numba.jit(forceobj=True, looplift=True)
    def lifted(x):
        names = {"a": object()}
        for i in range(3):
            x += i
        return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert theirs(1) == 2 and lifted(np.zeros(1))[0] == 3
"""


def test_what_others_compile_is_none_of_ours():
    """numba tells all listeners of all that the process compiles, in forms of its own."""
    assert run_python(OTHER_PEOPLES) == ""


# ---- where compiled code is kept --------------------------------------------------------------------------------

WITHOUT_CACHE = """
import pathlib, sys, warnings
import numpy as np
from numba.core import caching

# As where neither the package nor the home can be written.
for name, locator in vars(caching).items():
    if name.endswith("CacheLocator") or "FsAgnostic" in name:
        if not name.startswith(("UserProvided", "_")):
            locator.ensure_cache_path = lambda self: (_ for _ in ()).throw(OSError("read only"))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import shardemb
    OPENED
print(*(str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)), sep="\\n")
"""


OPENED = """
    with shardemb.open(sys.argv[1]) as store:
        store.create_table("t", num_embeddings=10, embedding_dim=2)
        store.commit()
    with shardemb.open(sys.argv[1], "r") as store:
        assert store["t"].lookup([1]).tolist() == [[0, 0]]
"""
CALLED = """
    from shardemb.compute import row_kernels
    records = np.array([[1, 2], [0, 0]], np.float32)
    row_kernels.copy_rows(records, np.zeros(1, np.int64), np.ones(1, np.int64), 0, 1)
    assert records.tolist() == [[1, 2], [1, 2]]
"""


@pytest.mark.parametrize(
    ("temporary", "use"),
    [("usable", OPENED), ("of somebody else", CALLED), ("none", CALLED)],
    ids=lambda each: each.split("\n")[0],
)
def test_without_a_folder_for_compiled_code_there_is_one_warning_and_all_works(tmp_path, temporary, use):
    folder = tmp_path / "tmp" / f"shardemb-kernels-{os.getuid()}"
    if temporary != "none":
        folder.parent.mkdir()
    if temporary == "of somebody else":
        folder.mkdir()
        folder.chmod(0o777)
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    program = WITHOUT_CACHE.replace("    OPENED\n", use.removeprefix("\n"))
    if temporary == "none":
        program = f"import tempfile; tempfile.tempdir = {str(folder.parent)!r}\n" + program
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        env=environment | {"TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (warning,) = done.stdout.splitlines()
    assert "set NUMBA_CACHE_DIR to a folder that can be written" in warning
    if temporary == "usable":
        assert f"they are kept in {folder}" in warning
        assert list(folder.rglob("*.nbi"))
        assert folder.stat().st_mode & 0o77 == 0
    else:
        assert "each process compiles them again" in warning
        assert not list(tmp_path.rglob("*.nbi"))
