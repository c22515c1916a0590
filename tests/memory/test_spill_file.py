import errno
import gc
import os

import numpy as np
import pytest

from shardemb.errors import DiskFullError
from shardemb.memory.spill_file import STAGE_BYTES, SpillFile
from shardemb.storage import files

WIDTH = 65  # 260 bytes: neither a power of two nor a divisor of a page
STEP = STAGE_BYTES // (4 * WIDTH)
ROWS = 3 * STEP


def new_spill_file(tmp_path):
    return SpillFile(tmp_path, 4 * WIDTH, ROWS)


def records_of(rows, value):
    return (np.asarray(rows)[:, None] * 1000 + np.arange(WIDTH) + value).astype(np.float32)


def addresses_of(records):
    return records.ctypes.data + np.arange(len(records)) * 4 * WIDTH


def write(spill_file, rows, value=0):
    records = records_of(rows, value)
    return spill_file.write(np.asarray(rows, np.int64), addresses_of(records))


def read(spill_file, slots):
    records = np.full((len(slots), WIDTH), -1, np.float32)
    spill_file.read(slots, addresses_of(records))
    return records


def file_bytes(spill_file):
    return os.fstat(spill_file._descriptor).st_size


def test_records_come_back_as_they_were(tmp_path):
    spill_file = new_spill_file(tmp_path)
    rows = np.random.default_rng(0).permutation(10**6)[: ROWS // 2]
    slots = write(spill_file, rows, 7)
    assert spill_file.slots.owner[slots].tolist() == rows.tolist()
    assert spill_file.slots.count == rows.size
    some = np.random.default_rng(1).permutation(rows.size)[:1000]
    np.testing.assert_array_equal(read(spill_file, slots[some]), records_of(rows[some], 7))
    np.testing.assert_array_equal(read(spill_file, slots), records_of(rows, 7))  # a run longer than the stage
    assert list(tmp_path.iterdir()) == []


def test_slots_that_are_freed_are_used_again(tmp_path):
    spill_file = new_spill_file(tmp_path)
    rng = np.random.default_rng(1)
    model = {}
    for step in range(30):
        rows = rng.integers(0, 10**6, 400)
        model |= {
            slot: (row, step)
            for slot, row in zip(write(spill_file, rows, step).tolist(), rows.tolist(), strict=True)
        }
        old = rng.permutation(list(model))[:350]
        expected = np.concatenate([records_of([row], value) for row, value in map(model.get, old.tolist())])
        np.testing.assert_array_equal(read(spill_file, old), expected)
        spill_file.release(old)
        for slot in old.tolist():
            del model[slot]
        assert spill_file.slots.count == len(model)
    assert file_bytes(spill_file) <= 2000 * 4 * WIDTH
    spill_file.release(np.array(sorted(model)))
    assert file_bytes(spill_file) == 0


def test_a_record_that_did_not_reach_the_disk_is_noticed(tmp_path):
    """If the kernel could not write a page back, it may return what was on the disk before."""
    spill_file = new_spill_file(tmp_path)
    slots = write(spill_file, range(10))
    os.pwrite(spill_file._descriptor, b"?", 4 * 4 * WIDTH + 100)
    read(spill_file, slots[:4])
    with pytest.raises(OSError, match=r"does not hold what was written to it; call store.rollback\(\)"):
        read(spill_file, slots[4:5])


def test_a_full_disk_stores_no_record_of_a_call(tmp_path, monkeypatch):
    spill_file = new_spill_file(tmp_path)
    before = write(spill_file, range(5), 1)
    real, calls = files.write, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise DiskFullError(errno.ENOSPC, "full")
        real(*arguments)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(DiskFullError):
        write(spill_file, range(2 * STEP))
    assert spill_file.slots.count == 5
    slots = write(spill_file, range(2 * STEP), 2)
    np.testing.assert_array_equal(read(spill_file, slots), records_of(range(2 * STEP), 2))
    np.testing.assert_array_equal(read(spill_file, before), records_of(range(5), 1))


def test_the_file_goes_with_the_object(tmp_path):
    spill_file = SpillFile(tmp_path, 260, 10)
    descriptor = spill_file._descriptor
    os.fstat(descriptor)
    del spill_file
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_file_system_without_unnamed_files_will_do(tmp_path, monkeypatch):
    real = files.openat2

    def refuse(path, flags, mode):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(path, flags, mode)

    monkeypatch.setattr(files, "openat2", refuse)
    spill_file = SpillFile(tmp_path, 4 * WIDTH, 10)
    assert list(tmp_path.iterdir()) == []
    slots = write(spill_file, [3], 1)
    np.testing.assert_array_equal(read(spill_file, slots), records_of([3], 1))
