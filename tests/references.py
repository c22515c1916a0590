"""What tests compare with: optimizers written a second time; and damaged documents.

The optimizers are written from the published formulas, one number after the other. Two versions of each, for two
questions:

- ``PUBLISHED`` follows the formulas as torch and FBGEMM publish them, in float64: is it the right formula? The
  package computes in float32, so the answer is "to about 1e-6".
- ``DOCUMENTED`` follows the order of operations that the package's documentation promises, in float32: are these
  the same bits on every machine?

Nothing here imports shardemb. A formula takes one row's weight, its state by column, its summed gradient (lists of
numbers of one type), the number of the step and the hyper-parameters; it returns the new weight and changes the
state in place.
"""

from __future__ import annotations

import copy
import json
import math

import numpy as np
from hypothesis import strategies as st

# ---- as published -----------------------------------------------------------------------------------------------


def sgd(w, state, g, t, *, lr):
    return [wj - lr * gj for wj, gj in zip(w, g, strict=True)]


def adagrad(w, state, g, t, *, lr, lr_decay, eps, initial_accumulator_value):
    """``torch.optim.Adagrad``, sparse: rate = lr / (1 + (t - 1) lr_decay); s += g^2; w -= rate g / (sqrt(s) + eps)."""
    rate = lr / (1 + (t - 1) * lr_decay)
    state["sum"] = [sj + gj * gj for sj, gj in zip(state["sum"], g, strict=True)]
    return [wj - rate * gj / (math.sqrt(sj) + eps) for wj, gj, sj in zip(w, g, state["sum"], strict=True)]


def rowwise_adagrad(w, state, g, t, *, lr, eps):
    """FBGEMM exact row-wise Adagrad without weight decay: s += mean(g^2); a = lr / (sqrt(s) + eps); w -= a g."""
    state["sum"] = [state["sum"][0] + math.fsum(gj * gj for gj in g) / len(g)]
    a = lr / (math.sqrt(state["sum"][0]) + eps)
    return [wj - a * gj for wj, gj in zip(w, g, strict=True)]


def adam(w, state, g, t, *, lr, betas, eps):
    """``torch.optim.SparseAdam``: eps is not bias-corrected, t counts the steps of the table."""
    b1, b2 = betas
    m = state["exp_avg"] = [b1 * mj + (1 - b1) * gj for mj, gj in zip(state["exp_avg"], g, strict=True)]
    v = state["exp_avg_sq"] = [
        b2 * vj + (1 - b2) * gj * gj for vj, gj in zip(state["exp_avg_sq"], g, strict=True)
    ]
    rate = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
    return [wj - rate * mj / (math.sqrt(vj) + eps) for wj, mj, vj in zip(w, m, v, strict=True)]


PUBLISHED = {"SGD": sgd, "Adagrad": adagrad, "RowWiseAdagrad": rowwise_adagrad, "Adam": adam}


# ---- as documented, operation by operation ----------------------------------------------------------------------


def _single(*values):
    """What is the same for all rows is computed in float64 and rounded once."""
    return [np.float32(value) for value in values]


def sgd_bits(w, state, g, t, *, lr):
    (lr,) = _single(lr)
    return [wj - lr * gj for wj, gj in zip(w, g, strict=True)]


def adagrad_bits(w, state, g, t, *, lr, lr_decay, eps, initial_accumulator_value):
    rate, eps = _single(lr / (1 + (t - 1) * lr_decay), eps)
    state["sum"] = [sj + gj * gj for sj, gj in zip(state["sum"], g, strict=True)]
    return [wj - rate * (gj / (np.sqrt(sj) + eps)) for wj, gj, sj in zip(w, g, state["sum"], strict=True)]


def rowwise_adagrad_bits(w, state, g, t, *, lr, eps):
    lr, eps = _single(lr, eps)
    lanes = [np.float32(0)] * 8
    whole = len(g) // 8 * 8
    for j in range(whole):
        lanes[j % 8] = lanes[j % 8] + g[j] * g[j]
    while len(lanes) > 1:
        lanes = [left + right for left, right in zip(lanes[::2], lanes[1::2], strict=True)]
    total = lanes[0]
    for gj in g[whole:]:
        total = total + gj * gj
    state["sum"] = [state["sum"][0] + total / np.float32(len(g))]
    factor = lr / (np.sqrt(state["sum"][0]) + eps)
    return [wj - factor * gj for wj, gj in zip(w, g, strict=True)]


def adam_bits(w, state, g, t, *, lr, betas, eps):
    b1, b2 = betas
    c1, c2, rate, eps = _single(1 - b1, 1 - b2, lr * math.sqrt(1 - b2**t) / (1 - b1**t), eps)
    m = state["exp_avg"] = [mj + c1 * (gj - mj) for mj, gj in zip(state["exp_avg"], g, strict=True)]
    v = state["exp_avg_sq"] = [
        vj + c2 * (gj * gj - vj) for vj, gj in zip(state["exp_avg_sq"], g, strict=True)
    ]
    return [wj - rate * (mj / (np.sqrt(vj) + eps)) for wj, mj, vj in zip(w, m, v, strict=True)]


DOCUMENTED = {
    "SGD": sgd_bits,
    "Adagrad": adagrad_bits,
    "RowWiseAdagrad": rowwise_adagrad_bits,
    "Adam": adam_bits,
}


# ---- a table in memory ------------------------------------------------------------------------------------------


class Table:
    """A table as a dict of rows, trained by one of the formulas above.

    Parameters
    ----------
    formula : callable
        From `PUBLISHED` or `DOCUMENTED`.
    weights : ndarray, shape (rows, dim)
        Of the type in which everything is computed.
    state : dict of str to ndarray, shape (rows, width)
        Initial optimizer state.
    """

    def __init__(self, formula, weights, state, **hyper):
        self.formula, self.hyper, self.step = formula, hyper, 0
        self.real = weights.dtype.type
        self.weights = [list(row) for row in weights]
        self.states = [
            {name: list(column[row]) for name, column in state.items()} for row in range(len(weights))
        ]

    def update(self, ids, grads):
        """Sum the gradients of equal ids in the order of the batch, then take one step on each row of the batch."""
        self.step += 1
        summed = {}
        for row, gradient in zip(np.ravel(ids).tolist(), grads.reshape(-1, grads.shape[-1]), strict=True):
            g = [self.real(value) for value in gradient]
            summed[row] = [a + b for a, b in zip(summed[row], g, strict=True)] if row in summed else g
        for row, g in summed.items():
            self.weights[row] = self.formula(self.weights[row], self.states[row], g, self.step, **self.hyper)

    def weight(self):
        return np.array(self.weights, self.real)

    def state(self, name):
        return np.array([state[name] for state in self.states], self.real)


# ---- damaged documents ------------------------------------------------------------------------------------------

HOSTILE = [
    None, True, False, 0, -1, 1, 2**31 + 1, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.0, 1e308, math.nan, -math.inf,
    "", ".", "..", "../../x", "/etc", "a/b", "a\0b", "\ud800", "x" * 5000, "1", "SGD",
    [], [[]], [None], ["a", 1], [0, 0], {}, {"": {}}, {"name": "SGD"}, {"name": []},
]  # fmt: skip


def places(document, path=()):
    """All places in a JSON document, as paths of keys and indices."""
    found = [path]
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            found += places(document[key], (*path, key))
    return found


@st.composite
def damaged(draw, document):
    """A JSON document with one or two values replaced, missing, or doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(document)[1:] or [()]))
        if not path:
            return document
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if what == "replace":
            parent[path[-1]] = draw(st.sampled_from(HOSTILE))
        elif what == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[f"{path[-1]} too"] = parent[path[-1]]
        else:
            parent.append(parent[path[-1]])
    return document


@st.composite
def damaged_bytes(draw, data):
    """A file cut short, with bytes changed, or another one altogether."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200) | st.just(json.dumps(draw(st.sampled_from(HOSTILE))).encode()))
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])
