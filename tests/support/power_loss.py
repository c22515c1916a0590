"""A simulated disk that loses power after any operation, and the workloads that run on it.

A workload runs on a real folder while every call that changes a disk is recorded. A crash state is what a disk may hold
at one point of the recording: what was synced is there, and of everything else any subset, each write torn at
512 bytes, each new name or rename there or not. Some crash states are opened on such a disk too, and crash again.
"""

import ast
import contextlib
import hashlib
import os
import random
import re
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import shardemb
from shardemb.commits import fold, log_writer, rewrite
from shardemb.compute import file_blocks
from shardemb.initializers import Uniform
from shardemb.optim import SGD, Adagrad, Adam
from shardemb.storage import files
from support import inside
from support.small import make_small
from support.stores import close_quietly
from support.witnesses import WITNESSES

STATES = int(os.environ.get("SHARDEMB_STATES", "1500"))


WORKLOADS = 12


SECTOR = 512


ROWS, DIM = 150, 16


NOTHING = None, {}


class Recording:
    """What was done to a disk below a folder: a list of operations, the names by inode number."""

    def __init__(self, root, skip=lambda call, path: False):
        self.root = Path(root)
        self.skip = skip  # which calls are left out, as if the program did not make them
        self.operations = []
        self.acknowledged = []
        self.left_out = []  # how many operations there were at each call that was left out
        self._lock = threading.RLock()

    def keeps(self, call, path):
        """Whether a call is made; note where one is not."""
        if self.skip(call, str(path)):
            self.left_out.append(len(self.operations))
            return False
        return True

    def points(self, chance, count):
        """Choose moments for a crash: any, and where calls are left out, most of them soon after one."""
        last = len(self.operations)
        return [
            min(chance.choice(self.left_out) + int(chance.expovariate(0.1)), last)
            if self.left_out and chance.random() < 0.7
            else chance.randrange(last + 1)
            for _ in range(count)
        ]

    def add(self, *operation):
        with self._lock:
            self.operations.append(operation)

    def name(self, path):
        return str(Path(path).relative_to(self.root))

    @contextlib.contextmanager
    def on(self):
        """Record the calls of ``files`` while the block runs."""
        real = {
            name: getattr(files, name)
            for name in (
                "write", "sync", "sync_data", "sync_tree", "rename", "remove", "remove_tree", "opened",
                "create_sparse", "make_directory", "allocate", "link", "punch",
            )
        }  # fmt: skip

        def inode(descriptor):
            return os.fstat(descriptor).st_ino

        def write(descriptor, data, offset, path):
            real["write"](descriptor, data, offset, path)
            if self.keeps("write", path):
                self.add("write", inode(descriptor), offset, bytes(data))

        def punch(descriptor, offset, nbytes, path):
            if self.keeps("punch", path):
                self.add("write", inode(descriptor), offset, bytes(nbytes))
            return real["punch"](descriptor, offset, nbytes, path)

        def sync(descriptor, path):
            if self.keeps("sync", path):
                self.add("sync", inode(descriptor))

        def sync_data(descriptor, path):
            if self.keeps("sync_data", path):
                self.add("sync", inode(descriptor))

        def sync_tree(path):
            if self.keeps("sync_tree", path):
                self.add("sync all")

        def rename(source, target):
            number = source.stat().st_ino
            with self._lock:
                real["rename"](source, target)
                if self.keeps("rename", target):
                    self.add("rename", self.name(source), self.name(target), number)

        def link(source, target):
            self.add("link", self.name(target), source.stat().st_ino)
            return real["link"](source, target)

        def remove(path):
            with self._lock:
                if os.path.lexists(path):
                    self.add("unlink", self.name(path))
                real["remove"](path)

        def remove_tree(path):
            for folder, _, names in os.walk(path, topdown=False):
                for name in names:
                    self.add("unlink", self.name(Path(folder) / name))
                self.add("unlink", self.name(folder))
            real["remove_tree"](path)

        def make_directory(path):
            missing = [each for each in (path, *path.parents) if not each.exists()]
            real["make_directory"](path)
            for each in reversed(missing):
                self.add("mkdir", self.name(each), each.stat().st_ino)

        @contextlib.contextmanager
        def opened(path, flags):
            new = flags & os.O_CREAT and not path.exists()
            with real["opened"](path, flags) as descriptor:
                if new:
                    self.add("create", self.name(path), inode(descriptor))
                yield descriptor

        def create_sparse(path, nbytes):
            real["create_sparse"](path, nbytes)
            self.add("truncate", path.stat().st_ino, nbytes)

        def allocate(descriptor, offset, nbytes, path):
            return None  # what it secures is not what this is about

        here = locals()
        with pytest.MonkeyPatch.context() as patch:
            for name in real:
                patch.setattr(files, name, here[name])
            yield


class Disk:
    """A disk while operations are applied to it: what is durable, and what is not yet.

    Files are byte arrays by inode number; folders are inode numbers whose names are entries ``path -> inode``.
    """

    def __init__(self):
        self.kinds, self.data, self.names = {}, {}, {}
        self.pending_data = {}  # inode: list of changes
        self.pending_names = []  # (folder, changes of names)
        self.found = {}

    @classmethod
    def of(cls, root):
        """A disk that durably holds what a folder holds."""
        disk = cls()
        for path in sorted(Path(root).rglob("*")):
            number = path.stat().st_ino
            disk.names[str(path.relative_to(root))] = number
            disk.kinds[number] = "folder" if path.is_dir() else "file"
            if path.is_file():
                disk.data[number] = bytearray(path.read_bytes())
        return disk

    def apply(self, kind, *details):
        getattr(self, "_" + kind.replace(" ", "_"))(*details)

    def _create(self, name, number):
        self.kinds[number] = "file"
        self.data[number] = bytearray()
        self.pending_data[number] = []
        self._rename_later(name, [(name, number)])

    def _mkdir(self, name, number):
        self.kinds[number] = "folder"
        self._rename_later(name, [(name, number)])

    def _link(self, name, number):
        self._rename_later(name, [(name, number)])

    def _unlink(self, name):
        self._rename_later(name, [(name, None)])

    def _rename(self, source, target, number):
        self._rename_later(target, [(source, None), (target, number)])

    def _rename_later(self, name, changes):
        self.pending_names.append((str(Path(name).parent), changes))

    def _truncate(self, number, nbytes):
        self.pending_data.setdefault(number, []).append(("size", nbytes, b""))

    def _write(self, number, offset, data):
        if number in self.data:  # and not the scratch file, which has no name
            self.pending_data.setdefault(number, []).append(("write", offset, data))

    def _sync(self, number):
        if self.kinds.get(number) == "folder":
            self._sync_folder(number)
            return
        for change in self.pending_data.pop(number, []):
            _change(self.data[number], change)

    def _sync_folder(self, number):
        # What is known of a folder's own name: the newest, durable or not.
        names = dict(self.names)
        for _, changes in self.pending_names:
            names.update(changes)
        folders = {name for name, each in names.items() if each == number} or {"."}
        kept = []
        for folder, changes in self.pending_names:
            if folder in folders:
                self._rename_now(changes)
            else:
                kept.append((folder, changes))
        self.pending_names = kept

    def _sync_all(self):
        for number in list(self.pending_data):
            self._sync(number)
        for _, changes in self.pending_names:
            self._rename_now(changes)
        self.pending_names = []

    def _rename_now(self, changes):
        _rename(self.names, changes)

    def crash(self, chance):
        """Return one of the states that a loss of power may leave: files by name, None for folders."""
        keep = chance.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        names = dict(self.names)
        for _, changes in self.pending_names:
            if chance.random() < keep:
                _rename(names, changes)
        keep = chance.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        state = {}
        for name, number in names.items():
            if number is None:
                continue
            if self.kinds[number] == "folder":
                state[name] = None
                continue
            content = bytearray(self.data[number])
            for change in self.pending_data.get(number, []):
                for part in _sectors(change):
                    if chance.random() < keep:
                        _change(content, part)
            state[name] = bytes(content)
        # A file whose folder did not make it is not reachable.
        reachable = {"": None}
        for name in sorted(state):  # a folder before what lies in it
            if name.rpartition("/")[0] in reachable:
                reachable[name] = state[name]
        del reachable[""]
        self.found = names  # which names are those of one file
        return reachable

    def killed(self):
        """Return the state that the next process sees if only this one dies: the page cache lives."""
        disk = Disk()
        disk.kinds, disk.names = self.kinds, dict(self.names)
        disk.data = {number: bytearray(content) for number, content in self.data.items()}
        disk.pending_data = {number: list(changes) for number, changes in self.pending_data.items()}
        disk.pending_names = list(self.pending_names)
        disk._sync_all()
        numbers = {name: number for name, number in disk.names.items() if number is not None}
        state = {
            name: bytes(disk.data[number]) if self.kinds[number] == "file" else None
            for name, number in numbers.items()
        }
        return state, numbers

    def moved(self, numbers, root):
        """Return the same disk where the files of `killed` have new inode numbers, those below a folder."""
        new = {number: (Path(root) / name).stat().st_ino for name, number in numbers.items()}

        def number_of(old):
            return None if old is None else new.get(old, -old)

        disk = Disk()
        disk.kinds = {number_of(old): kind for old, kind in self.kinds.items()}
        disk.data = {number_of(old): bytearray(content) for old, content in self.data.items()}
        disk.pending_data = {number_of(old): list(changes) for old, changes in self.pending_data.items()}
        disk.names = {name: number_of(old) for name, old in self.names.items()}
        disk.pending_names = [
            (folder, [(name, number_of(old)) for name, old in changes])
            for folder, changes in self.pending_names
        ]
        return disk


def _rename(names, changes):
    if len(changes) == 2:  # a rename takes everything below the name along
        (source, _), (target, number) = changes
        if names.get(source) is None and target in names:
            names.pop(source, None)
            names[target] = number
            return
        # A folder is in one place: where an earlier rename of it was lost, it leaves the place before that one.
        places = [name for name, each in names.items() if each == number and name not in (source, target)]
        source = source if source in names or not places else places[0]
        if any(name.startswith(source + "/") for name in names):
            names.pop(source, None)
        for name in [each for each in names if each.startswith(source + "/")]:
            names[target + name[len(source) :]] = names.pop(name)
    for name, number in changes:
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


def _change(content, change):
    kind, offset, data = change
    if kind == "size":
        content[offset:] = b""
        content.extend(bytes(offset - len(content)))
        return
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    content[offset : offset + len(data)] = data


def _sectors(change):
    kind, offset, data = change
    if kind == "size":
        return [change]
    cuts = [0, *range(SECTOR - offset % SECTOR, len(data), SECTOR), len(data)]
    return [("write", offset + a, data[a:b]) for a, b in pairwise(cuts)]


def materialise(state, folder, numbers=None):
    """Write a crash state into a new folder; names of one inode, where they are given, are names of one file again."""
    first = {}
    for name, data in sorted(state.items()):
        path = Path(folder) / name
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        number = numbers[name] if numbers else name
        if number in first:
            os.link(first[number], path)
        else:
            path.write_bytes(data)
            first[number] = path


def contents(store):
    """Everything that a commit means, for comparison."""
    last = store.last_commit
    tables = {}
    for name, shown in store.items():
        table = getattr(shown, "rows", shown)  # by row, also where its users have keys
        ids = np.arange(table.num_embeddings)
        state = [table.state(column, ids).tobytes() for column in list(inside.state(table).spec.columns)[1:]]
        tables[name] = (table.step, table.optimizer, table.lookup(ids).tobytes(), *state)
    for name, words in store.vocabularies.items():
        record = inside.key_rows(words).entry
        tables[f"{name}@"] = (
            record,
            [key for batch in words.to_arrow_batches() for key in batch.to_pylist()],
            inside.key_rows(words).tables.freed(record.head, record.tail).tolist(),
        )
    return (last.id, last.step, tuple(last.metadata.items())) if last else None, tables


def work(path, seed, recording):
    """Train, commit, roll back, fold, change tables, reopen; note what each acknowledged commit holds."""
    chance, precisions = random.Random(seed), random.Random(-seed - 1)
    rng = np.random.default_rng(seed)
    options = {
        "log_bytes": chance.choice([1, 60_000, 2**30]),
        "memory_budget": chance.choice([0, 2**30]),
        "threads": 1,
    }
    store = shardemb.open(path, **options)
    recording.acknowledged.append((len(recording.operations), contents(store)))

    def commit(step):
        expected = contents(store)[1]
        before = store.last_commit
        future = ((before.id if before else 0) + 1, step, (("seen", step),))
        recording.acknowledged.append((None, (future, expected)))  # from here on it may be found
        store.commit(step=step, metadata={"seen": step})
        recording.acknowledged.append((len(recording.operations), (future, expected)))

    def new(name):
        values = np.ones((ROWS, DIM), np.float32)
        more = chance.choice([{}, {"initializer": Uniform(-1, 1, seed=1)}, {"initializer": values}])
        optimizer = chance.choice([SGD(lr=0.5), Adam(lr=0.1), Adagrad(initial_accumulator_value=0.5)])
        if precisions.random() < 0.4:
            more = more | {"dtype": "bfloat16", "rounding": precisions.choice(["nearest", "stochastic"])}
        store.create_table(
            name, num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=64, optimizer=optimizer, **more
        )

    new("a")
    new("b")
    commit(0)
    for step in range(1, 6):
        for name in list(store):
            ids = rng.integers(0, store[name].num_embeddings, chance.choice([1, 20, 200]))
            store[name].update(ids, rng.normal(size=(ids.size, DIM)).astype(np.float32))
        what = chance.choice(WHAT)
        if what == "rollback":
            store.rollback()
        elif what == "checkpoint":
            store.checkpoint()
        elif what == "broken" and store.has_changes:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(log_writer.Log, "append_images", _broken_off)
                store.commit(step=step)
        elif what == "resize":
            store[chance.choice(list(store))].resize(chance.choice([1, 130, ROWS + 100]), drop_rows=True)
            for name in list(store):
                ids = rng.integers(0, store[name].num_embeddings, 20)
                store[name].write(ids, rng.normal(size=(20, DIM)).astype(np.float32))
        elif what == "materialize":
            with contextlib.suppress(shardemb.ShardEmbError):  # a table that no commit knows yet
                store[chance.choice(list(store))].materialize()
        elif what in ("reshard", "reshard twice"):
            commit(step)
            reshard(store, chance.choice(list(store)), recording, twice=what != "reshard")
        elif what == "drop" and len(store) > 1:
            store.drop_table(chance.choice(list(store)))
            new(f"t{step}")
        elif what == "rename":
            store.rename_table(chance.choice(list(store)), f"r{step}")
        elif what == "reopen":
            close_quietly(store)
            store = shardemb.open(path, **options)
        elif what == "anew":
            close_quietly(store)
            recording.acknowledged.append((None, NOTHING))
            store = shardemb.open(path, "w", **options)
            recording.acknowledged.append((len(recording.operations), NOTHING))
            new("a")
        commit(step)
    close_quietly(store)


WHAT = [
    "", "", "rollback", "checkpoint", "broken", "drop", "rename", "reopen", "anew",
    "resize", "resize", "materialize", "reshard", "reshard twice",
]  # fmt: skip


def reshard(store, name, recording, *, twice):
    """Reshard a table, which is a commit; and before that do so only half way."""
    real = rewrite._fill

    def fill(old, new, file, *, keep_state):
        if file.number == 1:
            raise KeyboardInterrupt
        real(old, new, file, keep_state=keep_state)

    if twice:
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(rewrite, "_fill", fill)
            allowing(recording, store, lambda: store.reshard(name, rows_per_shard=RESHARDED))
    allowing(recording, store, lambda: store.reshard(name, rows_per_shard=RESHARDED))


RESHARDED = 128


def allowing(recording, store, commit):
    """Call something that ends with a commit, which changes nothing else."""
    last, expected = store.last_commit, contents(store)[1]
    future = (last.id + 1, last.step, tuple(last.metadata.items()))
    recording.acknowledged.append((None, (future, expected)))
    commit()
    recording.acknowledged.append((len(recording.operations), (future, expected)))


def work_behind(path, seed, recording):
    """Train while commits are made durable in the background, and do what waits for them; as `work`."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    options = {
        "log_bytes": chance.choice([1, 60_000, 2**30]),
        "memory_budget": chance.choice([0, 20_000, 2**30]),
        "threads": 1,
    }
    store = shardemb.open(path, **options)
    for name, initializer in (("a", None), ("b", Uniform(-1, 1, seed=1))):
        store.create_table(
            name,
            num_embeddings=ROWS,
            embedding_dim=DIM,
            rows_per_shard=64,
            optimizer=Adam(lr=0.1),
            initializer=initializer,
        )

    def train():
        for name in chance.sample(list(store), chance.randint(1, len(store))):
            ids = rng.integers(0, ROWS, chance.choice([1, 20, 200]))
            store[name].update(ids, rng.normal(size=(ids.size, DIM)).astype(np.float32))

    for step in range(8):
        train()
        last, expected = store.last_commit, contents(store)[1]
        future = ((last.id if last else 0) + 1, step, ()), expected
        recording.acknowledged.append((None, future))
        pending = store.commit(step=step, wait=False)
        for _ in range(chance.randrange(4)):
            train()
        what = chance.choice(["", "", "rollback", "checkpoint", "reopen", "rename"])
        if what == "rollback":
            store.rollback()
        elif what == "checkpoint":
            store.checkpoint()
        elif what == "rename":
            store.rename_table(chance.choice(list(store)), f"r{step}")
        elif what == "reopen":
            close_quietly(store)
        pending.result()
        recording.acknowledged.append((len(recording.operations), future))
        if what == "reopen":
            store = shardemb.open(path, **options)
    close_quietly(store)


_append_images = log_writer.Log.append_images


def _broken_off(self, *arguments):
    """Append images as a commit does, a part of them even to the file, and go no further."""
    _append_images(self, *arguments)
    if self.sequence % 2:
        self._flush()
    raise KeyboardInterrupt


def allowed_at(recording, point):
    """What may be found after a crash before operation `point`: the last acknowledged commit, or the one under way."""
    last = under_way = None
    for when, found in recording.acknowledged:
        if when is None:
            under_way = found
        elif when <= point:
            last, under_way = found, None
        else:
            break
    return [each for each in (last or NOTHING, under_way) if each is not None]


def scratch():
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def explore(
    seed, number_of_states, *, again=0.2, kill=0.1, skip=lambda call, path: False, work=work, readers=False
):
    """Crash a workload at random points; return the hashes of the states. The first bad one is an AssertionError.

    With `readers`, each state is read before it is recovered.
    """
    chance = random.Random(seed)
    seen = set()
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        lower_limits(patch, seed)
        recording = Recording(folder, skip)
        with recording.on():
            work(Path(folder) / "store", seed, recording)
        points = sorted(recording.points(chance, number_of_states))
        disk, done = Disk(), 0
        for point in points:
            for operation in recording.operations[done:point]:
                disk.apply(*operation)
            done = point
            killed = chance.random() < kill
            state, numbers = disk.killed() if killed else (disk.crash(chance), None)
            key = digest(state)
            if key in seen and not killed:
                continue
            seen.add(key)
            twice = killed or chance.random() < again
            before = disk if killed else None
            allowed = allowed_at(recording, point)
            problem = readers and read_wrongly(state, allowed, numbers)
            problem = problem or check(
                state, allowed, chance, seen, again=twice, skip=skip, before=before, numbers=numbers
            )
            assert problem is None, f"seed {seed}, operation {point}: {problem}"
    return seen


def lower_limits(patch, seed):
    """Let small workloads do what otherwise takes large ones."""
    patch.setattr(log_writer, "FIRST_SEGMENT", 32_768)
    patch.setattr(log_writer, "STAGE_BYTES", 65_536)
    # So that small tables are folded in long stretches too.
    patch.setattr(file_blocks, "WINDOW_BLOCKS", 4)
    patch.setattr(fold, "DIRECT_BLOCKS", random.Random(seed).choice([1, 3, 100]))
    make_small(patch, random.Random(seed))


def digest(state):
    found = hashlib.blake2b(digest_size=12)
    for name, data in sorted(state.items()):
        found.update(f"{name}\0{-1 if data is None else len(data)}\0".encode())
        found.update(data or b"")
    return found.digest()


def check(state, allowed, chance, seen, *, again, skip, before=None, numbers=None):
    """Open a crash state; return what is wrong with it, or None.

    Where the process alone was killed, `before` is the disk that it left behind, much of it not durable.
    """
    with scratch() as folder:
        materialise(state, folder, numbers)
        path = Path(folder) / "store"
        recording = Recording(folder, skip)
        if again:
            disk = before.moved(numbers, folder) if before else Disk.of(folder)
        try:
            with recording.on() if again else contextlib.nullcontext():
                store = shardemb.open(path, threads=1)
        except shardemb.ShardEmbError as error:
            return f"does not open: {error!r}"
        found = contents(store)
        if not again and list((path / ".shardemb").glob("rebuilt/*")):
            # What was begun goes on, from whatever the loss of power has left of it.
            try:
                for name in store:
                    store.reshard(name, rows_per_shard=RESHARDED)
            except (shardemb.ShardEmbError, OSError) as error:
                return f"damage: resharding does not go on: {error!r}"
            if contents(store)[1] != found[1]:
                return "damage: a table that was being resharded is another one then"
        damage = [problem] if (problem := keys_that_are_wrong(store, more=not again)) else store.verify()
        close_quietly(store)
        if damage:
            return f"damage: {damage[0]}"
        if found not in allowed:
            return f"opens at {found[0]} with {list(found[1])}, and not at {[(a[0], list(a[1])) for a in allowed]}"
        if again:
            (point,) = recording.points(chance, 1)
            for operation in recording.operations[:point]:
                disk.apply(*operation)
            state = disk.crash(chance)
            seen.add(digest(state))
            problem = check(state, allowed, chance, seen, again=False, skip=skip)
            return problem and f"after a crash within recovery: {problem}"
    return None


def read_wrongly(state, allowed, numbers):
    """Read a crash state as it is; return what is wrong with it, or None. Not every one is a store already."""
    with scratch() as folder:
        materialise(state, folder, numbers)
        try:
            store = shardemb.open(Path(folder) / "store", "r", threads=1)
        except shardemb.StoreNotFoundError:
            return None
        with store:
            found, damage = contents(store), store.verify()
    if damage:
        return f"damage to a reader: {damage[0]}"
    if found not in allowed:
        return f"a reader opens at {found[0]}, and not at {[each[0] for each in allowed]}, or sees other rows"
    return None


def keys_that_are_wrong(store, *, more):
    """Say which keys a store does not find where they are, or which rows it would give to others."""
    for words in store.vocabularies.values():
        (record, pairs, freed) = contents(store)[1][f"{words.name}@"]
        keys, rows = [pair["key"] for pair in pairs], [pair["row"] for pair in pairs]
        if words.lookup(keys).tolist() != rows or len(words) != len(keys):
            return f"keys of {words.name!r} are not found in their rows"
        if sorted(rows + freed) != list(range(record.reserved, record.rows)):
            return f"rows of {words.name!r} are lost, or in use twice"
        if more and words.admission is None:
            kinds = {"int64": (10**15).__add__, "string": "new {}".format, "bytes": lambda n: b"new %d" % n}
            new = list(map(kinds[words.key_type], range(len(freed) + 3)))
            if words.add(new).tolist() != [*freed, *range(record.rows, record.rows + 3)]:
                return f"new keys of {words.name!r} get other rows"
    return None


def explore_all(seed):
    return explore(seed, STATES // WORKLOADS)


def explore_behind(seed):
    with pytest.MonkeyPatch.context() as patch:
        slow_commits(patch)
        return explore(seed, STATES // WORKLOADS, work=work_behind)


def slow_commits(patch):
    """Let commits take a little longer, so that other threads come in between."""
    real = log_writer.Log.append_images

    def append_images(self, *arguments):
        time.sleep(0.002)
        real(self, *arguments)

    patch.setattr(log_writer.Log, "append_images", append_images)


LEFT_OUT = {
    "the sync of a commit": lambda call, path: call == "sync_data" and path.endswith(".log"),
    "the sync of a segment's header": lambda call, path: call == "sync" and path.endswith(".new"),
    "the sync of the log's folder": lambda call, path: call == "sync" and path.endswith("/log"),
    "the sync of folded rows": lambda call, path: call == "sync_data" and "/rows/" in path,
    "the sync of folded presence bits": lambda call, path: call == "sync_data" and "/present/" in path,
    "the sync of the base": lambda call, path: call == "sync" and path.endswith("manifest.json"),
    "the sync of the base's folder": lambda call, path: call == "sync" and path.endswith("/.shardemb"),
    "the sync of new tables": lambda call, path: call == "sync_tree",
    "the sync of the log before recovery": lambda call, path: call == "sync" and path.endswith(".log"),
    "the sync of moved folders": lambda call, path: call == "sync" and path.endswith("/store"),
}


def found_without(skip, *, kill, states=8000, first_seed=0, work=work, witness=None):
    """Return which of up to `states` states does not open at the last commit where some calls are left out.

    The workload of the seed `witness`, if there is one, is tried first.
    """
    each = 500 // WORKLOADS
    seeds = range(first_seed, first_seed + -(-states // each))
    for seed in seeds if witness is None else (witness, *seeds):
        try:
            explore(seed, each, again=0.5, kill=kill, skip=skip, work=work)
        except AssertionError as error:
            assert re.search(r"opens at|does not open|damage", str(error))
            return str(error)
    return None


def found_without_barrier(what, **more):
    # Without the last, only a power cut soon after the kill of a process makes a difference.
    kill = 0.7 if "before recovery" in what else 0.1
    return found_without(LEFT_OUT[what], kill=kill, **{"witness": WITNESSES.get(what)} | more)


SOURCE = Path(shardemb.__file__).parent


MUTATED = {
    "write", "write_new", "overwrite", "rename", "stage", "publish", "replace",
    "sync", "sync_data", "sync_tree", "sync_directory", "sync_file", "punch",
}  # fmt: skip


# What may be left out without a wrong state after a loss of power, and why it is there.
OTHER_REASONS = {
    "log_writer._next_segment:write": "END: a segment that somebody removes is noticed",
    "log_writer._next_segment:sync_data": "END",
    "log_writer._fill:write": "zeros, so that later commits need one cheap sync; speed",
    "log_writer.discard:rename": "a segment to be used again; speed",
    "log_writer._begin_segment:write_new": "an empty file; what is written to it counts",
    "folders._move:rename": "a table is found wherever its folder lies, and moved again at the next opening",
    "log_writer._begin_segment:rename:2": "a segment is used again; speed",
    "journal.begin:overwrite": "tells readers of another writer",
    "files.overwrite_text:write": "tells people who holds the lock",
    "files.overwrite:write": "the same",
    "writer._create:replace": "the manifest, which is published again before the first commit",
    "writer._create:sync_directory:2": "the folder's own name, above what is simulated",
    "table_folder.open_existing:sync_file": "chunks that zarr has deleted, which no workload does",
    "table_folder.open_existing:publish": "the same",
    "folders.keep_rebuilt:sync_directory": "a third call for what a second one removed, which no workload makes",
    "rewrite.reshaped:rename:2": "what was made for a commit that failed; speed",
    "copies.note:write": "copies, which have a test of their own",
    "copies._copy_changed:sync_data": "the same",
    "copies._copy_changed:write": "the same",
    "copies._copy_changed:sync_data:2": "the same",
    "copies.older_place:overwrite": "the same",
    "copies.older_place:sync_directory": "the same",
    "copies._take_over:rename": "the same",
    "copies.complete:replace": "the same",
    "copies.complete:write_new": "the same",
    "copies.complete:replace:2": "the same",
    "copies.complete:sync_tree": "the same",
    "copies.complete:replace:3": "the same",
    "copies.complete:sync_directory": "the same",
    "table_folder._create_in_steps:sync_tree": "imports that go on, which no workload makes",
    "table_folder._create_in_steps:replace": "the same",
    "table_folder._create_in_steps:sync_file": "the same",
    "table_folder._create_in_steps:replace:2": "the same",
    "table_folder.complete:sync_file": "the same",
    "table_folder.complete:replace": "the same",
    "table_folder.create:rename": "the same",
    "importing.take:write": "rows of a stream, in a file without a name",
    "copies._copy_changed:write:2": "copies, which have a test of their own",
    "targets.new_file:sync": "exports, which no workload makes",
    "targets.write:write": "the same",
    "arrays._write_rows:write": "the same",
    "arrays.write_block:write": "the same",
    "lance.export_lance:sync_tree": "the same",
    "projector.export_projector:sync_directory": "the same",
    "remote.put:replace": "the same",
    "remote.sync:sync_directory": "the same",
    "index.build:write": "a file of the user's beside the store",
    "index.build:sync": "the same",
    "rewrite.unshare:sync_file": "files with a second name elsewhere, which no workload makes",
    "rewrite.unshare:publish": "the same",
    "writer._take_lock:replace": "the same",
    "targets.staged:sync_directory": "exports, which no workload makes",
    "targets._hoisted:rename": "the same",
    "targets._rename:rename": "the same",
    "targets._move_in:sync_directory": "the same",
    "targets._move_in:sync_directory:2": "the same",
    "targets._move_in:rename": "the same",
    "table_folder._write_rows:sync": "so that the page cache can be emptied",
    "fills.announce:write": "tells readers of rows that no commit has",
    "fills.punch:write": "file systems that cannot make holes",
    "checkpoint._write:replace": "the parameters of a model in torch, which is no part of a store",
    "checkpoint._write:sync_directory": "the same",
    "dynamicemb._append:write": "dumps of dynamicemb, the same",
    "tags.release:write": "tells readers of a tag",
    "undo.keep:write": "the same, and what is damage",
    "tags.make:write_new": "copies of a tag, which no workload makes",
    "tags.put_back:sync_file": "the same",
    "undo.__init__:sync_data": "a power cut soon after the kill of a process; rule R28 has a witness of its own",
    "key_rows.retire_index:sync_directory": "the index of a vocabulary that is restored, which no workload does",
    "fills.copy:write": "copies, which no workload makes",
    "fills._copy_window:write": "the same",
    "table_catalog.take_in:rename": "stores that are split or merged, which no workload does",
}


def call_sites():
    """Every call of a function that changes the disk, by the name of where it stands: file, first and last line."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if path.stem in ("parquet", "spill_file"):
            continue  # neither is there after a crash
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if not isinstance(node, ast.Call):
                    continue
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                within = path.stem == "files" and isinstance(node.func, ast.Name)
                of_files = within or ast.unparse(node.func) == f"files.{name}"
                if of_files and name in MUTATED:
                    key = f"{path.stem}.{function.name}:{name}"
                    key += f":{sum(each.startswith(key) for each in found) + 1}" if key in found else ""
                    found[key] = str(path), node.lineno, node.end_lineno
    return found


SITES = call_sites()


def is_about_fills(site):
    """Whether a call is one of what is written before its commit."""
    return site.startswith(("fills.", "filling.", "attempt.sync_fills"))


def is_about_tags(site):
    """Whether a call is one of what keeps commits under names."""
    return site.startswith(("undo.", "tags.", "tagging."))


def is_about_partitions(site):
    """Whether a call is one of what a partition does when it is told what was decided."""
    return site == "writer._resolve:replace"


def is_about_keys(site):
    """Whether a call is one of the index of keys."""
    return Path(SITES[site][0]).parent.name == "vocabulary"


def leaving_out(site):
    filename, first, last = SITES[site]

    def skip(call, path):
        frame = sys._getframe(1)
        for _ in range(13):
            frame = frame.f_back
            if frame is None:
                return False
            if frame.f_code.co_filename == filename and first <= frame.f_lineno <= last:
                return True
        return False

    return skip


def found_without_call(site, **more):
    return found_without(leaving_out(site), kill=0.3, **{"witness": WITNESSES.get(site)} | more)
