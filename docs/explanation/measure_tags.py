"""Prints what tags cost: to make one, to fold beside one, to read one, to go back.

Usage: python docs/explanation/measure_tags.py FOLDER [ROWS]. By default it takes 1.5 GB and two minutes.
"""

import sys
import time
from pathlib import Path

import numpy as np

import shardemb

DIM, CHANGED = 64, 20_000


def timed(call):
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def changed(table, seed):
    ids = np.random.default_rng(seed).choice(table.num_embeddings, CHANGED, replace=False)
    table.write(ids, np.full((CHANGED, DIM), seed, np.float32))


def fold(store, table, seed):
    changed(table, seed)
    store.commit()
    return timed(store.checkpoint)


def main(folder, rows=2_000_000):
    store = shardemb.open(Path(folder) / "tags.zarr", "w")
    ones = lambda start, stop: np.ones((stop - start, DIM), np.float32)  # noqa: E731
    table = store.create_table("t", num_embeddings=rows, embedding_dim=DIM, initializer=ones)
    store.commit()
    store.checkpoint()
    print(f"{rows:,} rows of {4 * DIM} bytes, {CHANGED:,} changed at random, all of them warm")
    plain = [fold(store, table, seed) for seed in (1, 2, 3)]
    print(f"fold without a tag           {1000 * min(plain):8.0f} ms")
    print(f"tag                          {1000 * timed(lambda: store.tag('best')):8.0f} ms")
    first = fold(store, table, 4)
    kept = store.info().tags[0].bytes_kept
    print(
        f"fold that keeps all blocks   {1000 * first:8.0f} ms, {kept / CHANGED:,.0f} bytes kept a changed row"
    )
    changed(table, 4)
    store.commit()
    print(f"fold that keeps none         {1000 * timed(store.checkpoint):8.0f} ms")
    seconds = timed(lambda: shardemb.open(store.path, "r", commit="best").close())
    print(f"open the tag                 {1000 * seconds:8.0f} ms")
    seconds = timed(lambda: store.restore("best"))
    print(
        f"restore                      {1000 * seconds:8.0f} ms, {1e6 * seconds / CHANGED:.0f} us a changed row"
    )
    print(f"untag                        {1000 * timed(lambda: store.untag('best')):8.0f} ms")
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
