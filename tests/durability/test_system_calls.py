"""The order of system calls, as the kernel sees them: a barrier that is missing shows here on any disk."""

import re
import shutil
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

WORKLOAD = """
    import os, random, sys
    import numpy as np
    import shardemb
    from shardemb.initializers import Uniform
    from shardemb.optim import Adam

    def mark(what):
        try:
            os.stat("/mark/" + what)
        except OSError:
            pass

    path, seed = sys.argv[1], int(sys.argv[2])
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    options = dict(log_bytes=chance.choice([1, 100_000, 10**9]), memory_budget=chance.choice([0, 10**9]))
    for opening in range(2):
        mark("opening")
        store = shardemb.open(path, **options)
        mark("open")
        for name in ("a", "b"):
            if name not in store:
                more = {"initializer": Uniform(-1, 1)} if name == "b" else {}
                shape = dict(num_embeddings=3000, embedding_dim=16, rows_per_shard=1024)
                store.create_table(name, optimizer=Adam(), **shape, **more)
        for step in range(8):
            for table in store.values():
                ids = rng.integers(0, 3000, 200)
                table.update(ids, rng.normal(size=(200, 16)).astype(np.float32))
            what = chance.choice(["", "", "rollback", "checkpoint", "rename"] if step else [""])
            if what == "rename":
                store.rename_table(list(store)[0], f"r{opening}{step}")
            elif what:
                getattr(store, what)()
            mark("committing")
            store.commit(step=step)
            mark("committed")
        if opening == 0:
            if os.fork() == 0:
                os._exit(0)
            os.wait()
        store.close()
        mark("closed")
"""

CALL = re.compile(r"^(\d+) +(\w+)\((.*)$")
DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")


def calls_of(text):
    """Thread, name, path and second path of every call that succeeded or was a mark, in order of their ends."""
    started = {}
    for line in text.splitlines():
        if (match := re.match(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$", line)) is not None:
            thread, name, rest = match.groups()
            line = f"{thread} {name}({started.pop(thread)}{rest}"
        match = CALL.match(line)
        if match is None:
            continue
        thread, name, rest = match.groups()
        if rest.endswith("<unfinished ...>"):
            started[thread] = rest.removesuffix("<unfinished ...>")
            continue
        mark = re.search(r'"/mark/(\w+)"', rest)
        if mark is not None:
            yield thread, "mark", mark[1], None
        elif not re.search(r"= -1 ", rest):
            # Names are given within an open folder, as in: renameat(5</store>, "a", 5</store>, "b")
            within = re.findall(r'(?:\d+<([^>]*)>|AT_FDCWD(?:<[^>]*>)?), "([^"]*)"', rest)
            if within:
                paths = [str(Path(folder or "/") / name) for folder, name in within]
            elif DESCRIPTOR.match(rest):
                paths = [DESCRIPTOR.match(rest)[1]]
            else:
                paths = re.findall(r'"([^"]*)"', rest)
            if paths:
                yield thread, name, paths[0], paths[-1]


def violations(calls, store):
    """What is out of order, in the words of the rules."""
    dirty = defaultdict(int)  # writes to a file since its last sync
    main = None
    opening, names_unsynced, base_durable = False, set(), True
    for thread, name, path, other in calls:
        main = main or thread
        inside = path.startswith(str(store))
        where = path.removeprefix(str(store)).removesuffix(" (deleted)")
        if name == "mark":
            opening = {"opening": True, "open": False}.get(path, opening)
            if path == "committed":
                yield from (
                    f"commit returned before {p} was synced"
                    for p, n in dirty.items()
                    if n and p.endswith(".log")
                )
        elif not inside:
            continue
        elif name == "pwrite64":
            dirty[where] += 1
            if re.search(r"/(rows|present)/c\.", where) and thread == main and not opening:
                yield f"{where} was written by the thread that trains"
        elif name in ("fsync", "fdatasync"):
            dirty[where] = 0
            names_unsynced.discard(where)
            if where == "/.shardemb":
                base_durable = True
        elif name == "syncfs":
            dirty.clear()
        elif name.startswith("rename"):
            target = other.removeprefix(str(store))
            if target == "/.shardemb/manifest.json":
                late = [
                    p for p, n in dirty.items() if n and re.search(r"/(rows|present|checks)/c\.|manifest", p)
                ]
                yield from (f"the base was published before {p} was synced" for p in late)
                base_durable = False
            elif where.endswith(".log") and not base_durable:
                yield f"{where} was recycled before the base was durable"
            dirty[target] = dirty.pop(where, 0)
        elif name.startswith("unlink"):
            if where.endswith(".log") and not base_durable:
                yield f"{where} was removed before the base was durable"
            dirty.pop(where, None)


def traced(tmp_path, seed):
    output = tmp_path / "strace"
    kinds = "trace=pwrite64,fsync,fdatasync,syncfs,rename,renameat,renameat2,unlink,unlinkat,stat,newfstatat"
    program = [sys.executable, "-c", textwrap.dedent(WORKLOAD), str(tmp_path / "store"), str(seed)]
    done = subprocess.run(
        ["strace", "-f", "-y", "-s", "0", "-e", kinds, "-e", "signal=none", "-o", str(output), *program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("this process may not trace another")
    assert done.returncode == 0, done.stderr
    return output.read_text()


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_nothing_relies_on_what_is_not_durable_yet(tmp_path, seed):
    calls = list(calls_of(traced(tmp_path, seed)))
    names = {name for _, name, _, _ in calls}
    assert {"pwrite64", "fsync", "fdatasync", "mark"} <= names
    assert sum(path == "committed" for _, name, path, _ in calls if name == "mark") == 16
    assert sum("/rows/c." in path for _, name, path, _ in calls if name == "pwrite64") > 10
    assert list(violations(calls, tmp_path / "store")) == []


SOUND = [
    ("1", "pwrite64", "/s/.shardemb/log/1.log", None),
    ("1", "fdatasync", "/s/.shardemb/log/1.log", None),
    ("1", "mark", "committed", None),
    ("2", "pwrite64", "/s/t/rows/c.0.0", None),
    ("2", "fdatasync", "/s/t/rows/c.0.0", None),
    ("2", "pwrite64", "/s/.shardemb/manifest.json.tmp", None),
    ("2", "fsync", "/s/.shardemb/manifest.json.tmp", None),
    ("2", "rename", "/s/.shardemb/manifest.json.tmp", "/s/.shardemb/manifest.json"),
    ("2", "fsync", "/s/.shardemb", None),
    ("2", "unlink", "/s/.shardemb/log/1.log", "/s/.shardemb/log/1.log"),
]


@pytest.mark.parametrize("left_out", [1, 4, 6, 8])
def test_a_call_that_is_left_out_is_a_violation(left_out):
    assert list(violations(SOUND, "/s")) == []
    assert list(violations(SOUND[:left_out] + SOUND[left_out + 1 :], "/s"))


def test_a_write_by_the_thread_that_trains_is_a_violation():
    assert list(violations([("1", "pwrite64", "/s/t/rows/c.0.0", None)], "/s"))
