"""Every benchmark runs once, at a tiny size, so that none rots; what it counts stays within its bounds.

Times are not looked at: a shared machine decides them. So a timed benchmark runs at its smallest sizes, with each of
its other parameters once. What `track_` benchmarks count is the same everywhere: one that has a bound runs with all
parameters, except sizes between the smallest and the largest of many. The soak runs the rest.
"""

import ast
import copy
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

discovery = pytest.importorskip("asv_runner.discovery")

FOLDER = Path(__file__).parents[1] / "benchmarks"

ROW_BYTES = 256

# What one commit may do to a table of eight changed shards: a sync for each, two for the manifest.
SYNCS = 10

# What one counter has as its bound: the pages of a batch, most of which hold one of its rows.
PAGES = 4096 * 4096

BOUNDS = {
    "cold.ColdReads.track_bytes_read_per_page": lambda *_: 1.1,
    "cold.ColdReads.track_major_faults_per_page": lambda *_: 0.05,
    "cold.Prefetch.track_bytes_read_per_page": lambda *_: 0.05,
    "cold.Warming.track_bytes_read_per_byte": lambda *_: 1.1,
    "cold.WholeRowWrite.track_bytes_read": lambda *_: PAGES,
    "commit.CommitBytes.track_bytes_per_changed_row": lambda *_: 1.05 * ROW_BYTES,
    "commit.CommitSyncs.track_syncs": lambda *_: SYNCS,
    "durability.Fold.track_syncs": lambda *_: 8 + 2 + 6,  # shards, checksums twice, segments and base
    "durability.Fold.track_bytes_per_changed_row": lambda *_: (
        3 * 4096
    ),  # a record of 768 bytes, alone on its pages
    "durability.FoldOfCommits.track_bytes_per_changed_byte": lambda *_: (
        2 * 4096 / 768
    ),  # a record, alone on its pages
    "durability.Paging.track_bytes_written_per_row": lambda *_: 4096 * 2,
    "export.Export.track_anonymous_growth": lambda *_: 128 * 2**20,
    "keys.Keys.track_anonymous_bytes": lambda *_: 64 * 2**20,
    "keys.Keys.track_bytes_on_disk_per_key": lambda *_: 32,
    "opening.Open.track_disk_bytes": lambda *_: 8 * 2**20,
    "opening.Open.track_files": lambda rows: 40 if rows < 10**9 else 1600,
    "scale.Scale.track_anonymous_bytes": lambda *_: 128 * 2**20,
    "scale.Scale.track_bytes_on_disk_per_row": lambda *_: 2 * 4096,
    "starting.SecondStart.track_kernels_compiled": lambda *_: 0,
    "starting.track_heavy_imports": lambda *_: 0,
    "tasks.Tasks.track_lookup_tasks": lambda rows, batch: 0 if batch == 16 else 4,
    "tasks.Tasks.track_update_tasks": lambda rows, batch: 0 if batch == 16 else 4,
}
"""By benchmark: its parameters to the largest value that may come out."""

UNBOUNDED = {
    "keys.Keys.track_keys_added_per_second",  # how busy the machine is
    "keys.KeysRatio.track_lookup_vs_arrow",  # at this size it is noise
    "keys.KeysRatio.track_lookup_vs_dict",
    "keys.KeysRatioLmdb.track_lookup_vs_lmdb",
    "ratios.LookupRatio.track_lookup_out_vs_take",  # at this size it is noise
    "ratios.LookupRatio.track_lookup_out_vs_pool",
    "ratios.LookupRatio.track_lookup_vs_index",
    "ratios.TrainingRatio.track_step_vs_numpy",
    "ratios.UntouchedRatio.track_untouched_vs_written",
    "scale.Scale.track_create_seconds",  # how busy the machine is
    "scale.Scale.track_open_seconds",
    "starting.SecondStart.track_kernels_found",
}


LEFT_TO_THE_SOAK = {
    ("starting.Start.time_first_lookup", ("filled cache",)),
    ("starting.Start.time_first_lookup", ("empty cache",)),
}
"""They compile every kernel once more, as `starting.SecondStart` does."""


def _discover():
    """Find the benchmarks as asv does; the size is read when they are imported."""
    with (
        mock.patch.dict("os.environ", SHARDEMB_BENCH_SCALE="0"),
        mock.patch.object(sys, "path", [str(FOLDER.parent), *sys.path]),
    ):
        return list(discovery.disc_benchmarks(str(FOLDER)))


def _parameters(benchmark):
    """List the parameters of a benchmark, one list for each."""
    return [[ast.literal_eval(value) for value in values] for values in benchmark.params]


def _chosen(parameters, *, bounded):
    """Return which combinations of parameters every run of the tests tries."""
    if bounded:
        ends = [[min(each), max(each)] if _are_many_sizes(each) else each for each in parameters]
        return set(itertools.product(*ends))
    ends = [[min(each)] if _are_sizes(each) else each for each in parameters]
    longest = max(map(len, ends), default=1)
    return {tuple(each[number % len(each)] for each in ends) for number in range(longest)}


def _are_sizes(values):
    return all(isinstance(value, int | float) for value in values)


def _are_many_sizes(values):
    return _are_sizes(values) and len(values) > 3


BENCHMARKS = {benchmark.name: benchmark for benchmark in _discover()}


def _cases():
    for name, benchmark in BENCHMARKS.items():
        parameters = _parameters(benchmark)
        chosen = _chosen(parameters, bounded=name in BOUNDS)
        for index, each in enumerate(itertools.product(*parameters)):
            is_tried = each in chosen and (name, each) not in LEFT_TO_THE_SOAK
            mark = pytest.mark.slow if is_tried else pytest.mark.soak
            yield pytest.param(name, index, each, id="-".join(map(str, (name, *each))), marks=mark)


CASES = list(_cases())


@pytest.fixture(scope="module")
def setup_cache(tmp_path_factory):
    """Do what asv does about `setup_cache`: run it once, in a folder that stays the current one for its users."""
    made = {}

    def enter(benchmark, monkeypatch):
        key = benchmark.setup_cache_key
        if key not in made:
            folder = tmp_path_factory.mktemp("asv")
            monkeypatch.chdir(folder)
            made[key] = folder, benchmark.do_setup_cache()
        monkeypatch.chdir(made[key][0])
        return made[key][1]

    return enter


@pytest.mark.parametrize(("name", "index", "parameters"), CASES)
def test_benchmark_runs_and_stays_in_bounds(name, index, parameters, setup_cache, monkeypatch):
    from benchmarks import common

    benchmark = copy.copy(BENCHMARKS[name])
    benchmark.set_param_idx(index)
    benchmark.set_cache(setup_cache(benchmark, monkeypatch))
    try:
        if benchmark.do_setup():
            pytest.skip("it says that it cannot run here")
        benchmark.number, benchmark.repeat, benchmark.warmup_time = 1, 1, 0
        result = benchmark.do_run()
    finally:
        benchmark.do_teardown()
        common.close_all()  # as the end of its process would
    assert result is not None
    if name in BOUNDS:
        assert result <= BOUNDS[name](*parameters)


def test_every_benchmark_runs_and_each_name_is_tried():
    marks = {}
    for case in CASES:
        name, _, parameters = case.values
        marks.setdefault(name, {})[parameters] = case.marks[0].name
    assert marks.keys() == BENCHMARKS.keys()
    for name, found in marks.items():
        left = {parameters for each, parameters in LEFT_TO_THE_SOAK if each == name}
        tried = [parameters for parameters, mark in found.items() if mark == "slow" or parameters in left]
        for position, values in enumerate(_parameters(BENCHMARKS[name])):
            some = {parameters[position] for parameters in tried}
            assert some == set(values) or (_are_sizes(values) and min(values) in some)
            assert name not in BOUNDS or max(values) in some or not _are_sizes(values)


def test_all_that_is_tracked_has_a_bound():
    tracked = {name for name, benchmark in BENCHMARKS.items() if benchmark.type == "track"}
    assert tracked == BOUNDS.keys() | UNBOUNDED


def test_arguments_fit(capsys):
    # What `asv check` does.
    assert all(benchmark.check(str(FOLDER)) for benchmark in BENCHMARKS.values()), capsys.readouterr().out


# ---- the comparison with others -----------------------------------------------------------------------------------

ARMS = {
    "B4": {"float32", "bfloat16", "bfloat16 as float32"},
    "B5": {"float32, 256 bytes", "float8 as bfloat16, 264 bytes", "float8 as they are, 264 bytes"},
    "W1": {"lookup", "lookup(out=)", "numpy a[ids] in RAM", "zarr"},
    "W5": {"write + commit", "zarr"},
    "W8": {"commit", "np.save + fsync"},
    "W11": {"1 shards", "64 shards", "1,024 shards", "8,192 shards"},
    "W12": {"26 tables", "one table"},
    "W14": {"cold: open + 100 steps", "warm: 100 steps", "one sequential read of the files"},
    "W15": {"after creation: 100 steps", "warm: 100 steps"},
    "W16": {"cold write + commit", "warm write + commit"},
    "W17": {"write + commit + checkpoint", "a plain file, synced"},
    "W18": {"lookup beside a fold", "lookup alone"},
    "B1": {"lookup_bag"},
    "B2": {"lookup_bag + Adam update_bag"},
    "B3": {"26 tables", "one table"},
    "B6": {"Adam", "SGD"},
    "B7": {"update", "clipped"},
    "I4": {"search", "NumPy sgemm + argpartition in RAM"},
    "I5": set(),
    "I1": {"shardemb"},
    "I2": {"shardemb"},
    "I3": {"all rows", "changed rows"},
    "T1": set(),
    "T3": set(),
    "T5": set(),
    "D1": set(),
    "D2": set(),
    "D7": set(),
}
PEERS = {
    "W1": {"torch": "torch embedding in RAM", "lmdb": "lmdb", "rocksdict": "RocksDB", "lance": "Lance"},
    "W5": {"tensorstore": "tensorstore", "lmdb": "lmdb", "rocksdict": "RocksDB", "h5py": "h5py"},
    "W14": {"torch": "torch.load + 100 SparseAdam steps"},
    "B1": {"torch": "torch embedding_bag in RAM"},
    "B2": {"torch": "torch EmbeddingBag, SparseAdam in RAM"},
    "W16": {"rocksdict": "RocksDB"},
    "T1": {"torch": "shardemb.torch"},
}
"""By workload: the module of a peer that may be missing, and its arm."""


def _installed(peers):
    return {arm for module, arm in peers.items() if importlib.util.find_spec(module) is not None}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(
            ["W1", "W5", "W12", "W14", "W16", "W17", "B1", "B2", "B3", "B4", "B5", "B7", "T1"],
            marks=pytest.mark.slow,
        ),
        pytest.param(sorted(ARMS), marks=pytest.mark.soak),
    ],
)
def test_the_comparison_runs_and_all_arms_return_the_same(tmp_path, names):
    result = tmp_path / "result.json"
    options = ["--scale", "0.005", "--only", ",".join(names), "--json", result, "--folder", tmp_path]
    subprocess.run([sys.executable, FOLDER / "compare.py", *options], check=True)
    found = json.loads(result.read_text())
    assert found["machine"]["copy_bytes_per_s"] > 0
    assert found["workloads"].keys() == set(names)
    for name, workload in found["workloads"].items():
        assert (name, workload["skipped"]) == (name, "")
        assert ARMS[name] | _installed(PEERS.get(name, {})) <= workload["cases"][0]["arms"].keys()
        assert all(case["equal"] for case in workload["cases"])
        assert (
            all(bar["met"] is not None for case in workload["cases"] for bar in case["bars"])
            or workload["missing"]
        )
    assert [path for path in tmp_path.iterdir() if path != result] == []  # what it made is gone


def test_a_comparison_that_does_not_exist_is_refused():
    answer = subprocess.run(
        [sys.executable, FOLDER / "compare.py", "--only", "W99"], capture_output=True, text=True
    )
    assert answer.returncode == 1
    assert "no workload W99" in answer.stderr
