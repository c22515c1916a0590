import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardemb.base.interrupts import signals_deferred
from shardemb.engine.runtime import Runtime
from shardemb.errors import PoisonedError, ReadOnlyError, StoreClosedError

BOTH = [signal.SIGINT, signal.SIGTERM]


def runtime(**settings):
    return Runtime(
        **{"path": Path("/stores/words"), "writable": True, "threads": 2, "memory_budget": 0, "log_bytes": 1}
        | settings
    )


@pytest.fixture(autouse=True)
def ctrl_c():
    """Make SIGINT raise KeyboardInterrupt, which it does not if a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def heard(ctrl_c):
    """Handlers for both signals, which record what they are called with."""
    calls = []
    before = {number: signal.getsignal(number) for number in BOTH}
    for number in BOTH:
        signal.signal(number, lambda number, frame: calls.append(signal.Signals(number).name))
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- signals ----------------------------------------------------------------------------------------------------


def test_ctrl_c_takes_effect_at_the_end_of_the_block():
    reached = []

    def block():
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # Python would deliver it at one of these
                reached.append(1)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert len(reached) == 1000


@pytest.mark.parametrize("number", BOTH)
def test_a_handler_is_called_once_and_not_before(heard, number):
    with signals_deferred():
        signal.raise_signal(number)
        assert heard == []
    assert heard == [number.name]


def test_every_signal_is_heard_in_the_order_in_which_they_came(heard):
    with signals_deferred():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
    assert heard == ["SIGTERM", "SIGINT", "SIGTERM"]


def test_a_handler_that_raises_does_not_swallow_the_next_signal(heard):
    """Ctrl-C and then SIGTERM: the process has to end, not only the call."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        with_signals(signal.SIGINT, signal.SIGTERM)
    assert heard == ["SIGTERM"]


def with_signals(*numbers, error=None):
    with signals_deferred():
        for number in numbers:
            signal.raise_signal(number)
        if error:
            raise error


def test_handlers_get_the_frame_that_was_interrupted():
    frames = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: frames.append(frame))
    try:
        with signals_deferred():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert frames[0].f_code.co_name == "test_handlers_get_the_frame_that_was_interrupted"


def test_blocks_within_blocks_wait_for_the_outermost(heard):
    with signals_deferred():
        with signals_deferred():
            signal.raise_signal(signal.SIGINT)
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
    assert heard == ["SIGINT", "SIGTERM"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_handlers_are_put_back_also_after_an_error(heard, error):
    before = [signal.getsignal(number) for number in BOTH]
    with pytest.raises(error):
        with_signals(error=error)
    assert [signal.getsignal(number) for number in BOTH] == before


def test_handlers_are_replaced_within_the_block_and_put_back():
    before = [signal.getsignal(number) for number in BOTH]
    with signals_deferred():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in BOTH] == before


def test_an_error_in_the_block_is_not_lost_behind_ctrl_c():
    with pytest.raises(KeyboardInterrupt) as caught:
        with_signals(signal.SIGINT, error=ZeroDivisionError)
    assert isinstance(caught.value.__context__, ZeroDivisionError)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_python_does_not_handle_is_left_alone(handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with signals_deferred():
            assert signal.getsignal(signal.SIGTERM) == handler
        assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_leaves_signals_as_they_are():
    """Only the main thread gets them, and only it may set handlers."""

    def block():
        with signals_deferred():
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(block).result() is signal.getsignal(signal.SIGINT)


# ---- what is allowed --------------------------------------------------------------------------------------------


def test_an_open_store_for_writing_allows_everything():
    state = runtime()
    state.check_open()
    state.check_sound()
    state.check_writable()
    with state.changing():
        pass


def test_a_closed_store_says_how_to_open_it():
    state = runtime()
    state.close()
    for check in (state.check_open, lambda: state.changing().__enter__(), lambda: state.in_background(print)):
        with pytest.raises(StoreClosedError, match=r"shardemb.open\('/stores/words'\)"):
            check()


def test_a_store_for_reading_refuses_changes():
    state = runtime(writable=False)
    state.check_open()
    for check in (state.check_writable, lambda: state.changing().__enter__()):
        with pytest.raises(ReadOnlyError, match='mode "r'):
            check()


def test_a_fork_may_not_change_its_parents_store():
    state = runtime(pid=os.getppid())
    assert not state.owned
    with pytest.raises(ReadOnlyError, match=f"belongs to process {os.getppid()}"):
        state.check_writable()


def test_a_poisoned_store_names_the_reason_and_the_way_out():
    state = runtime(poisoned="a commit failed")
    with pytest.raises(PoisonedError, match="a commit failed; close it and open it again"):
        state.check_sound()


def can_be_changed_by_another_thread(state):
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(lambda: state.lock.acquire(timeout=0.05) and not state.lock.release()).result()


def test_changes_exclude_each_other_and_may_be_nested():
    state = runtime()
    with state.changing():
        with state.changing():
            assert not can_be_changed_by_another_thread(state)
        assert not can_be_changed_by_another_thread(state)
    assert can_be_changed_by_another_thread(state)


def test_the_lock_is_released_after_an_error():
    state = runtime()
    with pytest.raises(ZeroDivisionError), state.changing():
        raise ZeroDivisionError
    assert can_be_changed_by_another_thread(state)


# ---- all or nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, KeyboardInterrupt])
def test_a_change_that_fails_half_way_stops_commits_until_rollback(error):
    state = runtime()
    with pytest.raises(error), state.all_or_nothing("an update"):
        raise error
    with pytest.raises(PoisonedError, match=r"an update failed half way; call store.rollback\(\)"):
        state.check_sound()
    state.half_done = None
    state.check_sound()


def test_ctrl_c_waits_for_a_change_and_does_no_harm():
    state, done = runtime(), []

    def change():
        with state.all_or_nothing("an update"):
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        change()
    assert done == [1]
    state.check_sound()


# ---- background -------------------------------------------------------------------------------------------------


def test_background_work_runs_in_order_in_one_thread_of_a_name():
    state, seen = runtime(), []
    for k in range(20):
        state.in_background(lambda k=k: seen.append((k, threading.current_thread().name)))
    state.in_background(threading.Event().set)
    last = threading.Event()
    state.in_background(last.set)
    assert last.wait(60)
    assert [k for k, _ in seen] == list(range(20))
    assert {name for _, name in seen} == {"shardemb_0"}
    state.close()


def test_close_waits_for_what_runs_and_drops_the_rest():
    state, seen = runtime(), []
    began, go_on = threading.Event(), threading.Event()

    def work():
        began.set()
        go_on.wait(60)
        seen.append("work")

    state.in_background(work)
    state.in_background(lambda: seen.append("dropped"))
    assert began.wait(60)
    timer = threading.Timer(0.05, go_on.set)
    timer.start()
    state.close()
    assert seen == ["work"]
    timer.join()
    state.close()


def test_background_work_that_fails_hurts_nobody():
    state, last = runtime(), threading.Event()
    state.in_background(lambda: 1 / 0)
    state.in_background(last.set)
    assert last.wait(60)
    state.close()
