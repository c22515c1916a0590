"""What all tests share: temporary stores, deterministic hypothesis, and a check that no test leaves anything open."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "shardemb",
    derandomize=True,  # the same examples on every run: a red test stays red
    deadline=None,  # the first example may compile kernels
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shardemb")

# A shell that starts pytest in the background leaves SIGINT ignored, and Python then makes no KeyboardInterrupt of it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def path(tmp_path):
    """Where a test's store goes; nothing is there yet."""
    return tmp_path / "store.zarr"


@pytest.fixture
def store(path):
    """An empty store, open for writing."""
    import shardemb

    store = shardemb.open(path)
    yield store
    close_quietly(store)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory):
    """For `hypothesis`: ``with new_store() as store`` opens an empty store and removes it afterwards."""
    import shardemb

    @contextlib.contextmanager
    def new_store(**options):
        with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
            store = shardemb.open(Path(folder) / "store.zarr", **options)
            try:
                yield store
            finally:
                close_quietly(store)

    return new_store


@pytest.fixture(scope="session")
def in_fork():
    """Call a function in a fork of this process; return what it returned, or None if it died on the way."""

    def in_fork(function, *arguments):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # 3.12 and later: other threads do not survive it
            pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(60)  # a child that hangs must not outlive the test
                os.close(reader)
                try:
                    answer = function(*arguments)
                except BaseException as error:
                    answer = error
                os.write(writer, pickle.dumps(answer))
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(pid, 0)
        return pickle.loads(answer) if answer else None

    return in_fork


def close_quietly(store):
    """Close a store without its warning about changes that the test did not commit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        store.close()


# ---- nothing is left behind -----------------------------------------------------------------------------------

_passed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    return report


@pytest.fixture(autouse=True)
def nothing_is_left(request, tmp_path_factory):
    """Fail a test that leaves a file open or mapped, a thread of shardemb running, or a signal's handler replaced.

    Tests that failed are let off: their traceback keeps everything alive.
    """
    base = str(tmp_path_factory.getbasetemp())
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    before = left_open(base)
    yield
    if not request.node.stash.get(_passed, False):
        return
    if left_open(base) - before:
        gc.collect()
    assert sorted(left_open(base) - before) == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def left_open(base):
    """Name what is still open or mapped of the files under a folder, and what still runs of shardemb's threads."""
    found = {
        f"thread {thread.name}" for thread in threading.enumerate() if thread.name.startswith("shardemb")
    }
    found |= {f"mapping of {line.split(maxsplit=5)[5]}" for line in _mappings() if base in line}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add(f"descriptor {number} of {os.readlink(f'/proc/self/fd/{number}')}")
    return {each for each in found if base in each or each.startswith("thread")}


def _mappings():
    return Path("/proc/self/maps").read_text().splitlines()


@pytest.fixture(scope="session")
def _pool():
    """Processes of their own: what they run replaces functions of the package."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool, {}


@pytest.fixture
def side_by_side(request, _pool):
    """Run a function for all parameters of this test at once, when the first asks; return the result for this one."""
    pool, begun = _pool
    name = request.node.originalname

    def result(function):
        if name not in begun:
            items = [item for item in request.session.items if getattr(item, "originalname", None) == name]
            parameters = [next(iter(item.callspec.params.values())) for item in items]
            begun[name] = {each: pool.submit(function, each) for each in parameters}
        return begun[name][next(iter(request.node.callspec.params.values()))].result()

    return result


def pytest_collection_modifyitems(config, items):
    """Leave the tests out that take hours, unless they are asked for."""
    if "soak" not in (config.option.markexpr or ""):
        left_out = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
