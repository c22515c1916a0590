"""The programs in ``examples/`` run, learn something, and continue where they stopped."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
