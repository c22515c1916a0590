import dataclasses
import hashlib
import json
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardemb import initializers, kernels, persisted
from shardemb.errors import FormatError
from shardemb.initializers import (
    Constant,
    Normal,
    Uniform,
    log,
    normal_quantile,
    philox,
    room_for,
    stream_key,
    unit,
)

WORDS = 2**32


def rows(initializer, num_rows, dim, *, key=None, first=0):
    """Initial values of rows never written, as a lookup computes them: by the compiled kernel."""
    out = np.empty((num_rows, dim), np.float32)
    ids = np.arange(first, first + num_rows)
    never_written = np.zeros((first + num_rows) // 8 + 1, np.uint8)
    key = stream_key(getattr(initializer, "seed", 0), "tokens") if key is None else key
    kernels.gather_or_fill(type(initializer))(
        np.empty((0, dim), np.float32),
        *(np.empty(0, np.int32), np.empty(0, np.int32), 0),
        never_written,
        0,
        ids,
        out,
        np.uint64(key),
        np.array(initializer.parameters(), np.float64),
        0,
        num_rows,
    )
    return out


def plain_rows(initializer, ids, dim, key):
    """The same by the plain Python function."""
    out = np.empty((len(ids), dim), np.float32)
    parameters, room = np.array(initializer.parameters(), np.float64), room_for(dim)
    for row, row_id in zip(out, ids, strict=True):
        initializer.fill_row(row, np.uint64(row_id), np.uint64(key), parameters, room)
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
    """The textbook's version, on Python's integers, which cannot overflow."""
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


@given(st.floats(2.0**-33, 1, exclude_max=True))
def test_log_is_the_logarithm(x):
    assert log(x) == pytest.approx(math.log(x), rel=1e-14, abs=1e-15)


@given(st.integers(1, 1000))
def test_log_of_powers_of_two(k):
    assert log(2.0**-k) == pytest.approx(-k * math.log(2), rel=1e-15)


@given(st.integers(0, WORDS - 1))
def test_the_quantile_is_that_of_the_normal_distribution(word):
    p = unit(np.uint64(word))
    assert normal_quantile(p) == pytest.approx(NormalDist().inv_cdf(p), rel=2e-7, abs=1e-8)


@pytest.mark.parametrize(
    "p", [0.5 / WORDS, 1e-9, math.exp(-25), 0.0749999, 0.075, 0.0750001, 0.5, 0.925, 0.99]
)
def test_the_quantile_on_both_sides_of_every_branch(p):
    assert normal_quantile(p) == pytest.approx(NormalDist().inv_cdf(p), rel=2e-7, abs=1e-8)


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
]


@pytest.mark.parametrize("initializer", INITIALIZERS, ids=str)
@pytest.mark.parametrize("dim", [1, 4, 7])
def test_kernel_and_plain_function_give_the_same_bits(initializer, dim):
    key = stream_key(getattr(initializer, "seed", 0), "tokens")
    for first in (0, 2**16 - 5, 2**20 - 3):
        compiled = rows(initializer, 40, dim, key=key, first=first)
        plain = plain_rows(initializer, range(first, first + 40), dim, key)
        np.testing.assert_array_equal(compiled.view(np.uint32), plain.view(np.uint32))


PINNED = [
    (
        Uniform(-0.05, 0.05, seed=0),
        "3bd70079 bc70cd9b 3d360089 bc85faa4 bd0ed3dd",
        "3cb1577a 3c7bcf16 bc872b6c 3cf03c77 bb2d8442",
    ),
    (
        Normal(seed=1),
        "3f036f1d 3f2ad940 3f95f3b2 3f254095 403b56e7",
        "beb24383 3dc6c80d 3f3bcafb 3f3ed7e9 3f51bd19",
    ),
    (
        Normal(0.5, 0.02, seed=2**63),
        "3efd8696 3f08d8d2 3efaa741 3efd3ba8 3f01b6a0",
        "3f023aaa 3ef613f4 3eee085c 3f095f71 3f06cd9a",
    ),
]


@pytest.mark.parametrize(("initializer", "row_6", "row_7"), PINNED, ids=lambda value: str(value)[:30])
def test_bits_are_pinned(initializer, row_6, row_7):
    """These are on other people's disks: whoever changes the generator changes their tables."""
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
    """What somebody has to write who reads our files in another language."""
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


@pytest.mark.parametrize("initializer", [Uniform(-1, 1, seed=9), Normal(seed=9)], ids=str)
def test_a_narrower_table_has_the_same_first_columns(initializer):
    """Row and column alone decide, so no value depends on how wide the table is."""
    np.testing.assert_array_equal(rows(initializer, 20, 13)[:, :6], rows(initializer, 20, 6))


# ---- statistics, at fixed seeds: either they hold or they do not ------------------------------------------------


def distance(values, cdf):
    """Kolmogorov-Smirnov statistic, scaled: below 1.95 in 999 of 1,000 cases."""
    values = np.sort(values.astype(np.float64).reshape(-1))
    n = values.size
    theory = cdf(values)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max((steps[1:] - theory).max(), (theory - steps[:-1]).max())


def normal_cdf(mean, std):
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
    assert distance(values, normal_cdf(3, 0.5)) < 1.95
    standard = (values.astype(np.float64) - 3) / 0.5
    sigma = 1 / math.sqrt(values.size)
    assert abs(standard.mean()) < 4 * sigma
    assert abs((standard**2).mean() - 1) < 4 * math.sqrt(2) * sigma
    assert abs((standard**3).mean()) < 4 * math.sqrt(15) * sigma
    assert abs((standard**4).mean() - 3) < 4 * math.sqrt(96) * sigma


def correlation(a, b):
    """Scaled so that independent values give a standard normal one."""
    return float(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1] * math.sqrt(a.size))


@pytest.mark.parametrize("initializer", [Uniform(-1, 1, seed=4), Normal(seed=4)], ids=str)
def test_neighbours_are_not_correlated(initializer):
    values = rows(initializer, 4096, 16)
    for lag in (1, 2, 64, 1024):
        assert abs(correlation(values[lag:], values[:-lag])) < 4  # rows
    for lag in (1, 2, 4, 8):
        assert abs(correlation(values[:, lag:], values[:, :-lag])) < 4  # columns


@pytest.mark.parametrize("initializer", [Uniform(-1, 1, seed=4), Normal(seed=4)], ids=str)
def test_tables_and_seeds_are_not_correlated(initializer):
    def of(seed, stream):
        return rows(initializer, 4096, 8, key=stream_key(seed, stream))

    first = of(0, "a")
    for other in (of(1, "a"), of(2**63, "a"), of(0, "b"), of(0, "A"), of(0, "aa")):
        assert abs(correlation(first, other)) < 4
        assert not (first == other).any()


def test_seed_and_name_cannot_be_confused():
    keys = {stream_key(seed, name) for seed in range(100) for name in ("a", "b", "\x00a", "a\x00", "ab")}
    assert len(keys) == 500


# ---- limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-1.0, 0.0), (1.0, np.nextafter(np.float32(1), 2)), (-3e38, 3e37)]
)
def test_uniform_values_lie_between_low_and_high_but_never_at_high(low, high):
    """Even the largest word, which float32 rounds up to high."""
    initializer = Uniform(low, high)
    parameters = np.array(initializer.parameters())
    out = np.empty(4, np.float32)
    for word in (0, 1, WORDS // 2, WORDS - 2, WORDS - 1):
        fixed = kernels._specialise(
            Uniform.fill_row, "fill_row", draw=lambda words, row, key, w=word: words.fill(w)
        )
        fixed(out, np.uint64(0), np.uint64(0), parameters, room_for(4))
        assert (np.float32(low) <= out).all(), word
        assert (out < np.float32(high)).all(), word


def test_the_largest_word_would_round_up_to_high():
    """So the test above tests something."""
    assert np.float32(unit(np.uint64(WORDS - 1))) == 1.0


def test_constant_is_rounded_to_float32():
    assert rows(Constant(0.1), 3, 2).tolist() == [[float(np.float32(0.1))] * 2] * 3


# ---- parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", INITIALIZERS, ids=str)
def test_json_gives_back_the_same_initializer(initializer):
    document = json.loads(json.dumps(persisted.to_json(initializer)))
    assert initializers.from_json(document) == initializer


def test_numbers_of_numpy_are_parameters_like_any_other():
    initializer = Uniform(np.float32(-0.5), np.float64(0.5), seed=np.int64(7))
    assert initializer == Uniform(-0.5, 0.5, seed=7)
    assert repr(initializer) == "Uniform(low=-0.5, high=0.5, seed=7)"
    assert initializers.from_json(json.loads(json.dumps(persisted.to_json(initializer)))) == initializer


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
        {"name": "Uniform", "low": 0.0, "high": 1.0},  # a seed made up would be another table
        {"name": "Uniform", "low": 1.0, "high": 0.0, "seed": 0},
        {"name": "Uniform", "low": -(10**400), "high": 0.0, "seed": 0},
        {"name": "Normal", "mean": 0.0, "std": 1.0, "seed": -1},
        {"name": "Normal", "mean": None, "std": 1.0, "seed": 0},
        {"name": "Normal", "mean": "a", "std": "b", "seed": "c"},
    ],
    ids=lambda document: str(document)[:50],
)
def test_json_that_is_no_initializer_is_a_format_error(document):
    with pytest.raises(FormatError, match="initializer"):
        initializers.from_json(document)
