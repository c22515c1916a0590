"""Recovery crashes, as the system calls of another process record it: the store opens at exactly the last commit."""

import shutil

import pytest
from support.recorded_calls import complete_calls, explore

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 5])  # rows, keys
def test_a_crash_within_recovery_loses_nothing(tmp_path, seed):
    assert explore(seed, 40, tmp_path / "calls") > 10


@needs_strace
@pytest.mark.slow
def test_a_recovery_that_syncs_nothing_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="does not open"):
        explore(0, 40, tmp_path / "calls", left_out=("sync", "sync all"))


def test_a_call_that_another_thread_interrupts_is_put_together():
    lines = [
        '10 pwrite64(5<\\x2f\\x61>, "\\x01", 1, 0 <unfinished ...>',
        "11 fsync(5<\\x2f\\x61>) = 0",
        "10 <... pwrite64 resumed>) = 1",
        '10 unlinkat(AT_FDCWD<\\x2f>, "\\x62", 0) = -1 ENOENT (No such file or directory)',
    ]
    assert list(complete_calls(lines)) == [
        ("fsync", "5<\\x2f\\x61>", 0),
        ("pwrite64", '5<\\x2f\\x61>, "\\x01", 1, 0', 1),
        ("unlinkat", 'AT_FDCWD<\\x2f>, "\\x62", 0', -1),
    ]
