"""Bags of rows, written as plainly as possible: the same operations in the same order, one value at a time."""

import numpy as np

F = np.float32


def bounds_of(offsets, count, *, include_last_offset=False):
    """Where bags begin, and where the last one ends."""
    return np.asarray(offsets) if include_last_offset else np.append(offsets, count).astype(np.int64)


def divisor_of(weights, mode):
    """What the sum of a bag with these weights, of float32, is divided by."""
    weights = weights.astype(np.float64)
    total = 0.0
    for weight in weights:
        total += weight * weight if mode == "sqrtn" else weight
    return F(np.sqrt(total)) if mode == "sqrtn" else F(total)


def positions_of(ids, bounds, bag, padding):
    return [i for i in range(bounds[bag], bounds[bag + 1]) if ids[i] != padding]


def pool(rows, ids, bounds, mode="sum", weights=None, padding=None):
    """Pool rows, one for each id, in float32 and in the order of the ids; also where each greatest value is from."""
    bags, dim = len(bounds) - 1, rows.shape[1]
    out, winners = np.zeros((bags, dim), F), np.full((bags, dim), -1)
    for bag in range(bags):
        which = positions_of(ids, bounds, bag, padding)
        if not which:
            continue
        if mode == "max":
            best = np.argmax(rows[which], axis=0)  # the first of equal ones
            out[bag] = rows[which][best, np.arange(dim)]
            winners[bag] = np.asarray(which)[best]
            continue
        for i in which:
            out[bag] += rows[i] if weights is None else F(weights[i]) * rows[i]
        if mode != "sum":
            divisor = divisor_of(np.ones(len(which), F) if weights is None else weights[which], mode)
            out[bag] = out[bag] / divisor if divisor else 0
    return out, winners


def row_gradients(
    ids, bounds, grads, mode="sum", weights=None, padding=None, winners=None, *, by_frequency=False
):
    """The gradient of each distinct row, as float64."""
    found = {}
    kept = [int(i) for i in ids if i != padding]
    for bag in range(len(bounds) - 1):
        which = positions_of(ids, bounds, bag, padding)
        if not which:
            continue
        given = np.ones(len(which), F) if weights is None else weights[which]
        divisor = float(divisor_of(given, mode)) if mode in ("mean", "sqrtn") else 1.0
        for i, weight in zip(which, given, strict=True):
            part = grads[bag].astype(np.float64) * float(weight)
            part = part / divisor if divisor else part * 0
            if mode == "max":
                part = np.where(winners[bag] == i, part, 0)
            if by_frequency:
                part = part / kept.count(int(ids[i]))
            found[int(ids[i])] = found.get(int(ids[i]), 0) + part
    return found
