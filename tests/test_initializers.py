import dataclasses
import functools
import hashlib
import json
import math
from statistics import NormalDist

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import references

import shardemb
from shardemb import initializers
from shardemb.base import sampling, serialization
from shardemb.base.sampling import log, normal_cdf, normal_quantile, philox, stream_key, unit
from shardemb.compute import (
    compiler,  # fmt: skip
    row_kernels,
)
from shardemb.errors import FormatError
from shardemb.initializers import (
    Constant,
    GlorotNormal,
    GlorotUniform,
    HeNormal,
    HeUniform,
    Normal,
    TruncatedNormal,
    Uniform,
    VarianceScaling,
)

WORDS = 2**32


def rows(initializer, num_rows, dim, *, key=None, first=0):
    """Return the initial values of rows as a lookup computes them, with the compiled kernel."""
    out = np.empty((num_rows, dim), np.float32)
    ids = np.arange(first, first + num_rows)
    never_written = np.zeros((first + num_rows) // 8 + 1, np.uint8)
    key = stream_key(getattr(initializer, "seed", 0), "tokens") if key is None else key
    row_kernels.gather_or_fill(type(initializer))(
        np.empty((0, dim), np.float32),
        *[np.empty(0, np.int32)] * 3,
        0,
        never_written,
        0,
        ids,
        out,
        np.uint64(key),
        np.array(initializer.parameters(), np.float64),
        0,
        1,
        0,
        num_rows,
    )
    return out


def plain_rows(initializer, ids, dim, key):
    """Return the same with the plain Python function."""
    out = np.empty((len(ids), dim), np.float32)
    parameters = np.array(initializer.parameters(), np.float64)
    initializer.fill_rows(out, np.arange(len(ids)), np.asarray(ids, np.int64), np.uint64(key), parameters)
    return out


# ---- Philox -----------------------------------------------------------------------------------------------------

KNOWN_ANSWERS = [  # Random123's kat_vectors: counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    low, high = counter.split()[:2], counter.split()[2:]
    # A 64-bit number has its low word first.
    row, block, whole_key = (np.uint64(int(b + a, 16)) for a, b in (low, high, key.split()))
    assert [f"{word:08x}" for word in philox(row, block, whole_key)] == expected.split()


@given(row=st.integers(0, 2**64 - 1), block=st.integers(0, 2**64 - 1), key=st.integers(0, 2**64 - 1))
def test_philox_agrees_with_plain_integers(row, block, key):
    assert list(philox(np.uint64(row), np.uint64(block), np.uint64(key))) == philox_of_integers(
        row, block, key
    )


def philox_of_integers(row, block, key):
    """The textbook version, with integers of Python, which cannot overflow."""
    c, k = [row % WORDS, row // WORDS, block % WORDS, block // WORDS], [key % WORDS, key // WORDS]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b // WORDS ^ c[1] ^ k[0], b % WORDS, a // WORDS ^ c[3] ^ k[1], a % WORDS]
        k = [(k[0] + 0x9E3779B9) % WORDS, (k[1] + 0xBB67AE85) % WORDS]
    return c


# ---- from words to numbers --------------------------------------------------------------------------------------


def test_unit_is_in_the_middle_of_its_cell():
    assert unit(np.uint64(0)) == 0.5 / WORDS
    assert unit(np.uint64(WORDS - 1)) == 1 - 0.5 / WORDS
    assert unit(np.uint64(WORDS // 2)) == 0.5 + 0.5 / WORDS


@given(st.integers(0, WORDS - 1))
def test_unit_is_symmetric_and_within_the_open_interval(word):
    x = unit(np.uint64(word))
    assert 0 < x < 1
    assert unit(np.uint64(WORDS - 1 - word)) == 1 - x


@given(st.floats(2.0**-33, 1, exclude_max=True, width=32))
def test_log_is_the_logarithm(x):
    assert log(np.float32(x)) == pytest.approx(math.log(x), rel=3e-7)


@given(st.integers(1, 126))
def test_log_of_powers_of_two(k):
    assert log(np.float32(2.0**-k)) == np.float32(-k) * np.float32(math.log(2))


@given(st.integers(0, WORDS - 1))
def test_the_quantile_is_that_of_the_normal_distribution(word):
    p = unit(np.uint64(word))
    assert normal_quantile(p) == pytest.approx(NormalDist().inv_cdf(p), rel=5e-7)
    assert normal_quantile(p).dtype == np.float32


@pytest.mark.parametrize(
    "p", [0.5 / WORDS, 1e-9, math.exp(-25), 0.0749999, 0.075, 0.0750001, 0.5, 0.925, 0.99]
)
def test_the_quantile_on_both_sides_of_every_branch(p):
    assert normal_quantile(p) == pytest.approx(NormalDist().inv_cdf(p), rel=5e-7)


def test_the_quantile_is_antisymmetric_and_rises():
    ps = [unit(np.uint64(word)) for word in range(0, WORDS, WORDS // 4096 - 1)]
    values = [normal_quantile(p) for p in ps]
    assert values == sorted(values)
    assert all(normal_quantile(1 - p) == -value for p, value in zip(ps, values, strict=True))


def test_no_normal_value_lies_further_out_than_the_documentation_says():
    assert 6.2 < normal_quantile(unit(np.uint64(WORDS - 1))) < 6.34


# ---- the same bits, whatever computes them ----------------------------------------------------------------------

INITIALIZERS = [
    Constant(0.1),
    Constant(-0.0),
    Uniform(-0.05, 0.05, seed=3),
    Uniform(1.0, 1.0 + 2.0**-20, seed=3),
    Normal(seed=3),
    Normal(mean=100.0, std=0.25, seed=2**64 - 1),
    TruncatedNormal(seed=3),
    TruncatedNormal(mean=-2.0, std=0.3, low=-50.0, high=-2.1, seed=3),  # a lower part, to its very end
    TruncatedNormal(mean=0.1, std=2.0, low=0.7, high=60.0, seed=3),  # mirrored at the mean
    TruncatedNormal(std=0.02, low=-0.01, high=0.011, seed=3),  # no tails
]


@pytest.mark.parametrize("initializer", INITIALIZERS, ids=str)
@pytest.mark.parametrize("dim", [1, 4, 7, 67])
def test_kernel_and_plain_function_give_the_same_bits(initializer, dim):
    key = stream_key(getattr(initializer, "seed", 0), "tokens")
    for first in (0, 2**16 - 5, 2**20 - 3):
        compiled = rows(initializer, 40, dim, key=key, first=first)
        plain = plain_rows(initializer, range(first, first + 40), dim, key)
        np.testing.assert_array_equal(compiled.view(np.uint32), plain.view(np.uint32))


REFERENCES = {
    "Uniform": lambda words, each: references.uniform(words, each.low, each.high),
    "Normal": lambda words, each: references.normal(words, each.mean, each.std),
    "TruncatedNormal": lambda words, each: references.truncated_normal(
        words, each.mean, each.std, each.low, each.high
    ),
}


@pytest.mark.parametrize("initializer", INITIALIZERS[2:], ids=str)
@pytest.mark.parametrize("dim", [64, 131])
def test_kernel_and_the_formulas_of_the_format_give_the_same_bits(initializer, dim):
    """If a multiplication was fused with an addition, some of this many values would differ."""
    words = references.philox(np.arange(3000), dim, 2**63 + 5)
    expected = REFERENCES[type(initializer).__name__](words, initializer)
    np.testing.assert_array_equal(
        rows(initializer, 3000, dim, key=2**63 + 5).view(np.uint32), expected.view(np.uint32)
    )


def test_the_reference_draws_the_same_words():
    ids = [0, 5, 2**32 + 5, 2**48 - 1]
    for row, words in zip(ids, references.philox(ids, 10, 2**64 - 3), strict=True):
        assert (
            words.tolist()
            == [word for block in range(3) for word in philox_of_integers(row, block, 2**64 - 3)][:10]
        )


@pytest.mark.parametrize("initializer", INITIALIZERS[4:], ids=str)
def test_words_on_both_sides_of_a_tail_are_told_apart(initializer):
    """The two formulas differ there for some words, and no sample of 2**32 words contains them."""
    parameters = np.array(initializer.parameters())
    start, width, *_, first, more = parameters.tolist()
    edges = {word for edge in (first, first + more) for word in (edge - 1, edge, edge + 1)}
    words = np.array([*sorted(word for word in edges if 0 <= word < WORDS), 0, WORDS - 1], np.uint32)
    seen = []

    def nonzero(flags, places):
        seen.extend(np.flatnonzero(flags).tolist())
        return sampling.nonzero(flags, places)

    helpers = {"draw": lambda out, row, key: out.__setitem__(slice(None), words), "nonzero": nonzero}
    fixed = compiler.with_globals(sampling.fill_normal, "fill_normal", helpers)
    one = np.zeros(1, int)
    fixed(np.empty((1, words.size), np.float32), one, one, np.uint64(0), start, width, parameters)
    p = [start + width * unit(word) for word in words]
    assert seen == [j for j in range(words.size) if abs(p[j] - 0.5) > 0.425]


@given(st.lists(st.integers(0, 1), max_size=100))
def test_the_places_of_ones_are_found(ones):
    flags = np.array([*ones, *[0] * (-len(ones) % 8)], np.uint8)
    for found in (sampling.nonzero, compiled_nonzero()):
        places = np.full(flags.size + 8, 77, np.uint32)
        assert found(flags, places) == sum(ones)
        assert places[: sum(ones)].tolist() == [k for k, one in enumerate(ones) if one]


@functools.cache
def compiled_nonzero():
    return numba.njit(row_kernels.nonzero)


PINNED = [
    (
        Uniform(-0.05, 0.05, seed=0),
        "3bd70079 bc70cd9b 3d360089 bc85faa4 bd0ed3dd",
        "3cb1577a 3c7bcf16 bc872b6c 3cf03c77 bb2d8442",
    ),
    (
        Normal(seed=1),
        "3f036f1d 3f2ad93f 3f95f3b3 3f254094 403b56e6",
        "beb24383 3dc6c80c 3f3bcafa 3f3ed7e8 3f51bd18",
    ),
    (
        Normal(0.5, 0.02, seed=2**63),
        "3efd8696 3f08d8d2 3efaa741 3efd3ba8 3f01b6a0",
        "3f023aaa 3ef613f4 3eee085c 3f095f71 3f06cd9a",
    ),
    (
        TruncatedNormal(seed=1),
        "3ef9e1ee 3f21ea08 3f8b7622 3f1cb01b 3ffc3dea",
        "bea9d733 3dbdb5d5 3f31aeaf 3f3482f8 3f45f6de",
    ),
    (
        TruncatedNormal(0.1, 2.0, 0.7, 60.0, seed=2),
        "3fac1378 40510116 3f971293 3f8e65b2 400abca1",
        "3fe5aa9e 40249d18 4008c9e0 4094d5ec 4006d298",
    ),
]


@pytest.mark.parametrize(("initializer", "row_6", "row_7"), PINNED, ids=lambda value: str(value)[:30])
def test_bits_are_pinned(initializer, row_6, row_7):
    """Other people's disks depend on these: a change of the generator changes their tables."""
    bits = rows(initializer, 2, 5, first=6).view(np.uint32)
    assert [" ".join(f"{value:08x}" for value in row) for row in bits] == [row_6, row_7]


def test_keys_are_pinned():
    names = (0, "tokens"), (1, "tokens"), (0, "users"), (2**64 - 1, "é")
    assert [f"{stream_key(*each):016x}" for each in names] == [
        "935a0ae7e2bd3b7e",
        "6d3001e1bbb2d600",
        "2785167595c09785",
        "83b88eb71795dc05",
    ]


def test_a_uniform_value_by_hand():
    """What one has to write to read our files in another language."""
    seed, name, row, low, high = 5, "tokens", 2**33 + 7, -0.25, 0.5
    key = int.from_bytes(
        hashlib.blake2b(seed.to_bytes(8, "little") + name.encode(), digest_size=8).digest(), "little"
    )
    words = [*philox_of_integers(row, 0, key), *philox_of_integers(row, 1, key)]
    expected = [np.float32(low + (high - low) * (word + 0.5) / 2**32) for word in words]
    assert plain_rows(Uniform(low, high, seed=seed), [row], 8, stream_key(seed, name))[0].tolist() == expected


def test_rows_beyond_32_bits_have_values_of_their_own():
    key = stream_key(0, "tokens")
    ids = [5, 5 + 2**32, 5 + 2**40, 5 + 2**47]
    values = plain_rows(Uniform(0, 1), ids, 4, key)
    assert len(np.unique(values)) == values.size


@pytest.mark.parametrize(
    "initializer", [Uniform(-1, 1, seed=9), Normal(seed=9), TruncatedNormal(seed=9)], ids=str
)
def test_a_narrower_table_has_the_same_first_columns(initializer):
    """Values depend only on row and column, not on the width of the table."""
    np.testing.assert_array_equal(rows(initializer, 20, 13)[:, :6], rows(initializer, 20, 6))


# ---- statistics, at fixed seeds: either they hold or they do not ------------------------------------------------


def distance(values, cdf):
    """Kolmogorov-Smirnov statistic, scaled: below 1.95 in 999 of 1,000 cases."""
    values = np.sort(values.astype(np.float64).reshape(-1))
    n = values.size
    theory = cdf(values)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max((steps[1:] - theory).max(), (theory - steps[:-1]).max())


def normal_cdf_of(mean, std):
    return lambda values: np.array([NormalDist(mean, std).cdf(value) for value in values])


@pytest.mark.parametrize("seed", range(3))
def test_uniform_values_are_uniform(seed):
    values = rows(Uniform(-2, 3, seed=seed), 2000, 16)
    assert distance(values, lambda x: (x + 2) / 5) < 1.95
    assert values.mean() == pytest.approx(0.5, abs=4 * 5 / math.sqrt(12 * values.size))
    assert values.var() == pytest.approx(25 / 12, rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_normal_values_are_normal(seed):
    values = rows(Normal(3, 0.5, seed=seed), 2000, 16)
    assert distance(values, normal_cdf_of(3, 0.5)) < 1.95
    standard = (values.astype(np.float64) - 3) / 0.5
    sigma = 1 / math.sqrt(values.size)
    assert abs(standard.mean()) < 4 * sigma
    assert abs((standard**2).mean() - 1) < 4 * math.sqrt(2) * sigma
    assert abs((standard**3).mean()) < 4 * math.sqrt(15) * sigma
    assert abs((standard**4).mean() - 3) < 4 * math.sqrt(96) * sigma


def correlation(a, b):
    """Scaled so that it is standard normal for independent values."""
    return float(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1] * math.sqrt(a.size))


@pytest.mark.parametrize(
    "initializer", [Uniform(-1, 1, seed=4), Normal(seed=4), TruncatedNormal(seed=4)], ids=str
)
def test_neighbours_are_not_correlated(initializer):
    values = rows(initializer, 4096, 16)
    for lag in (1, 2, 64, 1024):
        assert abs(correlation(values[lag:], values[:-lag])) < 4  # rows
    for lag in (1, 2, 4, 8):
        assert abs(correlation(values[:, lag:], values[:, :-lag])) < 4  # columns


@pytest.mark.parametrize(
    "initializer", [Uniform(-1, 1, seed=4), Normal(seed=4), TruncatedNormal(seed=4)], ids=str
)
def test_tables_and_seeds_are_not_correlated(initializer):
    def of(seed, stream):
        return rows(initializer, 4096, 8, key=stream_key(seed, stream))

    first = of(0, "a")
    for other in (of(1, "a"), of(2**63, "a"), of(0, "b"), of(0, "A"), of(0, "aa")):
        assert abs(correlation(first, other)) < 4
        assert not (first == other).any()


CUTS = [
    TruncatedNormal(seed=0),
    TruncatedNormal(2.0, 0.5, 1.8, 4.0, seed=1),
    TruncatedNormal(0.0, 1.0, 0.5, 1.7, seed=2),
    TruncatedNormal(0.0, 1.0, -1.7, -0.5, seed=2),
    TruncatedNormal(-1.0, 3.0, -1.5, 0.9, seed=3),
    TruncatedNormal(0.0, 1.0, -100.0, 100.0, seed=4),
]


@pytest.mark.parametrize("initializer", CUTS, ids=str)
def test_truncated_values_are_those_of_the_distribution_between_the_bounds(initializer):
    cdf = normal_cdf_of(initializer.mean, initializer.std)
    below, within = (
        cdf([initializer.low])[0],
        np.ptp(cdf([initializer.low, initializer.high])),
    )
    values = rows(initializer, 2000, 16)
    assert distance(values, lambda x: (cdf(x) - below) / within) < 1.95
    # Moments by the midpoint rule, from the density alone.
    x = np.linspace(initializer.low, initializer.high, 2_000_001)
    density = np.exp(-0.5 * ((x - initializer.mean) / initializer.std) ** 2)
    mean = np.average(x, weights=density)
    moments = [np.average((x - mean) ** k, weights=density) for k in range(9)]
    for k in (1, 2, 3, 4):
        error = math.sqrt((moments[2 * k] - moments[k] ** 2) / values.size)
        assert abs(((values - mean) ** k).mean() - moments[k]) < 4 * error, k


# ---- would these tests notice? ----------------------------------------------------------------------------------


def chi_square_of_bytes(words):
    """For each of the four bytes, scaled: beyond 4 in about one of 10,000 cases."""
    worst = 0.0
    for shift in (0, 8, 16, 24):
        counts = np.bincount((words.reshape(-1) >> np.uint64(shift)).astype(np.int64) & 255, minlength=256)
        expected = words.size / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        worst = max(worst, abs(chi_square - 255) / math.sqrt(2 * 255))
    return worst


def flaws(draw):
    """What is wrong with a generator ``draw(rows, dim, key)`` of words: names of the statistics that are out of bounds.

    Each is below 4 or 5 for independent, uniform words; how far beyond says nothing more.
    """
    ids = np.arange(2048)
    words = draw(ids, 32, 2**40 + 1)
    real = references.units(words)
    found = {
        "distribution": distance(real, lambda x: x) / 1.95 * 4,
        "bytes": chi_square_of_bytes(words),
        "mean": abs(real.mean() - 0.5) * math.sqrt(12 * real.size),
        "variance": abs(real.var() - 1 / 12) * math.sqrt(180 * real.size),
    }
    for lag in (1, 2, 64, 1024):
        found[f"rows, {lag} apart"] = abs(correlation(real[lag:], real[:-lag]))
    for lag in (1, 2, 3, 4, 8, 16):
        found[f"columns, {lag} apart"] = abs(correlation(real[:, lag:], real[:, :-lag]))
    others = {
        "rows, 2**32 apart": draw(ids + 2**32, 32, 2**40 + 1),
        "seeds": draw(ids, 32, 2**40 + 2),
        "tables": draw(ids, 32, 1),
        "seeds, high word": draw(ids, 32, 2**41 + 1),
    }
    for name, other in others.items():
        found[name] = abs(correlation(real, references.units(other)))
    return {name for name, value in found.items() if not value < 4.5}


def compiled_words(ids, dim, key):
    """Words of the compiled generator, from its values: a float64 of 32 bits tells all of them but float32 does not."""
    out = np.empty((len(ids), dim), np.uint32)
    draw = compiler.formula(sampling.draw, philox=compiler.formula(sampling.philox))
    for row, row_id in zip(out, ids, strict=True):
        draw(row, np.uint64(row_id), np.uint64(key))
    return out.astype(np.uint64)


def test_the_generator_has_no_flaw():
    assert flaws(compiled_words) == set()


BROKEN = {
    "one counter for two blocks": (
        lambda *a: references.philox(*a, block_of=lambda j: j // np.uint64(8)),
        "columns, 4 apart",
    ),
    "columns not counted": (
        lambda *a: references.philox(*a, block_of=lambda j: j * np.uint64(0)),
        "columns, 8 apart",
    ),
    "key ignored": (lambda ids, dim, key: references.philox(ids, dim, 0), "seeds"),
    "high word of the key ignored": (
        lambda ids, dim, key: references.philox(ids, dim, key % 2**32),
        "seeds, high word",
    ),
    "high word of the row dropped": (
        lambda *a: references.philox(*a, high_word=False),
        "rows, 2**32 apart",
    ),
    "one round": (lambda *a: references.philox(*a, rounds=1), "bytes"),
    "three rounds": (lambda *a: references.philox(*a, rounds=3), "bytes"),
    "bytes of text": (lambda *a: references.philox(*a) & np.uint64(0x7F7F7F7F), "bytes"),
    "a row twice": (
        lambda ids, dim, key: references.philox(np.asarray(ids) // 2, dim, key),
        "rows, 1 apart",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_generator_has_flaws(broken):
    draw, expected = BROKEN[broken]
    assert expected in flaws(draw)


def test_nine_rounds_look_random_but_are_not_the_known_answer():
    """Statistics cannot find this, which is why there are known answers."""
    assert references.philox([0], 4, 0)[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert references.philox([0], 4, 0, rounds=9)[0, 0] != 0x6627E8D5
    assert flaws(lambda *a: references.philox(*a, rounds=9)) == set()


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (Normal(seed=1), Normal(std=1.05, seed=1)),
        (Normal(seed=1), Normal(mean=0.02, seed=1)),
        (Normal(seed=1), TruncatedNormal(seed=1)),
    ],
    ids=str,
)
def test_the_distance_tells_distributions_apart(given, wrong):
    cdf = normal_cdf_of(given.mean, given.std)
    assert distance(rows(given, 2000, 16), cdf) < 1.95 < distance(rows(wrong, 2000, 16), cdf)


def test_seed_and_name_cannot_be_confused():
    keys = {stream_key(seed, name) for seed in range(100) for name in ("a", "b", "\x00a", "a\x00", "ab")}
    assert len(keys) == 500


# ---- limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-1.0, 0.0), (1.0, np.nextafter(np.float32(1), 2)), (-3e38, 3e37)]
)
def test_uniform_values_lie_between_low_and_high_but_never_at_high(low, high):
    """Not even for the largest word, which float32 would round up to high."""
    initializer = Uniform(low, high)
    parameters = np.array(initializer.parameters())
    out = np.empty((1, 4), np.float32)
    for word in (0, 1, WORDS // 2, WORDS - 2, WORDS - 1):
        helpers = {"draw": lambda words, row, key, w=word: words.fill(w)}
        fixed = compiler.with_globals(Uniform.fill_rows, "fill_rows", helpers)
        fixed(out, np.zeros(1, int), np.zeros(1, int), np.uint64(0), parameters)
        assert (np.float32(low) <= out).all(), word
        assert (out < np.float32(high)).all(), word


def test_the_largest_word_would_round_up_to_high():
    """So the test above can fail."""
    assert np.float32(unit(np.uint64(WORDS - 1))) == 1.0


def test_constant_is_rounded_to_float32():
    assert rows(Constant(0.1), 3, 2).tolist() == [[float(np.float32(0.1))] * 2] * 3


# ---- truncated normal: bounds -----------------------------------------------------------------------------------


@st.composite
def truncated(draw):
    """Everything that is allowed: at least a tenth of the distribution, and bounds that differ in float32."""
    mean, std = draw(st.floats(-1e3, 1e3)), draw(st.floats(1e-2, 1e3))
    low = draw(st.floats(-8, 1.2))
    high = draw(st.floats(low + 0.2, 9))
    try:
        return TruncatedNormal(mean, std, mean + low * std, mean + high * std, seed=draw(st.integers(0, 9)))
    except ValueError as error:
        assert "a tenth" in str(error)
        assert NormalDist().cdf(high) - NormalDist().cdf(low) < 0.1 + 1e-5
        return TruncatedNormal(mean, std)


@given(truncated())
def test_truncated_values_lie_within_their_bounds(initializer):
    values = rows(initializer, 50, 7).astype(np.float64)
    assert initializer.low <= values.min() <= values.max() <= initializer.high
    assert initializers.from_json(json.loads(json.dumps(serialization.to_json(initializer)))) == initializer


@given(truncated(), st.sampled_from([0, 1, WORDS // 2, WORDS - 2, WORDS - 1]))
def test_the_outermost_words_are_within_the_domain_of_the_quantile(initializer, word):
    start, width, *_ = initializer.parameters()
    p = start + width * unit(np.uint64(word))
    assert math.sqrt(-math.log(min(p, 1 - p))) < 5  # from 5 on, the algorithm has a third interval


@given(truncated())
def test_the_outermost_words_come_close_to_the_bounds(initializer):
    start, width, mean, factor, *_ = initializer.parameters()
    ends = sorted(
        mean + factor * float(normal_quantile(start + width * unit(np.uint64(w)))) for w in (0, WORDS - 1)
    )
    for end, bound in zip(ends, (initializer.low, initializer.high), strict=True):
        reach = min(max((bound - mean) / initializer.std, -6.33), 6.33)  # no probability is below 2**-33
        assert (end - mean) / initializer.std == pytest.approx(reach, abs=0.1)


@given(st.floats(-6.2, 0))
def test_the_distribution_function_is_the_inverse_of_the_quantile(x):
    assert normal_cdf(x) == pytest.approx(NormalDist().cdf(x), rel=1e-5)
    assert normal_cdf(x) == references.normal_probability(x)
    assert normal_quantile(normal_cdf(x)) >= x


@pytest.mark.parametrize("x", [-6.4, -1e10, -math.inf])
def test_no_probability_is_below_that_of_the_smallest_word(x):
    assert normal_cdf(x) == unit(np.uint64(0))


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.3), (0.2, 0.3), (-2.0, 0.05)])
def test_a_bound_that_float32_cannot_hold_is_not_passed(low, high):
    """Rounded to float32, 0.3 and -0.1 are outside the bounds."""
    values = rows(TruncatedNormal(0.1, 0.2, low, high), 4000, 4).astype(np.float64)
    assert low <= values.min() <= values.max() <= high


def test_bounds_are_two_standard_deviations_by_default():
    assert TruncatedNormal(1.0, 0.5) == TruncatedNormal(1.0, 0.5, 0.0, 2.0)
    assert TruncatedNormal(1.0, 0.5, high=5.0) == TruncatedNormal(1.0, 0.5, 0.0, 5.0)
    assert repr(TruncatedNormal(np.float32(1), low=np.int64(0))) == (
        "TruncatedNormal(mean=1.0, std=1.0, low=0.0, high=3.0, seed=0)"
    )


def test_mirrored_values_are_those_of_the_opposite_bounds():
    upper = rows(TruncatedNormal(low=0.3, high=2.0), 100, 8)
    np.testing.assert_array_equal(upper, -rows(TruncatedNormal(low=-2.0, high=-0.3), 100, 8))


# ---- recipes ----------------------------------------------------------------------------------------------------

KERAS = [  # by the formulas of keras.initializers, for a matrix of 1000 x 24
    (GlorotUniform(seed=1), Uniform(-math.sqrt(6 / 1024), math.sqrt(6 / 1024), seed=1)),
    (HeUniform(seed=1), Uniform(-math.sqrt(6 / 1000), math.sqrt(6 / 1000), seed=1)),
    (GlorotNormal(), TruncatedNormal(0.0, math.sqrt(2 / 1024) / 0.87962566103423978)),
    (HeNormal(), TruncatedNormal(0.0, math.sqrt(2 / 1000) / 0.87962566103423978)),
    (VarianceScaling(0.5, "fan_out", "normal", seed=2), Normal(0.0, math.sqrt(0.5 / 24), seed=2)),
    (VarianceScaling(), TruncatedNormal(0.0, math.sqrt(1 / 512) / 0.87962566103423978)),
]


@pytest.mark.parametrize(("recipe", "expected"), KERAS, ids=str)
def test_a_recipe_is_that_of_keras(recipe, expected):
    got = recipe.for_shape(1000, 24)
    assert type(got) is type(expected)
    assert got.seed == expected.seed
    for one, other in zip(dataclasses.astuple(got), dataclasses.astuple(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-15)


@pytest.mark.parametrize("distribution", ["uniform", "normal", "truncated_normal"])
@pytest.mark.parametrize(("fan", "size"), [("fan_in", 4000), ("fan_out", 30), ("fan_avg", 2015)])
def test_values_have_the_variance_that_was_asked_for(fan, size, distribution):
    values = rows(VarianceScaling(3.0, fan, distribution, seed=5).for_shape(4000, 30), 4000, 30)
    assert values.var() == pytest.approx(3.0 / size, rel=0.02)
    assert abs(values.mean()) < 4 * math.sqrt(3.0 / size / values.size)


def test_a_fan_is_at_least_one():
    assert VarianceScaling(1.0, "fan_out", "normal").for_shape(1, 1) == Normal()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": 0.0}, ValueError, "scale must be greater than 0"),
        ({"scale": -1}, ValueError, "scale must be greater than 0"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"fan": "fan"}, ValueError, "fan must be one of .*'fan_in'"),
        ({"fan": None}, ValueError, "fan must be one of"),
        ({"distribution": "gauss"}, ValueError, "distribution must be one of .*'truncated_normal'"),
        ({"seed": -1}, ValueError, "seed must be between"),
        ({"seed": 1.0}, TypeError, "seed must be an integer"),
    ],
)
def test_a_recipe_checks_its_parameters(arguments, error, message):
    with pytest.raises(error, match=message):
        VarianceScaling(**arguments)


def test_a_recipe_is_not_what_a_file_says():
    with pytest.raises(FormatError, match="initializer"):
        initializers.from_json(
            {"name": "VarianceScaling", "scale": 1.0, "fan": "fan_in", "distribution": "normal", "seed": 0}
        )


def test_a_table_keeps_what_became_of_a_recipe(tmp_path):
    expected = GlorotUniform(seed=1).for_shape(300, 5)
    with shardemb.open(tmp_path / "s.zarr") as store:
        table = store.create_table(
            "t", num_embeddings=300, embedding_dim=5, initializer=GlorotUniform(seed=1)
        )
        assert table.initializer == expected
        store.commit()
    with shardemb.open(tmp_path / "s.zarr", mode="r") as store:
        assert store["t"].initializer == expected
        np.testing.assert_array_equal(
            store["t"].lookup(np.arange(300)), rows(expected, 300, 5, key=stream_key(1, "t"))
        )


# ---- the same values, however they are computed -----------------------------------------------------------------


@pytest.mark.parametrize(
    "initializer", [Uniform(-1, 1, seed=6), Normal(seed=6), TruncatedNormal(seed=6)], ids=str
)
def test_shards_threads_batches_and_updates_do_not_matter(tmp_path, initializer):
    expected = rows(initializer, 20_000, 19)
    order = np.random.default_rng(0).permutation(20_000)
    for threads, rows_per_shard in ((1, None), (3, 64), (2, 8192)):
        with shardemb.open(tmp_path / f"{threads}.zarr", threads=threads) as store:
            table = store.create_table(
                "tokens",
                num_embeddings=20_000,
                embedding_dim=19,
                initializer=initializer,
                optimizer=shardemb.optim.SGD(lr=1.0),
                rows_per_shard=rows_per_shard,
            )
            np.testing.assert_array_equal(table.lookup(order), expected[order])
            table.update(order[:7000], np.zeros((7000, 19)))  # loads them into memory
            np.testing.assert_array_equal(table.lookup(order[::-1]), expected[order[::-1]])
            store.rollback()


# ---- parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", INITIALIZERS, ids=str)
def test_json_gives_back_the_same_initializer(initializer):
    document = json.loads(json.dumps(serialization.to_json(initializer)))
    assert initializers.from_json(document) == initializer


def test_numbers_of_numpy_are_parameters_like_any_other():
    initializer = Uniform(np.float32(-0.5), np.float64(0.5), seed=np.int64(7))
    assert initializer == Uniform(-0.5, 0.5, seed=7)
    assert repr(initializer) == "Uniform(low=-0.5, high=0.5, seed=7)"
    assert initializers.from_json(json.loads(json.dumps(serialization.to_json(initializer)))) == initializer


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Constant(math.nan), ValueError),
        (lambda: Constant(math.inf), ValueError),
        (lambda: Constant(1e39), ValueError),
        (lambda: Constant(10**400), ValueError),
        (lambda: Constant("0"), TypeError),
        (lambda: Constant(True), TypeError),
        (lambda: Constant(None), TypeError),
        (lambda: Constant([0.0]), TypeError),
        (lambda: Uniform(1.0, 1.0), ValueError),
        (lambda: Uniform(1.0, 0.0), ValueError),
        (lambda: Uniform(1.0, 1.0 + 1e-12), ValueError),  # the same in float32
        (lambda: Uniform(-3e38, 3e38), ValueError),  # the difference is not
        (lambda: Uniform(0.0, math.nan), ValueError),
        (lambda: Uniform("0", "1"), TypeError),
        (lambda: Uniform(0.0, 1.0, seed=-1), ValueError),
        (lambda: Uniform(0.0, 1.0, seed=2**64), ValueError),
        (lambda: Uniform(0.0, 1.0, seed=0.0), TypeError),
        (lambda: Uniform(0.0, 1.0, seed=True), TypeError),
        (lambda: Uniform(0.0, 1.0, seed=None), TypeError),
        (lambda: Normal(std=0.0), ValueError),
        (lambda: Normal(std=-1.0), ValueError),
        (lambda: Normal(std=1e38), ValueError),  # 6.3 of them
        (lambda: Normal(mean=math.inf), ValueError),
        (lambda: Normal(mean="0"), TypeError),
        (lambda: Normal(seed="0"), TypeError),
        (lambda: TruncatedNormal(std=0.0), ValueError),
        (lambda: TruncatedNormal(std=1e38), ValueError),
        (lambda: TruncatedNormal(low=1.0, high=1.0), ValueError),
        (lambda: TruncatedNormal(low=1.0, high=-1.0), ValueError),
        (lambda: TruncatedNormal(low=-math.inf), ValueError),
        (lambda: TruncatedNormal(high=math.nan), ValueError),
        (lambda: TruncatedNormal(low=1.2), ValueError),  # 0.092 of the distribution up to 2
        (lambda: TruncatedNormal(low=0.0, high=0.25), ValueError),  # 0.0987
        (lambda: TruncatedNormal(low=-0.25, high=0.0), ValueError),
        (lambda: TruncatedNormal(low=1.29, high=1e30), ValueError),  # 0.0985
        (lambda: TruncatedNormal(low=1e30, high=2e30), ValueError),
        (lambda: TruncatedNormal(mean=1e30), ValueError),  # low and high are the same
        (lambda: TruncatedNormal(low="0"), TypeError),
        (lambda: TruncatedNormal(high=True), TypeError),
        (lambda: TruncatedNormal(mean=None), TypeError),
    ],
)
def test_parameters_are_checked(make, error):
    with pytest.raises(error):
        make()


def test_initializers_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Uniform(0, 1).seed = 5


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"name": 5},
        {"name": {"a": "b"}},
        {"name": "Initializer"},
        {"name": "Zeros"},
        {"name": "Constant"},
        {"name": "Constant", "value": 0.0, "seed": 0},
        {"name": "Constant", "value": 10**400},
        {"name": "Constant", "value": math.nan},
        {"name": "Constant", "value": [0.0]},
        {"name": "Uniform", "low": 0.0, "high": 1.0},  # with a default for the seed it would be another table
        {"name": "Uniform", "low": 1.0, "high": 0.0, "seed": 0},
        {"name": "Uniform", "low": -(10**400), "high": 0.0, "seed": 0},
        {"name": "Normal", "mean": 0.0, "std": 1.0, "seed": -1},
        {"name": "Normal", "mean": None, "std": 1.0, "seed": 0},
        {"name": "TruncatedNormal", "mean": 0.0, "std": 1.0, "seed": 0},
        {"name": "TruncatedNormal", "mean": 0.0, "std": 1.0, "low": None, "high": 1.0, "seed": 0},
        {"name": "TruncatedNormal", "mean": 0.0, "std": 1.0, "low": 3.0, "high": 4.0, "seed": 0},
        {"name": "Normal", "mean": "a", "std": "b", "seed": "c"},
    ],
    ids=lambda document: str(document)[:50],
)
def test_json_that_is_no_initializer_is_a_format_error(document):
    with pytest.raises(FormatError, match="initializer"):
        initializers.from_json(document)
