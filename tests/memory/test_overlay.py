"""What `test_shards.py` does not cover: lookups while rows are evicted and spilled, and when a store does that."""

import errno
import threading
from pathlib import Path

import numpy as np
import pytest
from support import inside
from support.model import assert_same_bits

import shardemb
from shardemb.base.sizes import PAGE
from shardemb.commits import fold
from shardemb.compute import row_kernels
from shardemb.compute.residency import count_resident
from shardemb.engine import batch, filling
from shardemb.engine.shards import Shards
from shardemb.errors import DiskFullError
from shardemb.initializers import Constant, Uniform
from shardemb.memory.overlay import Overlay
from shardemb.memory.slots import TOUCHED
from shardemb.optim import SGD, Adam
from shardemb.storage import files

ROWS, DIM = 20_000, 60  # records of 240 bytes
BUDGET = 50 * (240 + 16 + 64)


@pytest.fixture
def store(tmp_path):
    with shardemb.open(tmp_path / "s", memory_budget=BUDGET) as store:
        yield store
        store.rollback()


def new(store, name="t", **more):
    return store.create_table(name, num_embeddings=ROWS, embedding_dim=DIM, **more)


def spread(value, count=100):
    """Ids of `count` rows, far apart, and what to write there."""
    ids = np.arange(count) * 19
    return ids, np.full((count, DIM), value, np.float32) + ids[:, None].astype(np.float32)


def test_changes_beyond_the_budget_are_spilled_and_can_be_looked_up(store):
    table = new(store)
    written = np.zeros((ROWS, DIM), np.float32)
    for step in range(5):
        ids = np.arange(step * 40, (step + 1) * 40) * 19
        rows = np.full((40, DIM), step + 1, np.float32)
        table.write(ids, rows)
        written[ids] = rows
    overlay = inside.shards(table).overlay
    assert overlay.spilled > 100
    assert overlay.slots.count <= 50
    assert_same_bits(table.lookup(np.arange(ROWS)), written)
    assert overlay.slots.count <= 4096 + 50  # a lookup reloads one part at a time
    store.commit()
    assert_same_bits(table.lookup(np.arange(ROWS)), written)
    store.checkpoint()
    assert overlay.spilled == 0
    assert_same_bits(table.lookup(np.arange(ROWS)), written)


@pytest.mark.parametrize("budget", [0, 30_000, 400_000])
@pytest.mark.parametrize("commit_every", [1, 7, 1000])
def test_a_table_of_twenty_times_the_budget_trains_as_one_in_memory(tmp_path, budget, commit_every):
    """Two tables of Adam: 20,000 x 60 x 12 bytes are 35 times the largest of these budgets."""
    rng = np.random.default_rng(0)
    stores = [
        shardemb.open(tmp_path / "small", memory_budget=budget, log_bytes=2**20),
        shardemb.open(tmp_path / "large"),
    ]
    for store in stores:
        for name, seed in {"a": 1, "b": 2}.items():
            new(store, name, optimizer=Adam(lr=0.1), initializer=Uniform(-1, 1, seed=seed))
    for step in range(20):
        batches = {
            name: ((ids := rng.integers(0, ROWS, 150)), rng.normal(size=(150, DIM)).astype(np.float32))
            for name in "ab"
        }
        asked = rng.integers(0, ROWS, 200)
        for store in stores:
            store.update(batches)
            if step % commit_every == 0:
                store.commit(step=step)
            if step == 13:
                store.rollback()
        assert_same_bits(*(store["a"].lookup(asked) for store in stores))
        assert_same_bits(*(store["b"].state("exp_avg", ids) for store in stores))
    for store in stores:
        store.commit()
    everything = np.arange(ROWS)
    for name in "ab":
        assert_same_bits(*(store[name].lookup(everything) for store in stores))
    for store in stores:
        store.close()
    small, large = (shardemb.open(tmp_path / name, "r") for name in ("small", "large"))
    for name in "ab":
        assert_same_bits(small[name].lookup(everything), large[name].lookup(everything))
        assert_same_bits(small[name].state("exp_avg_sq", ids), large[name].state("exp_avg_sq", ids))
    small.close()
    large.close()


def test_rollback_drops_spilled_rows_too(store):
    table = new(store)
    table.write(*spread(1.0))
    store.commit()
    table.write(*spread(2.0))
    table.write(*spread(3.0, 60))
    assert inside.shards(table).overlay.spilled
    store.rollback()
    assert inside.shards(table).overlay.spilled == 0
    ids, rows = spread(1.0)
    assert_same_bits(table.lookup(ids), rows)


def test_prefetch_for_an_update_reloads_the_newest_records(store):
    table = new(store, optimizer=SGD(lr=1.0))
    ids, rows = spread(1.0)
    table.write(ids, rows)
    table.write([ROWS - 1], np.ones((1, DIM), np.float32))
    table.write(ids[:40] + 2000, rows[:40])
    assert inside.shards(table).overlay.spilled
    table.prefetch(ids, for_update=True)
    inside.runtime(store)._background.shutdown()
    inside.runtime(store)._background = None
    table.update(ids, np.zeros_like(rows))
    assert_same_bits(table.lookup(ids), rows)


def test_a_spill_file_that_cannot_grow_changes_nothing(store, monkeypatch):
    table = new(store)
    ids, rows = spread(1.0)
    table.write(ids, rows)
    real = files.write

    def write(descriptor, data, offset, path):
        if "spill file" in str(path):
            raise DiskFullError(errno.ENOSPC, "no room left on the disk")
        real(descriptor, data, offset, path)

    monkeypatch.setattr(files, "write", write)
    before, changed = table.lookup(np.arange(ROWS)), inside.shards(table).changes
    with pytest.raises(DiskFullError, match="no room left"):
        table.write([ROWS - 1], np.ones((1, DIM), np.float32))
    assert_same_bits(table.lookup(np.arange(ROWS)), before)
    assert inside.shards(table).changes == changed
    monkeypatch.undo()
    table.write([ROWS - 1], np.ones((1, DIM), np.float32))
    assert table.lookup(ROWS - 1).min() == 1
    store.commit()
    assert_same_bits(table.lookup(ids), rows)


def test_rows_that_cannot_be_read_back_are_refused_and_rolled_back(store, monkeypatch):
    table = new(store, optimizer=SGD(lr=1.0))
    table.write(*spread(1.0))
    store.commit()
    store.checkpoint()
    ids, rows = spread(2.0)
    table.write(ids, rows)
    table.write(ids + 2000, rows)
    assert inside.shards(table).overlay.spilled
    real = files.read_into

    def read_into(descriptor, view, offset, path):
        if "spill file" in str(path):
            raise OSError(errno.EIO, "bad sector")
        real(descriptor, view, offset, path)

    monkeypatch.setattr(files, "read_into", read_into)
    with pytest.raises(OSError, match="bad sector"):
        table.lookup(ids)
    with pytest.raises(OSError, match="bad sector"):
        table.update(ids, rows)
    store.rollback()
    ids, rows = spread(1.0)
    assert_same_bits(table.lookup(ids), rows)


def test_lookups_while_rows_are_spilled_see_whole_batches(tmp_path):
    """Every row that is spilled while a lookup runs is looked up again."""
    with shardemb.open(tmp_path / "s", memory_budget=0, threads=1) as store:
        table = new(store)
        ids = np.arange(1000)
        table.write(ids, np.ones((1000, DIM), np.float32))
        stop, wrong = threading.Event(), []

        def look():
            while not stop.is_set():
                if not (table.lookup(ids) == 1).all():
                    wrong.append(1)

        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(150):
            table.write([ROWS - 1], np.ones((1, DIM), np.float32))
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong
        store.commit()


def test_a_row_that_is_spilled_in_the_middle_of_a_lookup_is_looked_up_again(store, monkeypatch):
    table = new(store)
    ids, rows = spread(1.0, 40)
    table.write(ids, rows)
    mapped = inside.shards(table)
    real, gathered = mapped.gather, []

    def gather(*arguments):
        if not gathered:
            mapped.overlay.spill(mapped.overlay.slots.count, tmp)
        gathered.append(mapped.overlay.spilled)
        real(*arguments)

    tmp = store.path / ".shardemb"
    monkeypatch.setattr(mapped, "gather", gather)
    assert_same_bits(table.lookup(ids), rows)
    assert len(gathered) == 2
    assert gathered[0] > 30
    monkeypatch.undo()


def test_a_fork_reads_spilled_rows_until_its_parent_overwrites_them(store):
    import os

    table = new(store)
    ids, rows = spread(1.0)
    table.write(ids, rows)
    table.write(ids + 2000, rows)
    assert inside.shards(table).overlay.spilled

    def child(before):
        """Return what a lookup in a child raises, after `before` was called in the parent."""
        read, write = os.pipe()
        number = os.fork()
        if number:
            os.close(read)
            before()
            os.close(write)
            return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        code = 1
        try:
            os.close(write)
            os.read(read, 1)
            assert_same_bits(table.lookup(ids), rows)
            code = 0
        except OSError as error:
            code = 2 if "has changed it since this one was forked" in str(error) else 3
        finally:
            os._exit(code)

    assert child(lambda: None) == 0
    assert_same_bits(table.lookup(ids), rows)  # the child has freed nothing that it shares

    def overwrite():
        for turn in range(1, 9):
            table.write(ids + 1000 * turn, np.full_like(rows, turn))
        assert_same_bits(table.lookup(ids), rows)

    assert child(overwrite) in (0, 2)
    table.write(ids, rows + 1)
    store.commit()
    store.checkpoint()
    assert_same_bits(table.lookup(ids), rows + 1)


def test_a_lookup_that_found_an_empty_index_looks_again(store, monkeypatch):
    """A row gets a slot after the lookup read the index, and before it reads the presence bitmap."""
    table = new(store, initializer=Constant(5.0))
    mapped = inside.shards(table)
    entered, go_on, found = threading.Event(), threading.Event(), []
    gather = mapped.gather

    def slow_gather(column, ids, out, start, stop):
        index, parameters = mapped.overlay.index, np.array([5.0])
        if entered.is_set():
            gather(column, ids, out, start, stop)
            return
        entered.set()
        go_on.wait()
        fill = row_kernels.gather_or_fill(Constant)
        fill(mapped.records, *index, mapped.present, 0, ids, out, np.uint64(0), parameters, 0, 1, start, stop)

    monkeypatch.setattr(mapped, "gather", slow_gather)
    looker = threading.Thread(target=lambda: found.append(table.lookup([1, 2])))
    looker.start()
    entered.wait()
    table.write([2], np.full((1, DIM), 7.0, np.float32))
    go_on.set()
    looker.join()
    assert found[0][:, 0].tolist() == [5.0, 7.0]
    monkeypatch.undo()


def test_a_lookup_notices_that_a_slot_it_reads_is_used_for_another_row(store, monkeypatch):
    """The lookup begins while a row is evicted: its slot is chosen, but the index still leads there."""
    table = new(store)
    ids = np.arange(50)
    table.write(ids, np.ones((50, DIM), np.float32))
    store.commit()
    store.checkpoint()
    mapped = inside.shards(table)
    entered, go_on, found = threading.Event(), threading.Event(), []
    set_entries, gather = Overlay._set_entries, mapped.gather

    def slow_gather(column, ids, out, start, stop):
        if threading.current_thread() is looker and not entered.is_set():
            place = int(mapped.overlay.places(ids)[0])
            entered.set()
            go_on.wait()
            out[:] = mapped.records[place, :DIM]
        else:
            gather(column, ids, out, start, stop)

    def slow_set(self, rows, entries):
        if not looker.is_alive() and not entered.is_set() and not entries.any():
            row.append(int(rows[-1]))
            looker.start()
            entered.wait()
        set_entries(self, rows, entries)

    row = []
    looker = threading.Thread(target=lambda: found.append(table.lookup(row)))
    monkeypatch.setattr(mapped, "gather", slow_gather)
    monkeypatch.setattr(Overlay, "_set_entries", slow_set)
    table.write(np.arange(1000, 1040), np.full((40, DIM), 9.0, np.float32))
    go_on.set()
    looker.join()
    assert (found[0] == 1).all()
    monkeypatch.undo()


def test_memory_of_tables_that_are_trained_in_turns_is_released(tmp_path):
    budget, rows = 16 * 2**20, 60_000
    with shardemb.open(tmp_path / "s", memory_budget=budget, threads=1) as store:
        tables = [store.create_table(f"t{k}", num_embeddings=rows, embedding_dim=60) for k in range(8)]
        for table in tables:
            for part in np.array_split(np.arange(rows), 10):
                table.write(part, np.ones((part.size, DIM), np.float32))
            store.commit()
            overlays = [inside.shards(each).overlay for each in tables]
            assert sum(each.nbytes + each.idle_bytes for each in overlays) < 1.5 * budget


def test_leaves_of_the_index_are_used_again(tmp_path):
    with shardemb.open(tmp_path / "s", memory_budget=0) as store:
        table = new(store)
        for start in range(0, ROWS, 200):
            table.write(np.arange(start, start + 200), np.ones((200, DIM), np.float32))
            store.commit()
            store.checkpoint()
        assert inside.shards(table).overlay._leaves.free_list[0] < 50


def test_clean_rows_of_one_table_make_room_for_another(tmp_path, monkeypatch):
    """Without waiting for a fold, and without spilling a row."""
    with shardemb.open(tmp_path / "s", memory_budget=2000 * (240 + 80)) as store:
        clean, dirty = new(store, "clean"), new(store, "dirty")
        clean.write(np.arange(900), np.ones((900, DIM), np.float32))
        store.commit()
        store.checkpoint()
        monkeypatch.setattr(
            type(inside.journal(store)), "fold_all", lambda self: pytest.fail("waited for a fold")
        )
        for start in range(0, 1800, 100):
            dirty.write(np.arange(start, start + 100), np.ones((100, DIM), np.float32))
        assert inside.shards(dirty).overlay.spilled == 0
        assert inside.shards(clean).overlay.slots.count < 900
        monkeypatch.undo()
        store.rollback()


def test_a_spill_that_finds_the_disk_full_takes_no_space_of_it(store, monkeypatch):
    import os

    table = new(store)
    table.write(np.arange(45), np.ones((45, DIM), np.float32))
    table.write(np.arange(100, 145), np.ones((45, DIM), np.float32))
    spill_file = inside.shards(table).overlay._spill_file
    before = os.fstat(spill_file._descriptor).st_size
    real = files.write

    def write(descriptor, data, offset, path):
        real(descriptor, data, offset, path)
        if "spill file" in str(path):
            raise DiskFullError(errno.ENOSPC, "no room left on the disk")

    monkeypatch.setattr(files, "write", write)
    with pytest.raises(DiskFullError):
        table.write(np.arange(200, 245), np.ones((45, DIM), np.float32))
    assert os.fstat(spill_file._descriptor).st_size == before > 0
    monkeypatch.undo()


def test_prefetched_rows_are_not_the_first_to_be_evicted(tmp_path):
    with shardemb.open(tmp_path / "s", memory_budget=1000 * (240 + 80)) as store:
        table = new(store)
        table.write(np.arange(900), np.ones((900, DIM), np.float32))
        store.commit()
        store.checkpoint()
        inside.shards(table).overlay.slots.state[:900] &= ~TOUCHED
        batch.prefetch(inside.runtime(store), inside.state(table), np.arange(5000, 5300), for_update=True)
        inside.shards(table).overlay.slots._hand = 0  # where they are
        batch.prefetch(inside.runtime(store), inside.state(table), np.arange(6000, 6300), for_update=True)
        assert (inside.shards(table).overlay._entries(np.arange(5000, 5300)) > 0).all()


def test_memory_of_rows_that_were_evicted_here_and_there_is_released(tmp_path, monkeypatch):
    """Every tenth row stays, so no page is empty; the rows that stay are moved together."""
    monkeypatch.setattr(filling, "LEAST_BYTES", 2**40)  # so that they go into slots
    count, anonymous = 100_000, lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    with shardemb.open(tmp_path / "s") as store:
        table = store.create_table("t", num_embeddings=count, embedding_dim=DIM)
        ids = np.arange(count)
        rows = np.repeat(ids[:, None], DIM, 1).astype(np.float32)
        for part in (ids[::2], ids[1::2]):  # not all at once: consecutive rows would take no memory
            table.write(part, rows[part])
        store.commit()
        store.checkpoint()
        overlay, full = inside.shards(table).overlay, anonymous()
        gone = ids[ids % 10 != 0]
        overlay.drop(gone)
        overlay.compact()
        assert full - anonymous() > 0.8 * 240 * count
        assert overlay.idle_bytes == 0
        assert_same_bits(table.lookup(ids), rows)
        table.write(ids[:500], -rows[:500])
        assert_same_bits(table.lookup(ids[:1000]), np.concatenate([-rows[:500], rows[500:1000]]))
        store.rollback()


def test_rows_that_move_while_a_lookup_runs_are_looked_up_again(store, monkeypatch):
    table = new(store)
    ids, rows = spread(1.0, 40)
    table.write(ids, rows)
    mapped, gathered = inside.shards(table), []
    store.commit()
    store.checkpoint()
    mapped.overlay.drop(ids[:20])
    gather = mapped.gather

    def late_gather(column, ids, out, start, stop):
        index = mapped.overlay.index
        if not gathered:
            mapped.overlay.compact()
        gathered.append(index)
        gather(column, ids, out, start, stop)

    monkeypatch.setattr(mapped, "gather", late_gather)
    assert_same_bits(table.lookup(ids), rows)
    assert len(gathered) == 2
    monkeypatch.undo()


def slow_folds(monkeypatch):
    """Make folds wait until the returned event is set."""
    go_on, write = threading.Event(), fold.write
    monkeypatch.setattr(fold, "write", lambda *arguments: (go_on.wait(20), write(*arguments)))
    return go_on


def test_a_lookup_that_began_before_a_fold_starts_over(tmp_path, monkeypatch):
    """It found its row in no slot, and would read from the file while the fold writes there."""
    with shardemb.open(tmp_path / "s") as store:
        table = new(store)
        table.write([0], np.zeros((1, DIM), np.float32))  # so that slots are in use already
        store.commit()
        gather, gathered, file = Shards.gather, [], tmp_path / "s/t/rows/c.0.0"

        def half_written(tables, threads, *rest):
            with file.open("r+b") as half:
                half.seek(5 * 240)
                half.write(np.full(DIM // 2, 7, np.float32).tobytes())
            seen.set()
            assert go_on.wait(30)
            write(tables, threads, *rest)

        def before_and_after(self, *arguments):
            gathered.append(1)
            if len(gathered) > 1:
                gather(self, *arguments)
                return
            # The lookup knows where row 5 is by now: in the files. There it was changed, and the fold is half way.
            table.write([5], np.full((1, DIM), 7, np.float32))
            store.commit()
            inside.journal(store)._start()
            assert seen.wait(30)
            _, _, out, start, stop = arguments
            out[start:stop] = np.fromfile(file, np.float32, count=DIM, offset=5 * 240)

        go_on, seen, write = threading.Event(), threading.Event(), fold.write
        monkeypatch.setattr(fold, "write", half_written)
        monkeypatch.setattr(Shards, "gather", before_and_after)
        try:
            found = table.lookup([5])
        finally:
            go_on.set()
        assert len(gathered) == 2
        assert found.tolist() == [[7] * DIM]


def test_rows_that_are_being_folded_do_not_keep_others_from_being_evicted(tmp_path, monkeypatch):
    with shardemb.open(tmp_path / "s", memory_budget=2000 * (240 + 80)) as store:
        clean, busy = new(store, "clean"), new(store, "busy")
        clean.write(np.arange(700), np.ones((700, DIM), np.float32))
        store.commit()
        store.checkpoint()
        go_on = slow_folds(monkeypatch)
        busy.write(np.arange(900), np.ones((900, DIM), np.float32))
        store.commit()
        inside.journal(store)._start()
        monkeypatch.setattr(
            type(inside.journal(store)), "_wait", lambda self: pytest.fail("waited for a fold")
        )
        busy.write(np.arange(1000, 1600), np.ones((600, DIM), np.float32))
        assert inside.shards(busy).overlay.spilled == 0
        monkeypatch.undo()
        go_on.set()
        store.commit()


def test_one_fold_is_waited_for_where_one_is_enough(tmp_path, monkeypatch):
    with shardemb.open(tmp_path / "s", memory_budget=1000 * (240 + 80)) as store:
        table = new(store)
        store.commit()  # one that changes the set of tables waits for its fold
        go_on = slow_folds(monkeypatch)
        table.write(np.arange(900), np.ones((900, DIM), np.float32))
        store.commit()  # most of the budget is dirty, so a fold begins
        table.write([950], np.ones((1, DIM), np.float32))
        store.commit()
        folds, start = [], type(inside.journal(store))._start
        monkeypatch.setattr(
            type(inside.journal(store)), "_start", lambda self: (folds.append(1), start(self))
        )
        threading.Timer(0.1, go_on.set).start()
        table.write(np.arange(2000, 2400), np.ones((400, DIM), np.float32))
        assert folds == []
        assert inside.shards(table).overlay.spilled == 0
        store.rollback()


def test_a_rollback_during_a_fold_keeps_no_rows_that_the_files_hold(tmp_path, monkeypatch):
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, initializer=Uniform(-1, 1))
        before = table.lookup(np.arange(2000))
        store.commit()
        go_on = slow_folds(monkeypatch)
        table.write(np.arange(1500), np.ones((1500, DIM), np.float32))
        store.commit()
        inside.journal(store)._start()
        table.write([7, 1800], np.full((2, DIM), 2.0, np.float32))
        store.rollback()
        before[:1500] = 1
        assert_same_bits(table.lookup(np.arange(2000)), before)
        go_on.set()
        store.checkpoint()
        assert inside.shards(table).overlay.slots.dirty <= 1  # row 7, whose image was put back
        assert_same_bits(table.lookup(np.arange(2000)), before)


def test_a_spill_makes_do_with_what_is_needed_if_the_disk_has_no_more(store, monkeypatch):
    table = new(store)
    table.write(*spread(1.0, 45))
    real = files.write

    def write(descriptor, data, offset, path):
        if "spill file" in str(path) and len(data) > 10 * 240:
            raise DiskFullError(errno.ENOSPC, "no room left on the disk")
        real(descriptor, data, offset, path)

    monkeypatch.setattr(files, "write", write)
    table.write(np.arange(1000, 1010) * 19, np.ones((10, DIM), np.float32))
    assert 0 < inside.shards(table).overlay.spilled <= 10
    monkeypatch.undo()


def test_a_prefetch_neither_waits_nor_spills_other_rows(store, monkeypatch):
    table = new(store)
    table.write(*spread(1.0, 49))
    monkeypatch.setattr(
        type(inside.journal(store)), "fold_all", lambda self: pytest.fail("waited for a fold")
    )
    batch.prefetch(inside.runtime(store), inside.state(table), np.arange(1000, 1010) * 19, for_update=True)
    assert inside.shards(table).overlay.spilled == 0
    assert inside.shards(table).overlay.slots.count == 49
    monkeypatch.undo()


def test_memory_for_the_next_slots_is_touched_before_they_are_used(tmp_path):
    with shardemb.open(tmp_path / "s", memory_budget=2**30, threads=1) as store:
        table = store.create_table("t", num_embeddings=2**20, embedding_dim=64)
        shards, ahead = inside.shards(table), []
        slots = shards.bytes.ctypes.data + shards.overlay.first_slot * 256
        for start in range(0, 2**18, 2**14):  # 4 MiB of slots each time
            table.write(np.arange(start, start + 2**14) * 3, np.ones((2**14, 64), np.float32))
            done = threading.Event()
            inside.runtime(store).in_background(done.set)
            assert done.wait(10)
            used = shards.overlay.slots.end * 256
            ahead.append(count_resident(slots + used, 48 * 2**20) * PAGE)
        assert ahead[:3] == [0, 0, 0]  # of little memory, nothing is touched ahead
        assert max(ahead) >= 4 * 2**20
        assert all(
            some <= 2**20 * (number + 1) + 4 * 2**20 for number, some in enumerate(ahead)
        )  # whole huge pages
        assert shards.overlay.touch_ahead(0) is None
        store.rollback()
