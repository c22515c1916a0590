"""word2vec's formats: gensim reads them, every bit comes back, and what is no token is refused by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.exports import DIM, any_bits, keyed_table, nothing_left, plain_table, same_bits

import shardemb
from shardemb.exports import arrow, words


def read_text(path):
    """Read word2vec's text format, in the plainest way."""
    header, *lines = path.read_bytes().decode().split("\n")[:-1]
    tokens = [line.split(" ")[0] for line in lines]
    vectors = np.array([[np.float32(each) for each in line.split(" ")[1:]] for line in lines], np.float32)
    assert header == f"{len(lines)} {vectors.shape[1] if lines else DIM}"
    return tokens, vectors


def read_binary(path):
    """Read word2vec's binary format, in the plainest way."""
    data = path.read_bytes()
    end = data.index(b"\n")
    count, dim = map(int, data[:end].split())
    at, tokens, vectors = end + 1, [], []
    for _ in range(count):
        blank = data.index(b" ", at)
        tokens.append(data[at:blank].decode())
        vectors.append(np.frombuffer(data, "<f4", dim, blank + 1))
        at = blank + 1 + 4 * dim
    assert at == len(data)
    return tokens, np.array(vectors)


READ = {"w.vec": read_text, "w.txt": read_text, "w.bin": read_binary}


@pytest.fixture(params=READ)
def name(request):
    return request.param


@pytest.mark.parametrize("block_bytes", [words.TEXT_BYTES, 60])
def test_every_bit_comes_back_with_its_key(store, tmp_path, monkeypatch, name, block_bytes):
    monkeypatch.setattr(words, "TEXT_BYTES", block_bytes)
    monkeypatch.setattr(arrow, "MAX_BYTES", max(block_bytes, 200))
    table, keys, rows = keyed_table(store)
    report = table.export(tmp_path / name)
    assert (report.num_rows, report.files) == (8, (tmp_path / name,))
    assert report.nbytes == (tmp_path / name).stat().st_size
    tokens, vectors = READ[name](tmp_path / name)
    assert tokens == keys
    assert same_bits(vectors, rows)


def test_row_ids_are_tokens_where_there_are_no_keys(store, tmp_path, name):
    table, rows = plain_table(store)
    table.export(tmp_path / name, rows=(3, 1400))
    tokens, vectors = READ[name](tmp_path / name)
    assert tokens == [str(row) for row in range(3, 1400)]
    assert same_bits(vectors, rows[3:1400])


def test_integer_keys_and_narrow_rows(store, tmp_path, name):
    table, keys, rows = keyed_table(
        store, [2**62, -7, 0], (), "int64", dtype="bfloat16", optimizer=None, counters=False
    )
    table.export(tmp_path / name)
    tokens, vectors = READ[name](tmp_path / name)
    assert tokens == [str(key) for key in keys]
    assert same_bits(vectors, rows)


def test_gensim_reads_both(store, tmp_path):
    keyed_vectors = pytest.importorskip("gensim.models").KeyedVectors
    table, keys, rows = keyed_table(store)
    for name, binary in (("w.vec", False), ("w.bin", True)):
        table.export(tmp_path / name)
        read = keyed_vectors.load_word2vec_format(tmp_path / name, binary=binary)
        assert read.index_to_key == keys
        assert same_bits(read.vectors, rows)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_numbers_are_the_shortest_that_read_back(numbers):
    values = np.array(numbers, np.float32)
    texts = bytes(words.lines(values.reshape(-1, 1), " ")).decode().split("\n")[:-1]
    back = np.array([np.float32(text) for text in texts])
    np.testing.assert_array_equal(back, values)
    some = ~np.isnan(values)  # text has no sign of NaN
    np.testing.assert_array_equal(np.signbit(back[some]), np.signbit(values[some]))
    for text, value in zip(texts, values, strict=True):
        if np.isfinite(value):
            shortest = np.format_float_scientific(value, unique=True, trim="-")
            assert len(text.replace("-", "").replace(".", "").split("e")[0].strip("0")) <= len(
                shortest.replace("-", "").replace(".", "").split("e")[0].strip("0") or "0"
            )


@pytest.mark.parametrize("bad", ["New York", "a\nb", "", " "])
def test_what_is_no_token_is_refused_by_name_and_nothing_is_left(store, tmp_path, name, bad):
    table, _, _ = keyed_table(store, ["a", "b", bad, "c"], ())
    (tmp_path / name).write_text("of before")
    with pytest.raises(ValueError, match=r"token .* of row 4 is empty or has a blank") as raised:
        table.export(tmp_path / name)
    assert repr(bad) in str(raised.value)
    assert (tmp_path / name).read_text() == "of before"
    assert nothing_left(tmp_path, name)
    table.export(tmp_path / name, where=["a", "b", "c"])
    assert READ[name](tmp_path / name)[0] == ["a", "b", "c"]


def test_no_rows(store, tmp_path, name):
    table, _ = plain_table(store)
    assert table.export(tmp_path / name, rows=(5, 5)).num_rows == 0
    assert (tmp_path / name).read_bytes() == b"0 6\n"


def test_raw_bytes_are_no_numbers(store, tmp_path, name):
    table = store.create_table("t", num_embeddings=10, embedding_dim=4, dtype="raw")
    with pytest.raises(ValueError, match="holds raw bytes"):
        table.export(tmp_path / name)
    assert nothing_left(tmp_path)


def test_a_key_that_is_removed_meanwhile_is_noticed(store, tmp_path, monkeypatch):
    table, _, _ = keyed_table(store)
    with_keys = words.with_keys

    def late(source, rows):
        found = with_keys(source, rows)
        table.delete(["of"])
        return found

    monkeypatch.setattr(words, "with_keys", late)
    with pytest.raises(shardemb.ShardEmbError, match="keys were removed while it was exported"):
        table.export(tmp_path / "w.bin")
    assert nothing_left(tmp_path)


def test_lines_are_joined_at_once():
    rows = any_bits(100, 3)
    text = bytes(words.lines(rows, "\t", words.as_tokens(np.arange(100)))).decode()
    assert text.count("\n") == 100
    assert text.count("\t") == 300
