"""The rules of durability: what shows that each holds, and how to undo it."""

import contextlib
import fcntl
import os
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import shardemb
from shardemb.base import interrupts
from shardemb.commits import fills, fold, log_reader, log_writer, tags, undo
from shardemb.compute import file_blocks
from shardemb.engine import batch, filling, runtime, shards
from shardemb.format import log_records, store_paths
from shardemb.memory import frozen_rows, hidden_rows, overlay, past_blocks, spill_file
from shardemb.optim import Adam
from shardemb.session.attempt import Attempt
from shardemb.session.base import Base
from shardemb.session.journal import Journal
from shardemb.session.partition_journal import PartitionJournal
from shardemb.storage import checksums, files
from shardemb.store import writer
from shardemb.vocabulary import key_rows
from support import fills_power_loss, inside, partitions_power_loss, tags_power_loss
from support.power_loss import WORKLOADS, Disk, Recording, contents, explore, materialise, scratch, work
from support.small import make_small
from support.stores import close_quietly
from support.witnesses import WITNESSES

ROWS, DIM = 150, 16


def new_store(folder, **options):
    store = shardemb.open(Path(folder) / "store", threads=1, **options)
    if "a" not in store:
        store.create_table(
            "a", num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=64, optimizer=Adam(lr=0.1)
        )
        store.commit(step=0)
    return store


def train(store, seed, count=20):
    rng = np.random.default_rng(seed)
    store["a"].update(rng.integers(0, ROWS, count), rng.normal(size=(count, DIM)).astype(np.float32))


def power(witness=None):
    """Cut the power at random moments of random workloads; the rarest rule shows in one workload of twenty.

    The workload of the seed `witness`, if there is one, is tried first.
    """
    for seed in range(200) if witness is None else (witness, *range(200)):
        try:
            explore(seed, 500 // WORKLOADS, again=0.5, kill=0.3)
        except (AssertionError, shardemb.ShardEmbError, OSError) as error:
            return str(error) or repr(error)
    return None


def other_ways_to_the_disk():
    """Compare a folder with what the recorded calls alone make of it."""
    for seed in range(4):
        with scratch() as folder:
            recording = Recording(folder)
            with recording.on():
                work(Path(folder) / "store", seed, recording)
            disk = Disk()
            for operation in recording.operations:
                disk.apply(*operation)
            made, _ = disk.killed()
            for name, data in made.items():
                # The lock holds a line for people, and the epoch file is no part of what a crash may harm.
                if (
                    data is not None
                    and (Path(folder) / name).read_bytes() != data
                    and not name.endswith("lock")
                ):
                    return f"{name} was changed past the recorded calls"
    return None


def damage_is_told():
    """Damage an older commit's record in the log of a store that was killed."""
    with scratch() as folder, forked(folder, commits=3) as path:
        segment = max((path / ".shardemb" / "log").glob("*.log"), key=lambda each: each.name)
        data = bytearray(segment.read_bytes())
        first = data.index(log_records.RECORD_MAGIC, 4096)
        data[first + 200] ^= 1
        segment.write_bytes(data)
        try:
            with shardemb.open(path) as store:
                return f"opened at step {store.last_commit.step}"
        except shardemb.LogDamagedError:
            return None


@contextlib.contextmanager
def forked(folder, commits):
    """A store whose writer made some commits and died."""
    child = os.fork()
    if not child:
        try:
            store = new_store(folder)
            store.checkpoint()
            for step in range(1, commits + 1):
                train(store, step)
                store.commit(step=step)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    yield Path(folder) / "store"


def budget_makes_no_difference():
    """Train with no memory at all, committing rarely, and with plenty."""
    found = []
    for budget in (0, 2**30):
        with scratch() as folder:
            store = new_store(folder, memory_budget=budget, log_bytes=1 if budget == 0 else 2**30)
            for step in range(12):
                train(store, step, 40)
                if step % 4 == 3:
                    store.commit(step=step)
                    store.checkpoint()
                    train(store, 100 + step)
            found.append(contents(store)[1])
            close_quietly(store)
    return None if found[0] == found[1] else "rows differ"


def broken_update_refuses_commit():
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        store = new_store(folder)
        patch.setattr(overlay.Overlay, "mark_changed", lambda self, places: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            train(store, 1)
        patch.undo()
        try:
            store.commit(step=1)
        except shardemb.PoisonedError:
            return None
        finally:
            close_quietly(store)
        return "a commit of half an update"


def rollback_beside_fold():
    """Roll back while a fold holds images that the files do not have yet."""
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        store = new_store(folder)
        train(store, 1)
        store.commit(step=1)
        committed = contents(store)
        go_on, write = threading.Event(), fold.write
        patch.setattr(fold, "write", lambda *arguments: (go_on.wait(20), write(*arguments)))
        folding = threading.Thread(target=store.checkpoint)
        folding.start()
        while not inside.journal(store).is_folding:
            time.sleep(0.001)
        train(store, 1)  # the same rows
        store.rollback()
        found = contents(store)
        go_on.set()
        folding.join()
        close_quietly(store)
    return None if found == committed else "rollback lost a commit"


def failed_sync_poisons():
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        store = new_store(folder)
        train(store, 1)

        def fail(descriptor, path):
            raise OSError(5, "Input/output error", str(path))

        patch.setattr(files, "sync_data", fail)
        with contextlib.suppress(OSError):
            store.commit(step=1)
        patch.undo()
        try:
            store.commit(step=2)
        except shardemb.PoisonedError:
            return None
        finally:
            close_quietly(store)
        return "committed after a failed sync"


def one_writer():
    with scratch() as folder:
        store = new_store(folder)
        try:
            second = shardemb.open(store.path)
        except shardemb.StoreLockedError:
            return None
        else:
            second.close()
            return "two writers"
        finally:
            close_quietly(store)


def reader_is_told():
    """Read beside a writer that another one follows."""
    with scratch() as folder:
        store = new_store(folder)
        reader = shardemb.open(store.path, "r")
        store.close()
        store = new_store(folder)
        try:
            reader["a"].lookup([1])
        except shardemb.StaleReaderError:
            return None
        finally:
            reader.close()
            close_quietly(store)
        return "a stale reader went on"


@contextlib.contextmanager
def committing(store, patch, step, error=None):
    """Commit in the background; within the block, it has packed some of its rows. It ends with an error, if given."""
    begun, go_on, real = threading.Event(), threading.Event(), log_writer.Log._reserve

    def reserve(self, nbytes):
        if self._count:
            begun.set()
            go_on.wait(20)
            if error is not None:
                raise error
        return real(self, nbytes)

    patch.setattr(log_writer, "STAGE_BYTES", 8192)
    patch.setattr(log_writer.Log, "_reserve", reserve)
    pending = store.commit(step=step, wait=False)
    assert begun.wait(20)
    try:
        yield
    finally:
        go_on.set()
    with contextlib.suppress(OSError, shardemb.ShardEmbError):
        pending.result()


def commit_beside_updates():
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        store = new_store(folder)
        train(store, 1, 200)
        expected = contents(store)[1]
        with committing(store, patch, 1):
            train(store, 2, 200)
        store.rollback()
        found = contents(store)
        close_quietly(store)
    return None if found == ((2, 1, ()), expected) else "a commit has what was changed after it began"


def failed_commit_beside_updates():
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        store = new_store(folder)
        train(store, 1, 200)
        with committing(store, patch, 1, shardemb.DiskFullError(28, "the disk is full")):
            train(store, 2)
        patch.undo()
        expected = contents(store)[1]
        try:
            store.commit(step=2)
            with shardemb.open(store.path, "r") as reader:
                found = contents(reader)[1]
        finally:
            close_quietly(store)
    return None if found == expected else "a commit that failed has kept its rows"


def fold_beside_commit():
    """Ask for a fold while a commit appends to the log."""
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        store = new_store(folder)
        train(store, 1, 200)
        store.commit(step=1)
        train(store, 2, 200)
        expected = contents(store)[1]
        with committing(store, patch, 2):
            asking = threading.Thread(target=lambda: quietly(store.checkpoint))
            asking.start()
            asking.join(0.3)
        asking.join()
        patch.undo()
        try:
            with shardemb.open(store.path, "r") as reader:
                found = contents(reader)[1]
        except shardemb.ShardEmbError as error:
            return repr(error)
        finally:
            close_quietly(store)
    return None if found == expected else "a fold has taken a part of a commit"


def quietly(call):
    with contextlib.suppress(OSError, shardemb.ShardEmbError):
        call()


def nothing_kept(patch):
    patch.setattr(frozen_rows.FrozenRows, "keep", lambda self, *rest: None)


def failed_commits_keep_their_rows(patch):
    real = frozen_rows.FrozenRows.release
    patch.setattr(frozen_rows.FrozenRows, "release", lambda self, *, committed: real(self, committed=True))


def folds_do_not_wait(patch):
    patch.setattr(Journal, "_wait", Journal._wait_for_fold)
    patch.setattr(Attempt, "appends", property(lambda self: False, lambda self, begun: None), raising=False)


def changes_in_place(patch):
    """As if the files were mapped shared: what an update changes is in them at once."""
    real = batch.change

    def change(runtime, changes, scaling=None):
        real(runtime, changes, scaling)
        for each in changes:
            shards = each.table.live()
            for row in each.batch.rows.tolist():
                place = int(shards.overlay.places(np.array([row]))[0])
                number, at = divmod(row, shards.spec.rows_per_shard)
                with shards.shard_path(number).open("r+b") as file:
                    file.seek(at * shards.spec.record_bytes)
                    file.write(shards.records[place].tobytes())

    patch.setattr(batch, "change", change)


def images_count_at_once(patch):
    real = log_reader._Reader._read_images

    def take(self, *arguments):
        real(self, *arguments)
        table, run = self._pending[-1]
        self.replay.add(table, run)

    patch.setattr(log_reader._Reader, "_read_images", take)


def acknowledged_before_sync(patch):
    patch.setattr(log_writer.Log, "append_commit", _append_commit_unsynced)


def _append_commit_unsynced(self, manifest):
    offset = self._reserve(log_records.RECORD.size + len(manifest))
    payload = self._stage.bytes(offset + log_records.RECORD.size, len(manifest))
    payload[:] = manifest
    self._seal(offset, log_records.COMMIT, payload, self._count)
    self._flush()


def recycled_before_base(patch):
    real = Base.publish

    def publish(self, base):
        log_writer.clear(store_paths.log(self._runtime.path), base.segment)
        real(self, base)

    patch.setattr(Base, "publish", publish)


def fold_after_base(patch):
    """The base moves though the fold has not begun."""
    patch.setattr(fold, "write", lambda tables, threads, *rest: None)


def base_in_place(patch):
    def replace(path, data):
        with files.opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
            files.write(descriptor, data + b" " * max(0, (files.size(path) or 0) - len(data)), 0, path)
            files.sync(descriptor, path)
        files.sync_directory(path.parent)

    patch.setattr(files, "replace", replace)


def recovery_reuses_numbers(patch):
    names = {name: getattr(log_reader, name) for name in ("read", "sync")}
    patch.setattr(writer, "log_reader", SimpleNamespace(**names, segments=lambda folder: []))


def recovery_writes_nothing(patch):
    patch.setattr(writer, "fold", SimpleNamespace(write=lambda images, threads, *rest: None))


def sync_declared_too_early(patch):
    real = log_writer.Log._put_record

    def put(self, offset, kind, payload, count, table, synced, salt, sequence):
        real(self, offset, kind, payload, count, table, sequence, salt, sequence)

    patch.setattr(log_writer.Log, "_put_record", put)


def damage_taken_for_torn(patch):
    patch.setattr(log_reader._Reader, "_require_torn", lambda *arguments: None)


def kept_late(patch):
    """What tags have is kept, but it is not durable before it is overwritten."""
    patch.setattr(undo, "files", Instead(sync_data=lambda descriptor, path: None))


def tag_not_durable(patch):
    """The base names a tag whose folder may not be there."""
    patch.setattr(tags, "files", Instead(sync_tree=lambda path: None))


def looked_once(patch):
    """A reader of a tag looks only once."""
    real = past_blocks.PastBlocks.look
    patch.setattr(
        past_blocks.PastBlocks, "look", lambda self: real(self) if self._seen is None else self._seen
    )


def kept_is_trusted(patch):
    """What the last writer has appended counts as durable."""
    real = undo.Keeper.__init__

    def init(self, *arguments):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(files, "sync_data", lambda descriptor, path: None)
            real(self, *arguments)

    patch.setattr(undo.Keeper, "__init__", init)


def indexes_stay(patch):
    """The index that misses keys is there when the commit that brings them back is durable."""
    patch.setattr(key_rows.KeyRows, "retire_index", lambda self: None)


class Instead:
    """The module ``files``, whoever has replaced its functions, with others of some names."""

    def __init__(self, **others):
        vars(self).update(others)

    def __getattr__(self, name):
        return getattr(files, name)


def voted_before_sync(patch):
    patch.setattr(
        log_writer.Log,
        "append_prepared",
        lambda self, manifest: self._append_manifest(log_records.PREPARED, manifest),
    )


def committed_alone(patch):
    """What is prepared counts as a commit for whoever reads the log, also for folds."""
    real = log_reader._Reader.finish

    def finish(self, folder):
        self._resolved = self._prepared.decided if self._prepared else None
        real(self, folder)

    patch.setattr(log_reader._Reader, "finish", finish)


def dropped_alone(patch):
    """An opening in doubt goes back to the last commit, whatever was decided."""
    real = writer._recover
    patch.setattr(writer, "_recover", lambda runtime, base, decided: real(runtime, base, (0, None)))


def resolved_in_memory(patch):
    """Recovery alone knows what was decided, until it is done."""
    patch.setattr(
        writer,
        "files",
        Instead(
            replace=lambda path, data: None if b'"resolved": [' in data else files.replace(path, data),
        ),
    )


def abandoned_in_memory(patch):
    patch.setattr(PartitionJournal, "drop", lambda self: self._give_up(self._require_prepared()))


def held_unsynced(patch):
    def read(self):
        path = self.runtime.path
        return log_reader.read(store_paths.log(path), writer.read_manifest(path))

    patch.setattr(writer.Held, "read", read)


def presence_not_folded(patch):
    real = fold.patches
    patch.setattr(
        fold,
        "patches",
        lambda table, images: (each for each in real(table, images) if "present" not in each.file.path.parts),
    )


def tables_follow_before_commit(patch):
    real = shardemb.Store.drop_table

    def drop(self, name):
        directory = inside.shards(self[name]).directory
        real(self, name)
        files.remove_tree(directory)

    patch.setattr(shardemb.Store, "drop_table", drop)


def everything_dropped(patch):
    def drop(self, count, folder):
        self.drop(self.slots.owner[self.slots.choose(count, exclude=np.uint8(0))])

    patch.setattr(overlay.Overlay, "spill", drop)


def paged_out_unseen(patch):
    patch.setattr(spill_file.SpillFile, "read", lambda self, slots, addresses: None)


def half_updates_count(patch):
    patch.setattr(runtime.Runtime, "all_or_nothing", lambda self, what: interrupts.signals_deferred())


def rollback_to_the_files(patch):
    nothing = log_reader.Images(np.empty(0, np.int64), np.empty(0, np.int64))
    real = shards.Shards.forget_changes
    patch.setattr(shards.Shards, "forget_changes", lambda self, images, budget: real(self, nothing, budget))


def errors_forgiven(patch):
    patch.setattr(Journal, "_poison", lambda self, error: None)


def no_lock(patch):
    patch.setattr(fcntl, "flock", lambda descriptor, how: None)


def epoch_not_compared(patch):
    patch.setattr(runtime.Runtime, "check_fresh", lambda self: None)


def checksums_alone(patch):
    """The new checksums first, and nobody told that blocks are in flux."""

    def begin(path, blocks):
        before = np.empty(blocks.size, np.uint64)

        def keep(words, part):
            before[part] = words
            return words

        checksums._update(path, blocks, keep)
        return before

    patch.setattr(checksums, "mark_in_flux", begin)


def fills_not_announced(patch):
    patch.setattr(fills.Announcements, "_replace", lambda self, some: None)


def fills_not_synced(patch):
    patch.setattr(Attempt, "sync_fills", lambda self: None)


def fills_forgotten_before_commit(patch):
    real = Journal._append_record

    def append(self, what, payload):
        self._announcements._replace([])
        real(self, what, payload)

    patch.setattr(Journal, "_append_record", append)


def fills_not_undone(patch):
    patch.setattr(fills, "undo_unfinished", lambda table, named, committed: None)


def fills_undone_late(patch):
    """The images first, and without a look at what has checksums by then."""
    undo, late = fills.undo_unfinished, []
    patch.setattr(fills, "undo_unfinished", lambda *arguments: late.append(arguments))
    write = fold.write

    def write_first(tables, *rest):
        write(tables, *rest)
        while late:
            with pytest.MonkeyPatch.context() as blind:
                blind.setattr(checksums, "read_sums", lambda path, first, count: np.zeros(count, np.uint64))
                undo(*late.pop())

    patch.setattr(fold, "write", write_first)


def fills_checksums_again(patch):
    patch.setattr(checksums, "add_sums", checksums.write_sums)


def windows_as_a_whole(patch):
    def widen(blocks, has_data):
        held = np.arange(has_data.size)
        return held, np.ones(held.size, np.bool_)

    patch.setattr(file_blocks, "widen", widen)


def nothing_hidden(patch):
    patch.setattr(hidden_rows.HiddenRows, "contain", lambda self, spec, rows: np.zeros(rows.size, np.bool_))


def fill_beside_fold():
    """Fill a part of a shard while a fold holds blocks of it that it has read."""
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "LEAST_BYTES", 4096)
        store = shardemb.open(Path(folder) / "store", threads=1)
        table = store.create_table("a", num_embeddings=4096, embedding_dim=DIM, rows_per_shard=4096)
        store.commit()
        table.write(np.arange(0, 4096, 1024), np.ones((4, DIM), np.float32))
        store.commit()
        go_on, reached, patched = threading.Event(), threading.Event(), file_blocks.patch

        def wait(*arguments):  # it has read the blocks, and has not written them
            reached.set()
            go_on.wait(20)
            patched(*arguments)

        patch.setattr(file_blocks, "patch", wait)
        folding = threading.Thread(target=store.checkpoint)
        folding.start()
        reached.wait(20)
        values = np.random.default_rng(1).random((1000, DIM), np.float32)
        table.write(np.arange(10, 1010), values)
        filled = inside.shards(table).filled.changes
        go_on.set()
        folding.join()
        same = np.array_equal(table.lookup(np.arange(10, 1010)), values)
        store.commit()
        damage = store.verify()
        close_quietly(store)
    assert filled
    return None if same and not damage else "a fold has undone a write"


def reader_beside_fill():
    """Read while a writer fills, with and without a commit, before and after it began."""
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "LEAST_BYTES", 4096)
        store = shardemb.open(Path(folder) / "store", threads=1)
        table = store.create_table("a", num_embeddings=4096, embedding_dim=DIM)
        store.commit()
        with shardemb.open(store.path, "r") as early:
            table.write(np.arange(2000), np.ones((2000, DIM), np.float32))
            with shardemb.open(store.path, "r") as late:
                found = [reader["a"].lookup(np.arange(4096)).any() for reader in (early, late)]
        close_quietly(store)
    return "a reader saw what no commit has" if any(found) else None


def reader_of_tag_beside_fold():
    """Fold while a reader of a tag is between its first look and the rows."""
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        store = new_store(folder)
        store.tag("best")
        expected = store["a"].lookup(np.arange(ROWS))
        train(store, 1)
        store.commit()
        real, folds = batch._without_lock, [store.checkpoint]

        def fold_first(opened, reads, gather):
            if folds and not opened.writable:
                folds.pop()()
            real(opened, reads, gather)

        with shardemb.open(store.path, "r", commit="best") as reader:
            patch.setattr(batch, "_without_lock", fold_first)
            found = reader["a"].lookup(np.arange(ROWS))
        close_quietly(store)
    return None if np.array_equal(found, expected) else "a reader saw what a fold has written"


def kept_in_the_page_cache_alone():
    """Kill a writer that has appended to an undo file and not synced it; cut the power once the next one has folded."""
    with scratch() as folder, scratch() as other:
        store = new_store(folder)
        store.tag("best")
        expected = contents(store)[1]
        train(store, 1)
        store.commit()
        before, recording = Disk.of(folder), Recording(folder)
        with recording.on(), pytest.MonkeyPatch.context() as patch:
            real = files.sync_data
            patch.setattr(
                files,
                "sync_data",
                lambda descriptor, path: 1 / 0 if path.name == "undo" else real(descriptor, path),
            )
            with contextlib.suppress(ZeroDivisionError):
                store.checkpoint()
        for operation in recording.operations:
            before.apply(*operation)
        state, numbers = before.killed()
        materialise(state, other, numbers)
        left, recording = before.moved(numbers, other), Recording(other)
        with recording.on():
            close_quietly(shardemb.open(Path(other) / "store", threads=1))
        for operation in recording.operations:
            left.apply(*operation)
        close_quietly(store)
        for seed in range(6):
            with scratch() as third:
                state = left.crash(random.Random(seed))
                materialise(
                    state, third, {name: left.found[name] for name, data in state.items() if data is not None}
                )
                with contextlib.closing(shardemb.open(Path(third) / "store", "r", commit="best")) as reader:
                    if contents(reader)[1] != expected:
                        return "the tag has lost what the page cache had"
    return None


def restored_keys_after_a_crash():
    """Go back to a commit with keys that the index was rebuilt without, and die right after the commit."""
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        make_small(patch, random.Random(2))
        store = shardemb.open(Path(folder) / "store", threads=1)
        words = store.create_vocabulary("words", key_type="int64")
        words.add(range(40))
        store.commit()
        store.tag("best")
        words.remove(range(35))
        store.commit()
        rows = inside.key_rows(words)
        rows._index = rows.index.empty_copy()  # as after many removals, which rebuild it
        rows._index.relocate(store_paths.index(store.path, rows.entry.uuid).with_name("gone"))
        rows.reindex()
        rows.index.merge(rows._coverage())
        patch.setattr(key_rows.KeyRows, "reindex", lambda self: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            store.restore("best")
        close_quietly(store)
        with shardemb.open(Path(folder) / "store", threads=1) as again:
            found = again.vocabularies["words"].lookup(range(40)).tolist()
    return None if found == list(range(40)) else "keys that came back are not found"


UNDONE = {
    "R1 shards hold committed values only": (changes_in_place, other_ways_to_the_disk),
    "R2 images count with their commit": (images_count_at_once, power),
    "R2 synced before it returns": (acknowledged_before_sync, power),
    "R3 folded before the base": (fold_after_base, power),
    "R3 base before the log goes": (recycled_before_base, power),
    "R4 the base changes in one instant": (base_in_place, power),
    "R5 recovery begins above every segment": (recovery_reuses_numbers, power),
    "R5 recovery writes every image": (recovery_writes_nothing, power),
    "R6 what is known to be synced": (sync_declared_too_early, power),
    "R7 damage is no torn tail": (damage_taken_for_torn, damage_is_told),
    "R8 presence is part of a row": (presence_not_folded, power),
    "R8 tables change with the commit": (tables_follow_before_commit, power),
    "R9 only what the files hold is dropped": (everything_dropped, budget_makes_no_difference),
    "R9 what is out comes back first": (paged_out_unseen, budget_makes_no_difference),
    "R10 an update is all or nothing": (half_updates_count, broken_update_refuses_commit),
    "R11 rollback ends at the last commit": (rollback_to_the_files, rollback_beside_fold),
    "R12 a failed sync ends it": (errors_forgiven, failed_sync_poisons),
    "R13 one writer": (no_lock, one_writer),
    "R14 a reader knows its writer": (epoch_not_compared, reader_is_told),
    "R15 in flux before it is written": (checksums_alone, power),
    "R16 a row is kept before it changes": (nothing_kept, commit_beside_updates),
    "R17 a failed commit gives its rows back": (failed_commits_keep_their_rows, failed_commit_beside_updates),
    "R18 no fold takes a part of a commit": (folds_do_not_wait, fold_beside_commit),
    "R19 announced before they are written": (fills_not_announced, fills_power_loss.power),
    "R20 filled rows are durable before their commit": (fills_not_synced, fills_power_loss.power),
    "R21 announced until their commit is durable": (fills_forgotten_before_commit, fills_power_loss.power),
    "R22 recovery makes holes of what no commit has": (fills_not_undone, fills_power_loss.power),
    "R22 holes are made before images are written": (fills_undone_late, fills_power_loss.power),
    "R23 checksums only for blocks that have none": (fills_checksums_again, fills_power_loss.power),
    "R23 a fold writes no blocks that were never written": (windows_as_a_whole, fill_beside_fold),
    "R24 readers hide what no commit has": (nothing_hidden, reader_beside_fill),
    "R25 kept before it is overwritten": (kept_late, tags_power_loss.power),
    "R26 a tag is there before the base names it": (tag_not_durable, tags_power_loss.power),
    "R27 readers of a tag look before and after": (looked_once, reader_of_tag_beside_fold),
    "R28 what was kept is durable before it counts": (kept_is_trusted, kept_in_the_page_cache_alone),
    "R29 an index is gone before keys come back": (indexes_stay, restored_keys_after_a_crash),
    "R30 a vote is durable": (voted_before_sync, partitions_power_loss.power),
    "R31 what is prepared is committed by a decision": (committed_alone, partitions_power_loss.power),
    "R31 what is prepared is dropped by a decision": (dropped_alone, partitions_power_loss.power),
    "R32 a decision is durable before recovery follows it": (resolved_in_memory, partitions_power_loss.power),
    "R33 abandoned durably before what it needs goes": (abandoned_in_memory, partitions_power_loss.power),
    "R34 what a partition says is durable": (held_unsynced, partitions_power_loss.power),
}


POWER = power, fills_power_loss.power, tags_power_loss.power, partitions_power_loss.power


def noticed(rule):
    undo, witness = UNDONE[rule]
    with pytest.MonkeyPatch.context() as patch:
        undo(patch)
        return witness(WITNESSES.get(rule)) if witness in POWER else witness()
