"""With dozens of keys, what otherwise takes millions: small tables and indexes, and hashes that collide."""

import numpy as np

from shardemb.session import vocabulary_catalog
from shardemb.vocabulary import hash_index, hashing, key_rows, key_tables, keyed_rows

KEY_TYPES = ["int64", "string", "bytes"]


def pool_of(key_type, rng):
    """Return distinct keys that a test draws from."""
    whole = [0, -1, 1, 2**63 - 1, -(2**63), *rng.integers(-(2**63), 2**63 - 1, 500).tolist(), *range(2, 500)]
    if key_type == "int64":
        return whole
    lengths = rng.choice(
        [1, 8, 9, 63, 64, 65, 130, 700], len(whole), p=[0.1, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]
    )
    texts = [
        "",
        "\0",
        "\0\0",
        "ä",
        *(f"{key:x}"[:63] * (int(n) // 8 + 1) for key, n in zip(whole, lengths, strict=True)),
    ]
    texts = list(dict.fromkeys(texts))
    return texts if key_type == "string" else [text.encode() + b"\xff" for text in texts]


def make_small(patch, chance):
    """Lower the limits of tables and index, so that dozens of keys do what otherwise takes millions."""
    shapes = key_tables.table_shapes

    def small_shapes(entry):
        rows = {"keys": 30, "freed": 5, "bytes": 3}
        return {what: (rows.get(what, n), width, 64) for what, (n, width, _) in shapes(entry).items()}

    patch.setattr(vocabulary_catalog, "table_shapes", small_shapes)
    patch.setattr(key_rows, "SLICE_ROWS", chance.choice([7, 100]))
    patch.setattr(key_tables, "SLICE_BYTES", chance.choice([200, 5000]))
    patch.setattr(key_rows, "BATCH_ROWS", chance.choice([11, 1000]))
    patch.setattr(keyed_rows, "SCANNED_ROWS", chance.choice([13, 1000]))
    patch.setattr(hash_index, "OPEN_PAIRS", chance.choice([(3, 3), (5, 50), (64, 64), (2**20, 2**23)]))
    patch.setattr(hash_index, "_STALE", chance.choice([0, 20, 2**16]))
    patch.setattr(hash_index, "PARALLEL_PAIRS", chance.choice([1, 2**13]))
    patch.setattr(hash_index, "_FIRST_BUCKETS", chance.choice([2, 64]))
    patch.setattr(hash_index, "PART_BITS", chance.choice([6, 9]))
    # So that hashes are the same in each run.
    patch.setattr(hashing, "secret_of", lambda identity: hashing.Secret(np.uint64(1), np.uint64(2)))


def let_hashes_collide(patch):
    """Give strings so few hashes that almost all of them collide."""
    real = hashing.hash_strings

    def few(*arguments):
        real(*arguments)
        *_, out, start, stop = arguments
        out[start:stop] &= np.uint64(31 << 59)

    patch.setattr(hashing, "hash_strings", few)
