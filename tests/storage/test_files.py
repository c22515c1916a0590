import contextlib
import ctypes
import errno
import gc
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import shardemb
from shardemb.errors import DiskFullError
from shardemb.initializers import Normal
from shardemb.storage import address_space, files

PAGE = 4096


def refuse(code):
    def call(*args, **options):
        raise OSError(code, os.strerror(code))

    return call


@pytest.fixture
def counted(monkeypatch):
    """Counters that begin with zero."""
    counters = files.Counters()
    monkeypatch.setattr(files, "counters", counters)
    return counters


# ---- whole files ------------------------------------------------------------------------------------------------


def test_replace_creates_and_replaces(tmp_path):
    path = tmp_path / "manifest.json"
    for data in (b"first", b"the second is longer", b"", b"4"):
        files.replace(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_staging_changes_nothing_until_it_is_published(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")
    files.stage(path, b"new")
    assert path.read_bytes() == b"old"
    assert files.staged(path).read_bytes() == b"new"
    files.publish(path)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_staged_file_that_a_crash_left_is_replaced(tmp_path):
    path = tmp_path / "manifest.json"
    files.staged(path).write_bytes(b"what a crash left, longer than the next")
    files.replace(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("name", ["zarr.json", "no_suffix", "a.b.c", ".hidden"])
def test_a_file_of_any_name_can_be_staged(tmp_path, name):
    files.replace(tmp_path / name, b"x")
    assert os.listdir(tmp_path) == [name]


def test_content_is_synced_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    """This order makes the replacement atomic and durable."""
    path, events = tmp_path / "manifest.json", []

    def watch(module, name, describe):
        original = getattr(module, name)

        def watched(first, *rest, **named):
            events.append((name, describe(first)))
            return original(first, *rest, **named)

        monkeypatch.setattr(module, name, watched)

    def file_of(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    watch(os, "pwrite", file_of)
    watch(os, "fsync", file_of)
    watch(os, "rename", lambda source: tmp_path / source)
    files.replace(path, b"new")
    staged = files.staged(path)
    assert events == [("pwrite", staged), ("fsync", staged), ("rename", staged), ("fsync", tmp_path)]


@pytest.mark.parametrize(
    ("function", "code"), [("pwrite", errno.ENOSPC), ("pwrite", errno.EIO), ("fsync", errno.EIO)]
)
def test_a_failure_while_staging_leaves_the_original_and_nothing_else(tmp_path, monkeypatch, function, code):
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, function, refuse(code))
    with pytest.raises(OSError, match=os.strerror(code) if code == errno.EIO else "no space left"):
        files.stage(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_ctrl_c_while_staging_leaves_the_original_and_nothing_else(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.stage(path, b"new")
    assert os.listdir(tmp_path) == ["manifest.json"]
    assert path.read_bytes() == b"old"


def test_write_new_refuses_what_exists(tmp_path):
    files.write_new(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        files.write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_sparse_file_has_its_size_and_takes_no_disk(tmp_path):
    path = tmp_path / "c.0.0"
    files.create_sparse(path, 2**30)
    assert files.size(path) == 2**30
    assert files.allocated(path) == 0
    with pytest.raises(FileExistsError):
        files.create_sparse(path, 5)
    assert files.size(path) == 2**30


def test_allocated_counts_what_files_and_folders_take(tmp_path):
    files.make_directory(tmp_path / "a" / "b")
    empty = files.allocated(tmp_path)
    files.write_new(tmp_path / "a" / "b" / "c", os.urandom(100_000))
    files.create_sparse(tmp_path / "a" / "sparse", 2**30)
    assert 100_000 <= files.allocated(tmp_path) - empty < 300_000


def test_only_regular_files_have_a_size(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert files.size(tmp_path / "file") == 5
    assert files.size(tmp_path / "missing") is None
    assert files.size(tmp_path) is None
    assert files.size(tmp_path / "link") is None
    assert files.size(tmp_path / "file" / "below") is None


def test_read_accepts_only_small_files(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert files.read(path) == b"12345"
    assert files.read(path, 5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        files.read(path, 4)
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "missing")


# ---- folders ----------------------------------------------------------------------------------------------------


def test_folders_are_made_with_their_parents_and_may_exist(tmp_path):
    for _ in range(2):
        files.make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_removing_what_is_not_there_is_fine(tmp_path):
    files.remove(tmp_path / "missing")
    files.remove_tree(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_removing_a_tree_spares_what_links_point_to(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "data").write_bytes(b"precious")
    files.make_directory(tmp_path / "ours" / "deep")
    (tmp_path / "ours" / "deep" / "link").symlink_to(tmp_path / "theirs")
    files.remove_tree(tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert (tmp_path / "theirs" / "data").read_bytes() == b"precious"


def test_rename_replaces_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    files.rename(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"new"


def test_rename_of_a_folder_does_not_replace_one_with_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(name.encode())
    with pytest.raises(OSError, match="not empty"):
        files.rename(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "file").read_bytes() == b"b"


def test_syncing_counts(tmp_path, counted):
    (tmp_path / "a").write_bytes(b"1")
    files.sync_file(tmp_path / "a")
    files.sync_directory(tmp_path)
    files.sync_tree(tmp_path)
    assert counted.syncs == 3


# ---- open files -------------------------------------------------------------------------------------------------


def test_writing_back_changes_nothing_and_tells_errors(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10_000)
    with files.opened(path, os.O_RDWR) as descriptor:
        files.write(descriptor, b"yy", 5000, path)
        address_space.write_back(descriptor, 4096, 4096, path)
    assert path.read_bytes() == b"x" * 5000 + b"yy" + b"x" * 4998
    with pytest.raises(OSError, match="file cannot be synced: Bad file descriptor"):
        address_space.write_back(descriptor, 4096, 4096, path)


def test_opened_closes_the_file_after_an_error_too(tmp_path):
    def use():
        with files.opened(tmp_path / "a", os.O_WRONLY | os.O_CREAT) as descriptor:
            descriptors.append(descriptor)
            raise ZeroDivisionError

    descriptors = []
    with pytest.raises(ZeroDivisionError):
        use()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


def test_opened_files_do_not_leak_into_child_processes(tmp_path):
    with files.opened(tmp_path / "a", os.O_WRONLY | os.O_CREAT) as descriptor:
        assert not os.get_inheritable(descriptor)


def written(path, data, offset):
    path.touch()
    with files.opened(path, os.O_WRONLY) as descriptor:
        files.write(descriptor, data, offset, path)
    return path.read_bytes()


@pytest.mark.parametrize("data", [b"abcdef", bytearray(b"abcdef"), memoryview(b"abcdef"), b""])
def test_write_writes_all_data_at_its_offset(tmp_path, data):
    assert written(tmp_path / "a", data, 3) == (b"\0\0\0" + bytes(data) if data else b"")


def test_write_accepts_arrays_of_any_shape(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert written(tmp_path / "a", values.data, 0) == values.tobytes()


def test_write_continues_after_a_short_write(tmp_path, monkeypatch, counted):
    """Linux writes at most 2 GiB in one call, and a signal can interrupt it anywhere."""
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: original(descriptor, data[:7], offset))
    data = os.urandom(100)
    assert written(tmp_path / "a", data, 10)[10:] == data
    assert counted.bytes_written == 100
    assert counted.writes == 15


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "pwrite", refuse(code))
    with pytest.raises(DiskFullError, match="free some space") as caught:
        written(tmp_path / "a", b"data", 0)
    assert caught.value.errno == code
    assert str(tmp_path / "a") in str(caught.value)


def test_a_file_that_may_not_grow_is_an_error_like_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", refuse(errno.EFBIG))
    with pytest.raises(
        DiskFullError, match=r"a would be larger than .* \(ulimit -f\).*rows_per_shard"
    ) as caught:
        written(tmp_path / "a", b"data", 0)
    assert caught.value.errno == errno.EFBIG


def test_a_read_only_file_system_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", refuse(errno.EROFS))
    with pytest.raises(
        OSError, match="a cannot be written, because its file system is read-only; choose"
    ) as caught:
        written(tmp_path / "a", b"data", 0)
    assert caught.value.errno == errno.EROFS
    assert not isinstance(caught.value, DiskFullError)


@pytest.mark.parametrize("code", [errno.EIO, errno.EPERM, errno.EBADF])
def test_other_errors_stay_what_they_are(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "pwrite", refuse(code))
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        written(tmp_path / "a", b"data", 0)
    assert not isinstance(caught.value, DiskFullError)


def allocate(path, offset, nbytes):
    with files.opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
        files.allocate(descriptor, offset, nbytes, path)


def test_allocating_takes_disk_space_and_changes_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    allocate(path, 0, 10 * PAGE)
    assert path.read_bytes() == b"content"
    assert files.allocated(path) >= 10 * PAGE


def fail_fallocate(monkeypatch, *codes):
    codes = list(codes)

    def fallocate(*args):
        if not codes:
            return 0
        ctypes.set_errno(codes.pop(0))
        return -1

    monkeypatch.setattr(files._libc, "fallocate", fallocate)
    return codes


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_cannot_allocate_is_fine(tmp_path, monkeypatch, code):
    fail_fallocate(monkeypatch, code)
    allocate(tmp_path / "a", 0, PAGE)
    assert files.allocated(tmp_path / "a") == 0


def test_allocating_continues_after_a_signal(tmp_path, monkeypatch):
    """Python repeats its own system calls after a signal, but not those made through ctypes."""
    left = fail_fallocate(monkeypatch, errno.EINTR, errno.EINTR)
    allocate(tmp_path / "a", 0, PAGE)
    assert left == []


def test_allocating_without_space_is_disk_full(tmp_path, monkeypatch):
    fail_fallocate(monkeypatch, errno.ENOSPC)
    with pytest.raises(DiskFullError, match="free some space"):
        allocate(tmp_path / "a", 0, PAGE)


def test_allocating_a_file_that_cannot_be_that_large_is_an_error(tmp_path, monkeypatch):
    fail_fallocate(monkeypatch, errno.EFBIG)
    with pytest.raises(DiskFullError, match=r"a would be larger than this process may write \(ulimit -f\)"):
        allocate(tmp_path / "a", 0, PAGE)


BLOCK = 65_536  # holes of this size exist on any file system


def sparse(path, data, blocks=8):
    """A file of blocks, of which some hold data and the others are holes. Not synced."""
    files.create_sparse(path, blocks * BLOCK)
    with files.opened(path, os.O_WRONLY) as descriptor:
        for block in data:
            files.write(descriptor, b"x" * BLOCK, block * BLOCK, path)
    return path


def holes(path, start, stop):
    with files.opened(path, os.O_RDONLY) as descriptor:
        return [
            (first // BLOCK, last // BLOCK)
            for first, last in files.holes(descriptor, start * BLOCK, stop * BLOCK)
        ]


@pytest.mark.parametrize(
    ("data", "start", "stop", "expected"),
    [
        ([], 0, 8, [(0, 8)]),
        (range(8), 0, 8, []),
        ([0, 3, 4], 0, 8, [(1, 3), (5, 8)]),
        ([0, 3, 4], 2, 5, [(2, 3)]),
        ([0, 3, 4], 3, 5, []),
        ([0, 7], 1, 7, [(1, 7)]),
        ([7], 7, 8, []),
        ([], 5, 5, []),
    ],
)
def test_holes_take_no_disk_space(tmp_path, data, start, stop, expected):
    """Data that is not on the disk yet is not a hole, because it will be."""
    assert holes(sparse(tmp_path / "a", data), start, stop) == expected


def test_punching_releases_allocated_space_and_nothing_else(tmp_path):
    """Holes are listed before: pages of zeros in memory make allocated space look like data."""
    path = sparse(tmp_path / "a", [1])
    files.sync_file(path)
    before, taken = path.read_bytes(), files.allocated(path)
    with files.opened(path, os.O_WRONLY) as descriptor:
        found = list(files.holes(descriptor, 0, 8 * BLOCK))
        for first, last in found:
            files.allocate(descriptor, first, last - first, path)
        assert files.allocated(path) >= 8 * BLOCK
        for first, last in found:
            files.punch(descriptor, first, last - first, path)
    assert files.allocated(path) == taken
    assert path.read_bytes() == before


def test_a_disk_that_is_really_full(new_disk):
    disk = new_disk("tmpfs", 65_536).place
    path = disk / "a"
    files.replace(path, b"old")
    for fill in (
        lambda: files.replace(path, bytes(100_000)),
        lambda: files.write_new(disk / "b", bytes(100_000)),
        lambda: allocate(disk / "b", 0, 100_000),
    ):
        with pytest.raises(DiskFullError, match="free some space"):
            fill()
    assert path.read_bytes() == b"old"
    files.remove(disk / "b")
    files.replace(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_text_replaces_the_one_before(tmp_path):
    with files.opened(tmp_path / "lock", os.O_RDWR | os.O_CREAT) as descriptor:
        files.overwrite_text(descriptor, "process 12345\n", tmp_path / "lock")
        files.overwrite_text(descriptor, "6\n", tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == "6\n"


def test_a_file_on_a_tmpfs_has_all_of_its_memory_or_does_not_exist(new_disk):
    """Otherwise reading a hole through a mapping would be a signal once the tmpfs is full."""
    disk = new_disk("tmpfs", 2**20)
    path = disk.place / "a"
    files.create_sparse(path, 2**19 + 1)
    assert path.read_bytes() == bytes(2**19 + 1)
    assert files.allocated(path) >= 2**19 + 1
    with pytest.raises(DiskFullError, match="free some space"):
        files.create_sparse(disk.place / "b", 2**19)
    files.create_sparse(disk.place / "empty", 0)
    assert sorted(each.name for each in disk.place.iterdir()) == ["a", "empty"]
    disk.leave(0)
    memory = address_space.AddressRange(2**19)
    memory.map_file(0, path, 2**19)
    assert not memory.array(np.uint8, (2**19,)).any()


def test_a_file_that_gets_no_size_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "ftruncate", refuse(errno.EFBIG))
    with pytest.raises(DiskFullError, match=r"a would be larger than this process may write \(ulimit -f\)"):
        files.create_sparse(tmp_path / "a", PAGE)
    assert not (tmp_path / "a").exists()


def test_a_table_on_a_full_tmpfs_is_an_error_and_not_a_signal(new_disk, in_fork):
    disk = new_disk("tmpfs", 4 * 2**20)

    def life():
        with shardemb.open(disk.place / "s") as store:
            table = store.create_table("t", num_embeddings=5000, embedding_dim=64, initializer=Normal(seed=1))
            store.commit(step=1)
            table.write([1], np.ones((1, 64)))
            store.commit(step=2)
            with pytest.raises(DiskFullError, match="free some space"):
                store.create_table("u", num_embeddings=20_000, embedding_dim=64)
            disk.leave(0)
            before = table.lookup(np.arange(5000))
            table.write(np.arange(1, 5000, 2), np.full((2500, 64), 2.0, np.float32))
            after = table.lookup(np.arange(5000))
            assert (after[::2] == before[::2]).all()
            assert (after[1::2] == 2).all()
            assert list(store) == ["t"]
            disk.make_room()
            return store.commit(step=3).step

    assert in_fork(life) == 3
    with shardemb.open(disk.place / "s", "r") as store:
        assert (store["t"].lookup([1, 3]) == 2).all()


# ---- locks ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path, *, shared):
    descriptor = files.lock(path, shared=shared)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            files.close(descriptor)


@pytest.mark.parametrize(("first", "second", "both"), [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)])
def test_a_lock_is_held_by_one_writer_or_many_readers(tmp_path, first, second, both):
    path = tmp_path / "lock"
    path.touch()
    with locked(path, shared=bool(first)) as mine:
        assert mine
        with locked(path, shared=bool(second)) as theirs:
            assert theirs == bool(both)
    with locked(path, shared=bool(second)) as later:
        assert later


def test_a_writer_makes_the_file_and_a_reader_does_not(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.lock(tmp_path / "lock", shared=True)
    with locked(tmp_path / "lock", shared=False) as got:
        assert got


def test_a_lock_of_another_process_ends_with_it(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from shardemb.storage import files
        assert files.lock(Path(sys.argv[1]), shared=False) is not None
        print("locked", flush=True)
        sys.stdin.read()
    """
    path = tmp_path / "lock"
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with locked(path, shared=False) as got:
            assert not got
        other.kill()  # no chance to clean up
        other.wait()
    with locked(path, shared=False) as got:
        assert got


# ---- address ranges ---------------------------------------------------------------------------------------------


def mapped(path):
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]


@pytest.fixture
def path(tmp_path):
    """A file of four pages."""
    path = tmp_path / "c.0.0"
    path.write_bytes(np.arange(4 * PAGE // 4, dtype=np.float32).tobytes())
    return path


def over(path, pages=4):
    memory = address_space.AddressRange(pages * PAGE)
    memory.map_file(0, path, pages * PAGE)
    return memory


def test_a_range_shows_the_files_that_are_mapped_into_it(path, tmp_path):
    other = tmp_path / "c.1.0"
    other.write_bytes(b"\xff" * PAGE)
    memory = address_space.AddressRange(6 * PAGE)
    memory.map_file(0, path, 4 * PAGE)
    memory.map_zeros(4 * PAGE, PAGE)
    memory.map_file(5 * PAGE, other, PAGE)
    whole = memory.array(np.uint8, (6, PAGE))
    assert whole[:4].tobytes() == path.read_bytes()
    assert not whole[4].any()
    assert (whole[5] == 255).all()


def test_a_range_begins_at_a_huge_page(path):
    """One that could hold any does; a smaller one takes no more address space than it needs."""
    large = [address_space.AddressRange(address_space.HUGE_PAGE + n * PAGE) for n in range(5)]
    assert all(memory.address % address_space.HUGE_PAGE == 0 for memory in large)
    ranges = [over(path) for _ in range(5)]
    assert ranges[0].array(np.uint8, (1,)).ctypes.data == ranges[0].address


def test_arrays_are_writable_and_have_the_requested_dtype_and_shape(path):
    array = over(path).array(np.float32, (16, 256))
    assert array.dtype == np.float32
    assert array.shape == (16, 256)
    assert array.flags.writeable
    assert array.flags.c_contiguous
    assert type(array) is np.ndarray


def test_private_writes_never_reach_the_file(path):
    before = path.read_bytes()
    memory = over(path)
    memory.array(np.float32, (PAGE,))[:] = -1
    files.sync_file(path)
    assert path.read_bytes() == before
    assert (memory.array(np.float32, (PAGE,)) == -1).all()  # but all arrays over the range see the writes
    memory.advise(0, 4 * PAGE, address_space.MADV_DONTNEED)
    assert memory.array(np.uint8, (4 * PAGE,)).tobytes() == before


def test_dropping_one_page_keeps_the_private_copies_of_the_others(path):
    memory = over(path)
    array = memory.array(np.float32, (4, 1024))
    array[:] = -1
    memory.advise(PAGE, PAGE, address_space.MADV_DONTNEED)
    assert (array[[0, 2, 3]] == -1).all()
    assert array[1].tolist() == list(range(1024, 2048))


def test_a_write_to_the_file_is_visible_where_there_is_no_private_copy(path):
    memory = over(path)
    array = memory.array(np.float32, (4, 1024))
    array[0, 0] = -1
    with files.opened(path, os.O_WRONLY) as descriptor:
        files.write(descriptor, b"\0" * 4 * PAGE, 0, path)
    assert not array[1:].any()
    assert array[0, 0] == -1


def test_bytes_are_the_memory_itself(path):
    memory = over(path)
    part = memory.bytes(PAGE, 8)
    assert bytes(part) == path.read_bytes()[PAGE : PAGE + 8]
    memory.array(np.uint8, (4 * PAGE,))[PAGE] = 77
    assert part[0] == 77
    assert len(memory.bytes(0, 0)) == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda memory: memory.array(np.float32, (PAGE,)),
        lambda memory: memory.array(np.float32, (PAGE,))[5:9],
        lambda memory: memory.array(np.float32, (4, 1024)).T,
        lambda memory: memory.bytes(0, 100),
        lambda memory: memory.bytes(0, 100)[50:],
    ],
    ids=["array", "slice", "transposed", "bytes", "slice of bytes"],
)
def test_every_view_keeps_the_range_mapped_and_the_last_one_unmaps_it(path, view):
    memory = over(path)
    kept = view(memory)
    del memory
    gc.collect()
    assert len(mapped(path)) == 1
    assert kept[0] is not None  # and it can be read
    del kept
    assert mapped(path) == []


def test_a_range_without_views_is_unmapped_too(path):
    memory = over(path)
    assert len(mapped(path)) == 1
    del memory
    assert mapped(path) == []


def test_the_whole_reservation_is_released_with_the_range():
    def reserved():
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmSize:")[1].split()[0]) * 1024

    before = reserved()
    memory = address_space.AddressRange(2**36)
    assert reserved() - before >= 2**36
    del memory
    assert reserved() - before < 2**30


def test_mappings_are_counted_as_long_as_they_last(path, counted):
    memory = address_space.AddressRange(8 * PAGE)
    memory.map_file(0, path, 4 * PAGE)
    assert counted.mappings == 2  # the file, and the rest of the range
    memory.map_file(4 * PAGE, path, 4 * PAGE)
    assert counted.mappings == 2
    array = memory.array(np.uint8, (1,))
    del memory
    assert counted.mappings == 2
    del array
    assert counted.mappings == 0


@pytest.mark.parametrize(
    "nbytes", [PAGE, 3 * PAGE, address_space.HUGE_PAGE, 5 * address_space.HUGE_PAGE + PAGE]
)
def test_what_is_counted_is_what_the_kernel_has(path, counted, nbytes):
    def mappings():
        return len(Path("/proc/self/maps").read_text().splitlines())

    ranges = [address_space.AddressRange(nbytes) for _ in range(300)]
    before, counted_before = mappings(), counted.mappings
    for memory in ranges:
        memory.map_file(0, path, PAGE)
        if nbytes > 2 * PAGE:
            memory.map_zeros(PAGE, PAGE)
    arrays = [
        array
        for _ in range(300)
        for array in address_space.zeros_together([(np.int32, 10), (np.int64, nbytes)])
    ]
    # Neighbours that are alike may be one to the kernel.
    assert mappings() - before <= counted.mappings - counted_before + 300
    assert counted.mappings <= 300 * (1 if nbytes == PAGE else 3) + 300
    del ranges, memory, arrays
    assert counted.mappings == 0


def test_a_file_that_cannot_be_mapped_is_not_counted(tmp_path, counted):
    memory = address_space.AddressRange(PAGE)
    before = counted.mappings
    with pytest.raises(FileNotFoundError):
        memory.map_file(0, tmp_path / "missing", PAGE)
    assert counted.mappings == before


def test_an_empty_range_is_an_empty_array():
    memory = address_space.AddressRange(0)
    assert memory.array(np.uint8, (0,)).size == 0
    assert len(memory.bytes(0, 0)) == 0


def test_an_error_about_address_space_names_possible_limits():
    with pytest.raises(OSError, match="ulimit -v"):
        address_space.AddressRange(2**60)


def test_advice_that_the_kernel_refuses_is_an_error(path):
    with pytest.raises(OSError, match=r"madvise\(12345\): Invalid argument"):
        over(path).advise(0, PAGE, 12345)


def test_a_range_can_be_used_by_many_threads(path):
    array = over(path).array(np.float32, (PAGE,))
    with ThreadPoolExecutor(4) as executor:
        sums = set(executor.map(lambda _: float(array.sum(dtype=np.float64)), range(50)))
    assert sums == {PAGE * (PAGE - 1) / 2}


# ---- zeros ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 10_000])
def test_zeros_are_a_writable_array_of_zeros(count):
    array = address_space.zeros(np.uint64, count)
    assert array.shape == (count,)
    assert array.dtype == np.uint64
    assert not array.any()
    array[:] = 2**64 - 1
    assert (array == 2**64 - 1).all()


def test_zeros_take_memory_only_where_they_are_written():
    def anonymous():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    before = anonymous()
    array = address_space.zeros(np.uint8, 2**36)
    array[:: 2**32] = 1
    assert int(array[:: 2**32].sum()) == 16
    assert anonymous() - before < 40 * 2**20  # sixteen huge pages at most


# ---- counters ---------------------------------------------------------------------------------------------------


def test_counters_lose_nothing_between_threads():
    counters = files.Counters()

    def count():
        for _ in range(2000):
            counters.add(bytes_written=3, writes=1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counters.bytes_written, counters.writes, counters.syncs) == (24_000, 8000, 0)


def test_an_array_may_be_collected_while_something_is_counted(path, counted):
    """A garbage collection can run anywhere and unmap a range, which counts too: that must not deadlock."""
    arrays = [over(path).array(np.uint8, (1,))]

    class Collects(int):
        def __radd__(self, other):
            arrays.clear()
            return other + int(self)

    thread = threading.Thread(target=lambda: counted.add(writes=Collects(1)), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert counted.writes == 1
    assert counted.mappings == 0
