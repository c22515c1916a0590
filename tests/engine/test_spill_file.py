import errno
import gc
import os

import numpy as np
import pytest

from shardemb.engine.spill_file import STAGE_BYTES, SpillFile
from shardemb.errors import DiskFullError
from shardemb.storage import files

WIDTH = 65  # 260 bytes: neither a power of two nor a divisor of a page
STEP = STAGE_BYTES // (4 * WIDTH)
ROWS = 3 * STEP


def new_scratch(tmp_path):
    return SpillFile(tmp_path, 4 * WIDTH, ROWS)


def records_of(rows, value):
    return (np.asarray(rows)[:, None] * 1000 + np.arange(WIDTH) + value).astype(np.float32)


def addresses_of(records):
    return records.ctypes.data + np.arange(len(records)) * 4 * WIDTH


def write(scratch, rows, value=0):
    records = records_of(rows, value)
    return scratch.write(np.asarray(rows, np.int64), addresses_of(records))


def read(scratch, slots):
    records = np.full((len(slots), WIDTH), -1, np.float32)
    scratch.read(slots, addresses_of(records))
    return records


def file_bytes(scratch):
    return os.fstat(scratch._descriptor).st_size


def test_records_come_back_as_they_were(tmp_path):
    scratch = new_scratch(tmp_path)
    rows = np.random.default_rng(0).permutation(10**6)[: ROWS // 2]
    slots = write(scratch, rows, 7)
    assert scratch.slots.owner[slots].tolist() == rows.tolist()
    assert scratch.slots.count == rows.size
    some = np.random.default_rng(1).permutation(rows.size)[:1000]
    np.testing.assert_array_equal(read(scratch, slots[some]), records_of(rows[some], 7))
    np.testing.assert_array_equal(read(scratch, slots), records_of(rows, 7))  # a run longer than the stage
    assert list(tmp_path.iterdir()) == []


def test_slots_that_are_given_up_are_used_again(tmp_path):
    scratch = new_scratch(tmp_path)
    rng = np.random.default_rng(1)
    model = {}
    for step in range(30):
        rows = rng.integers(0, 10**6, 400)
        model |= {
            slot: (row, step)
            for slot, row in zip(write(scratch, rows, step).tolist(), rows.tolist(), strict=True)
        }
        old = rng.permutation(list(model))[:350]
        expected = np.concatenate([records_of([row], value) for row, value in map(model.get, old.tolist())])
        np.testing.assert_array_equal(read(scratch, old), expected)
        scratch.release(old)
        for slot in old.tolist():
            del model[slot]
        assert scratch.slots.count == len(model)
    assert file_bytes(scratch) <= 2000 * 4 * WIDTH
    scratch.release(np.array(sorted(model)))
    assert file_bytes(scratch) == 0


def test_what_was_not_written_in_truth_is_noticed(tmp_path):
    """After a write that failed behind its back the kernel may give back what was on the disk before."""
    scratch = new_scratch(tmp_path)
    slots = write(scratch, range(10))
    os.pwrite(scratch._descriptor, b"?", 4 * 4 * WIDTH + 100)
    read(scratch, slots[:4])
    with pytest.raises(OSError, match=r"does not hold what was written to it; call store.rollback\(\)"):
        read(scratch, slots[4:5])


def test_a_full_disk_keeps_nothing_of_a_call(tmp_path, monkeypatch):
    scratch = new_scratch(tmp_path)
    before = write(scratch, range(5), 1)
    real, calls = files.write, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise DiskFullError(errno.ENOSPC, "full")
        real(*arguments)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(DiskFullError):
        write(scratch, range(2 * STEP))
    assert scratch.slots.count == 5
    slots = write(scratch, range(2 * STEP), 2)
    np.testing.assert_array_equal(read(scratch, slots), records_of(range(2 * STEP), 2))
    np.testing.assert_array_equal(read(scratch, before), records_of(range(5), 1))


def test_the_file_goes_with_the_object(tmp_path):
    scratch = SpillFile(tmp_path, 260, 10)
    descriptor = scratch._descriptor
    os.fstat(descriptor)
    del scratch
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_file_system_without_nameless_files_will_do(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *more, **named):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    scratch = SpillFile(tmp_path, 4 * WIDTH, 10)
    assert list(tmp_path.iterdir()) == []
    slots = write(scratch, [3], 1)
    np.testing.assert_array_equal(read(scratch, slots), records_of([3], 1))
