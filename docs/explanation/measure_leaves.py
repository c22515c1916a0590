"""What a step takes with all rows of a batch as a leaf, with each row once, and the sum of a sparse gradient of torch.

python docs/explanation/measure_leaves.py
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import shardemb

ROWS, DIM, IDS, TIMES = 1_000_000, 64, 65_536, 15


def all_rows(table, ids):
    leaf = torch.from_numpy(table.lookup(ids)).requires_grad_()
    (leaf * 2).sum().backward()
    table.update(ids, leaf.grad.numpy())


def each_row_once(table, ids):
    rows, unique, inverse = table.lookup_unique(ids)
    leaf = torch.from_numpy(rows).requires_grad_()
    (torch.nn.functional.embedding(torch.from_numpy(inverse), leaf) * 2).sum().backward()
    table.update(unique, leaf.grad.numpy())


def coalesce(table, ids):
    grad = torch.sparse_coo_tensor(torch.from_numpy(ids)[None], torch.ones(ids.size, DIM), table.shape)
    grad.coalesce()


def main():
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, shardemb.open(Path(folder) / "store.zarr") as store:
        table = store.create_table(
            "rows", num_embeddings=ROWS, embedding_dim=DIM, optimizer=shardemb.optim.Adam(lr=1e-3)
        )
        for name, make in (
            ("uniform", lambda: rng.integers(0, ROWS, IDS)),
            ("Zipf", lambda: (ROWS ** rng.random(IDS)).astype(np.int64)),
        ):
            seconds = {all_rows: [], each_row_once: [], coalesce: []}
            for _ in range(TIMES):
                for step, taken in seconds.items():
                    ids = make()  # other ones, as rows are cheaper to change again
                    start = time.perf_counter()
                    step(table, ids)
                    taken.append(time.perf_counter() - start)
            whole, once, torchs = (statistics.median(taken[2:]) for taken in seconds.values())
            print(
                f"{name}: all rows {1e3 * whole:.0f} ms; each row once {1e3 * once:.0f} ms, {once / whole:.2f}x; ",
                end="",
            )
            print(f"coalesce() alone {1e3 * torchs:.0f} ms, {torchs / whole:.2f}x")
        store.rollback()


if __name__ == "__main__":
    main()
