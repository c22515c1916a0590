"""The undo file of a tag: what is kept, once and durably, and what is read of it."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.power_loss import scratch
from support.specs import make

from shardemb.commits import tags, undo
from shardemb.errors import DiskFullError, FormatError
from shardemb.format import store_paths
from shardemb.format.table_files import TableLocation
from shardemb.initializers import Uniform
from shardemb.storage import files, table_folder

PAGE = 4096


@pytest.fixture
def table(tmp_path):
    """A table of several files, all of whose blocks hold their own numbers."""
    tag_of(tmp_path)
    return table_of(tmp_path)


def fill(table, value):
    for file in table.files():
        blocks = np.arange(file.nbytes // PAGE)
        write(file, blocks, value)


def write(file, blocks, value):
    with files.opened(file.path, os.O_WRONLY) as descriptor:
        for block in blocks.tolist():
            files.write(descriptor, content(file.first + block, value).tobytes(), block * PAGE, file.path)


def content(block, value):
    return np.full(PAGE // 8, block * 1000 + value, np.int64).view(np.uint8)


def kept(tag):
    """The blocks that are kept, in the order of their records, after their content was compared."""
    found = []
    for records in undo.read(tag):
        for number, blocks, contents in tags.by_table(records):
            assert number == 0
            for block, data in zip(blocks.tolist(), contents, strict=True):
                assert np.array_equal(data, content(block, 0))
                found.append(block)
    return found


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 3), min_size=1)), max_size=8), st.booleans()
)
@settings(deadline=None, max_examples=20)
def test_each_block_is_kept_once_with_what_it_held_first(changes, anew):
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(undo, "WINDOW", 2)
        table = table_of(folder)
        tag, every = tag_of(folder), list(table.files())
        keeper, expected = undo.Keeper(tag, [table]), set()
        for value, (number, blocks) in enumerate(changes, start=1):
            file = every[number]
            some = np.array(sorted(block for block in blocks if block < file.nbytes // PAGE))
            if anew:
                keeper = undo.Keeper(tag, [table])
            keeper.keep([(file.path, some)])
            write(file, some, value)
            expected |= set((file.first + some).tolist())
        found = kept(tag)
        assert sorted(found) == sorted(expected)


def table_of(folder):
    spec = make(1000, 16, initializer=Uniform(-1, 1, seed=1), rows_per_shard=256)
    table = TableLocation(spec, Path(folder) / "t")
    table_folder.create(spec, table.directory, None)
    fill(table, 0)
    return table


def tag_of(folder):
    tag = Path(folder) / "tag"
    (tag / ".shardemb").mkdir(parents=True)
    undo.create(tag)
    return tag


def test_files_that_the_tag_does_not_have_are_left_out(table, tmp_path):
    keeper = undo.Keeper(tmp_path / "tag", [table])
    other = tmp_path / "other"
    other.write_bytes(bytes(PAGE))
    keeper.keep([(other, np.array([0]))])
    assert kept(tmp_path / "tag") == []
    os.link(table.shard(1).path, tmp_path / "link")  # as that of a table that was resized
    keeper.keep([(tmp_path / "link", np.array([2]))])
    assert kept(tmp_path / "tag") == [table.shard(1).first + 2]


def test_a_disk_that_is_full_keeps_nothing_and_can_be_tried_again(table, tmp_path, monkeypatch):
    keeper, shard = undo.Keeper(tmp_path / "tag", [table]), table.shard(0)
    real = files.sync_data

    def full(descriptor, path):
        raise DiskFullError(28, "full")

    monkeypatch.setattr(files, "sync_data", full)
    with pytest.raises(DiskFullError):
        keeper.keep([(shard.path, np.array([0, 1]))])
    monkeypatch.setattr(files, "sync_data", real)
    keeper.keep([(shard.path, np.array([1]))])
    assert kept(tmp_path / "tag")[0] == shard.first + 1
    write(shard, np.array([1]), 7)
    keeper.keep([(shard.path, np.array([0, 1]))])
    assert sorted(kept(tmp_path / "tag")) == [shard.first, shard.first + 1]


@pytest.mark.parametrize("counted", [False, True])
def test_what_cannot_be_read_is_the_end_unless_it_was_counted(table, tmp_path, counted):
    tag, shard = tmp_path / "tag", table.shard(0)
    undo.Keeper(tag, [table]).keep([(shard.path, np.array([0, 1, 3]))])
    path = store_paths.undo(tag)
    data = bytearray(path.read_bytes())
    data[PAGE + undo.RECORD.itemsize + 500] ^= 1
    if not counted:
        data[:8] = (1).to_bytes(8, "little")
    path.write_bytes(data)
    if counted:
        with pytest.raises(FormatError, match="is damaged: a part of the tag is lost"):
            list(undo.read(tag))
    else:
        assert kept(tag) == [shard.first]
        keeper = undo.Keeper(tag, [table])
        keeper.keep([(shard.path, np.array([0, 1, 3]))])
        assert kept(tag)[:3] == [shard.first, shard.first + 1, shard.first + 3]


@pytest.mark.parametrize("cut", [0, 100])
def test_a_file_that_was_cut_off_is_lost(table, tmp_path, cut):
    os.truncate(store_paths.undo(tmp_path / "tag"), cut)
    with pytest.raises(FormatError, match="was cut off"):
        list(undo.read(tmp_path / "tag"))


def test_what_was_released_is_not_read(table, tmp_path):
    tags.release(tmp_path / "tag")
    with pytest.raises(FormatError, match="was released, or is lost"):
        list(undo.read(tmp_path / "tag"))
    keeper = undo.Keeper(tmp_path / "tag", [table])
    keeper.keep([(table.shard(0).path, np.array([0]))])
    assert store_paths.undo(tmp_path / "tag").stat().st_size == PAGE
