"""Operations on files that fail, at any position of a workload.

A workload of hundreds of operations makes most of them in few ways: one call site, which is the chain of calls that
leads to the operation, is passed again and again. The tests let each call site fail in each way, once over all
workloads; the soak lets every operation of every workload fail.
"""

import contextlib
import errno
import os
import random
import shutil
import sys
import warnings
from collections import Counter
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

import shardemb
from shardemb.commits import fold, log_writer
from shardemb.compute import file_blocks
from shardemb.engine import table_state
from shardemb.errors import DiskFullError, PoisonedError, ShardEmbError
from shardemb.format import zarr_metadata
from shardemb.format.table_files import TableLocation
from shardemb.initializers import Uniform
from shardemb.optim import SGD, Adam
from shardemb.session.journal import Journal
from shardemb.storage import files
from support import inside
from support.power_loss import NOTHING, contents, scratch
from support.stores import close_quietly

WORKLOADS = int(os.environ.get("SHARDEMB_FAILING_WORKLOADS", "5"))


ROWS, DIM = 120, 16


KINDS = ["full", "error", "short"]


# Not those that consist of others of them: where `stage`, `publish` or `replace` fail, one of these has failed.
CALLS = (
    "write", "sync", "sync_data", "sync_tree", "sync_directory", "rename", "link", "remove", "remove_tree",
    "create_sparse", "make_directory", "allocate", "opened", "open_direct", "open_unnamed", "read_at", "read_into",
    "copy_link", "punch",
)  # fmt: skip


PACKAGE = str(Path(shardemb.__file__).parent)


def call_site(name, depth):
    """Return where an operation is asked for: its name, and the lines of the package that lead to it, innermost first.

    Lines of ``files`` do not count: that is where operations end, whoever asks for them.
    """
    lines, frame = [name], sys._getframe(2)
    while frame is not None and len(lines) <= depth:
        filename = frame.f_code.co_filename
        if filename.startswith(PACKAGE) and filename != files.__file__:
            lines.append((filename.removeprefix(PACKAGE), frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


class Failing:
    """Lets one call fail, in one of three ways: that of a number, or that of a number among those of a call site."""

    def __init__(self, at=None, kind="full", site=None, depth=100):
        self.at, self.kind, self.site, self.depth = at, kind, site, depth
        self.count, self.sites, self.paused, self.failed = 0, Counter(), False, None

    def on(self):
        real = {name: getattr(files, name) for name in CALLS}

        def wrapped(name):
            def call(*arguments, **options):
                if self.paused:
                    return real[name](*arguments, **options)
                self.count += 1
                site = call_site(name, self.depth)
                self.sites[site] += 1
                if self.at == (self.sites[site] if site == self.site else None if self.site else self.count):
                    self.failed = (
                        f"{name} of {next(str(a) for a in reversed(arguments) if isinstance(a, Path))}"
                    )
                    self._fail(name, real[name], arguments)
                return real[name](*arguments, **options)

            return call

        patch = pytest.MonkeyPatch()
        for name in CALLS:
            patch.setattr(files, name, wrapped(name))
        return contextlib.closing(_Undo(patch))

    def _fail(self, name, real, arguments):
        if name == "write" and self.kind == "short":
            descriptor, data, offset, path = arguments
            data = memoryview(data).cast("B")
            real(descriptor, data[: len(data) // 2 // 4096 * 4096], offset, path)
        if name == "remove_tree" and self.kind == "short":
            for path in sorted(each for each in arguments[0].rglob("*") if each.is_file())[::2]:
                path.unlink()
        full = self.kind == "full" and not name.startswith(("sync", "read"))
        if full:
            raise DiskFullError(errno.ENOSPC, "no room left on the disk")
        raise OSError(errno.ENOSPC if self.kind == "full" else errno.EIO, "it failed")

    @contextlib.contextmanager
    def off(self):
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


class _Undo:
    def __init__(self, patch):
        self.close = patch.undo


def kinds_of(name):
    """In how many ways an operation fails: only what is made of parts can stop half way."""
    return KINDS if name in ("write", "remove_tree") else KINDS[:2]


def every_position(count, seed=0):
    """List every call of a workload, each to fail in one way: what the soak does."""
    return [Failing(position, KINDS[(position + seed) % 3]) for position in range(1, count + 1)]


def every_site(workloads, chosen, depth=100, kinds_of=kinds_of):
    """List for one of several workloads the calls to fail, such that over all of them each site fails in each way.

    Parameters
    ----------
    workloads : list of Counter
        How often each passes each call site.
    chosen : int
        The number of one of them.
    depth : int, optional
        How many lines of the package make a call site, as in `workloads`.
    kinds_of : callable, optional
        Returns the ways in which a site fails, given the name of its operation.
    """
    found = []
    for site in sorted(set().union(*workloads), key=str):
        passing = [number for number, sites in enumerate(workloads) if sites[site]]
        for kind in kinds_of(site[0]):
            chance = random.Random(f"{site} {kind}")  # the same in every process, whatever else is passed
            cheap = [1 / workloads[each].total() for each in passing]
            number = chance.choices(passing, cheap)[0]
            at = chance.randint(1, workloads[number][site])
            if number == chosen:
                found.append(Failing(at, kind, site, depth))
    return found


def train(path, seed, failing):
    """Train, page, commit, fold, change tables, roll back; return what may be found afterwards."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    allowed, poisoned = [NOTHING], False
    store = shardemb.open(
        path, memory_budget=chance.choice([0, 2**30]), log_bytes=chance.choice([1, 10**9]), threads=1
    )

    def attempt(call, *arguments, **options):
        nonlocal poisoned
        try:
            call(*arguments, **options)
        except PoisonedError:
            poisoned = True
        except (ShardEmbError, OSError) as error:
            assert str(error), repr(error)
            return False
        return not poisoned

    def new(name):
        optimizer = chance.choice([SGD(lr=0.5), Adam(lr=0.1)])
        more = chance.choice([{}, {"initializer": Uniform(-1, 1, seed=1)}])
        store.create_table(
            name, num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=64, optimizer=optimizer, **more
        )

    def commit(step):
        nonlocal allowed
        with failing.off():
            if poisoned or inside.runtime(store).poisoned:
                return
            last = store.last_commit
            future = ((last.id if last else 0) + 1, step, ()), contents(store)[1]
        allowed = [future] if attempt(store.commit, step=step) else [*allowed, future]

    attempt(new, "a")
    attempt(new, "b")
    commit(1)
    for step in (2, 3):
        for name in tuple(store):
            ids = rng.integers(0, ROWS, 40)
            attempt(store[name].update, ids, rng.normal(size=(40, DIM)).astype(np.float32))
        commit(10 * step)
        attempt(store.lookup, {name: [1, 2, 100] for name in store})
        for name in tuple(store):
            attempt(store[name].write, [1, 5], np.full((2, DIM), step, np.float32))
        attempt(chance.choice([store.rollback, store.checkpoint, store.has_changes.__bool__]))
        if step == 2 and "a" in store:
            attempt(store.drop_table, "a")
            attempt(store.rename_table, "b", "a") if "b" in store else None
            attempt(new, "c")
        commit(10 * step + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt(store.close)
        with failing.off():
            close_quietly(store)
    return allowed


def check(path, allowed, what):
    try:
        store = shardemb.open(path)
    except ShardEmbError as error:
        raise AssertionError(f"{what}: does not open") from error
    with store:
        found = contents(store)
        assert found in allowed, f"{what}: opens at {found[0]}, not at {[each[0] for each in allowed]}"
        assert store.verify() == [], what
        assert not strays(store), what
        return found


def strays(store):
    """List what is visible in a store's folder and belongs to none of its tables; and tables that wait for nothing."""
    own = {store.path / zarr_metadata.DOCUMENT}
    for name, table in store.items():
        folder = store.path / name
        own |= {
            folder / zarr_metadata.DOCUMENT,
            *(folder / each / zarr_metadata.DOCUMENT for each in zarr_metadata.ARRAYS),
        }
        own |= {path for path, _ in TableLocation(inside.state(table).spec, folder).expected_files()}
    found = {path for path in store.path.glob("[!.]*/**/*") if path.is_file()}
    found |= {path for path in store.path.iterdir() if path.name != ".shardemb" and path.name not in store}
    found = {path for path in found if path.name not in FOREIGN}
    return sorted(found - own) + sorted(store.path.glob(".shardemb/tables/*"))


@contextlib.contextmanager
def small():
    """Let small tables and logs meet what large ones do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_writer, "FIRST_SEGMENT", 32_768)
        patch.setattr(log_writer, "STAGE_BYTES", 65_536)
        patch.setattr(file_blocks, "WINDOW_BLOCKS", 4)
        patch.setattr(fold, "DIRECT_BLOCKS", 2)
        patch.setattr(table_state, "MATERIALIZED_BYTES", 10_000)
        yield


def trained(seed, train=train, check=check, depth=100):
    """Return the calls of a workload in which none fails."""
    failing = Failing(depth=depth)
    with scratch() as folder:
        with failing.on():
            allowed = train(Path(folder) / "store", seed, failing)
        assert len(allowed) == 1
        check(Path(folder) / "store", allowed, "nothing failed")
    return failing


def fail_everywhere(seed):
    """Let every call of a workload fail; return which operations did."""
    with small():
        # A fold in its thread makes the number vary a little.
        return fail_each(seed, every_position(trained(seed).count, seed))


def fail_every_site(seed):
    """Let each call site of some workloads fail in each way, one workload's share; return which operations did."""
    with small():
        return fail_each(seed, every_site([trained(each).sites for each in range(WORKLOADS)], seed))


def fail_each(seed, every, train=train, check=check):
    """Return which operations failed, one in each run of a workload."""
    failed = Counter()
    for one in every:
        with scratch() as folder:
            path = Path(folder) / "store"
            with one.on():
                try:
                    allowed = train(path, seed, one)
                except (ShardEmbError, OSError):
                    allowed = [NOTHING]  # the first opening
            check(path, allowed, f"seed {seed}, call {one.at} {one.site or ''}, {one.kind}, {one.failed}")
            failed[str(one.failed).split()[0]] += 1
    return failed


def resize(store, rows, names="a"):
    for name in names:
        store[name].resize(rows, drop_rows=True)
    if store.has_changes:  # otherwise all of it was done before
        store.commit(step=2)


def resize_without_links(store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os, "link", lambda *names, **more: (_ for _ in ()).throw(PermissionError(1, "no links here"))
        )
        resize(store, 300)


def resize_and_roll_back(store):
    if not inside.runtime(store).half_done:
        store["a"].resize(300)
    store.rollback()


def reshard(store, **how):
    store.reshard("a", **how)


def materialize(store):
    store["a"].materialize()
    assert not inside.shards(store["a"]).never_written(0, ROWS).size


CHANGES = {
    "more rows": partial(resize, rows=300, names="az"),
    "more rows, without links": resize_without_links,
    "fewer rows": partial(resize, rows=100),
    "more rows, undone": resize_and_roll_back,
    "other shards": partial(reshard, rows_per_shard=128),
    "another optimizer": partial(reshard, optimizer=SGD()),
    "rows never written": materialize,
    "a copy": lambda store: store.copy(store.path.with_name("copy")),
}


OF_WHAT_IS_COMMITTED = "other shards", "another optimizer"


FOREIGN = "notes", "alias"
"""Names of what another program has put into the folder of a table."""


THEIRS = {
    "more rows": {"link", "copy_link", "create_sparse", "remove_tree", "sync_tree", "rename"},
    "a copy": {"sync_tree", "copy_link"},
}


def make(path):
    with shardemb.open(path, threads=1) as store:
        for name, more in (("a", {"initializer": Uniform(-1, 1, seed=1)}), ("z", {})):
            store.create_table(
                name,
                num_embeddings=ROWS,
                embedding_dim=DIM,
                rows_per_shard=64,
                optimizer=Adam(lr=0.1),
                **more,
            )
        learn(store, 1)
        store.commit(step=1)
    for number, name in enumerate(("notes", "nested/notes")):
        (path / "a" / name).parent.mkdir(exist_ok=True)
        (path / "a" / name).write_text(f"mine {number}")
    (path / "a" / "alias").symlink_to("notes")


def assert_foreign(path):
    """What another program has put into the folder of a table is there, whatever became of the table."""
    assert (path / "a" / "alias").readlink() == Path("notes")
    assert (path / "a" / "alias").read_text() == "mine 0"
    assert (path / "a" / "nested" / "notes").read_text() == "mine 1"


def begin(path, what):
    """Open a store, and change some of its rows unless they have changed before."""
    store = shardemb.open(path, threads=1, memory_budget=0 if what == "fewer rows" else 2**30)
    if what not in OF_WHAT_IS_COMMITTED and store.last_commit.step == 1:
        learn(store, 2)
    return store


def learn(store, seed):
    rng = np.random.default_rng(seed)
    for table in store.values():
        table.update(rng.integers(0, 100, 20), rng.normal(size=(20, DIM)).astype(np.float32))


def leave(store, failing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ShardEmbError, OSError):
            store.close()
        with failing.off():
            close_quietly(store)


def undisturbed(path, what):
    """Return the calls that a change makes, what each commit holds from the first one on, and what memory does then."""
    states, go_on, failing = [], Journal._fold_if_due, Failing()

    def note(journal, attempt):  # once it is committed
        if journal is inside.journal(store):
            states.append(contents(store))
        go_on(journal, attempt)

    with pytest.MonkeyPatch.context() as patch, failing.on():
        with failing.off():
            with shardemb.open(path, "r") as store:
                states.append(contents(store))
            store = begin(path, what)
            patch.setattr(Journal, "_fold_if_due", note)
        CHANGES[what](store)
        with failing.off():
            after = contents(store)[1]
        leave(store, failing)
    return failing, states, after


def fail_once(path, what, failing, at_once, states, after):
    """Make a change in which a call fails, and make it again: in the same store, or once that was opened anew."""
    change, copied, first = CHANGES[what], path.with_name("copy"), states[0]
    with failing.on():
        with failing.off():
            store = begin(path, what)
            before, had_changes = contents(store)[1], store.has_changes
        done = True
        try:
            change(store)
        except (ShardEmbError, OSError) as error:
            done = False
            assert str(error), repr(error)
            assert not copied.exists()
        with failing.off():
            sound = not inside.runtime(store).poisoned
            if not done and sound and not inside.runtime(store).half_done:
                # What the commits of a change hold is there for each table as a whole.
                found = contents(store)[1]
                assert all(found[name] in (before[name], after[name]) for name in before)
                assert store.has_changes == had_changes
            if at_once and sound:
                if not done:
                    change(store)
                    done = True
                assert contents(store)[1] == after
                learn(store, 3)
                store.commit(step=3)
                store.checkpoint()
                assert not inside.runtime(store).poisoned
                states = [contents(store)]
            last = store.last_commit.id
        leave(store, failing)
    check(path, [each for each in states if each[0][0] in (last, last + (not done))], what)
    assert_foreign(path)
    if not done:
        with begin(path, what) as store:
            change(store)
            assert contents(store)[1] == after
            store.rollback()
            committed = contents(store)
        check(path, [committed], what)
        assert_foreign(path)
    assert not list(path.glob(".shardemb/rebuilt/*"))
    if what == "a copy":
        check(copied, [first], what)
        assert_foreign(copied)


@cache
def calls_of_changes():
    """Return for each change the calls that it makes where none fails, and with what it can be compared."""
    found = {}
    for what in CHANGES:
        with scratch() as folder:
            make(Path(folder) / "store")
            found[what] = undisturbed(Path(folder) / "store", what)
    return found


def change_everywhere(what):
    """Let every call of a change fail; return which operations did."""
    with small():
        calls, states, after = calls_of_changes()[what]
        return fail_changes(what, every_position(calls.count), states, after)


def change_every_site(what):
    """Let each call site of all changes fail in each way, one change's share; return which operations did."""
    with small():
        found = calls_of_changes()
        every = every_site([calls.sites for calls, _, _ in found.values()], list(CHANGES).index(what))
        return fail_changes(what, every, *found[what][1:])


def fail_changes(what, every, states, after):
    """Return which operations failed, one in each run of a change."""
    failed = Counter()
    with scratch() as folder:
        start = Path(folder) / "start"
        make(start)
        for number, failing in enumerate(every):
            with scratch() as other:
                path = Path(other) / "store"
                shutil.copytree(start, path, symlinks=True)
                try:
                    fail_once(path, what, failing, number % 2, states, after)
                except BaseException as error:
                    error.add_note(
                        f"{failing.kind} at call {failing.at} {failing.site or ''}, {failing.failed}"
                    )
                    raise
                failed[str(failing.failed).split()[0]] += 1
    return failed
