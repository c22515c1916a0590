"""The programs in ``examples/`` run, learn something, and continue where they stopped."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import shardemb

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def torch():
    """torch, whose random numbers go on afterwards as if nothing had been drawn."""
    module = pytest.importorskip("torch")
    with module.random.fork_rng():
        yield module


@pytest.fixture
def text(tmp_path):
    """Sentences about two subjects, which share no words."""
    rng = np.random.default_rng(0)
    subjects = [["sun", "rain", "wind", "cloud", "storm"], ["bread", "soup", "salt", "oven", "spoon"]]
    lines = [" ".join(rng.choice(subjects[n % 2], 8)) for n in range(6000)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join([*lines, "seldom"]))
    return path


def test_word_vectors(tmp_path, text):
    word_vectors = example("word_vectors")
    first = word_vectors.train(tmp_path / "vectors.zarr", [text])
    second = word_vectors.train(tmp_path / "vectors.zarr", [text], epochs=2)
    assert second.step > first.step > 0
    assert second.metadata == {"epochs": 2}
    table = pq.read_table(tmp_path / "vectors.zarr.parquet")
    vectors = dict(zip(table["key"].to_pylist(), np.array(table["embedding"].to_pylist()), strict=True))
    assert len(vectors) == 10  # without the one that is there once

    def likeness(one, other):
        return vectors[one] @ vectors[other] / np.linalg.norm(vectors[one]) / np.linalg.norm(vectors[other])

    assert likeness("sun", "rain") > 0.5 > likeness("sun", "bread")
    assert likeness("bread", "salt") > 0.5 > likeness("rain", "salt")


# ---- with torch, the tables in memory and on disk


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, of its own gradients
def test_recommender(torch, tmp_path):
    recommender = example("recommender")
    reached = [
        recommender.train(tables, steps=24, every=8, size=128, rows=300, held_out=8)[0]
        for tables in ("ram", tmp_path / "clicks.zarr")
    ]
    assert min(reached) > 0.55
    assert abs(reached[0] - reached[1]) < 0.1  # by other first rows, and an optimizer that adds up less
    with shardemb.open(tmp_path / "clicks.zarr", mode="r") as store:
        assert store.last_commit.step in (8, 16, 24)
        assert store["feature0"].step == store.last_commit.step  # what came after the best one was undone


def test_area_under_the_curve():
    auc = example("recommender").auc
    assert auc(np.array([0.1, 0.9, 0.4, 0.8]), np.array([0, 1, 1, 0])) == 3 / 4


def test_ngram_memory(torch, tmp_path, monkeypatch):
    """The text's next word follows from the last two, which the memory finds at once."""
    memory = example("ngram_memory")
    rng = np.random.default_rng(0)
    follows, words = rng.integers(0, 20, (20, 20)), [1, 2]
    for _ in range(8_000):
        words.append(follows[words[-2], words[-1]] if rng.random() < 0.9 else rng.integers(20))
    monkeypatch.setattr(memory, "text", lambda: np.array(words))
    for name, value in {"WORDS": 20, "DIM": 16, "LENGTH": 16, "MEMORY_LR": 0.1, "HELD_OUT": 4}.items():
        monkeypatch.setattr(memory, name, value)
    options = {"rows": 2000, "size": 8}
    store = str(tmp_path / "memory.zarr")
    losses = {name: memory.train(name, 40, **options)[0] for name in ("none", "ram")}
    memory.train(store, 20, **options)
    losses["disk"] = memory.train(store, 40, **options, cold=True)[0]  # goes on
    assert losses["ram"] < losses["none"] - 0.2
    assert losses["disk"] == pytest.approx(losses["ram"], abs=1e-3)


def test_knowledge_graph(torch, tmp_path):
    """Each of 60 entities has a successor, and a predecessor by another relation."""
    graphs = example("knowledge_graph")
    lines = ["head_id:token\trelation_id:token\ttail_id:token"]
    lines += [f"e{n}\tnext\te{(n + 1) % 60}\ne{(n + 1) % 60}\tlast\te{n}" for n in range(60)]
    (tmp_path / "graph").write_text("\n".join(lines))
    options = {"dim": 32, "batch": 64, "negatives": 32, "steps": 150}
    for product, least in (("complex", 0.5), ("distmult", 0.2)):
        reached = [
            graphs.train(tables, tmp_path / "graph", product=product, **options)[0]
            for tables in ("ram", tmp_path / "graph.zarr")
        ]
        assert min(reached) > least, product
    assert math.isnan(graphs.train(tmp_path / "graph.zarr", entities=10**6, steps=2)[0])


def test_hypernyms(tmp_path):
    """In WordNet's format: two words for a noun, a pointer to a verb, an instance, and two ways to the same noun."""
    pytest.importorskip("torch")
    graphs = example("knowledge_graph")
    lines = [
        "  1 This software and database is being provided to you",
        "00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | all there is",
        "00001930 03 n 02 physical_entity 0 thing 1 002 @ 00001740 n 0000 + 00692347 v 0101 | it | exists",
        "00001940 03 n 01 place 0 001 @ 00001740 n 0000 | somewhere",
        "00001950 03 n 01 Paris 0 002 @i 00001930 n 0000 @i 00001940 n 0000 | a city",
    ]
    entity, thing, place, paris = (line[:8] for line in lines[1:])
    above = [(thing, entity), (place, entity), (paris, entity), (paris, thing), (paris, place)]
    assert list(graphs.hypernyms(lines)) == [(noun, "is a", kind) for noun, kind in above]
    (tmp_path / "data.noun").write_text("\n".join(lines))
    triples, entities, relations = graphs.read_triples(tmp_path / "data.noun")
    assert (triples.tolist(), entities, relations) == (
        [[0, 0, 1], [2, 0, 1], [3, 0, 0], [3, 0, 1], [3, 0, 2]],
        4,
        1,
    )


def test_hypernyms_of_wordnet():
    """As many as Nickel and Kiela (2017) count in WordNet 3.0."""
    pytest.importorskip("torch")
    path = Path("/usr/share/wordnet/data.noun")
    if not path.exists():
        pytest.skip("needs WordNet: apt-get install wordnet-base")
    triples, entities, relations = example("knowledge_graph").read_triples(path)
    assert (len(triples), entities, relations) == (743_241, 82_115, 1)


def test_filtered_ranks(torch):
    """Of two true tails, neither counts against the other."""
    graphs = example("knowledge_graph")
    rows = torch.nn.Embedding.from_pretrained(torch.tensor([[1.0], [3.0], [2.0], [-1.0]]))
    model = graphs.Model(rows, torch.nn.Embedding.from_pretrained(torch.ones(1, 1)), graphs.distmult)
    triples = np.array([[0, 0, 2]])
    # Tails of 0: 3 > [2] > 1 > -1, of which entity 1 is known; heads of 2: 3 > 2 > [1].
    assert graphs.filtered_mrr(model, 4, triples, np.array([[0, 0, 1], [0, 0, 2]])) == pytest.approx(
        (1 + 1 / 3) / 2
    )


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_title_genres(torch, tmp_path):
    """Titles say what they are about, in a word of which half is new in the titles that are held out."""
    genres = example("title_genres")
    rng, stems = np.random.default_rng(0), {"space": "SciFi", "ghost": "Horror", "heart": "Romance"}
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for number in range(200):
        stem = list(stems)[number % 3]
        lines.append(f"{number}\tThe {stem}{rng.integers(50)}\t1995\t{stems[stem]}")
    (tmp_path / "films").write_text("\n".join(lines))
    right = [
        genres.train(name, tmp_path / "films", epochs=3)[0] for name in ("ram", tmp_path / "titles.zarr")
    ]
    assert right == [1.0, 1.0]


def test_skip_gram(torch, tmp_path, monkeypatch):
    """In memory and on disk, words that occur together are near each other."""
    skip_gram = example("skip_gram")
    rng = np.random.default_rng(0)
    numbers = np.concatenate([np.append(rng.permutation(5) + 5 * (n % 2), [-1] * 5) for n in range(2000)])
    monkeypatch.setattr(skip_gram, "text", lambda: (list("abcdefghij"), numbers))
    monkeypatch.setattr(skip_gram, "BATCH", 512)
    losses = []
    for name in ("ram", tmp_path / "vectors.zarr"):
        loss, *_, words, vectors = skip_gram.train(name, steps=150)
        assert set(skip_gram.nearest("a", words, vectors, 4)) == set("bcde")
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
