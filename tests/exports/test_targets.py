"""Where exports go: folders that exist, other file systems, and what is left if the process is killed."""

import errno
import itertools
import os
import signal
import subprocess
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.stores import run_in_fork

import shardemb
from shardemb.exports import targets
from shardemb.storage import files

ROWS = 3000


@pytest.fixture
def table(store):
    return store.create_table(
        "t", num_embeddings=ROWS, embedding_dim=16, initializer=shardemb.initializers.Uniform(-1, 1)
    )


def names(folder):
    return sorted(os.listdir(folder))


def assert_complete(table, folder, parts, others=()):
    expected = [f"part-{k:05d}.parquet" for k in range(parts)]
    assert names(folder) == sorted([*expected, *others])
    ids = np.concatenate([pq.read_table(folder / name)["id"].to_numpy() for name in expected])
    np.testing.assert_array_equal(ids, np.arange(ROWS))


# ---- a folder that is a file system of its own


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_a_mount_point_takes_parts(new_disk, table, kind):
    disk = new_disk(kind, 16 * 2**20)
    report = table.export_parquet(disk.place, parts=3)
    assert report.num_rows == ROWS
    assert_complete(table, disk.place, 3)
    assert names(disk.place.parent) == sorted({kind, *(["disk.img"] if kind == "ext4" else [])})


def test_a_new_file_system_is_an_empty_folder(new_disk, table):
    disk = new_disk("ext4", 16 * 2**20)
    (disk.place / "lost+found").mkdir()
    table.export_parquet(disk.place, parts=2)
    assert_complete(table, disk.place, 2, ["lost+found"])


def test_nothing_is_written_to_the_file_system_above(new_disk, tmp_path, table):
    """The folder above is on a disk that is as good as full."""
    small = new_disk("tmpfs", 2**16)
    (small.place / "large").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", small.place / "large"], check=True)
    try:
        table.export_parquet(small.place / "large", parts=2)
        assert_complete(table, small.place / "large", 2)
    finally:
        subprocess.run(["umount", "--lazy", small.place / "large"], check=True)


def test_a_mounted_folder_of_the_same_file_system(tmp_path, table, new_disk):
    """Its device is that of the folder above, and still it can neither be replaced nor be left by a rename."""
    disk = new_disk("ext4", 16 * 2**20)
    for name in ("real", "bound"):
        (disk.place / name).mkdir()
    subprocess.run(["mount", "--bind", disk.place / "real", disk.place / "bound"], check=True)
    try:
        table.export_parquet(disk.place / "bound", parts=2)
        assert_complete(table, disk.place / "real", 2)
        assert names(disk.place) == ["bound", "real"]
    finally:
        subprocess.run(["umount", "--lazy", disk.place / "bound"], check=True)


def test_a_mounted_file_is_refused_by_name(tmp_path, table, new_disk):
    new_disk("tmpfs", 2**16)  # skips where nothing can be mounted
    for name in ("real", "bound"):
        (tmp_path / name).write_text("old")
    subprocess.run(["mount", "--bind", tmp_path / "real", tmp_path / "bound"], check=True)
    try:
        with pytest.raises(OSError, match="cannot replace .*bound: it is a mount point") as caught:
            table.export_parquet(tmp_path / "bound")
        assert caught.value.errno == errno.EBUSY
        assert (tmp_path / "real").read_text() == "old"
        assert not list(tmp_path.glob(".shardemb-*"))
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "bound"], check=True)


def test_a_full_mount_point_is_as_it_was(new_disk, table):
    disk = new_disk("ext4", 16 * 2**20)
    (disk.place / "lost+found").mkdir()
    for left in range(0, 200_000, 20_000):
        disk.make_room()
        disk.leave(left)
        ballast = disk.place / "ballast"
        ballast.rename(disk.place / "lost+found" / "ballast")
        try:
            with pytest.raises(shardemb.DiskFullError):
                table.export_parquet(disk.place, parts=2)
            assert names(disk.place) == ["lost+found"]
        finally:
            (disk.place / "lost+found" / "ballast").rename(ballast)


# ---- a folder that exists, on the same file system


def test_an_existing_folder_is_replaced_in_one_rename(tmp_path, table, monkeypatch):
    (tmp_path / "t").mkdir()
    seen = []
    real = files.rename
    monkeypatch.setattr(
        files, "rename", lambda a, b: (seen.append((a, b, names(tmp_path / "t"))), real(a, b))
    )
    table.export_parquet(tmp_path / "t", parts=2)
    (inside, above, before), (source, target, meanwhile) = seen
    assert inside.parent == tmp_path / "t"
    assert (above, source, target) == (tmp_path / inside.name, above, tmp_path / "t")
    assert (before, meanwhile) == ([inside.name], [])
    assert_complete(table, tmp_path / "t", 2)
    assert names(tmp_path) == ["store.zarr", "t"]


def test_a_folder_below_one_that_cannot_be_written_to(tmp_path, table, monkeypatch):
    """Then it cannot be replaced; root may write anywhere, so the kernel's answer is made up."""
    (tmp_path / "t").mkdir()
    real = files.rename

    def rename(source, target):
        if target.parent == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        real(source, target)

    monkeypatch.setattr(files, "rename", rename)
    table.export_parquet(tmp_path / "t", parts=3)
    assert_complete(table, tmp_path / "t", 3)
    assert names(tmp_path) == ["store.zarr", "t"]


def test_what_a_killed_export_left_is_no_content(tmp_path, table):
    left = tmp_path / "t" / f".shardemb-{'0123456789abcdef'}.tmp"
    left.mkdir(parents=True)
    (left / "part-00000.parquet").write_text("half")
    table.export_parquet(tmp_path / "t", parts=2)
    assert_complete(table, tmp_path / "t", 2, [left.name])


@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_parts_of_an_earlier_export_are_replaced_in_one_step(tmp_path, table, monkeypatch, number):
    real, seen = files.exchange, []

    def exchange(one, other):
        real(one, other)
        seen.append((names(one), names(other)))

    monkeypatch.setattr(files, "exchange", exchange)
    table.export_parquet(tmp_path / "t", parts=2)
    table.export_parquet(tmp_path / "t", parts=number)
    ((before, after),) = seen
    assert (len(before), len(after)) == (2, number)
    assert_complete(table, tmp_path / "t", number)
    assert names(tmp_path) == ["store.zarr", "t"]


def test_an_export_that_fails_leaves_the_parts_of_the_earlier_one(tmp_path, table):
    table.export_parquet(tmp_path / "t", parts=2)

    def stop(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        table.export_parquet(tmp_path / "t", parts=3, progress=stop)
    assert_complete(table, tmp_path / "t", 2)
    assert names(tmp_path) == ["store.zarr", "t"]


def test_what_appears_among_parts_that_are_being_replaced_stays(tmp_path, table, monkeypatch):
    table.export_parquet(tmp_path / "t", parts=2)
    real = files.exchange

    def exchange(one, other):
        (tmp_path / "t" / "theirs").touch()
        monkeypatch.setattr(files, "exchange", real)
        real(one, other)

    monkeypatch.setattr(files, "exchange", exchange)
    with pytest.raises(FileExistsError, match="were not there before"):
        table.export_parquet(tmp_path / "t", parts=3)
    assert_complete(table, tmp_path / "t", 2, ["theirs"])
    assert names(tmp_path) == ["store.zarr", "t"]


def test_what_is_replaced_keeps_its_permissions(tmp_path, table):
    table.export_parquet(tmp_path / "t", parts=2)
    table.export_parquet(tmp_path / "f")
    (tmp_path / "t").chmod(0o2770)
    (tmp_path / "f").chmod(0o600)
    table.export_parquet(tmp_path / "t", parts=2)
    table.export_parquet(tmp_path / "f")
    assert (tmp_path / "t").stat().st_mode & 0o7777 == 0o2770
    assert (tmp_path / "f").stat().st_mode & 0o7777 == 0o600


def test_two_exports_to_one_folder(tmp_path, table):
    """The second one is refused while the first one writes; neither takes anything from the other."""
    table.export_parquet(tmp_path / "t", parts=2)
    seen = []

    def meanwhile(done, total):
        if not seen:
            seen.append(done)
            with pytest.raises(FileExistsError, match="another export to it is running"):
                table.export_parquet(tmp_path / "t", parts=3)

    table.export_parquet(tmp_path / "t", parts=4, progress=meanwhile)
    assert_complete(table, tmp_path / "t", 4)
    assert names(tmp_path) == ["store.zarr", "t"]


def test_what_cannot_be_removed_or_listed_does_not_stop_an_export(tmp_path, store, table, monkeypatch):
    """What another user has left; a folder above that may only be passed through."""
    left = tmp_path / f"{targets._prefix(tmp_path / 't')}{'0' * 8}.tmp"
    left.touch()
    real, entries = files.remove_tree, files.entries

    def remove_tree(path):
        if path == left:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        real(path)

    monkeypatch.setattr(files, "remove_tree", remove_tree)
    table.export_parquet(tmp_path / "t", parts=2)
    assert_complete(table, tmp_path / "t", 2)

    def listed(path):
        if path == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return entries(path)

    monkeypatch.setattr(files, "entries", listed)
    table.export_parquet(tmp_path / "t", parts=3)
    assert_complete(table, tmp_path / "t", 3)
    assert store.info().abandoned_exports == ()


def test_parts_in_a_mount_point_are_not_replaced(new_disk, table):
    disk = new_disk("ext4", 16 * 2**20)
    table.export_parquet(disk.place, parts=2)
    with pytest.raises(FileExistsError, match="in one step: it is a mount point, or another"):
        table.export_parquet(disk.place, parts=3)
    assert_complete(table, disk.place, 2)


@pytest.mark.parametrize("parts", [None, 2])
@pytest.mark.parametrize("exists", [True, False])
def test_the_next_export_to_a_target_removes_what_a_killed_one_left_and_no_other(
    tmp_path, store, table, parts, exists
):
    target, other = tmp_path / "target", tmp_path / "other"
    if exists:
        table.export_parquet(target, parts=parts)
    store.commit()

    def die(done, total):
        os._exit(0)

    for path in (target, other):
        run_in_fork(partial(table.export_parquet, path, parts=parts, progress=die))
    left = sorted([*tmp_path.glob(".shardemb-*"), *tmp_path.glob("*/.shardemb-*.tmp")])
    assert len(left) == 2
    within = [str(each) for each in left if each.parent == tmp_path]
    assert sorted(store.info().abandoned_exports) == within
    assert within
    assert all(path in str(store.info()) for path in within)
    seen = []

    def meanwhile(done, total):
        if not seen:  # what is being written is not taken for abandoned
            seen.append(store.info().abandoned_exports)
            with pytest.raises(StopIteration):
                table.export_parquet(target, parts=parts, progress=stop)

    def stop(done, total):
        raise StopIteration

    table.export_parquet(target, parts=parts, progress=meanwhile)
    assert len(seen[0]) == 1
    (remains,) = [*tmp_path.glob(".shardemb-*"), *tmp_path.glob("*/.shardemb-*.tmp")]
    assert remains in left
    table.export_parquet(other, parts=parts)
    assert store.info().abandoned_exports == ()
    assert names(tmp_path) == ["other", "store.zarr", "target"]


@pytest.mark.parametrize("name", [".shardemb-1.tmp", ".hidden", "lost+found2", "_SUCCESS"])
def test_anything_else_is_content(tmp_path, table, name):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / name).touch()
    with pytest.raises(FileExistsError, match="parts need a new or an empty folder"):
        table.export_parquet(tmp_path / "t", parts=2)
    assert names(tmp_path / "t") == [name]


# ---- file by file


@pytest.fixture
def one_by_one(tmp_path, monkeypatch):
    """A folder that cannot be replaced."""
    monkeypatch.setattr(targets, "_hoisted", lambda *_: False)
    (tmp_path / "t").mkdir()
    return tmp_path / "t"


def test_the_first_file_comes_last_and_after_a_sync(one_by_one, table, monkeypatch):
    calls = []

    def heard(name, where):
        real = getattr(files, name)
        monkeypatch.setattr(
            files, name, lambda *args: (calls.append((name, args[where].name)), real(*args))[1]
        )

    heard("sync", 1)
    heard("link", 1)
    heard("sync_directory", 0)
    table.export_parquet(one_by_one, parts=3)
    parts = [f"part-{k:05d}.parquet" for k in range(3)]
    assert [call for call in calls if call[0] != "sync"][-5:] == [
        ("link", parts[2]), ("link", parts[1]), ("sync_directory", "t"), ("link", parts[0]), ("sync_directory", "t"),
    ]  # fmt: skip
    synced = [name for what, name in calls if what == "sync"]
    assert set(parts) <= set(synced[: synced.index("t")])
    assert_complete(table, one_by_one, 3)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("at", range(3))
def test_a_file_that_cannot_be_placed_takes_the_others_with_it(one_by_one, table, monkeypatch, at, links):
    real, count = files.link if links else files.rename, itertools.count()

    def fail(source, target):
        if next(count) == at:
            raise OSError(errno.EIO, "the disk is on fire")
        return real(source, target)

    monkeypatch.setattr(files, "link" if links else "rename", fail)
    if not links:
        monkeypatch.setattr(files, "link", lambda *_: False)  # as on a file system without hard links
    with pytest.raises(OSError, match="on fire"):
        table.export_parquet(one_by_one, parts=3)
    assert names(one_by_one) == []


def test_a_file_system_without_links(one_by_one, table, monkeypatch):
    monkeypatch.setattr(files, "link", lambda *_: False)
    table.export_parquet(one_by_one, parts=3)
    assert_complete(table, one_by_one, 3)


@pytest.mark.parametrize("theirs", ["theirs", "part-00000.parquet", "part-00001.parquet"])
def test_what_appeared_meanwhile_stays(one_by_one, table, theirs):
    def appear(done, total):
        (one_by_one / theirs).write_text("theirs")

    with pytest.raises(
        FileExistsError, match="there are files in it that were not there before|remove them first"
    ):
        table.export_parquet(one_by_one, parts=2, progress=appear)
    assert names(one_by_one) == [theirs]
    assert (one_by_one / theirs).read_text() == "theirs"


def export_until(path, target, at):
    """Export, and die at one of the operations on files, counted from 0; return their number."""
    calls = itertools.count()

    def count(real, *args):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    for name in ("write", "sync", "rename", "link", "sync_directory", "remove_tree"):
        setattr(files, name, partial(count, getattr(files, name)))
    with shardemb.open(path, "r") as store:
        calls = itertools.count()
        store["t"].export_parquet(target, parts=2)
        return next(calls)


@pytest.mark.parametrize("mounted", [False, True], ids=["folder", "mount point"])
def test_a_killed_export_leaves_nothing_or_everything_and_can_be_repeated(tmp_path, path, new_disk, mounted):
    with shardemb.open(path) as store:
        uniform = shardemb.initializers.Uniform(-1, 1)
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=16, initializer=uniform)
        store.commit()
    target = new_disk("ext4", 64 * 2**20).place if mounted else tmp_path / "t"
    target.mkdir(exist_ok=True)
    number, _ = run_in_fork(export_until, path, target, -1)
    visible = []
    for at in [0, number // 2, *range(number - 12, number)]:
        for name in names(target):
            files.remove_tree(target / name)
        _, died_of = run_in_fork(export_until, path, target, at)
        assert died_of == signal.SIGKILL
        visible.append([name for name in names(target) if not name.startswith(".shardemb-")])
        if "part-00000.parquet" in visible[-1]:
            assert sum(pq.read_metadata(target / name).num_rows for name in visible[-1]) == ROWS
            continue
        for name in visible[-1]:
            (target / name).unlink()
        assert run_in_fork(export_until, path, target, -1)[1] == 0
        assert_complete(table, target, 2, [name for name in names(target) if name.startswith(".shardemb-")])
    assert visible[0] == []
    assert "part-00000.parquet" in visible[-1]
    # One file is there alone only where the folder cannot be replaced.
    assert (["part-00001.parquet"] in visible) == mounted
