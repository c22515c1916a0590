"""What tests of importers share."""

import numpy as np


def gathered(source):
    """All rows of an open source, put together from its blocks, which are checked to follow each other."""
    found = list(source.blocks())
    starts = np.cumsum([0, *(len(block.rows) for block in found)])
    assert [block.first for block in found] == list(starts[:-1])
    assert source.num_rows in (None, starts[-1])
    if source.unit == "row" and source.total:
        assert sum(block.consumed for block in found) == source.total == starts[-1]
    for block in found:
        assert block.rows.dtype == np.float32
        assert block.rows.flags.c_contiguous
        assert (block.keys is None) == (source.key_type is None)
        assert block.keys is None or len(block.keys) == len(block.rows)
    return np.concatenate([np.empty((0, source.dim), np.float32), *(block.rows for block in found)])


def keys_of(source):
    """All keys of an open source, as Python has them."""
    keys = [block.keys for block in source.blocks()]
    return [
        key for some in keys for key in (some.tolist() if isinstance(some, np.ndarray) else some.to_pylist())
    ]
