"""Binary files of word2vec and models of fastText, against a reading word by word, gensim and the tool of fastText."""

import bz2
import gzip
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vector_files import model_of_fasttext, read, read_file

from shardemb.errors import SourceError
from shardemb.imports import binary
from shardemb.imports.binary import open_fasttext_binary, open_word2vec_binary
from shardemb.imports.blocks import ReadOptions

TOKENS = ["", "\u00a0", "\x85", "a\tb", "a\nb", "naïve", "東京", "\0", "\r", "</s>", "the", "x" * 1000, "the"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "words.bin"


def numbers(count, dim, seed=0):
    """Float32 with any bits but those of NaN and infinity: blanks and newlines among their bytes."""
    rows = np.random.default_rng(seed).integers(0, 2**32, (count, dim), np.uint32).view(np.float32)
    rows[~np.isfinite(rows)] = 0
    rows.flat[:2] = np.frombuffer(b"    \n\n\n\n", np.float32)[: rows.size]
    return rows


def file_of(tokens, rows, end="\n", kind="<f4"):
    parts = [f"{len(rows)} {rows.shape[1]}\n".encode()]
    for token, row in zip(tokens, rows, strict=True):
        parts.append(token.encode() + b" " + row.astype(kind).tobytes() + end.encode())
    return b"".join(parts)


def assert_same(got, tokens, rows):
    assert got[0] == tokens
    np.testing.assert_array_equal(got[1].view(np.uint32), rows.view(np.uint32))


# ---- word2vec ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("dim", [1, 3, 300])
def test_word2vec_with_and_without_newlines_behind_rows(path, dim, end):
    rows = numbers(len(TOKENS), dim)
    data = file_of(TOKENS, rows, end)
    assert_same(read_file(open_word2vec_binary, path, data), TOKENS, rows)
    assert_same(read_file(open_word2vec_binary, path, data.removesuffix(b"\n")), TOKENS, rows)
    for pack in (gzip.compress, bz2.compress):
        assert_same(read_file(open_word2vec_binary, path, pack(data)), TOKENS, rows)


@pytest.mark.parametrize("chunk", [1100, 2000, 10_000])
def test_rows_are_cut_anywhere(path, monkeypatch, chunk):
    monkeypatch.setattr(binary, "CHUNK", chunk)
    tokens = TOKENS * 10
    rows = numbers(len(tokens), 5)
    for end in ("", "\n"):
        assert_same(read_file(open_word2vec_binary, path, file_of(tokens, rows, end)), tokens, rows)


def test_what_a_word2vec_source_says_about_itself(path):
    path.write_bytes(file_of(TOKENS, numbers(len(TOKENS), 4)))
    with open_word2vec_binary(path, ReadOptions()) as source:
        assert (source.format, source.name, source.dim) == ("word2vec-binary", str(path), 4)
        assert (source.num_rows, source.total) == (len(TOKENS), path.stat().st_size)
        assert (source.dtype, source.key_type, source.unit) == ("float32", "string", "byte")
    path.write_bytes(gzip.compress(path.read_bytes()))
    with open_word2vec_binary(path, ReadOptions()) as source:
        assert (source.num_rows, source.total) == (None, path.stat().st_size)


@pytest.mark.parametrize("limit", [0, 1, 5, 100])
def test_a_limit(path, limit):
    rows = numbers(len(TOKENS), 4)
    path.write_bytes(file_of(TOKENS, rows))
    assert_same(read_file(open_word2vec_binary, path, limit=limit), TOKENS[:limit], rows[:limit])


def test_rows_beyond_those_that_the_header_promises_are_not_read(path):
    data = file_of(["a", "b"], numbers(2, 2)) + b"something else"
    assert read_file(open_word2vec_binary, path, data)[0] == ["a", "b"]
    assert read_file(open_word2vec_binary, path, b"0 5\nsomething else")[0] == []


def test_tokens_that_are_not_utf8(path):
    data = b"2 1\na 1234b\xe4 1234"
    with pytest.raises(SourceError, match=r"words.bin, byte 13 \(row 1\): the token b'b\\xe4' is not UTF-8"):
        read_file(open_word2vec_binary, path, data)
    assert read_file(open_word2vec_binary, path, unicode_errors="ignore")[0] == ["a", "b"]
    assert read_file(open_word2vec_binary, path, unicode_errors="replace")[0] == ["a", "b\ufffd"]


def test_memory_beside_the_rows_is_bounded(path, monkeypatch):
    monkeypatch.setattr(binary, "CHUNK", 2**17)
    path.write_bytes(gzip.compress(b"9 3\n" + bytes(2**24), 1))
    with pytest.raises(SourceError, match=r"byte 4 \(row 0\): no blank within 65,536 bytes"):
        read_file(open_word2vec_binary, path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "words.bin: is empty"),
        (b"the 1 2\n", "line 1: begins with b'the 1 2'"),
        (b"1 99999999\n", "line 1: rows of 99,999,999 values; tables have 1 to 65,536"),
        (b"9223372036854775807 1\na 1234", "promises 9,223,372,036,854,775,807 rows of at least 5 bytes"),
        (b"2 1\na 1234b 123", r"byte 10 \(row 1\): the file ends within a row, but line 1 promises 2 rows"),
        (b"2 1\na 1234bcdefg", r"byte 10 \(row 1\): the file ends within a row"),
        (b"1 1\na " + struct.pack("<f", np.nan), r"byte 6 \(row 0\): value 1 is nan, and not finite"),
        (b"1 2\na " + struct.pack("<2f", 1, -np.inf), r"byte 6 \(row 0\): value 2 is -inf"),
        (b"PK\3\4", "is a zip archive"),
        (b"2 3\nthe 0.25 -0.5 1e-3\nof 1 2 3 \n", "line 2: the rows are text: the format is word2vec-text"),
    ],
)
def test_refusals_say_where_and_what(path, data, message):
    with pytest.raises(SourceError, match=message):
        read_file(open_word2vec_binary, path, data)


@pytest.mark.parametrize("dim", [1, 2, 50])
@pytest.mark.parametrize("count", [1, 2, 100])
@pytest.mark.parametrize("end", ["", "\n"])
def test_float64_is_told_from_the_size(path, count, dim, end):
    rows = np.random.default_rng(count).normal(size=(count, dim))
    tokens = [f"word{number}" for number in range(count)]
    with pytest.raises(SourceError, match="values are float64.*save the vectors as float32"):
        read_file(open_word2vec_binary, path, file_of(tokens, rows, end, "<f8"))
    assert_same(
        read_file(open_word2vec_binary, path, file_of(tokens, rows.astype(np.float32), end)),
        tokens,
        rows.astype(np.float32),
    )


def test_a_value_of_digits_is_not_taken_for_text(path):
    assert_same(
        read_file(open_word2vec_binary, path, b"1 1\na 1 23"),
        ["a"],
        np.frombuffer(b"1 23", "<f4")[np.newaxis],
    )


def test_long_tokens_are_not_taken_for_float64(path):
    tokens = [f"a/path/of/a/document/{number}" for number in range(100)]
    rows = numbers(100, 2)
    assert_same(read_file(open_word2vec_binary, path, file_of(tokens, rows)), tokens, rows)


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_is_written_is_read(tmp_path_factory, data):
    token = st.text(st.characters(codec="utf-8", exclude_characters=" "), max_size=8).map(
        lambda each: each.lstrip("\n")
    )
    tokens = data.draw(st.lists(token, max_size=30))
    rows = numbers(len(tokens), data.draw(st.integers(1, 5)), seed=len(tokens))
    path = tmp_path_factory.getbasetemp() / "written"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binary, "CHUNK", data.draw(st.sampled_from([64, 300, 2**20])))
        got = read_file(
            open_word2vec_binary, path, file_of(tokens, rows, data.draw(st.sampled_from(["", "\n"])))
        )
    assert_same(got, tokens, rows)


WORD2VEC = file_of(["the", "of", "ä", ""], np.arange(8, dtype=np.float32).reshape(4, 2))
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=3)), max_size=6)


def changed(data, changes):
    for share, gone, new in changes:
        at = int(share * len(data))
        data = data[:at] + new + data[at + gone :]
    return data


def reference_rows_in(data, nbytes, count):
    """Rows of a token, a blank and `nbytes` of values, found one by one in Python, and where the last one ends."""
    found, at = [], 0
    for _ in range(count):
        blank = data.find(b" ", at, at + binary.TOKEN_BYTES)
        if blank < 0 or blank + 1 + nbytes > len(data):
            break
        found.append((data[at:blank].lstrip(b"\n"), blank + 1, data[blank + 1 : blank + 1 + nbytes]))
        at = blank + 1 + nbytes
    return found, at


@settings(max_examples=300)
@given(
    data=st.lists(st.sampled_from([b" ", b"\n", b"a", b"\xff", b"bc d", b"12345678"]), max_size=40).map(
        b"".join
    ),
    nbytes=st.sampled_from([4, 8, 12]),
    count=st.integers(0, 20),
    longest=st.sampled_from([1, 3, 2**16]),
)
def test_rows_in_any_bytes_are_those_that_python_finds(data, nbytes, count, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binary, "TOKEN_BYTES", longest)
        expected, end = reference_rows_in(data, nbytes, count)
        tokens, starts, values, found_end = binary.rows_in(data, nbytes, count)
    tokens.validate(full=True)
    assert list(zip(tokens.to_pylist(), starts, map(bytes, values), strict=True)) == expected
    assert found_end == end


def read_or_refused(opener, path, data, **options):
    try:
        keys, rows = read_file(opener, path, data, **options)
    except SourceError as error:
        assert str(path) in str(error)
    else:
        assert np.isfinite(rows).all()
        assert len(keys) in (0, len(rows))


@settings(max_examples=150)
@given(changes=CHANGES, errors=st.sampled_from(["strict", "replace"]))
def test_damaged_word2vec_is_read_or_refused(tmp_path_factory, changes, errors):
    path, data = tmp_path_factory.getbasetemp() / "damaged", changed(WORD2VEC, changes)
    for packed in (data, gzip.compress(data)):
        read_or_refused(open_word2vec_binary, path, packed, unicode_errors=errors)


@settings(max_examples=100)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random"
    for each in (data, b"3 1\n" + data, b"\xba\x16\x4f\x2f\x0c\0\0\0" + data):
        read_or_refused(open_word2vec_binary, path, each)
        read_or_refused(open_fasttext_binary, path, each)


@pytest.mark.parametrize("dim", [1, 25])
def test_word2vec_as_gensim_writes_and_reads_it(path, dim):
    models = pytest.importorskip("gensim.models")
    tokens = [token for token in dict.fromkeys(TOKENS) if token]
    rows = numbers(len(tokens), dim, seed=1)
    vectors = models.KeyedVectors(dim)
    vectors.add_vectors(tokens, rows)
    vectors.save_word2vec_format(str(path), binary=True)
    got = read_file(open_word2vec_binary, path)
    assert_same(got, tokens, rows)
    theirs = models.KeyedVectors.load_word2vec_format(str(path), binary=True)
    assert_same(got, theirs.index_to_key, theirs.vectors)


# ---- fastText ---------------------------------------------------------------------------------------------------

WORDS = ["</s>", "the", "naïve", "東京", "a", "", "naïvenaïve", "\u00a0", "aaaaaaaaaa", "x" * 100, "né"]
WORDS = [word.encode() for word in WORDS] + [
    b"\xff",
    b"a\xe4\xb8",
    b"\x80\x80b",
]  # as the tool cuts long ones


def matrix_of(count, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def reference_rows(word, buckets, shortest, longest):
    """The rows of the n-grams of a word, character by character, as fastText has it (Dictionary::computeSubwords)."""
    if word == b"</s>":
        return []
    characters = []
    for byte in b"<" + word + b">":
        if byte & 0xC0 == 0x80:
            characters[-1] += bytes([byte])
        else:
            characters.append(bytes([byte]))
    rows = []
    for start in range(len(characters)):
        for length in range(1, longest + 1):
            end = start + length
            if end > len(characters) or length < shortest:
                continue
            if length == 1 and (start == 0 or end == len(characters)):
                continue
            value = 2166136261
            for byte in b"".join(characters[start:end]):
                signed = byte | 0xFFFFFF00 if byte >= 128 else byte
                value = ((value ^ signed) * 16777619) % 2**32
            rows.append(value % buckets)
    return rows


def reference_vectors(words, matrix, shortest, longest):
    buckets, vectors = len(matrix) - len(words), []
    for number, word in enumerate(words):
        ngrams = reference_rows(word, buckets, shortest, longest)
        vectors.append(matrix[[number, *(len(words) + row for row in ngrams)]].mean(axis=0, dtype=np.float64))
    return np.array(vectors)


@pytest.mark.parametrize("ngrams", [(3, 6), (1, 1), (1, 3), (0, 2), (2, 40), (5, 4), (3, 0), (0, 0), (2, -1)])
@pytest.mark.parametrize("labels", [(), (b"__label__a", b"__label__b")])
def test_a_word_is_the_mean_of_its_rows(path, ngrams, labels):
    matrix = matrix_of(len(WORDS) + 97, 7)
    path.write_bytes(model_of_fasttext(WORDS, matrix, ngrams=ngrams, labels=labels))
    keys, rows = read_file(open_fasttext_binary, path, unicode_errors="replace")
    assert keys == [word.decode(errors="replace") for word in WORDS]
    np.testing.assert_allclose(rows, reference_vectors(WORDS, matrix, *ngrams), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("words", "gathered"), [(10, 28), (130, 28), (130, 300), (2**16, 2000)])
def test_words_and_rows_are_cut_anywhere(path, monkeypatch, words, gathered):
    monkeypatch.setattr(binary, "_WORDS", max(words, 130))
    monkeypatch.setattr(binary, "_GATHERED", gathered)
    matrix = matrix_of(len(WORDS) + 97, 7)
    path.write_bytes(model_of_fasttext(WORDS, matrix, ngrams=(2, 4)))
    _, rows = read_file(open_fasttext_binary, path, unicode_errors="ignore")
    np.testing.assert_allclose(rows, reference_vectors(WORDS, matrix, 2, 4), rtol=1e-5, atol=1e-6)


@settings(max_examples=60)
@given(
    words=st.lists(st.binary(max_size=12).map(lambda each: each.replace(b"\0", b"")), min_size=1, max_size=8),
    ngrams=st.tuples(st.integers(0, 4), st.integers(0, 7)),
    buckets=st.integers(1, 2**31 - 1),
)
def test_ngrams_of_any_bytes(words, ngrams, buckets):
    model = binary.Model(1, buckets, *ngrams, len(words), 0, 0)
    rows, counts = binary.ngram_rows(words, model)
    expected = [reference_rows(word, buckets, *ngrams) for word in words]
    assert counts.tolist() == list(map(len, expected))
    assert rows.tolist() == [row for each in expected for row in each]


def test_a_mean_that_is_too_large_is_refused_by_its_word(path):
    matrix = np.full((22, 2), 3e38, np.float32)
    path.write_bytes(model_of_fasttext([b"the", b"of"], matrix))
    with pytest.raises(SourceError, match=r"\(word 0\): value 1 is inf, and not finite"):
        read_file(open_fasttext_binary, path)


def test_what_a_fasttext_source_says_about_itself(path):
    words = [b"the", b"of"]
    path.write_bytes(model_of_fasttext(words, matrix_of(12, 3)))
    with open_fasttext_binary(path, ReadOptions()) as source:
        assert (source.format, source.name, source.dim) == ("fasttext-binary", str(path), 3)
        assert (source.num_rows, source.total, source.unit, source.key_type) == (2, 2, "row", "string")
    with open_fasttext_binary(path, ReadOptions(member="input")) as source:
        assert (source.format, source.name, source.dim) == ("fasttext-binary", str(path), 3)
        assert (source.num_rows, source.total, source.unit, source.key_type) == (12, 12, "row", None)


def test_the_matrix_of_all_rows(path, monkeypatch):
    matrix = matrix_of(1000, 3)
    path.write_bytes(model_of_fasttext(WORDS, matrix))
    monkeypatch.setattr(binary, "block_rows", lambda dim: 130)
    keys, rows = read_file(open_fasttext_binary, path, member="input")
    assert keys == []
    np.testing.assert_array_equal(rows, matrix)
    with open_fasttext_binary(path, ReadOptions(member="input")) as source:
        for start, stop in ((0, 0), (5, 6), (990, 1000), (0, 1000)):
            np.testing.assert_array_equal(source.read(start, stop), matrix[start:stop])


@pytest.mark.parametrize("limit", [0, 1, 5, 10**6])
def test_a_limit_of_words_and_of_rows(path, monkeypatch, limit):
    monkeypatch.setattr(binary, "_WORDS", 130)
    matrix = matrix_of(len(WORDS) + 50, 3)
    path.write_bytes(model_of_fasttext(WORDS, matrix, ngrams=(2, 3)))
    keys, rows = read_file(open_fasttext_binary, path, limit=limit, unicode_errors="ignore")
    assert len(keys) == min(limit, len(WORDS))
    np.testing.assert_allclose(rows, reference_vectors(WORDS, matrix, 2, 3)[:limit], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        read_file(open_fasttext_binary, path, limit=limit, member="input")[1], matrix[:limit]
    )


def test_supervised_models_of_version_11_have_no_ngrams(path):
    matrix = matrix_of(len(WORDS) + 50, 3)
    for changes, longest in (({"version": 11, "model": 3}, 0), ({"version": 11}, 6), ({"model": 3}, 6)):
        path.write_bytes(model_of_fasttext(WORDS, matrix, **changes))
        _, rows = read_file(open_fasttext_binary, path, unicode_errors="ignore")
        np.testing.assert_allclose(rows, reference_vectors(WORDS, matrix, 3, longest), rtol=1e-5, atol=1e-6)


def test_a_model_without_buckets(path):
    matrix = matrix_of(len(WORDS), 3)
    path.write_bytes(model_of_fasttext(WORDS, matrix, ngrams=(0, 0), labels=(b"__label__x",)))
    np.testing.assert_array_equal(read_file(open_fasttext_binary, path, unicode_errors="ignore")[1], matrix)


REFUSED_MODELS = {
    "magic": ({"magic": 7}, "byte 0: this is no model of fastText"),
    "older": ({"version": 10}, "byte 4: a model of fastText of version 10; only 11 and 12 are read"),
    "newer": ({"version": 13}, "version 13"),
    "quantised": ({"quantised": True}, r"byte [\d,]+: the model is quantised \(.ftz\).*use the model from before"),
    "quantised and pruned": ({"quantised": True, "pruned": 3}, "the model is quantised"),
    "pruned": ({"pruned": 3}, "n-grams were left out"),
    "pruned of all": ({"pruned": 0}, "n-grams were left out"),
    "dim": ({"dim": 4}, "a matrix of 64 x 3 for 14 words, 50 buckets of n-grams and vectors of 4"),
    "dims": ({"dim": 2**30, "columns": 2**30}, "a matrix of 64 x 1,073,741,824"),
    "no dim": ({"dim": 0, "columns": 0}, "a matrix of 64 x 0"),
    "buckets": ({"bucket": 49}, "a matrix of 64 x 3 for 14 words, 49 buckets"),
    "rows": ({"rows": 2**60, "bucket": 2**31 - 1}, "a matrix of 1,152,921,504,606,846,976 x 3"),
    "more rows": ({"rows": 14 + 2**31 - 1, "bucket": 2**31 - 1}, "2,147,483,661 x 3 values should follow, and"),
    "no buckets": ({"rows": 14, "bucket": 0}, "n-grams of 6 characters in 0 buckets"),
    "ngrams": ({"maxn": 2**31 - 1}, "n-grams of 2,147,483,647 characters"),
    "words": ({"size": 2**31 - 1, "nwords": 2**31 - 1}, "a dictionary of 2,147,483,647 entries"),
    "one more word": ({"size": 15, "nwords": 15}, "entry|a matrix"),
    "one word less": ({"nwords": 13, "nlabels": 1}, "entry 13 of the dictionary is not what it should be"),
    "sizes": ({"size": 13}, "a dictionary of 13 entries, 14 words and 0 labels"),
    "negative": ({"nlabels": -14, "size": 0}, "a dictionary of 0 entries, 14 words and -14 labels"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED_MODELS.values(), ids=list(REFUSED_MODELS))
def test_models_that_are_refused(path, changes, message):
    data = model_of_fasttext(WORDS, matrix_of(len(WORDS) + 50, 3), **changes)
    for member in (None, "input"):
        with pytest.raises(SourceError, match=message):
            read_file(open_fasttext_binary, path, data, member=member, unicode_errors="ignore")


def test_a_model_that_is_cut_off_anywhere_is_refused(path):
    whole = model_of_fasttext([b"the", b"of"], matrix_of(5, 2))
    end = len(whole) - 17 - 16  # of the matrix; what is behind it is not needed
    for length in range(end):
        with pytest.raises(SourceError, match="words.bin, byte"):
            read_file(open_fasttext_binary, path, whole[:length])
    assert read_file(open_fasttext_binary, path, whole[:end])[0] == ["the", "of"]


def test_values_and_words_that_are_refused(path):
    matrix = matrix_of(12, 3)
    matrix[1, 2] = np.nan
    path.write_bytes(model_of_fasttext([b"the", b"of"], matrix))
    with pytest.raises(SourceError, match=r"words.bin, before byte [\d,]+ \(word 1\): value 3 is nan"):
        read_file(open_fasttext_binary, path)
    with pytest.raises(SourceError, match="words.bin, row 1 of the input matrix: value 3 is nan"):
        read_file(open_fasttext_binary, path, member="input")
    path.write_bytes(model_of_fasttext([b"the", b"\xff"], matrix_of(12, 3)))
    with pytest.raises(SourceError, match=r"\(word 1\): the token b'\\xff' is not UTF-8"):
        read_file(open_fasttext_binary, path)


def test_options_and_files_that_are_refused(path):
    data = model_of_fasttext([b"the"], matrix_of(5, 2))
    with pytest.raises(SourceError, match="words.bin: there is no member 'output': 'input' is"):
        read_file(open_fasttext_binary, path, data, member="output")
    for opener in (open_fasttext_binary, open_word2vec_binary):
        with pytest.raises(SourceError, match="columns=.* means nothing"):
            read_file(opener, path, columns=("a",))
    with pytest.raises(SourceError, match="member=.* means nothing"):
        read_file(open_word2vec_binary, path, member="a")
    with pytest.raises(SourceError, match="is compressed with gzip, but its rows are read in any order"):
        read_file(open_fasttext_binary, path, gzip.compress(data))


@settings(max_examples=150)
@given(changes=CHANGES, member=st.sampled_from([None, "input"]))
def test_damaged_models_are_read_or_refused(tmp_path_factory, changes, member):
    data = changed(model_of_fasttext(WORDS[:6], matrix_of(10, 2), labels=[b"__label__"]), changes)
    read_or_refused(open_fasttext_binary, tmp_path_factory.getbasetemp() / "model", data, member=member)


# ---- against others


def test_fasttext_as_gensim_reads_it():
    gensim = pytest.importorskip("gensim.models.fasttext")
    folder = Path(gensim.__file__).parents[1] / "test" / "test_data"
    seen = 0
    for path in (
        folder / name for name in ("lee_fasttext_new.bin", "crime-and-punishment.bin", "toy-model.bin")
    ):
        if not path.exists():
            continue
        seen += 1
        theirs = gensim.load_facebook_vectors(str(path))
        keys, rows = read_file(open_fasttext_binary, path)
        assert keys == theirs.index_to_key
        ours = [number for number, key in enumerate(keys) if key != "</s>"]  # it gives this one n-grams
        np.testing.assert_allclose(rows[ours], theirs.vectors[ours], rtol=1e-5, atol=1e-6)
        _, matrix = read_file(open_fasttext_binary, path, member="input")
        np.testing.assert_array_equal(matrix, np.concatenate([theirs.vectors_vocab, theirs.vectors_ngrams]))
    assert seen or not folder.exists()


@pytest.mark.parametrize("command", ["skipgram", "cbow -maxn 0", "skipgram -minn 1 -maxn 3"])
def test_fasttext_as_its_own_tool_prints_it(tmp_path, command):
    tool = shutil.which("fasttext") or pytest.skip("fasttext is not installed")
    text = tmp_path / "text"
    text.write_text("the naïve 東京 fox jumps over é the lazy dog " * 30 + "\n")
    command = f"{command} -input {text} -output {tmp_path}/m -minCount 1 -dim 8 -bucket 500 -thread 1"
    subprocess.run([tool, *command.split()], check=True, capture_output=True)
    keys, rows = read_file(open_fasttext_binary, tmp_path / "m.bin")
    printed = subprocess.run(
        [tool, "print-word-vectors", str(tmp_path / "m.bin")],
        input="\n".join(keys), capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert [line.split(" ")[0] for line in printed] == keys
    theirs = np.array([line.split()[1:] for line in printed], np.float32)
    np.testing.assert_allclose(rows, theirs, rtol=1e-3, atol=1e-5)  # five digits are printed


def test_a_file_that_is_closed_meanwhile(path):
    path.write_bytes(model_of_fasttext([b"the"], matrix_of(5, 2)))
    with open_fasttext_binary(path, ReadOptions(member="input")) as source:
        pass
    assert len(read(source)[1]) == 5  # it is mapped, and no thread that still reads is harmed
    assert os.path.exists(path)
