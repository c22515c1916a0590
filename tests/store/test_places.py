"""Places where no store can be, or can be read only, and files that grow no further: each error says what to do."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess

import numpy as np
import pytest

import shardemb
from shardemb.errors import DiskFullError, ReadOnlyError, StaleReaderError, StoreNotFoundError
from shardemb.initializers import Uniform
from shardemb.optim import SGD

DIM = 16


def make(path):
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="string").add(["a", "b"])
        table = store.create_table("t", num_embeddings=500, embedding_dim=DIM, initializer=Uniform(-1, 1))
        table.write([1], np.ones((1, DIM)))
        store.commit(step=3)
    return path


# ---- links and files --------------------------------------------------------------------------------------------

NO_PLACES = {
    "link to nothing": (
        lambda p: p.symlink_to("nowhere"),
        r"s is a link to nowhere, where nothing is; make that",
    ),
    "link to itself": (lambda p: p.symlink_to("s"), r"s is a link to s, where nothing is"),
    "link to a file": (
        lambda p: ((p.parent / "f").write_text("x"), p.symlink_to("f")),
        r"f is a file; a store is a",  # where the link leads
    ),
    "file": (lambda p: p.write_text("x"), r"s is a file; a store is a folder.*, choose another path"),
    "pipe": (lambda p: os.mkfifo(p), r"s is a file; a store is a folder"),
}


@pytest.mark.parametrize("mode", ["r", "r+", "a", "w", "w-"])
@pytest.mark.parametrize("kind", NO_PLACES)
@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_place_where_no_store_can_be_is_named(tmp_path, kind, mode, below):
    make_place, message = NO_PLACES[kind]
    make_place(tmp_path / "s")
    before = sorted((str(path), os.lstat(path).st_size) for path in tmp_path.rglob("*"))
    with pytest.raises(StoreNotFoundError, match=message) as caught:
        shardemb.open(tmp_path / "s" / below, mode)
    if below:
        assert str(tmp_path / "s" / below) in str(caught.value) or "link to" in kind
    assert sorted((str(path), os.lstat(path).st_size) for path in tmp_path.rglob("*")) == before


def test_a_link_to_a_folder_is_a_store_like_any_other(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "link")
    make(tmp_path / "link" / "inner")
    with shardemb.open(tmp_path / "real" / "inner", "r") as store:
        assert store.last_commit.step == 3


# ---- read-only --------------------------------------------------------------------------------------------------


@pytest.fixture
def read_only(new_disk):
    """A store on a file system that was mounted read-only; the store was copied there while it was open."""
    disk = new_disk("ext4", 2**30)
    make(disk.place / "s")
    with shardemb.open(disk.place / "s", log_bytes=2**20) as store:
        store["t"].write([2], np.full((1, DIM), 2.0))
        store.commit(step=4)
        shutil.copytree(disk.place / "s", disk.place / "unclean", ignore=shutil.ignore_patterns("lock"))
        store.copy(disk.place / "copied")
    subprocess.run(["mount", "-o", "remount,ro", disk.place], check=True)
    return disk.place


def test_a_store_on_a_read_only_file_system_can_be_read(read_only, tmp_path):
    for name in ("s", "unclean", "copied"):
        with shardemb.open(read_only / name, "r") as store:
            assert store["t"].lookup([1, 2])[:, 0].tolist() == [1, 2]
            assert list(store.vocabularies["v"]) == ["a", "b"]
            store.refresh()
            assert store.last_commit.step == 4
            assert store.verify() == []
    shutil.copytree(read_only / "s", tmp_path / "s")
    with shardemb.open(tmp_path / "s") as store:
        store.commit()


def test_a_copy_can_be_read_where_it_cannot_be_locked(tmp_path):
    """It has never had a writer, of which readers could notice the next."""
    with shardemb.open(make(tmp_path / "s")) as store:
        store.copy(tmp_path / "copied")
    (tmp_path / "copied" / ".shardemb" / "lock").unlink()
    with shardemb.open(tmp_path / "copied", "r") as reader:
        assert reader["t"].lookup([1])[0, 0] == 1
        with shardemb.open(tmp_path / "copied") as store:
            store["t"].write([1], np.full((1, DIM), 2.0))
            store.commit(step=5)
            with pytest.raises(StaleReaderError):
                reader["t"].lookup([1])
            reader.refresh()
            assert reader.last_commit.step == 5
            assert reader["t"].lookup([1])[0, 0] == 2


def test_it_cannot_be_written_and_says_so(read_only, tmp_path):
    for name in ("s", "unclean"):
        for mode in ("r+", "a", "w"):
            with pytest.raises(
                ReadOnlyError, match=rf"{name} cannot be .* is read-only; open it with mode \"r\""
            ) as caught:
                shardemb.open(read_only / name, mode)
            assert caught.value.errno == errno.EROFS
    for mode in ("a", "w", "w-"):
        with pytest.raises(
            ReadOnlyError, match="new cannot be opened for writing.*read-only; choose another path"
        ):
            shardemb.open(read_only / "new", mode)
    with shardemb.open(make(tmp_path / "s")) as store:
        with pytest.raises(OSError, match=r"new cannot be written, because its file system is read-only"):
            store.copy(read_only / "new")
        store.commit()


def test_a_folder_without_permission_cannot_be_written_and_says_so(tmp_path, in_fork):
    make(tmp_path / "s")
    if os.getuid():
        pytest.skip("only root can become somebody else")
    for path in (tmp_path, *tmp_path.parents[:-1]):
        if not os.stat(path).st_mode & 0o001:
            path.chmod(0o755)

    with shardemb.open(tmp_path / "s", "r") as store:
        store["t"].lookup([1])  # nobody may not compile: the kernels that were compiled cannot be kept

    def open_as_nobody():
        os.setuid(65534)
        found = []
        for name, mode in (("s", "a"), ("s", "r+"), ("new", "a")):
            with pytest.raises(ReadOnlyError, match="because this user may not write there") as caught:
                shardemb.open(tmp_path / name, mode)
            found.append(str(caught.value))
        with shardemb.open(tmp_path / "s", "r") as store:
            return found, store["t"].lookup([1])[0, 0]

    (first, _, last), value = in_fork(open_as_nobody)
    assert 'open it with mode "r"' in first
    assert "choose another path" in last
    assert value == 1


# ---- ulimit -f --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(nbytes):
    """Let no file grow beyond a size, as ``ulimit -f`` does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


MESSAGE = (
    r"{} would be larger than this process may write \(ulimit -f\).*raise the limit, or choose smaller files"
)


def test_files_that_may_not_be_created_leave_nothing_behind(tmp_path):
    path = make(tmp_path / "s")
    with shardemb.open(path) as store:
        with largest_file(2**20):
            with pytest.raises(DiskFullError, match=MESSAGE.format(r"c\.0\.0")) as caught:
                store.create_table("big", num_embeddings=10**6, embedding_dim=DIM)
            assert caught.value.errno == errno.EFBIG
            with pytest.raises(DiskFullError, match=MESSAGE.format(r"c\.0\.0")):
                store.create_vocabulary("w", key_type="string")
            small = store.create_table("small", num_embeddings=10**5, embedding_dim=DIM, rows_per_shard=4096)
            small.write([1], np.ones((1, DIM)))
            store.commit()
        assert sorted(store) == ["small", "t"]
        assert list(store.vocabularies) == ["v"]
        store.create_table("big", num_embeddings=10**6, embedding_dim=DIM)
        store.commit()


def test_a_commit_or_fold_that_may_not_grow_a_file_can_be_repeated(tmp_path):
    """As on a full disk, nothing has happened."""
    with shardemb.open(tmp_path / "s", log_bytes=2**24) as store:  # its segments have 1 MiB
        table = store.create_table("t", num_embeddings=10**5, embedding_dim=DIM, optimizer=SGD(lr=1.0))
        store.commit(step=0)
        table.write(range(50_000), np.ones((50_000, DIM)))
        with largest_file(2**21):
            with pytest.raises(DiskFullError, match=MESSAGE.format(r"00\d+\.new")):
                store.commit(step=1)
            assert store.last_commit.step == 0
        store.rollback()
        for start in range(0, 50_000, 10_000):  # each fits into a segment
            table.write(range(start, start + 10_000), np.full((10_000, DIM), 2.0))
            store.commit(step=1)
        with largest_file(2**21):
            with pytest.raises(DiskFullError, match=MESSAGE.format(r"c\.0\.0")):
                store.checkpoint()
            table.write([99_999], np.ones((1, DIM)))
            store.commit(step=2)
        store.checkpoint()
        assert table.lookup([0, 49_999, 50_000, 99_999])[:, 0].tolist() == [2, 2, 0, 1]
    with shardemb.open(tmp_path / "s", "r") as store:
        assert store["t"].lookup([0, 49_999, 50_000, 99_999])[:, 0].tolist() == [2, 2, 0, 1]


def test_rows_that_may_not_be_spilled_stay_in_memory(tmp_path):
    with shardemb.open(tmp_path / "s", memory_budget=10**6) as store:
        table = store.create_table("t", num_embeddings=10**5, embedding_dim=DIM)
        store.commit()
        with largest_file(2**20), pytest.raises(DiskFullError, match=MESSAGE.format("")):
            for start in range(0, 10**5, 5000):
                table.write(range(start, start + 5000), np.full((5000, DIM), start + 1.0))
                written = start + 5000
        found = table.lookup(range(written))[:, 0]
        assert found.tolist() == [row // 5000 * 5000 + 1 for row in range(written)]
        store.commit()


def test_a_store_may_not_be_opened_where_nothing_may_be_written(tmp_path):
    path = make(tmp_path / "s")
    with largest_file(0):
        with pytest.raises(DiskFullError, match=MESSAGE.format("")):
            shardemb.open(path)
        with shardemb.open(path, "r") as store:
            assert store["t"].lookup([1])[0, 0] == 1
    with shardemb.open(path) as store:
        assert store.last_commit.step == 3
