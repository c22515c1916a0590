"""Reads files of vectors whole, and makes such files."""

import struct

import numpy as np

from shardemb.imports.blocks import ReadOptions


def read(source):
    """Read an open source; return keys and rows. Every block continues where the one before it ended."""
    keys, rows, consumed = [], [np.empty((0, source.dim), np.float32)], 0
    for block in source.blocks():
        assert block.first == sum(map(len, rows))
        assert block.rows.dtype == np.float32
        assert block.rows.flags.c_contiguous
        assert block.rows.shape[1] == source.dim
        assert consumed <= block.consumed <= (source.total or block.consumed)  # 0: nobody knows
        consumed = block.consumed
        rows.append(block.rows)
        if source.key_type is None:
            assert block.keys is None
        else:
            assert len(block.keys) == len(block.rows) > 0
            keys += block.keys.to_pylist()
    rows = np.concatenate(rows)
    assert source.num_rows in (None, len(rows))
    return keys, rows


def read_file(opener, path, data=None, **options):
    """Read a file, which is made of some data first; return keys and rows."""
    if data is not None:
        path.write_bytes(data)
    with opener(path, ReadOptions(**options)) as source:
        return read(source)


def model_of_fasttext(words, matrix, *, ngrams=(3, 6), labels=(), **changes):
    """Return a model of fastText as bytes: of some words, and a matrix with a row for each of them and each bucket."""
    given = {
        "magic": 793712314,
        "version": 12,
        "dim": matrix.shape[1],
        "ws": 5,
        "epoch": 5,
        "count": 1,
        "neg": 5,
    }
    given |= {"word_ngrams": 1, "loss": 2, "model": 2, "bucket": len(matrix) - len(words)}
    given |= {"minn": ngrams[0], "maxn": ngrams[1], "rate": 100, "t": 1e-4}
    given |= {"size": len(words) + len(labels), "nwords": len(words), "nlabels": len(labels), "tokens": 99}
    given |= {"pruned": -1, "quantised": False, "rows": len(matrix), "columns": matrix.shape[1]}
    assert given.keys() >= changes.keys()
    given |= changes
    values = list(given.values())
    parts = [struct.pack("<2i12id", *values[:15]), struct.pack("<3i2q", *values[15:20])]
    for kind, group in enumerate((words, labels)):
        parts += [word + b"\0" + struct.pack("<qb", 7, kind) for word in group]
    parts += [struct.pack("<2i", 0, 0)] * max(given["pruned"], 0)
    parts += [struct.pack("<?2q", *values[20:]), matrix.astype("<f4").tobytes()]
    output = np.zeros((len(words), matrix.shape[1]), "<f4")
    return b"".join([*parts, struct.pack("<?2q", False, *output.shape), output.tobytes()])
