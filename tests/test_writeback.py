import errno
import os
import shutil
import subprocess

import dask
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardemb import files, writeback
from shardemb.errors import DiskFullError
from shardemb.writeback import FileChanges

PAGE = 4096
SIZE = 8 * PAGE


def change(path, stretches, fill=1):
    """A file of zeros, memory full of `fill`, and what of it is to be written."""
    files.create_sparse(path, SIZE)
    memory = np.full(SIZE, fill, np.uint8)
    return FileChanges(path, memory.data, np.array(stretches, np.int64).reshape(-1, 2))


def changes(tmp_path, count=5):
    return [
        change(tmp_path / f"c.{k}.0", [[k * 10, k * 10 + 7], [PAGE, 2 * PAGE]], k + 1) for k in range(count)
    ]


def expected(each):
    content = np.zeros(SIZE, np.uint8)
    for start, stop in each.stretches:
        content[start:stop] = each.memory[start]
    return content.tobytes()


@pytest.fixture
def counted(monkeypatch):
    counters = files.Counters()
    monkeypatch.setattr(files, "counters", counters)
    return counters


@pytest.mark.parametrize("choice", ["threads", "sync"])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_stretches_are_written_where_they_belong_and_nothing_else(tmp_path, choice, threads):
    some = changes(tmp_path)
    with dask.config.set(scheduler=choice):
        writeback.secure(some, threads)
        assert not any(any(each.path.read_bytes()) for each in some)
        writeback.write(some, threads)
    assert [each.path.read_bytes() for each in some] == [expected(each) for each in some]


@given(st.lists(st.integers(0, SIZE), max_size=12, unique=True).map(sorted))
def test_any_stretches(tmp_path_factory, ends):
    some = change(tmp_path_factory.mktemp("files") / "c.0.0", ends[: len(ends) // 2 * 2], 7)
    writeback.write([some], 2)
    assert some.path.read_bytes() == expected(some)


def test_every_file_is_synced_once_after_its_last_write(tmp_path, monkeypatch):
    events = []
    for name in ("pwrite", "fsync"):
        original = getattr(os, name)

        def watched(descriptor, *rest, name=name, original=original):
            events.append((os.readlink(f"/proc/self/fd/{descriptor}"), name))
            return original(descriptor, *rest)

        monkeypatch.setattr(os, name, watched)
    some = changes(tmp_path)
    writeback.write(some, 2)
    for each in some:
        assert [name for path, name in events if path == str(each.path)] == ["pwrite", "pwrite", "fsync"]


def test_nothing_but_the_stretches_is_written(tmp_path, counted):
    writeback.write(changes(tmp_path), 2)
    assert counted.bytes_written == 5 * (7 + PAGE)
    assert counted.syncs == 5


def test_no_changes_no_work(counted):
    writeback.secure([], 2)
    writeback.write([], 2)
    assert (counted.writes, counted.syncs) == (0, 0)


def test_space_is_secured_before_anything_is_written(tmp_path):
    path = tmp_path / "c.0.0"
    files.create_sparse(path, SIZE)
    assert files.allocated(path) == 0
    writeback.secure([FileChanges(path, bytes(SIZE), np.array([[0, PAGE], [4 * PAGE, 6 * PAGE]]))], 2)
    assert files.allocated(path) >= 3 * PAGE
    assert path.read_bytes() == bytes(SIZE)


def test_a_file_that_cannot_be_secured_stops_it_before_any_file_is_changed(tmp_path, monkeypatch):
    original = files.allocate

    def allocate(descriptor, offset, nbytes, path):
        if path.name == "c.3.0":
            raise DiskFullError(errno.ENOSPC, "no room")
        original(descriptor, offset, nbytes, path)

    monkeypatch.setattr(files, "allocate", allocate)
    some = [change(tmp_path / f"c.{k}.0", [[0, PAGE], [2 * PAGE, 3 * PAGE]], k + 1) for k in range(5)]
    with pytest.raises(DiskFullError):
        writeback.secure(some, 2)
    assert [each.path.read_bytes() for each in some] == [bytes(SIZE)] * 5
    assert [files.allocated(each.path) for each in some] == [0] * 5  # what was secured is given back


@pytest.mark.parametrize("function", ["pwrite", "fsync"])
def test_an_error_of_one_file_comes_out(tmp_path, monkeypatch, function):
    original = getattr(os, function)

    def failing(descriptor, *rest):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("c.3.0"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor, *rest)

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(OSError, match="Input/output error"):
        writeback.write(changes(tmp_path), 2)


def test_a_missing_file_is_an_error_and_not_made(tmp_path):
    some = changes(tmp_path)
    some[2].path.unlink()
    for work in (writeback.secure, writeback.write):
        with pytest.raises(FileNotFoundError, match=r"c\.2\.0"):
            work(some, 2)
    assert not some[2].path.exists()


def test_a_disk_that_is_really_full_is_met_before_the_first_byte(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        some = []
        for k in range(4):  # 128 KiB in all
            path = place / f"c.{k}.0"
            files.create_sparse(path, SIZE)
            some.append(FileChanges(path, bytes([1]) * SIZE, np.array([[0, SIZE]])))
        with pytest.raises(DiskFullError, match="make room"):
            writeback.secure(some, 2)
        assert not any(any(each.path.read_bytes()) for each in some)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
