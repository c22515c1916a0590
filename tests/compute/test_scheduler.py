import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import dask
import dask.base
import dask.local
import dask.threaded
import numpy as np
import pytest

from shardemb.compute import scheduler
from shardemb.compute.scheduler import run


def here(k):
    """Where a task ran, and which it was."""
    return k, os.getpid(), threading.get_ident()


def where(tasks=5):
    results = run([lambda k=k: here(k) for k in range(tasks)], 2)
    assert [k for k, _, _ in results] == list(range(tasks))
    assert {process for _, process, _ in results} == {os.getpid()}
    return {thread for _, _, thread in results}


def named(choice):
    return getattr(
        choice, "__name__", str(choice)
    )  # without an address: a test has one name in all processes


# ---- who runs them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [None, "threads", "threading", "Threads", dask.threaded.get], ids=named)
def test_the_calling_thread_and_others_run_them_by_default(choice):
    meeting = threading.Barrier(2, timeout=60)

    def meet():
        meeting.wait()
        return threading.get_ident()

    with dask.config.set(scheduler=choice):
        assert len({threading.get_ident(), *run([meet, meet], 2)}) == 2


def test_the_calling_thread_does_what_others_do_not_come_to():
    """However long the others' tasks are, no task waits while a thread has nothing to do."""
    began, last = threading.Event(), threading.Event()

    def first():
        began.set()
        return last.wait(60)

    def others():
        return began.wait(60) and threading.get_ident()

    # The newest is begun first.
    *threads, ended = run([lambda: last.set() or others(), others, others, first], 2)
    assert ended
    assert len(set(threads)) == 1


def test_one_thread_is_the_calling_thread():
    caller = threading.get_ident()
    assert run([threading.get_ident] * 5, 1) == [caller] * 5


@pytest.mark.parametrize("threads", [1, 2])
def test_tasks_that_dask_is_told_to_hand_out_together(threads):
    with dask.config.set(chunksize=5):
        assert run([lambda k=k: k for k in range(7)], threads) == list(range(7))


def test_each_thread_has_its_own_helpers():
    """Otherwise the short tasks of one would wait for the long ones of another."""
    long_ones, go_on = threading.Barrier(3, timeout=60), threading.Event()

    def long_one():
        long_ones.wait()
        return go_on.wait(60)

    other = threading.Thread(target=run, args=([long_one, long_one], 2))
    other.start()
    long_ones.wait()
    meeting = threading.Barrier(2, timeout=60)
    assert sorted(run([meeting.wait, meeting.wait], 2)) == [0, 1]
    go_on.set()
    other.join()


def test_the_helpers_of_a_thread_end_after_it():
    helpers = []

    def work():
        meeting = threading.Barrier(2, timeout=60)
        helpers.extend(run([lambda: (meeting.wait(), threading.current_thread())] * 2, 2))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for _, helper in helpers:
        helper.join(60)
        assert not helper.is_alive()


@pytest.fixture
def kept_to(monkeypatch):
    """Record what helpers are told: (thread, cores, the core of the caller)."""
    calls, keep_to, here = [], scheduler._keep_to, scheduler._getcpu

    def note(thread, cores):
        calls.append((thread, cores, here()))
        keep_to(thread, cores)

    monkeypatch.setattr(scheduler, "_keep_to", note)
    return calls


def meet():
    """Have the caller and one helper run a task each; return the cores that each may use in it."""
    meeting = threading.Barrier(2, timeout=60)
    return run([lambda: meeting.wait() >= 0 and os.sched_getaffinity(0)] * 2, 2)


several_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@several_cores
def test_helpers_that_slept_wake_on_another_core_than_the_callers(kept_to, monkeypatch):
    meet()
    for core in sorted(os.sched_getaffinity(0))[:2] * 3:
        monkeypatch.setattr(scheduler, "_getcpu", lambda core=core: core)
        time.sleep(5 * scheduler.REST_S)
        kept_to.clear()
        assert meet() == [os.sched_getaffinity(0)] * 2  # once it runs, it may run anywhere
        (helper, others, _), (itself, cores, begun_on) = kept_to
        assert (helper != threading.get_native_id(), itself) == (True, 0)
        assert (others, cores) == (os.sched_getaffinity(0) - {core}, os.sched_getaffinity(0))
        assert begun_on != core


def test_helpers_that_are_awake_stay_where_they_are(kept_to, monkeypatch):
    meet()
    monkeypatch.setattr(scheduler, "REST_S", 3600)
    kept_to.clear()
    meet()
    assert kept_to == []


@several_cores
def test_a_thread_that_may_use_one_core_has_helpers_all_the_same():
    allowed, one = os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}
    try:
        for cores in one, allowed, one:
            os.sched_setaffinity(0, cores)
            time.sleep(5 * scheduler.REST_S)
            assert meet() == [cores, cores]
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("choice", ["sync", "synchronous", "single-threaded", "SYNC", dask.get], ids=named)
def test_the_calling_thread_runs_them_where_the_configuration_says_so(choice):
    with dask.config.set(scheduler=choice):
        assert where() == {threading.get_ident()}


@pytest.mark.parametrize("setting", ["scheduler", "pool"])
def test_an_executor_of_the_configuration_is_used(setting):
    own = set()
    executor = ThreadPoolExecutor(3, initializer=lambda: own.add(threading.get_ident()))
    with executor, dask.config.set({setting: executor}):
        assert where(50) <= own


@pytest.mark.parametrize(
    "choice", ["processes", "multiprocessing", "distributed", "dask.distributed", "nonsense"]
)
def test_a_scheduler_of_other_processes_is_not_used(choice):
    """Tasks work on memory that is mapped into this process."""
    with dask.config.set(scheduler=choice):
        where()


def test_an_unknown_scheduler_is_not_used():
    def elsewhere(*args, **options):
        raise AssertionError("called")

    with dask.config.set(scheduler=elsewhere):
        where()


class Elsewhere(ThreadPoolExecutor):
    """Built as an executor of processes or interpreters may be."""

    def submit(self, *args, **options):
        raise AssertionError("called")


def test_an_executor_that_may_run_elsewhere_is_not_used():
    with Elsewhere(1) as executor, dask.config.set(scheduler=executor):
        where()


def test_the_synchronous_executor_of_dask_is_used():
    with dask.config.set(scheduler=dask.local.SynchronousExecutor()):
        assert where() == {threading.get_ident()}


def test_an_executor_of_processes_is_not_used():
    with ProcessPoolExecutor(1) as executor, dask.config.set(scheduler=executor):
        where()


def test_the_choice_is_looked_up_for_every_run():
    with dask.config.set(scheduler="sync"):
        assert where() == {threading.get_ident()}
    executor = ThreadPoolExecutor(1)
    with executor, dask.config.set(scheduler=executor):
        assert threading.get_ident() not in where()


@pytest.mark.parametrize("choice", [None, "processes"])
def test_a_single_task_runs_in_the_calling_thread(choice):
    with dask.config.set(scheduler=choice):
        assert where(1) == {threading.get_ident()}


def test_no_tasks_no_results():
    assert run([], 2) == []


def test_tasks_run_concurrently():
    meeting = threading.Barrier(2, timeout=60)
    assert sorted(run([meeting.wait, meeting.wait], 2)) == [0, 1]


def test_no_more_of_them_than_threads():
    lock, running, most = threading.Lock(), 0, 0

    def task():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    run([task] * 20, 3)
    assert 1 <= most <= 3


def test_tasks_may_run_tasks():
    def inner(k):
        return sum(run([lambda j=j: 10 * k + j for j in range(3)], 2))

    assert run([lambda k=k: inner(k) for k in range(3)], 2) == [3, 33, 63]


def test_results_are_in_order_however_long_each_takes():
    assert run([lambda k=k: time.sleep((5 - k) / 500) or k for k in range(6)], 4) == list(range(6))


# ---- errors -----------------------------------------------------------------------------------------------------

every_scheduler = pytest.mark.parametrize("choice", ["threads", "sync", "executor"])


@contextlib.contextmanager
def configured(choice):
    with (
        ThreadPoolExecutor(2) as executor,
        dask.config.set(scheduler=executor if choice == "executor" else choice),
    ):
        yield


def fail():
    raise ZeroDivisionError("by intent")


@every_scheduler
def test_the_error_of_a_task_comes_out_as_it_is(choice):
    with configured(choice), pytest.raises(ZeroDivisionError, match="by intent"):
        run([time.perf_counter, fail], 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_comes_out_too(error):
    def leave():
        raise error

    with pytest.raises(error):
        run([time.perf_counter, leave], 2)


def test_an_error_is_raised_when_all_that_runs_has_ended():
    began, ended = threading.Event(), threading.Event()

    def slow():
        began.set()
        time.sleep(0.1)
        ended.set()

    with pytest.raises(ZeroDivisionError):
        run([lambda: began.wait(60) and fail(), slow], 2)
    assert ended.is_set()


@every_scheduler
def test_after_an_error_no_task_begins(choice):
    began = []

    def fail():
        began.append(1)
        raise ZeroDivisionError

    with configured(choice), pytest.raises(ZeroDivisionError):
        run([fail] * 10, 1)
    time.sleep(0.02)
    assert len(began) <= (2 if choice == "executor" else 1)  # the executor has two threads


def test_a_task_that_takes_long_is_told_of_the_error_of_another():
    stop = threading.Event()
    with pytest.raises(ZeroDivisionError):
        run([fail, lambda: stop.wait(60) or pytest.fail("not told")], 2, stop)
    assert stop.is_set()


def test_without_an_error_nobody_is_told_anything():
    stop = threading.Event()
    assert run([lambda: 1, lambda: 2], 2, stop) == [1, 2]
    assert not stop.is_set()


@pytest.fixture
def ctrl_c():
    """Let SIGINT raise KeyboardInterrupt, which it does not if a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_interrupts_the_task_of_the_calling_thread_and_waits_for_the_others():
    ended, caller = [], threading.get_ident()
    both_run = threading.Barrier(2)  # a task that has not begun would never run

    def task():
        both_run.wait(60)
        if threading.get_ident() == caller:
            time.sleep(60)
        else:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        ended.append(threading.get_ident())

    with pytest.raises(KeyboardInterrupt):
        run([task, task, task], 2)
    assert len(ended) == 1
    assert caller not in ended


def test_after_an_error_tasks_can_be_run_again():
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            run([fail, fail, fail], 2)
        assert run([lambda: 1, lambda: 2], 2) == [1, 2]


def test_a_fork_runs_them_without_the_threads_that_it_does_not_have():
    code = """
        import os, threading
        from shardemb.compute.scheduler import run
        both = threading.Barrier(2)
        assert sorted(run([both.wait, both.wait], 2)) == [0, 1]  # there are two threads now
        child = os.fork()
        if child == 0:
            os._exit(0 if run([lambda: 1, lambda: 2], 2) == [1, 2] else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    assert subprocess.run(command, check=False, timeout=30).returncode == 0


# ---- dask arrays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "chunks"), [(10, (4, 4, 2)), (8, (4, 4)), (3, (3,)), (4, (4,))])
def test_an_array_has_a_chunk_a_shard_and_reads_when_it_is_computed(num_rows, chunks):
    values = np.arange(num_rows * 3, dtype=np.float32).reshape(num_rows, 3)
    read = []

    def rows(start, stop):
        read.append((start, stop))
        return values[start:stop]

    array = scheduler.as_array(rows, num_rows, 3, 4, np.dtype(np.float32))
    assert array.chunks == (chunks, (3,))
    assert array.dtype == np.float32
    assert read == []
    np.testing.assert_array_equal(array.compute(), values)
    ends = np.cumsum(chunks).tolist()
    assert sorted(read) == list(zip([0, *ends[:-1]], ends, strict=True))


def test_an_array_reads_only_the_chunks_that_are_asked_for():
    read = []

    def rows(start, stop):
        read.append((start, stop))
        return np.zeros((stop - start, 2), np.float32)

    assert scheduler.as_array(rows, 100, 2, 10, np.dtype(np.float32))[35:41, 1].compute().shape == (6,)
    assert sorted(read) == [(30, 40), (40, 50)]


def test_cores_are_those_that_the_process_may_use():
    assert 1 <= scheduler.CORES <= len(os.sched_getaffinity(0))
