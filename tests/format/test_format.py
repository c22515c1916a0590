"""Stores of version 1 of the format stay readable. ``tests/data/make.py`` has created those that are read here."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.model import TableModel, assert_same_bits

import shardemb
from shardemb.initializers import Uniform
from shardemb.optim import Adagrad


def expected(steps):
    tables = {
        "plain": TableModel.new("plain", num_embeddings=300, embedding_dim=4),
        "trained": TableModel.new(
            "trained",
            num_embeddings=100,
            embedding_dim=4,
            optimizer=Adagrad(lr=0.5, initial_accumulator_value=0.25),
            initializer=Uniform(-1, 1, seed=3),
        ),
    }
    for step in range(1, steps + 1):
        for name, table in tables.items():
            ids = np.arange(step, len(table.weights), 7)
            table.write(ids, np.full((ids.size, 4), step + len(name), np.float32))
            if table.optimizer:
                table.update(ids, np.ones((ids.size, 4), np.float32))
    return tables


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize(("name", "steps"), [("closed", 1), ("killed", 3)])
def test_stores_of_format_1_open_as_they_were_committed(tmp_path, name, steps, mode):
    with zipfile.ZipFile(Path(__file__).parents[1] / "data" / "format-1.zip") as archive:
        archive.extractall(tmp_path)
    with shardemb.open(tmp_path / name, mode) as store:
        assert store.last_commit == shardemb.Commit(steps, steps, {"step": steps})
        assert store.verify() == []
        for table, model in expected(steps).items():
            model.assert_matches(store[table])
            ids = np.arange(len(model.weights))
            assert_same_bits(store[table].lookup(ids), model.weights)
