"""Tables from files: keys, duplicates, failures that leave nothing, memory that stays small."""

import contextlib
import gzip
import json
import subprocess
import sys

import numpy as np
import polars
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from support.model import assert_same_bits

import shardemb
from shardemb.cli import main
from shardemb.errors import SourceError, TableExistsError, VocabularyExistsError
from shardemb.imports import blocks
from shardemb.imports.arrays import ArraySource
from shardemb.optim import Adam
from shardemb.storage import files
from shardemb.store.importing import ImportReport


def values(count, dim=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def write_text(path, tokens, rows, header=True):
    lines = [f"{len(tokens)} {rows.shape[1]}"] * header
    lines += [" ".join([token, *map(str, row.tolist())]) for token, row in zip(tokens, rows, strict=True)]
    path.write_bytes(("\n".join(lines) + "\n").encode())


def is_empty(store):
    """There is nothing left of a failed import: the name can be used again."""
    return list(store) == [] and list(store.vocabularies) == [] and not store.has_changes


# ---- what becomes of a source -------------------------------------------------------------------------------------


def test_words_become_a_table_with_a_vocabulary_in_one_commit(tmp_path, path):
    tokens, rows = ["the", "of", "naïve", "new\u00a0york"], values(4)
    write_text(tmp_path / "words.txt", tokens, rows)
    with shardemb.open(path) as store:
        report = store.import_table("words", tmp_path / "words.txt", optimizer=Adam(), counters=True)
        assert report == ImportReport("words", "word2vec-text", 4, 3, 0)
        store.commit(step=1)
    with shardemb.open(path) as store:
        table = store["words"]
        assert list(table) == tokens
        assert_same_bits(table.lookup(tokens), rows)
        assert not table.state("exp_avg", tokens).any()
        table.update(["the"], np.ones((1, 3)))
        assert store.verify() == []
        store.rollback()


def test_rows_without_keys_become_a_plain_table(tmp_path, store):
    rows = values(1000).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    store.import_table("rows", tmp_path / "rows.npy")
    assert (store["rows"].dtype, store["rows"].shape) == ("float16", (1000, 3))
    assert_same_bits(store["rows"].lookup(np.arange(1000)), rows.astype(np.float32))
    store.import_table("wide", tmp_path / "rows.npy", dtype="float32", limit=10, rows_per_shard=1024)
    assert (store["wide"].dtype, store["wide"].shape) == ("float32", (10, 3))
    store.commit()


@pytest.mark.parametrize("of_file", [True, False])
def test_tokens_may_come_from_elsewhere(tmp_path, store, of_file):
    rows, tokens = values(5), ["a", "b", "c d", "é", "b"]
    np.save(tmp_path / "rows.npy", rows)
    (tmp_path / "tokens.txt").write_bytes(gzip.compress("\r\n".join([*tokens, ""]).encode()))
    report = store.import_table(
        "rows", tmp_path / "rows.npy", tokens=tmp_path / "tokens.txt" if of_file else tokens
    )
    assert (report.num_rows, report.duplicates) == (4, 1)
    assert_same_bits(store["rows"].lookup(tokens[:4]), rows[:4])
    store.commit()


@settings(max_examples=30)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(1, 40), st.data())
def test_the_first_of_several_rows_with_a_key_wins(new_store, tmp_path_factory, keys, size, data):
    """In streams and in files, whatever the blocks are, as a dict has it."""
    rows = values(len(keys), 2, len(keys))
    expected = {}
    for key, row in zip(keys, rows, strict=True):
        expected.setdefault(key, row)
    kind = pa.list_(pa.float32(), 2)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=kind)
    table = pa.table({"id": pa.array(keys, pa.int64()), "embedding": vectors})
    file = tmp_path_factory.mktemp("keys") / "rows.parquet"
    parquet.write_table(table, file, row_group_size=size)
    source = data.draw(
        st.sampled_from([file, pa.RecordBatchReader.from_batches(table.schema, table.to_batches(size))])
    )
    with pytest.MonkeyPatch.context() as patch, new_store() as store:
        patch.setattr(blocks, "BLOCK_BYTES", 8 * size)
        report = store.import_table("rows", source)
        assert (report.num_rows, report.duplicates) == (len(expected), len(keys) - len(expected))
        assert list(store["rows"]) == list(expected)
        assert_same_bits(store["rows"].lookup(list(expected)), np.stack(list(expected.values())))
        store.rollback()
        with (
            pytest.raises(SourceError, match="has come before")
            if report.duplicates
            else contextlib.nullcontext()
        ):
            store.import_table("rows", file, duplicates="error")
        store.rollback()


def test_frames_streams_and_folders(tmp_path, store):
    frame = polars.DataFrame({"token": ["a", "b"], "embedding": [[1.0, 2.0], [3.0, 4.0]]})
    assert store.import_table("frame", frame).num_rows == 2
    (tmp_path / "parts").mkdir()
    for number in range(3):
        frame.with_columns(token=polars.col("token") + str(number)).write_parquet(
            tmp_path / f"parts/{number}.parquet"
        )
    assert store.import_table("parts", tmp_path / "parts").num_rows == 6
    assert store["parts"].lookup(["b2"]).tolist() == [[3, 4]]
    nothing = pa.table({"embedding": pa.array([], pa.list_(pa.float32(), 2))})
    with pytest.raises(SourceError, match="no rows"):
        store.import_table("nothing", nothing)
    store.rollback()


def test_a_stream_without_a_length_is_counted(store):
    rows = values(300, 2)
    kind = pa.list_(pa.float32(), 2)
    batch = pa.record_batch(
        {"embedding": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=kind)}
    )
    reader = pa.RecordBatchReader.from_batches(batch.schema, iter([batch.slice(0, 100), batch.slice(100)]))
    assert store.import_table("rows", reader).num_rows == 300
    assert_same_bits(store["rows"].lookup(np.arange(300)), rows)
    store.rollback()


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def _damaged(path):
    lines = path.read_bytes().split(b"\n")
    return b"\n".join([*lines[:3], lines[3].rsplit(b" ", 1)[0], *lines[4:]])


BAD = {
    "a ragged row": (_damaged, {}, "line 4"),
    "a row too few": (lambda path: b"\n".join(path.read_bytes().split(b"\n")[:-2]) + b"\n", {}, "promises 8"),
    "a value that is none": (lambda path: path.read_bytes().replace(b"k3 ", b"k3 x"), {}, "line 5"),
    "NaN": (lambda path: b"1 2\nk 1 nan\n", {}, "not finite"),
    "no UTF-8": (lambda path: path.read_bytes().replace(b"k3", b"\xff\xfe"), {}, "not UTF-8"),
    "the same key twice": (
        lambda path: path.read_bytes().replace(b"k3", b"k2"),
        {"duplicates": "error"},
        "row 3",
    ),
    "too few tokens": (lambda path: path.read_bytes(), {"tokens": ["a"]}, "8 rows, and 1 token"),
    "another format": (lambda path: path.read_bytes(), {"format": "safetensors"}, "words.txt"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_source_leaves_nothing(tmp_path, store, what):
    damage, options, message = BAD[what]
    file = tmp_path / "words.txt"
    write_text(file, [f"k{i}" for i in range(8)], values(8))
    file.write_bytes(damage(file))
    with pytest.raises(SourceError, match=message) as caught:
        store.import_table("words", file, **options)
    assert "words.txt" in str(caught.value)
    assert is_empty(store)
    write_text(file, ["a"], values(1))
    store.import_table("words", file)
    store.rollback()


def test_names_that_are_taken_are_refused_before_anything_is_read(tmp_path, store):
    store.create_table("words", num_embeddings=3, embedding_dim=2)
    with pytest.raises(TableExistsError):
        store.import_table("words", tmp_path / "missing.txt")
    store.create_vocabulary("others", key_type="string")
    write_text(tmp_path / "words.txt", ["a"], values(1))
    with pytest.raises(VocabularyExistsError):
        store.import_table("others", tmp_path / "words.txt")
    with pytest.raises(FileNotFoundError):
        store.import_table("third", tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="duplicates must be"):
        store.import_table("third", tmp_path / "words.txt", duplicates="last")
    with pytest.raises(ValueError, match="format must be one of"):
        store.import_table("third", tmp_path / "words.txt", "docx")
    assert list(store) == ["words"]
    store.rollback()


@pytest.mark.parametrize("when", range(1, 40, 3))
def test_an_interrupt_anywhere_leaves_nothing_or_all(tmp_path, store, monkeypatch, when):
    write_text(tmp_path / "words.txt", [f"k{i}" for i in range(2000)], values(2000))
    real, calls = files.write, []

    def write(*arguments):
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", write)
        try:
            store.import_table("words", tmp_path / "words.txt")
        except KeyboardInterrupt:
            assert is_empty(store)
        else:
            assert len(store["words"]) == 2000
    store.rollback()


# ---- going on -----------------------------------------------------------------------------------------------------


def unfinished(store):
    return [each for each in (store.path / ".shardemb" / "rebuilt").glob("*") if each.is_dir()]


@pytest.fixture
def array(tmp_path):
    """A file of rows for six shards."""
    rows = values(6000, 8)
    np.save(tmp_path / "rows.npy", rows)
    return tmp_path / "rows.npy", rows


def interrupted(store, file, monkeypatch, when, error=KeyboardInterrupt):
    """Import until the shard number `when`, counted from 1, is about to be durable."""
    real, calls = files.sync, []

    def sync(descriptor, path):
        calls.append(path.parent.name == "rows")
        if sum(calls) == when:
            raise error
        real(descriptor, path)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(files, "sync", sync)
        store.import_table("rows", file, rows_per_shard=1024)


@pytest.mark.parametrize("reopens", [False, True])
@pytest.mark.parametrize("when", range(1, 7))
def test_an_interrupted_import_goes_on(path, array, monkeypatch, when, reopens):
    file, rows = array
    store, seen, real = shardemb.open(path), [], ArraySource.read
    interrupted(store, file, monkeypatch, when)
    assert is_empty(store)
    if reopens:  # as after a crash: what is left waits
        store.close()
        store = shardemb.open(path)

    def read(self, start, stop):
        seen.append((start, stop))
        return real(self, start, stop)

    monkeypatch.setattr(ArraySource, "read", read)
    progress = []
    store.import_table(
        "rows", file, rows_per_shard=1024, progress=lambda done, total: progress.append((done, total))
    )
    assert min(start for start, stop in seen if start < stop) == 1024 * (when - 1)
    assert (progress[0][0] >= 1024 * (when - 1), progress[-1]) == (True, (6000, 6000))
    assert_same_bits(store["rows"].lookup(np.arange(6000)), rows)
    store.commit()
    assert store.verify() == []
    assert unfinished(store) == []
    store.close()
    with shardemb.open(path, "r") as reader:
        assert_same_bits(reader["rows"].lookup(np.arange(6000)), rows)


CHANGED = {
    "the file": lambda store, file: np.save(file, values(6000, 8, 1)),
    "the commit": lambda store, file: store.commit(),
    "the limit": lambda store, file: {"limit": 5000},
    "the dtype": lambda store, file: {"dtype": "float16"},
}


@pytest.mark.parametrize("what", CHANGED)
def test_an_import_of_something_else_starts_over(store, array, monkeypatch, what):
    file, _ = array
    interrupted(store, file, monkeypatch, 3)
    assert len(unfinished(store)) == 1
    options = CHANGED[what](store, file)
    seen, real = [], ArraySource.read
    monkeypatch.setattr(ArraySource, "read", lambda self, *rows: seen.append(rows) or real(self, *rows))
    store.import_table("rows", file, rows_per_shard=1024, **(options if isinstance(options, dict) else {}))
    assert min(seen)[0] == 0
    assert unfinished(store) == []
    rows = np.load(file)[: len(store["rows"])]
    expected = rows.astype(np.float16).astype(np.float32) if what == "the dtype" else rows
    assert_same_bits(store["rows"].lookup(np.arange(len(rows))), expected)
    store.commit()


def test_of_a_bad_file_nothing_waits(store, array):
    file, rows = array
    rows[5500, 3] = np.nan
    np.save(file, rows)
    with pytest.raises((SourceError, ValueError), match="5500|finite"):
        store.import_table("rows", file, rows_per_shard=1024)
    assert is_empty(store)
    assert unfinished(store) == []


def test_memory_does_not_grow_with_the_file(tmp_path):
    """In a process of its own, of which other tests know nothing."""
    rows, dim = 1_200_000, 64  # 307 MB
    kind = pa.list_(pa.float32(), dim)
    with parquet.ParquetWriter(
        tmp_path / "rows.parquet", pa.schema({"id": pa.int64(), "embedding": kind})
    ) as writer:
        for start in range(0, rows, 50_000):
            some = pa.FixedSizeListArray.from_arrays(
                pa.array(np.random.default_rng(start).random(50_000 * dim, np.float32)), type=kind
            )
            writer.write_table(
                pa.table({"id": np.arange(start, start + 50_000), "embedding": some}, schema=writer.schema)
            )
    code = """
import sys, shardemb
from pathlib import Path
from shardemb.imports import blocks
blocks.BLOCK_BYTES = 2**22  # a few of those are far from the bound below, and from all of the file
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))
with shardemb.open(sys.argv[1], memory_budget=2**24) as store:
    store.import_table("few", sys.argv[2], limit=1000)
    before, most = anonymous(), 0
    def watch(done, total):
        global most
        most = max(most, anonymous())
    store.import_table("rows", sys.argv[2], progress=watch)
    store.commit()
print((most - before) // 1024)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "s"), str(tmp_path / "rows.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200  # MiB


# ---- on the command line ------------------------------------------------------------------------------------------


def test_the_command_commits_and_says_what_it_did(tmp_path):
    write_text(tmp_path / "words.txt", ["a", "b", "a"], values(3))
    command = ["import", str(tmp_path / "words.txt"), str(tmp_path / "s"), "words", "--quiet"]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.output) == (
        0,
        "words: 2 rows of 3 from word2vec-text, 1 duplicate left out\n",
    )
    done = CliRunner().invoke(
        main, [*command[:-2], "more", "--quiet", "--json", "--dtype", "bfloat16", "--limit", "1"]
    )
    assert json.loads(done.output) == {
        "table": "more", "format": "word2vec-text", "num_rows": 1, "embedding_dim": 3, "duplicates": 0,
    }  # fmt: skip
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "already has a table 'words'" in done.output
    with shardemb.open(tmp_path / "s", "r") as store:
        assert (store.last_commit.id, list(store)) == (2, ["words", "more"])
