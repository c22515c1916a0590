"""What all tests share: temporary stores, deterministic hypothesis, and a check that no test leaves anything open."""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.stores import SmallDisk, close_quietly, run_in_fork

settings.register_profile(
    "shardemb",
    derandomize="SHARDEMB_SEED" not in os.environ,  # the same examples on every run: a red test stays red
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
    """As `run_in_fork`, without the signal."""
    return lambda function, *arguments: run_in_fork(function, *arguments)[0]


@pytest.fixture
def new_disk(tmp_path):
    """``new_disk("ext4", nbytes)`` makes a `SmallDisk`, which goes with the test."""
    with contextlib.ExitStack() as stack:

        def new_disk(kind, nbytes):
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            try:
                disk = SmallDisk(kind, folder, nbytes)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"cannot make a file system here: {getattr(error, 'stderr', error)}")
            stack.callback(disk.unmount)
            return disk

        yield new_disk


@pytest.fixture
def small_disk(new_disk):
    """A disk with 6 MB of room."""
    disk = new_disk("ext4", 48 * 2**20)
    disk.leave(6_000_000)
    return disk


# ---- nothing is left behind -----------------------------------------------------------------------------------

_passed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    return report


@pytest.fixture(autouse=True, scope="module")
def nothing_stays_mapped(request, tmp_path_factory):
    """Fail a module whose tests leave a file mapped; to look for that after each test would take minutes."""
    base, failed = str(tmp_path_factory.getbasetemp()), request.session.testsfailed
    # Thousands of collected tests and hundreds of compiled kernels are millions of objects, which nobody drops: without
    # this, each collection of garbage looks at all of them, for seconds.
    gc.freeze()
    yield
    gc.collect()
    if request.session.testsfailed == failed:  # a traceback would keep everything alive
        assert [line for line in Path("/proc/self/maps").read_text().splitlines() if base in line] == []


@pytest.fixture(autouse=True)
def nothing_is_left(request, tmp_path_factory):
    """Fail a test that leaves a file open, a thread of shardemb running, or a signal's handler replaced.

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
    deadline = time.monotonic() + 5
    while left_open(base) - before and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread of Arrow may be about to close what it has read
    assert sorted(left_open(base) - before) == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def left_open(base):
    """Name what is still open of the files under a folder, and what still runs of shardemb's threads."""
    found = {
        f"thread {thread.name}" for thread in threading.enumerate() if thread.name.startswith("shardemb")
    }
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add(f"descriptor {number} of {os.readlink(f'/proc/self/fd/{number}')}")
    return {each for each in found if base in each or each.startswith("thread")}


@pytest.fixture(scope="session")
def _elsewhere():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def elsewhere(request, _elsewhere):
    """Run a function for the parameter of this test in another process, as it replaces functions of the package."""

    def result(function):
        return _elsewhere.submit(function, *request.node.callspec.params.values()).result()

    return result


def pytest_collection_modifyitems(config, items):
    """Leave the tests out that take hours, unless they are asked for; begin with those that take minutes.

    Whatever core is done early takes over what is left of another's, which should be what is short.
    """
    if "soak" not in (config.option.markexpr or ""):
        left_out = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
