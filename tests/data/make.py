"""Makes ``format-1.zip``: stores of format 1, one closed and one as a killed process leaves it, with a log.

Run once, by ``python tests/data/make.py``, and kept: later versions must read what this one wrote.
"""

import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np

import shardemb


def change(store, step):
    """Write rows whose values say which step it was."""
    for name, table in store.items():
        ids = np.arange(step, table.num_embeddings, 7)
        table.write(ids, np.full((ids.size, table.embedding_dim), step + len(name), np.float32))
        if table.optimizer:
            table.update(ids, np.ones((ids.size, table.embedding_dim), np.float32))
    store.commit(step=step, metadata={"step": step})


def make(folder):
    """Make both stores."""
    with shardemb.open(folder / "closed") as store:
        store.create_table("plain", num_embeddings=300, embedding_dim=4, rows_per_shard=256)
        store.create_table(
            "trained",
            num_embeddings=100,
            embedding_dim=4,
            optimizer=shardemb.optim.Adagrad(lr=0.5, initial_accumulator_value=0.25),
            initializer=shardemb.initializers.Uniform(-1, 1, seed=3),
        )
        change(store, 1)
    shutil.copytree(folder / "closed", folder / "live")
    store = shardemb.open(folder / "live")
    change(store, 2)
    change(store, 3)
    shutil.copytree(folder / "live", folder / "killed")
    store.close()
    shutil.rmtree(folder / "live")


if __name__ == "__main__":
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as work:
        make(Path(work))
        shutil.make_archive(str(Path(__file__).with_name("format-1")), "zip", work)
