import errno
import gc
import os

import numpy as np
import pytest

from shardemb import files
from shardemb.errors import DiskFullError
from shardemb.scratch import STAGE_PAGES, Scratch
from shardemb.spec import PAGE

PAGES = 3 * STAGE_PAGES


@pytest.fixture
def memory():
    memory = files.AddressRange(PAGES * PAGE)
    memory.map_zeros(0, memory.nbytes)
    return memory


def content(memory):
    return memory.array(np.int64, (PAGES, PAGE // 8))


def fill(memory, pages, value):
    content(memory)[pages] = np.asarray(pages)[:, None] * 1000 + value


def drop(memory):
    memory.advise(0, memory.nbytes, files.MADV_DONTNEED)


def kept(scratch):
    bits = np.unpackbits(scratch.kept.view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == np.flatnonzero(scratch.slots).tolist()
    return set(np.flatnonzero(bits).tolist())


def file_bytes(scratch):
    return os.fstat(scratch._descriptor).st_size


def test_pages_come_back_as_they_were(memory, tmp_path):
    scratch = Scratch(tmp_path, memory)
    pages = np.random.default_rng(0).permutation(PAGES)[: PAGES // 2]
    pages.sort()
    fill(memory, pages, 7)
    scratch.write(pages)
    assert kept(scratch) == set(pages.tolist())
    drop(memory)
    some = pages[::3]
    scratch.read(some)
    assert (content(memory)[some] == some[:, None] * 1000 + 7).all()
    others = np.setdiff1d(np.arange(PAGES), some)
    assert not content(memory)[others].any()
    assert list(tmp_path.iterdir()) == []


def test_slots_that_are_given_up_are_used_again(memory, tmp_path):
    scratch = Scratch(tmp_path, memory)
    rng = np.random.default_rng(1)
    model = {}
    for step in range(30):
        new = np.setdiff1d(rng.integers(0, PAGES, 400), list(model))
        fill(memory, new, step)
        scratch.write(new)
        model |= dict.fromkeys(new.tolist(), step)
        assert len({*scratch.slots[list(model)].tolist()} - {0}) == len(model)
        old = rng.choice(sorted(model), min(len(model), 350), replace=False)
        drop(memory)
        scratch.read(np.sort(old))
        assert [row[5] for row in content(memory)[old]] == [
            page * 1000 + model[page] for page in old.tolist()
        ]
        scratch.release(np.sort(old))
        for page in old.tolist():
            del model[page]
        assert kept(scratch) == set(model)
    assert file_bytes(scratch) <= 2000 * PAGE
    scratch.release(np.array(sorted(model)))
    assert file_bytes(scratch) == 0


def test_what_was_not_written_in_truth_is_noticed(memory, tmp_path):
    """After a write that failed behind its back the kernel may give back what was on the disk before."""
    scratch = Scratch(tmp_path, memory)
    pages = np.arange(10)
    fill(memory, pages, 1)
    scratch.write(pages)
    os.pwrite(scratch._descriptor, b"?", 4 * PAGE + 100)
    drop(memory)
    scratch.read(pages[:4])
    with pytest.raises(OSError, match=r"does not hold what was written to it; call store.rollback\(\)"):
        scratch.read(pages[4:5])


def test_a_full_disk_keeps_what_fitted_and_frees_the_rest(memory, tmp_path, monkeypatch):
    scratch = Scratch(tmp_path, memory)
    pages = np.arange(2 * STAGE_PAGES)
    fill(memory, pages, 1)
    real, calls = files.write, []

    def write(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise DiskFullError(errno.ENOSPC, "full")
        real(*arguments)

    monkeypatch.setattr(files, "write", write)
    with pytest.raises(DiskFullError):
        scratch.write(pages)
    assert kept(scratch) == set(range(STAGE_PAGES))
    scratch.write(pages[STAGE_PAGES:])
    assert scratch.slots.max() == 2 * STAGE_PAGES
    drop(memory)
    scratch.read(pages)
    assert (content(memory)[pages] == pages[:, None] * 1000 + 1).all()


def test_the_file_goes_with_the_object(memory, tmp_path):
    scratch = Scratch(tmp_path, memory)
    descriptor = scratch._descriptor
    os.fstat(descriptor)
    del scratch
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_file_system_without_nameless_files_will_do(memory, tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, *more, **named):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    scratch = Scratch(tmp_path, memory)
    assert list(tmp_path.iterdir()) == []
    fill(memory, [3], 1)
    scratch.write(np.array([3]))
    drop(memory)
    scratch.read(np.array([3]))
    assert content(memory)[3, 0] == 3001
