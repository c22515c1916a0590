import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.specs import make

from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks
from shardemb.format.table_files import TableLocation
from shardemb.initializers import Constant
from shardemb.storage import checksums, files

SPEC = make(
    70_000, 5, rows_per_shard=20_480, initializer=Constant(2.0)
)  # 4 shards of 100 blocks, 3 of presence


def test_blocks_are_numbered_through_shards_and_presence(tmp_path):
    every = list(TableLocation(SPEC, tmp_path).files())
    assert [file.first for file in every] == [0, 100, 200, 300, 400]
    assert sum(file.nbytes for file in every) == SPEC.num_blocks * PAGE == 403 * PAGE
    assert every[3].rows == (61_440, 70_000)
    assert every[4].rows == (0, 70_000)
    assert [file.number for file in every] == [0, 1, 2, 3, 0]


def test_rows_of_a_block():
    """A block has 204.8 rows of 20 bytes, so some rows lie in two blocks."""
    first, last, bits = (list(TableLocation(SPEC, Path("x")).files())[i] for i in (0, 3, 4))
    assert first.rows_of(0) == (0, 205)
    assert first.rows_of(1) == (204, 410)
    assert last.rows_of(300) == (61_440, 61_645)
    start, stop = last.rows_of(399)
    assert start == stop  # after the last row
    assert bits.rows_of(401) == (32_768, 65_536)
    assert bits.rows_of(402) == (65_536, 70_000)


def test_a_checksum_is_xxh3_of_a_block_and_never_a_reserved_value():
    data = np.random.default_rng(0).bytes(3 * PAGE)
    expected = [xxhash.xxh3_64_intdigest(data[i : i + PAGE]) & ~1 for i in range(0, len(data), PAGE)]
    assert checksums.block_sums(memoryview(data)).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xxhash, "xxh3_64_intdigest", lambda data: 1)
        assert checksums.block_sum(b"") > checksums.DAMAGED
        assert (checksums.block_sums(memoryview(data)) > checksums.DAMAGED).all()


def test_which_blocks_are_damaged():
    random = np.random.default_rng(0)
    content = random.integers(1, 256, (9, PAGE), np.uint8)
    content[[1, 2]] = 0
    content[2, 7] = 5
    sums = checksums.block_sums(content.reshape(-1).data)
    known = np.array([0, 0, 0, sums[3], sums[3], sums[5] | 1, sums[3] | 1, 2, 3], np.uint64)
    marks = np.zeros((9, PAGE), np.uint8)
    marks[[0, 2, 3, 4, 6]] = 255  # the log has new values for these
    marks[0, 9] = 0
    which = np.arange(9)
    found = checksums.differing(known, content, which, lambda i: marks[i])
    # Data where there was none, outside of the new bits; zeros; new bits alone; intact; another block's checksum;
    # in flux and not in the log; in flux and in the log; damaged; damaged and in flux.
    assert found.tolist() == [True, False, False, False, True, True, False, True, True]
    assert (
        checksums.differing(known[::-1], content, which[::-1], lambda i: marks[8 - i]).tolist()
        == found[::-1].tolist()
    )


@settings(max_examples=50)
@given(st.lists(st.sets(st.integers(0, 3999), max_size=40), max_size=5), st.sampled_from([1, 2, 1024]))
def test_the_checksums_are_an_array_on_disk(tmp_path_factory, steps, window_pages):
    path = tmp_path_factory.mktemp("checks") / "c.0"
    files.create_sparse(path, 8 * PAGE)
    model = np.zeros(4096, np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "WINDOW_BYTES", window_pages * PAGE)
        for number, blocks in enumerate(steps, 1):
            blocks = np.array(sorted(blocks), np.int64)
            new = number * 10_000 + 2 * blocks.astype(np.uint64)
            assert checksums.mark_in_flux(path, blocks).tolist() == model[blocks].tolist()
            flux = np.where(model[blocks] == 0, model[blocks], model[blocks] | np.uint64(1))
            assert np.fromfile(path, np.uint64)[blocks].tolist() == flux.tolist()
            checksums.write_sums(path, blocks, new)
            model[blocks] = new
    assert np.fromfile(path, np.uint64).tolist() == model.tolist()


def test_zarr_reads_the_checksums(tmp_path):
    import shardemb

    with shardemb.open(tmp_path / "s") as store:
        table = store.create_table("t", num_embeddings=1000, embedding_dim=64)
        table.write([500], np.ones((1, 64), np.float32))
        store.commit()
    found = zarr.open_group(tmp_path / "s", mode="r")["t/checks"][:]
    assert np.flatnonzero(found).tolist() == [500 * 256 // PAGE]


def test_an_initial_array_has_checksums_too(tmp_path):
    import shardemb

    values = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
    with shardemb.open(tmp_path / "s") as store:
        store.create_table("t", num_embeddings=1000, embedding_dim=64, initializer=values)
        store.commit()
        assert store.verify() == []
    (path,) = (tmp_path / "s/t/rows").glob("c.*")
    with path.open("r+b") as file:
        file.seek(256 * 300)
        file.write(b"?")
    with shardemb.open(tmp_path / "s", "r") as store:
        assert [each.rows for each in store.verify()] == [(288, 304)]


def test_pages_of_rows():
    assert file_blocks.pages(np.array([0, 1, 2, 100]), 3000).tolist() == [0, 1, 2, 73]
    assert file_blocks.pages(np.empty(0, np.int64), 8).size == 0
    assert file_blocks.pages(np.array([1]), 3 * PAGE).tolist() == [3, 4, 5]


def test_a_file_is_read_past_the_page_cache(tmp_path):
    """Checksums are compared with the disk's content, not with a copy of it in memory."""
    path = tmp_path / "f"
    path.write_bytes(bytes(PAGE))
    with files.opened_direct(path) as descriptor:
        import fcntl

        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    assert flags & os.O_DIRECT or os.statvfs(path).f_bsize != PAGE
