"""Words and vectors as text: what real files of word2vec, GloVe and fastText have in them, and what is refused."""

import bz2
import gzip
import random
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vector_files import read, read_file

from shardemb.errors import SourceError
from shardemb.imports import text
from shardemb.imports.blocks import ReadOptions
from shardemb.imports.text import open_fasttext_text, open_glove, open_word2vec_text

ODD = [
    "",
    "\u00a0",
    "\x85",
    "\u3000",
    "a\u00a0b",
    "\u2028",
    "a\tb",
    '"',
    '"a"',
    '""',
    "'",
    "\\",
    "#",
    ",",
    "nan",
    "1",
    "-0.5",
]
ODD += [
    "naïve",
    "東京",
    "\0",
    "a\rb",
    "\r",
    ". . .",
    "at name@domain.com",
    " ",
    "  ",
    "x 1\ry",
    "\ufeff",
    "</s>",
    "NULL",
]
"""Tokens that one or another reader of such files stumbles over."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "words.txt"


def lines_of(tokens, rows, end="\n"):
    return "".join(
        f"{token} {' '.join(map(repr, row))}{end}" for token, row in zip(tokens, rows.tolist(), strict=True)
    )


def with_header(tokens, rows, end="\n"):
    return f"{len(rows)} {rows.shape[1]}{end}{lines_of(tokens, rows, end)}".encode()


def numbers(count, dim, seed=0):
    """Float32 of all magnitudes, and their extremes."""
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(count, dim)) * 10.0 ** rng.integers(-30, 30, (count, dim))).astype(np.float32)
    rows.flat[:6] = np.array([0, -0.0, 3.4028235e38, -1.1754944e-38, 1e-45, 1], np.float32)[: rows.size]
    return rows


def assert_same(got, tokens, rows):
    assert got[0] == tokens
    np.testing.assert_array_equal(got[1].view(np.uint32), rows.view(np.uint32))


# ---- what is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", " \n", " \r\n", "  \n"])
@pytest.mark.parametrize("dim", [1, 3, 300])
def test_all_tokens_and_every_end_of_a_line(path, dim, end):
    rows = numbers(len(ODD), dim)
    assert_same(read_file(open_word2vec_text, path, with_header(ODD, rows, end)), ODD, rows)
    assert_same(read_file(open_fasttext_text, path), ODD, rows)
    assert_same(read_file(open_glove, path, lines_of(ODD, rows, end).encode()), ODD, rows)


def test_the_smallest_file_that_has_a_row(path):
    assert_same(read_file(open_word2vec_text, path, b"1 1\n 1"), [""], np.array([[1]], np.float32))


def test_lines_that_end_differently(path):
    rows = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)
    data = b"a 1 2\nb 3 4 \nc 5 6  \r\nd 7 8\r\n"
    assert_same(read_file(open_glove, path, data), ["a", "b", "c", "d"], rows)


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_an_odd_token_among_ordinary_ones(path, odd):
    tokens = [odd, *(f"a{number}" for number in range(100)), odd, *(f"b{number}" for number in range(100))]
    for dim in (1, 3):
        rows = numbers(len(tokens), dim)
        assert_same(read_file(open_word2vec_text, path, with_header(tokens, rows)), tokens, rows)


@pytest.mark.parametrize("chunk", [40, 100, 1000])
def test_lines_are_cut_anywhere(path, monkeypatch, chunk):
    monkeypatch.setattr(text, "CHUNK", chunk)
    tokens = [f"word{number}" for number in range(50)] + ODD
    rows = numbers(len(tokens), 2)
    for end in ("\n", " \r\n"):
        assert_same(read_file(open_word2vec_text, path, with_header(tokens, rows, end)), tokens, rows)
        assert_same(read_file(open_glove, path, lines_of(tokens, rows, end).encode()), tokens, rows)


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lambda data: pa.compress(data, "zstd", asbytes=True)]
)
def test_compressed_files(path, pack):
    rows = numbers(len(ODD), 3)
    assert_same(read_file(open_word2vec_text, path, pack(with_header(ODD, rows))), ODD, rows)
    with open_word2vec_text(path, ReadOptions()) as source:
        assert source.num_rows is None  # what a header promises, only reading tells
        assert source.total == path.stat().st_size


def test_what_a_source_says_about_itself(path):
    path.write_bytes(with_header(["a", "b", "c"], numbers(3, 4)))
    for opener, form in ((open_word2vec_text, "word2vec-text"), (open_fasttext_text, "fasttext-text")):
        with opener(path, ReadOptions()) as source:
            assert (source.format, source.name, source.dim, source.num_rows) == (form, str(path), 4, 3)
            assert (source.dtype, source.key_type, source.unit) == ("float32", "string", "byte")
    path.write_text("a 1 2\n")
    with open_glove(path, ReadOptions()) as source:
        assert (source.format, source.dim, source.num_rows, source.total) == ("glove", 2, None, 6)


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n\n", b" \n \r\n"])
def test_the_last_newline_may_be_missing_or_not_alone(path, end):
    rows = np.array([[1, 2], [3, 4]], np.float32)
    assert_same(read_file(open_glove, path, b"a 1 2\nb 3 4" + end), ["a", "b"], rows)
    assert_same(read_file(open_word2vec_text, path, b"2 2\na 1 2\nb 3 4" + end), ["a", "b"], rows)
    # Short chunks: it is not known yet whether more lines follow the empty ones.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK", 7)
        assert_same(read_file(open_glove, path, b"a 1 2\nb 3 4" + end), ["a", "b"], rows)


def test_a_byte_order_mark_is_no_part_of_the_first_token(path):
    rows = np.array([[1]], np.float32)
    assert_same(read_file(open_glove, path, b"\xef\xbb\xbfa 1\n"), ["a"], rows)
    assert_same(read_file(open_word2vec_text, path, b"\xef\xbb\xbf1 1\na 1\n"), ["a"], rows)


def test_numbers_are_rounded_once_to_the_nearest_float32(path):
    # Half way between two float32 and a little more, which float64 does not hold: rounded twice, it would be 1.
    near = "1.00000005960464477539062500000000001"
    given = [near, "+0.5", "1e-60", "-1E-400", ".5", "5.", "7e-46", "8e-46", "00012.50"]
    expected = [1.0000001, 0.5, 0, -0.0, 0.5, 5, 0, 1e-45, 12.5]
    rows = np.array(expected, np.float32)[:, np.newaxis]
    tokens = [f"w{number}" for number in range(len(given))]
    data = "".join(f"{token} {number}\n" for token, number in zip(tokens, given, strict=True))
    assert_same(read_file(open_glove, path, data.encode()), tokens, rows)
    # As one of many lines they take another way.
    many = "".join(f"m{number} 1\n" for number in range(500))
    keys, more = read_file(open_glove, path, (many + data + many).encode())
    assert keys[500:-500] == tokens
    np.testing.assert_array_equal(more[500:-500].view(np.uint32), rows.view(np.uint32))


def test_rows_beyond_those_that_the_header_promises_are_not_read(path):
    got = read_file(open_word2vec_text, path, b"2 1\na 1\nb 2\nwhat this is, nobody knows\n")
    assert_same(got, ["a", "b"], np.array([[1], [2]], np.float32))
    assert read_file(open_word2vec_text, path, b"0 3\na b c\n")[0] == []


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 100])
def test_a_limit(path, limit):
    rows = numbers(3, 2)
    data = with_header(["a", "b", "c"], rows)
    assert_same(read_file(open_word2vec_text, path, data, limit=limit), ["a", "b", "c"][:limit], rows[:limit])
    with open_word2vec_text(path, ReadOptions(limit=limit)) as source:
        assert source.num_rows == min(limit, 3)
    data = data[data.index(b"\n") + 1 :]
    assert_same(read_file(open_glove, path, data, limit=limit), ["a", "b", "c"][:limit], rows[:limit])
    # What is behind it is not looked at.
    if limit < 3:
        data += b"broken\n"
        assert_same(read_file(open_glove, path, data, limit=limit), ["a", "b", "c"][:limit], rows[:limit])


def test_tokens_that_occur_twice_are_left_to_the_caller(path):
    assert read_file(open_glove, path, b"a 1\na 2\n")[0] == ["a", "a"]


def test_tokens_that_are_not_utf8(path):
    data = b"a 1\n\xe4\xb8 2\nb\xff 3\n"
    with pytest.raises(
        SourceError, match=r"words.txt, line 2 \(row 1\): the token b'\\xe4\\xb8' is not UTF-8"
    ):
        read_file(open_glove, path, data)
    assert read_file(open_glove, path, unicode_errors="replace")[0] == ["a", "\ufffd", "b\ufffd"]
    assert read_file(open_glove, path, unicode_errors="ignore")[0] == ["a", "", "b"]


def test_blocks_are_of_a_bounded_size(path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 1000)
    monkeypatch.setattr(text, "block_rows", lambda dim: 100)
    path.write_bytes(b"".join(b"w%d 1 2\n" % number for number in range(5000)))
    with open_glove(path, ReadOptions()) as source:
        sizes = [len(block.rows) for block in source.blocks()]
    assert sum(sizes) == 5000
    assert max(sizes) < 300
    assert min(sizes[:-1]) >= 100
    # Few rows with long tokens make blocks, too.
    monkeypatch.setattr(text, "block_rows", lambda dim: 10**6)
    monkeypatch.setattr(text, "_KEY_BYTES", 5000)
    with open_glove(path, ReadOptions()) as source:
        assert len(list(source.blocks())) > 5


# ---- what is refused --------------------------------------------------------------------------------------------

REFUSED_GLOVE = {
    b"": "words.txt, line 1: the file is empty",
    b"\n \n": "line 1: there is no row",
    b"word\n": "line 1: no number after a token and a blank",
    b"the\t1\t2\n": "line 1: no number after a token and a blank",
    b"a 1 2\nb 1\nc 1 2\n": r"line 2 \(row 1\): a token and 1 number, but rows have 2 numbers: b'b 1'",
    b"a 1 2\nb 1 2 3\n": r"line 2 \(row 1\): more than 2 numbers: b'b 1 2 3'",
    b"a 1 2\nb\n": r"line 2 \(row 1\): a token and 0 numbers",
    b"a 1 2\n\nb 1 2\n": r"line 2 \(row 1\): the line is empty",
    b"a 1 2\nb 1  2\n": r"line 2 \(row 1\): b'' is not a number",
    b"a 1 2\nb 1 2x\n": r"line 2 \(row 1\): b'2x' is not a number",
    b"a 1 2\nb 1 0x10\n": r"line 2 \(row 1\): b'0x10' is not a number",
    b"a 1 2\nb 1 1_0\n": r"line 2 \(row 1\): b'1_0' is not a number",
    b"a 1 2\nb 1,5 2\n": r"line 2 \(row 1\): b'1,5' is not a number",
    "a 1 2\nb 1 ٣\n".encode(): r"line 2 \(row 1\): .* is not a number",
    b"a 1 2\nb 1 nan\n": r"line 2 \(row 1\): value 2 is nan, and not finite",
    b"a 1 inf\nb 1 2\n": r"line 1 \(row 0\): value 2 is inf, and not finite",
    b"a 1 2\nb -Infinity 2\n": r"line 2 \(row 1\): value 1 is -inf, and not finite",
    b"a 1 2\nb 1 1e39\n": r"line 2 \(row 1\): value 2 is inf, and not finite",
    b"a 1 2\nb 1 +1e39\n": r"line 2 \(row 1\): value 2 is inf, and not finite",
    b"2 3\na 1 2 3\n": r"line 2 \(row 1\): more than 1 number \(is line 1 a header, and the format word2vec-text\?\)",
    b"\xff\xfea\0 \x001\0\n\0": "is in UTF-16",
    b"PK\3\4 1 2\n": "is a zip archive",
}
REFUSED_WORD2VEC = {
    b"": "words.txt: is empty",
    b"the 1 2\n": "line 1: begins with b'the 1 2', and not with how many rows and values there are",
    b"1 2 3\n": "line 1: begins with b'1 2 3'",
    b"-1 2\n": "line 1: begins with b'-1 2'",
    b"\n": "line 1: begins with b''",
    b"2 0\n": "line 1: rows of 0 values",
    b"1 65537\n": "line 1: rows of 65,537 values",
    b"3 2\n": "line 1: promises 3 rows of at least 5 bytes, but 0 bytes follow",
    b"9223372036854775807 65536\na 1 2\n": "line 1: promises 9,223,372,036,854,775,807 rows",
    b"3 1\na 0.25\nb 0.25\n": "line 4: the file ends after 2 rows, but line 1 promises 3: it is cut off",
    b"2 2\na 1 2\nb 1 nan\n": r"line 3 \(row 1\): value 2 is nan",
    b"2 2\na 1 2\nb 1\n           ": r"line 3 \(row 1\): a token and 1 number",
    b"2 1\na 1 2\nb 1 2\n": r"line 2 \(row 0\): more than 1 number: b'a 1 2'",
}


@pytest.mark.parametrize(
    ("opener", "data", "message"),
    [
        *((open_glove, *each) for each in REFUSED_GLOVE.items()),
        *((open_word2vec_text, *each) for each in REFUSED_WORD2VEC.items()),
    ],
)
def test_refusals_say_where_and_what(path, opener, data, message):
    with pytest.raises(SourceError, match=message):
        read_file(opener, path, data)


def test_a_bad_line_is_named_among_thousands(path, monkeypatch):
    lines = [b"w%d 1 2" % number for number in range(3000)]
    for bad, problem in (
        (b"x 1", "a token and 1 number"),
        (b"x 1 y", "b'y' is not"),
        (b"x 1 nan", "value 2 is nan"),
    ):
        for chunk in (1000, text.CHUNK):
            monkeypatch.setattr(text, "CHUNK", chunk)
            data = b"\n".join([*lines[:2345], bad, *lines[2345:]])
            with pytest.raises(SourceError, match=rf"line 2,346 \(row 2,345\): {problem}"):
                read_file(open_glove, path, data)
            with pytest.raises(SourceError, match=rf"line 2,347 \(row 2,345\): {problem}"):
                read_file(open_word2vec_text, path, b"3000 2\n" + data)


def test_options_without_a_use_are_refused(path):
    path.write_bytes(b"1 1\na 1\n")
    for opener in (open_glove, open_word2vec_text, open_fasttext_text):
        with pytest.raises(SourceError, match="words.txt: member='m' means nothing"):
            opener(path, ReadOptions(member="m"))
        with pytest.raises(SourceError, match="columns=.* means nothing"):
            opener(path, ReadOptions(columns=("c",)))


@pytest.mark.parametrize(
    "data", [bytes(2**25), b"\n" * 2**25, b"1 " * 2**24], ids=["zeros", "newlines", "numbers"]
)
def test_files_without_lines_take_bounded_memory(path, monkeypatch, data):
    monkeypatch.setattr(text, "LINE_BYTES", 2**20)
    monkeypatch.setattr(text, "CHUNK", 2**19)
    path.write_bytes(gzip.compress(b"5 3\na 1 2 3\n" + data, 1))
    del data
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=r"line 3 \(row 1\): no row ends within 1,048,576 bytes"):
            read_file(open_word2vec_text, path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# ---- against others ---------------------------------------------------------------------------------------------


TOKENS = st.one_of(
    st.sampled_from(ODD),
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=8),
)


@settings(max_examples=30)
@given(data=st.data())
def test_whatever_is_written_is_read(tmp_path_factory, data):
    tokens = data.draw(st.lists(TOKENS, min_size=1, max_size=30))
    # Not: a number behind a blank, which looks like one more of the row; and a mark before the first token.
    tokens = ["a", *(token for token in tokens if token.rpartition(" ")[2].strip("+-.0123456789eE"))]
    dim = data.draw(st.integers(1, 5))
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)
    count = len(tokens) * dim
    rows = np.array(data.draw(st.lists(values, min_size=count, max_size=count)), np.float32).reshape(-1, dim)
    end = data.draw(st.sampled_from(["\n", "\r\n", " \n"]))
    path = tmp_path_factory.mktemp("text") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK", data.draw(st.sampled_from([64, 300, 2**20])))
        assert_same(read_file(open_word2vec_text, path, with_header(tokens, rows, end)), tokens, rows)
        assert_same(read_file(open_glove, path, lines_of(tokens, rows, end).encode()), tokens, rows)


VALID = b"4 2\nthe 0.5 -1.25\nof 1e-3 2\n\xc3\xa4 3 4\n. . 5 6 \n"
BYTES = st.sampled_from([bytes([each]) for each in b"0123456789.eE+- \n\r\tnaif\0\xff\xc3\xa4x"])
CHANGE = st.tuples(st.integers(0, len(VALID)), st.integers(0, 3), st.binary(max_size=3) | BYTES)


@settings(max_examples=150)
@given(
    changes=st.lists(CHANGE, max_size=6),
    header=st.booleans(),
    errors=st.sampled_from(["strict", "replace"]),
)
def test_damaged_files_are_read_or_refused(tmp_path_factory, changes, header, errors):
    data = VALID if header else VALID[4:]
    for at, gone, new in changes:
        data = data[:at] + new + data[at + gone :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    for packed in (data, gzip.compress(data)):
        try:
            got = read_file(open_word2vec_text if header else open_glove, path, packed, unicode_errors=errors)
        except SourceError as error:
            assert str(path) in str(error)
        else:
            assert np.isfinite(got[1]).all()


@settings(max_examples=100)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random"
    for given_bytes in (data, b"1 2\n" + data):
        for opener in (open_glove, open_word2vec_text):
            try:
                read_file(opener, path, given_bytes)
            except SourceError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize("dim", [1, 25])
def test_what_gensim_writes_and_reads(path, dim):
    models = pytest.importorskip("gensim.models")
    tokens = [token for token in ODD if " " not in token and token.strip()]
    rows = numbers(len(tokens), dim, seed=1)
    vectors = models.KeyedVectors(dim)
    vectors.add_vectors(tokens, rows)
    vectors.save_word2vec_format(str(path), binary=False)
    got = read_file(open_word2vec_text, path)
    assert_same(got, tokens, rows)
    theirs = models.KeyedVectors.load_word2vec_format(str(path), binary=False)
    assert_same(got, theirs.index_to_key, theirs.vectors)
    vectors.save_word2vec_format(str(path), binary=False, write_header=False)
    assert_same(read_file(open_glove, path), tokens, rows)


def test_a_file_is_closed_by_its_source_and_by_a_refusal(path):
    path.write_bytes(b"a 1\n")
    with open_glove(path, ReadOptions()) as source:
        read(source)
    with pytest.raises(ValueError, match="closed"):
        next(source.blocks())
    # That no refusal leaves a file open, the warnings tell: they are errors.
    with pytest.raises(SourceError):
        open_word2vec_text(path, ReadOptions())


def test_a_wide_and_long_file(path):
    rng = random.Random(0)
    rows = np.random.default_rng(0).normal(size=(1000, 300)).astype(np.float32)
    tokens = [f"{rng.random():.5f}x" for _ in range(1000)]
    assert_same(read_file(open_word2vec_text, path, with_header(tokens, rows)), tokens, rows)


@pytest.mark.timeout(30)
def test_a_long_run_of_digits_is_looked_at_once(tmp_path):
    """And not once for each way to cut it in two."""
    token = b"a " + b"9" * 100_000 + b"x"
    data = b"2 2\n" + token + b" 1 2\nb 3 4\n"
    keys, rows = read_file(open_word2vec_text, tmp_path / "words.txt", data)
    assert keys == [token.decode(), "b"]
    assert rows.tolist() == [[1, 2], [3, 4]]
