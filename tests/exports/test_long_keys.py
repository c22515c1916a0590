"""Exports of keys of any length: their memory depends neither on the number of rows nor on how long keys are."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardemb
from shardemb.exports import arrow
from shardemb.exports.arrow import cut_by_bytes

ROWS, LENGTH = 10_000, 10_000
"""100 MB of keys, in one window of 65,536 rows."""


@given(
    st.lists(st.one_of(st.integers(0, 5), st.integers(0, 100)), max_size=60),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_ranges_are_as_large_as_they_may_be(nbytes, most, start):
    ranges = list(cut_by_bytes(start, np.array(nbytes, np.int64), most))
    assert [row for first, last in ranges for row in range(first, last)] == list(
        range(start, start + len(nbytes))
    )
    sums = [sum(nbytes[first - start : last - start]) for first, last in ranges]
    for (first, last), total in zip(ranges, sums, strict=True):
        assert total <= most or last - first == 1
    for (_, last), total in zip(ranges[:-1], sums, strict=False):
        assert total + nbytes[last - start] > most  # the next row would have been too much


KEYS = {
    "string": ["", "a", "é" * 40, "b" * 5000, "c", "d" * 70, "e" * 10_000, "f"],
    "bytes": [b"", b"a", b"\xff" * 80, b"b" * 5000, b"c", b"d" * 70, b"e" * 10_000, b"f"],
}


@pytest.fixture(params=KEYS)
def keyed(request, store, monkeypatch):
    """A table with keys of several lengths, one of which was removed; and its rows and keys."""
    monkeypatch.setattr(arrow, "MAX_BYTES", 4096)
    keys = KEYS[request.param]
    words = store.create_vocabulary("w", key_type=request.param, reserved=2)
    table = store.create_table(
        "w", vocabulary="w", embedding_dim=2, initializer=shardemb.initializers.Uniform(-1, 1)
    )
    words.add(keys)
    words.remove(keys[3:4])
    return table, {row: key for row, key in enumerate(keys, 2) if row != 5}


def test_row_groups_are_bounded_by_the_bytes_of_keys(keyed, tmp_path):
    table, keys = keyed
    for parts in (None, 3):
        report = table.export_parquet(tmp_path / f"{parts}", parts=parts)
        assert report.num_rows == len(keys)
        written = pa.concat_tables(map(pq.read_table, report.files))
        assert dict(zip(written["id"].to_pylist(), written["key"].to_pylist(), strict=True)) == keys
        for file, metadata in ((each, pq.read_metadata(each)) for each in report.files):
            for group in range(metadata.num_row_groups):
                lengths = [len(key.as_buffer()) for key in pq.ParquetFile(file).read_row_group(group)["key"]]
                assert sum(lengths) <= 4096 or len(lengths) == 1
    groups = pq.read_metadata(tmp_path / "None").num_row_groups
    assert groups == 3  # the rows before the long key, this one, and what follows


@pytest.mark.parametrize("stream", [
    lambda table: (table.to_arrow_batches(), "id"),
    lambda table: (table.vocabulary.to_arrow_batches(), "row"),
], ids=["table", "vocabulary"])  # fmt: skip
def test_batches_are_bounded_by_the_bytes_of_keys(keyed, stream):
    table, keys = keyed
    batches, name = stream(table)
    batches = list(batches)
    found = [
        (row, key)
        for batch in batches
        for row, key in zip(*map(pa.Array.to_pylist, (batch[name], batch["key"])), strict=True)
    ]
    assert found == list(keys.items())
    assert len(batches) == 3


def test_integers_and_short_keys_are_not_cut(store):
    """A batch is as large as without the rule."""
    store.create_vocabulary("w", key_type="int64").add(np.arange(70_000))
    table = store.create_table("w", vocabulary="w", embedding_dim=2)
    assert [batch.num_rows for batch in table.to_arrow_batches()] == [65_536, 4_464]


# ---- memory


def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this kernel does not report RssAnon")


@pytest.fixture(scope="module")
def long_keys(tmp_path_factory):
    """Path of a store with keys that do not compress, committed and closed."""
    path = tmp_path_factory.mktemp("long") / "store.zarr"
    with shardemb.open(path) as store:
        words = store.create_vocabulary("w", key_type="bytes")
        store.create_table("w", vocabulary="w", embedding_dim=4)
        for _ in range(ROWS // 2000):
            words.add([os.urandom(LENGTH) for _ in range(2000)])
        store.commit()
    return path


EXPORTS = {
    "file": lambda table, path: table.export_parquet(path),
    "parts": lambda table, path: table.export_parquet(path, parts=2),
    "stream": lambda table, path: sum(batch.num_rows for batch in table.to_arrow_batches()),
    "vocabulary": lambda table, path: sum(batch.num_rows for batch in table.vocabulary.to_arrow_batches()),
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_memory_is_bounded_by_bytes(long_keys, tmp_path, monkeypatch, export):
    """Many times `MAX_BYTES` of keys take a few times of it."""
    monkeypatch.setattr(arrow, "MAX_BYTES", 2**20)
    with shardemb.open(long_keys, mode="r", threads=2) as store:
        table, done, peak = store["w"], threading.Event(), [0]
        table.export_parquet(tmp_path / "first", rows=(0, 1))  # loads what it needs

        def watch():
            while not done.is_set():
                peak[0] = max(peak[0], anonymous_bytes())
                time.sleep(0.001)

        watcher, before = threading.Thread(target=watch), anonymous_bytes()
        watcher.start()
        try:
            export(table, tmp_path / "out")
        finally:
            done.set()
            watcher.join()
    assert peak[0] - before < ROWS * LENGTH / 2
