import contextlib
import io
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from shardemb.base import progress
from shardemb.base.progress import track


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_a_terminal():
    return contextlib.redirect_stderr(Terminal())


# ---- track


def test_a_function_hears_of_every_step():
    heard = []
    with track(10, "work", progress=lambda done, total: heard.append((done, total))) as advance:
        for steps in (1, 4, 5):
            advance(steps)
    assert heard == [(1, 10), (5, 10), (10, 10)]


def test_no_steps_no_calls():
    with track(0, "nothing", progress=lambda done, total: pytest.fail("called")):
        pass


def test_steps_from_many_threads_are_heard_in_order():
    heard = []

    def slow(done, total):
        time.sleep(0.0001)
        heard.append(done)

    with track(200, "work", progress=slow) as advance, ThreadPoolExecutor(8) as pool:
        list(pool.map(advance, [1] * 200))
    assert heard == list(range(1, 201))


def test_what_the_function_raises_comes_out_of_the_step():
    def refuse(done, total):
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"), track(2, "work", progress=refuse) as advance:
        advance(1)


@pytest.mark.parametrize("silent", [None, False])
def test_silent_unless_asked(silent):
    with on_a_terminal() as terminal, track(3, "work", progress=silent) as advance:
        advance(3)
    assert terminal.getvalue() == ""


def test_one_line_where_stderr_is_no_terminal(capsys):
    with track(3000, "export tokens", progress=True) as advance:
        advance(1000)
        advance(2000)
        assert capsys.readouterr() == ("", "")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("export tokens: 3,000 rows in ")
    assert captured.err.count("\n") == 1


def test_no_line_for_a_job_that_failed(capsys):
    with pytest.raises(OSError), track(3, "work", progress=True):
        raise OSError
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with on_a_terminal() as terminal, track(3000, "export [tokens]", progress=True) as advance:
        advance(3000)
    drawn = terminal.getvalue()
    assert "export [tokens]" in drawn  # not read as markup of rich
    assert "3,000 of 3,000 rows" in drawn


def test_lines_where_a_log_waits_long(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with track(3 * 2**20, "copying", unit="byte", progress=True) as advance:
        advance(2**20)
        assert capsys.readouterr().err.startswith("copying: 1.0 MiB of 3.0 MiB in ")
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 60.0)
        advance(2 * 2**20)
        assert capsys.readouterr() == ("", "")
    assert capsys.readouterr().err.startswith("copying: 3.0 MiB in ")


def test_no_stderr_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with track(1, "work", progress=True) as advance:
        advance(1)


@pytest.mark.parametrize("wrong", ["yes", 2, [print]])
def test_anything_else_is_refused(wrong):
    with (
        pytest.raises(TypeError, match=r"progress must be True, False, None or a function"),
        track(1, "work", progress=wrong),
    ):
        pytest.fail("entered")


def test_rich_is_imported_only_for_a_bar():
    code = """
import sys
from shardemb.base.progress import track
for quiet in (None, False, True, lambda done, total: None):
    with track(1, "work", progress=quiet) as advance:
        advance(1)
assert "rich" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path)},
    )


def test_examples():
    import doctest

    assert doctest.testmod(progress).failed == 0
