"""Pairs of an index, laid out as the docstrings of ``index_kernels.py`` and ``index_files.py`` describe."""

import numpy as np

LAST = 2**64 - 1
NO_ROW = LAST


def level(pairs, bits, share=0.75, deep=()):
    """Return spans, entries and bits of pairs. Parts have ``bits - 1`` bits; two of `bits` replace each in `deep`."""
    spans, entries, number = [], [], 0
    while number < 2**bits:
        own_bits = bits if bits == 0 or number // 2 in deep else bits - 1
        own_number = number >> (bits - own_bits)
        own = [pair for pair in sorted(pairs) if first_bits(pair[0], own_bits) == own_number]
        begin, buckets, before = len(entries), int(len(own) / share), own_number << (64 - own_bits)
        for value, row in own:
            entries += [(before, NO_ROW)] * (begin + bucket_in(value, own_bits, buckets) - len(entries))
            entries.append((value, row))
            before = value
        spans += [(begin, buckets, len(entries), own_bits)] * 2 ** (bits - own_bits)
        number = len(spans)
    return np.array(spans), np.array(entries, np.uint64).reshape(-1, 2), bits


def first_bits(value, bits):
    return value >> (64 - bits)


def bucket_in(value, bits, buckets):
    """Return the bucket of a hash, counted from the beginning of its part."""
    return ((value << bits) % 2**64 >> 32) * buckets >> 32
