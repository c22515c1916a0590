"""Coefficients of correlation against SciPy where that is installed, and against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardemb.search import correlation


@settings(max_examples=60)
@given(st.integers(3, 400), st.floats(-3, 3), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_both_are_those_of_scipy(count, slope, distinct, seed):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    one = rng.integers(0, distinct + 1, count).astype(float)  # many ties
    other = slope * one + rng.standard_normal(count)
    if np.ptp(one) == 0:
        assert np.isnan(correlation.pearson(one, other).statistic)
        return
    np.testing.assert_allclose(
        correlation.pearson(one, other), stats.pearsonr(one, other), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(
        correlation.spearman(one, other), stats.spearmanr(one, other), rtol=1e-6, atol=1e-7
    )


def test_known_values():
    assert correlation.pearson([1, 2], [5, 3]) == pytest.approx((-1, 1))
    assert correlation.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx((1, 0), abs=1e-7)
    assert correlation.spearman([1, 2, 3, 4], [1, 8, 27, 64]).statistic == pytest.approx(1)
    statistic, probability = correlation.pearson([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
    assert statistic == pytest.approx(0.8)
    assert probability == pytest.approx(
        0.10408803866182788
    )  # of t = 0.8 * sqrt(3 / 0.36), 3 degrees of freedom


@pytest.mark.parametrize("x", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_the_incomplete_beta_function_where_it_is_a_polynomial(x):
    assert correlation.incomplete_beta(2, 3, x) == pytest.approx(6 * x**2 - 8 * x**3 + 3 * x**4, abs=1e-12)
    assert correlation.incomplete_beta(1, 1, x) == pytest.approx(x)
