"""What tests compare with: optimizers and initial values written a second time; and damaged documents.

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


# ---- as published, on arrays, with everything that can be chosen ------------------------------------------------
#
# Each takes one row: weight, a dict of state arrays, gradient, the learning rate, the step that corrects the bias, and
# the hyper-parameters `h` as attributes. It returns the new weight and changes the state.


def mean_square(g):
    return math.fsum((g * g).tolist()) / g.size


def root(x, h):
    return np.sqrt(x + h.eps) if getattr(h, "eps_inside_root", False) else np.sqrt(x) + h.eps


def any_sgd(w, s, g, lr, t, h):
    """``torch.optim.SGD``: the first buffer of the parameter is its gradient, without dampening."""
    if not h.momentum:
        return w - lr * g
    inner, outer = (lr, 1.0) if h.lr_in_momentum else (1.0, lr)
    g = inner * g
    s["momentum_buffer"] = h.momentum * s["momentum_buffer"] + (1 if t == 1 else 1 - h.dampening) * g
    return w - outer * (g + h.momentum * s["momentum_buffer"] if h.nesterov else s["momentum_buffer"])


def any_lars(w, s, g, lr, t, h):
    decay = 0.0 if h.decoupled_weight_decay else h.weight_decay
    norm, length = np.linalg.norm(w), np.linalg.norm(g)
    a = lr * h.eta * norm / (length + decay * norm) if norm and length else lr
    s["momentum_buffer"] = h.momentum * s["momentum_buffer"] + a * (g + decay * w)
    return w - s["momentum_buffer"]


def any_adagrad(w, s, g, lr, t, h):
    s["sum"] = s["sum"] + g * g
    return w - lr / (1 + (t - 1) * h.lr_decay) * g / root(s["sum"], h)


def any_rowwise_adagrad(w, s, g, lr, t, h):
    s["sum"] = s["sum"] + mean_square(g)
    return w - lr / (1 + (t - 1) * h.lr_decay) * g / root(s["sum"], h)


def moments(s, g, h, square):
    b1, b2 = h.betas
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * square
    return b1, b2


def adam_like(w, s, g, lr, t, h, square, second="exp_avg_sq"):
    b1, b2 = moments(s, g, h, square)
    if second == "max_exp_avg_sq":
        s[second] = np.maximum(s[second], s["exp_avg_sq"])
    m, c = s["exp_avg"] / (1 - b1**t), math.sqrt(1 - b2**t)
    divisor = np.sqrt(s[second]) / c + h.eps if h.eps_after_correction else (np.sqrt(s[second]) + h.eps) / c
    return w - lr * m / divisor


def any_adam(w, s, g, lr, t, h):
    return adam_like(w, s, g, lr, t, h, g * g)


def any_rowwise_adam(w, s, g, lr, t, h):
    return adam_like(w, s, g, lr, t, h, mean_square(g))


def any_amsgrad(w, s, g, lr, t, h):
    return adam_like(w, s, g, lr, t, h, g * g, "max_exp_avg_sq")


def any_adamax(w, s, g, lr, t, h):
    b1, b2 = h.betas
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    outside = h.eps if h.eps_outside_maximum else 0.0
    s["exp_inf"] = np.maximum(b2 * s["exp_inf"], np.abs(g) + (h.eps - outside))
    return w - lr / (1 - b1**t) * s["exp_avg"] / (s["exp_inf"] + outside)


def any_nadam(w, s, g, lr, t, h):
    b1, b2 = moments(s, g, h, g * g)
    mu = [b1 * (1 - 0.5 * 0.96 ** (k * h.momentum_decay)) for k in range(1, int(t) + 2)]
    product = math.prod(mu[:-1])
    divisor = np.sqrt(s["exp_avg_sq"] / (1 - b2**t)) + h.eps
    w = w - lr * (1 - mu[-2]) / (1 - product) * g / divisor
    return w - lr * mu[-1] / (1 - product * mu[-1]) * s["exp_avg"] / divisor


def any_rmsprop(w, s, g, lr, t, h):
    s["square_avg"] = h.alpha * s["square_avg"] + (1 - h.alpha) * g * g
    variance = s["square_avg"]
    if h.centered:
        s["grad_avg"] = h.alpha * s["grad_avg"] + (1 - h.alpha) * g
        variance = np.maximum(variance - s["grad_avg"] ** 2, 0)
    inner, outer = (lr, 1.0) if h.lr_in_momentum else (1.0, lr)
    moved = inner * g / root(variance, h)
    if h.momentum:
        moved = s["momentum_buffer"] = h.momentum * s["momentum_buffer"] + moved
    return w - outer * moved


def any_rowwise_rmsprop(w, s, g, lr, t, h):
    s["square_avg"] = h.alpha * s["square_avg"] + (1 - h.alpha) * mean_square(g)
    return w - lr * g / root(s["square_avg"], h)


def any_adadelta(w, s, g, lr, t, h):
    s["square_avg"] = h.rho * s["square_avg"] + (1 - h.rho) * g * g
    delta = np.sqrt(s["acc_delta"] + h.eps) / np.sqrt(s["square_avg"] + h.eps) * g
    s["acc_delta"] = h.rho * s["acc_delta"] + (1 - h.rho) * delta * delta
    return w - lr * delta


def lamb_like(w, s, g, lr, t, h, square):
    b1, b2 = moments(s, g, h, square)
    r = s["exp_avg"] / (1 - b1**t) / (np.sqrt(s["exp_avg_sq"] / (1 - b2**t)) + h.eps)
    r = r + (0.0 if h.decoupled_weight_decay else h.weight_decay) * w
    norm, length = np.linalg.norm(w), np.linalg.norm(r)
    return w - lr * (norm / length if norm and length else 1.0) * r


def any_lamb(w, s, g, lr, t, h):
    return lamb_like(w, s, g, lr, t, h, g * g)


def any_rowwise_lamb(w, s, g, lr, t, h):
    return lamb_like(w, s, g, lr, t, h, mean_square(g))


def any_ftrl(w, s, g, lr, t, h):
    """``keras.optimizers.Ftrl`` with a learning rate power of -1/2."""
    n = s["accumulator"] + g * g
    s["linear"] = s["linear"] + g + 2 * h.l2_shrinkage * w - (np.sqrt(n) - np.sqrt(s["accumulator"])) / lr * w
    s["accumulator"] = n
    quadratic = np.sqrt(n) / lr + 2 * (h.l2_strength + h.beta / (2 * lr))
    return (np.clip(s["linear"], -h.l1_strength, h.l1_strength) - s["linear"]) / quadratic


def any_lion(w, s, g, lr, t, h):
    b1, b2 = h.betas
    w = w - lr * np.sign(b1 * s["exp_avg"] + (1 - b1) * g)
    s["exp_avg"] = b2 * s["exp_avg"] + (1 - b2) * g
    return w


FORMULAS = {
    "SGD": any_sgd, "LARS": any_lars, "Adagrad": any_adagrad, "RowWiseAdagrad": any_rowwise_adagrad,
    "Adam": any_adam, "AdamW": any_adam, "PartialRowWiseAdam": any_rowwise_adam, "AMSGrad": any_amsgrad,
    "Adamax": any_adamax, "NAdam": any_nadam, "RMSprop": any_rmsprop, "RowWiseRMSprop": any_rowwise_rmsprop,
    "Adadelta": any_adadelta, "LAMB": any_lamb, "PartialRowWiseLAMB": any_rowwise_lamb, "FTRL": any_ftrl,
    "Lion": any_lion,
}  # fmt: skip


def with_options(name, w, s, g, t, h, factor=1.0):
    """One step of a row, float64, with the options that all optimizers have, in the order in which they are listed."""
    lr = h.lr(t) if callable(h.lr) else h.lr
    g = factor * (-g if h.maximize else g)
    if h.clip_value is not None:
        g = np.clip(g, -h.clip_value, h.clip_value)
    if h.clip_norm is not None:
        g = g * min(1.0, h.clip_norm / max(np.linalg.norm(g), 1e-300))
    g = g + h.l1 * np.sign(w)
    if h.decoupled_weight_decay:
        w = w * (1 - lr * h.weight_decay)
    elif name not in {"LAMB", "PartialRowWiseLAMB", "LARS"}:
        g = g + h.weight_decay * w
    count = t
    if h.rowwise_bias_correction:
        count = s["step"] = s["step"] + 1
        count = float(count[0])
    w = FORMULAS[name](w, s, g, lr, count, h)
    if h.constraint == "non_neg":
        w = np.maximum(w, 0)
    norm = np.linalg.norm(w)
    if h.constraint == "unit_norm":
        w = w / norm if norm else w
        norm = np.linalg.norm(w)
    if h.max_norm is not None and norm > h.max_norm:
        w = w * (h.max_norm / norm)
    return w


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


class Model:
    """A table as arrays of float64, trained by `with_options`; `optimizer` has the hyper-parameters as attributes."""

    def __init__(self, optimizer, weights, widths, initial):
        self.optimizer, self.step = optimizer, 0
        self.weights = weights.astype(np.float64)
        self.states = [
            {name: np.full(width, initial.get(name, 0.0)) for name, width in widths.items()} for _ in weights
        ]

    def summed(self, ids, grads):
        """The sum of the gradients of each row of a batch."""
        rows, inverse = np.unique(np.ravel(ids), return_inverse=True)
        sums = np.zeros((rows.size, grads.shape[-1]))
        np.add.at(sums, inverse, grads.reshape(-1, grads.shape[-1]).astype(np.float64))
        return rows, sums

    def update(self, ids, grads, factor=1.0):
        self.step += 1
        name = type(self.optimizer).__name__
        for row, g in zip(*self.summed(ids, grads), strict=True):
            self.weights[row] = with_options(
                name, self.weights[row], self.states[row], g, self.step, self.optimizer, factor
            )

    def state(self, name):
        return np.array([state[name] for state in self.states])


# ---- initial values, as FORMAT.md has them ------------------------------------------------------------------------


def philox(rows, dim, key, *, rounds=10, block_of=lambda j: j // 4, high_word=True):
    """Random words of rows, shape (len(rows), dim): Philox4x32, on whole arrays. The options break it."""
    j = np.arange(dim, dtype=np.uint64)
    rows, low = np.asarray(rows, np.uint64)[:, None], np.uint64(2**32 - 1)
    zero = np.zeros((rows.size, dim), np.uint64)
    c0, c1, c2, c3 = (
        rows & low | zero,
        (rows >> np.uint64(32)) * np.uint64(high_word) | zero,
        block_of(j) | zero,
        zero,
    )
    k0, k1 = key % 2**32, key // 2**32
    for _ in range(rounds):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.choose((j % np.uint64(4)).astype(np.intp), [c0, c1, c2, c3])


F = np.float32


def polynomial(x, *coefficients):
    """Horner's rule, the highest power first, in float32."""
    total = F(coefficients[0]) * np.ones_like(x)
    for coefficient in coefficients[1:]:
        total = total * x + F(coefficient)
    return total


def natural_log(x):
    """Of an array of float32 in (0, 1)."""
    e = np.zeros_like(x)
    while (low := x < F(0.7071067811865476)).any():
        x, e = np.where(low, F(2) * x, x), np.where(low, e - F(1), e)
    z = (x - F(1)) / (x + F(1))
    return e * F(0.6931471805599453) + F(2) * z * polynomial(z * z, 1 / 9, 1 / 7, 1 / 5, 1 / 3, 1)


def normal_quantile(p):
    """AS 241, PPND7, of an array of float64; from p on in float32."""
    near, below = abs(p - 0.5) <= 0.425, p < 0.5
    q = (p - 0.5).astype(F)
    r = F(0.180625) - q * q
    top = polynomial(r, 59.10937472, 159.29113202, 50.434271938, 3.3871327179)
    middle = q * top / polynomial(r, 67.187563600, 78.757757664, 17.895169469, 1.0)
    r = np.sqrt(-natural_log(np.where(below, p, 1 - p).astype(F))) - F(1.6)
    top = polynomial(r, 0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777)
    tail = top / polynomial(r, 0.12021132975, 0.73700164250, 1.0)
    return np.where(near, middle, np.where(below, -tail, tail))


def normal_probability(x):
    """Where normal_quantile reaches x <= 0, and not below 2^-33: the end of 64 bisections."""
    a, b = 2.0**-33, 0.5
    if normal_quantile(np.array(a)) >= x:
        return a
    for _ in range(64):
        c = (a + b) / 2
        a, b = (c, b) if normal_quantile(np.array(c)) < x else (a, c)
    return b


def truncated_normal(words, mean, std, low, high):
    """Values of words, float32."""
    a, b, sign = (low - mean) / std, (high - mean) / std, 1.0
    if a > 0:
        a, b, sign = -b, -a, -1.0
    start = normal_probability(a)
    stop = normal_probability(b) if b <= 0 else 1 - normal_probability(-b)
    values = F(mean) + F(sign * std) * normal_quantile(start + (stop - start) * units(words))
    smallest, largest = np.float32(low), np.float32(high)
    smallest = smallest if float(smallest) >= low else np.nextafter(smallest, np.float32(np.inf))
    largest = largest if float(largest) <= high else np.nextafter(largest, np.float32(-np.inf))
    return np.clip(values, smallest, largest)


def normal(words, mean, std):
    return F(mean) + F(std) * normal_quantile(units(words))


def uniform(words, low, high):
    last = np.nextafter(np.float32(high), np.float32(low))
    return np.minimum((low + (high - low) * units(words)).astype(np.float32), last)


def units(words):
    return (words.astype(np.float64) + 0.5) * 2.0**-32


# ---- hashes of keys ---------------------------------------------------------------------------------------------


def siphash13(data, first, second, rounds=(1, 3)):
    """SipHash, as its paper has it, on Python's integers: rounds for each word, and at the end."""
    mask = 2**64 - 1

    def turn(x, left):
        return (x << left | x >> (64 - left)) & mask

    def mix(count):
        nonlocal v0, v1, v2, v3
        for _ in range(count):
            v0, v2 = (v0 + v1) & mask, (v2 + v3) & mask
            v1, v3 = turn(v1, 13) ^ v0, turn(v3, 16) ^ v2
            v0 = turn(v0, 32)
            v2, v0 = (v2 + v1) & mask, (v0 + v3) & mask
            v1, v3 = turn(v1, 17) ^ v2, turn(v3, 21) ^ v0
            v2 = turn(v2, 32)

    start = [int.from_bytes(b"somepseudorandomlygeneratedbytes"[at : at + 8], "big") for at in (0, 8, 16, 24)]
    v0, v1, v2, v3 = (each ^ key for each, key in zip(start, (first, second) * 2, strict=True))
    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) % 256])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v3 ^= word
        mix(rounds[0])
        v0 ^= word
    v2 ^= 0xFF
    mix(rounds[1])
    return v0 ^ v1 ^ v2 ^ v3


def splitmix(x, first, second):
    """The finaliser of SplitMix64 of a number of 64 bits, between two secrets."""
    x ^= first
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return ((x ^ x >> 31) + second) % 2**64


def unsplitmix(hashes, first, second):
    """The keys that `splitmix` gives these hashes; arrays, uint64 in and int64 out."""

    def unshifted(x, right):
        """Solve ``y ^ y >> right == x``."""
        return x ^ x >> np.uint64(right) ^ x >> np.uint64(2 * right)  # the third shift leaves nothing

    x = np.asarray(hashes, np.uint64) - np.uint64(second)
    x = unshifted(x, 31) * np.uint64(pow(0x94D049BB133111EB, -1, 2**64))
    x = unshifted(x, 27) * np.uint64(pow(0xBF58476D1CE4E5B9, -1, 2**64))
    return (unshifted(x, 30) ^ np.uint64(first)).view(np.int64)


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
