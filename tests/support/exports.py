"""Tables for tests of exports, and what is in them."""

import numpy as np

import shardemb

DIM = 6
WORDS = ["the", "of", "naïve", "日本", "x" * 70, "a\u00a0b", "gone", "-1", "Z"]


def any_bits(num_rows, width, seed=0):
    """Make float32 values of every kind that is finite: denormals, -0.0, the greatest; each with any last bits."""
    bits = np.random.default_rng(seed).integers(0, 2**32, (num_rows, width), dtype=np.uint32)
    values = bits.view(np.float32)
    values[~np.isfinite(values)] = -0.0
    values.reshape(-1)[:4] = [1e-45, -0.0, np.finfo(np.float32).max, 0.1]
    return values


def plain_table(store, num_rows=1500, **options):
    """Create a table of several shards without keys; return it and its rows."""
    table = store.create_table("t", num_embeddings=num_rows, embedding_dim=DIM, rows_per_shard=512, **options)
    rows = any_bits(num_rows, DIM)
    table.write(np.arange(num_rows), rows)
    return table, table.lookup(np.arange(num_rows))


def keyed_table(store, keys=WORDS, removed=("gone",), key_type="string", **options):
    """Create a table by key in which some rows have lost theirs; return it, and its keys and rows in order."""
    store.create_vocabulary("words", key_type=key_type, reserved=2)
    options = {"optimizer": shardemb.optim.SGD(lr=1.0), "counters": True} | options
    table = store.create_table("w", vocabulary="words", embedding_dim=DIM, **options)
    table.write(keys, any_bits(len(keys), DIM, seed=1), create=True)
    if removed:
        table.delete(list(removed))
    kept = [key for key in keys if key not in removed]
    return table, kept, table.lookup(kept)


def same_bits(found, expected):
    """Compare arrays bit for bit."""
    found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))
    return True


def nothing_left(folder, *kept):
    """Check that a folder has nothing but what it had before."""
    found = sorted(path.name for path in folder.iterdir() if path.name not in ("store.zarr", *kept))
    assert found == []
    return True
