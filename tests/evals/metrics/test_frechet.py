"""Fréchet distance against closed forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from dit.evals.metrics.frechet import Statistics, frechet_distance


def gaussian(rng: np.random.Generator, d: int) -> Statistics:
    a = rng.normal(size=(d, d))
    return Statistics(rng.normal(size=d), a @ a.T + np.eye(d), 100)  # sqrtm needs it away from singular


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_commuting_covariances_have_a_closed_form(seed, d):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    s, t, m = rng.uniform(0, 3, d), rng.uniform(0, 3, d), rng.normal(size=d)
    a = Statistics(np.zeros(d), (q * s**2) @ q.T, 10)
    b = Statistics(m, (q * t**2) @ q.T, 10)
    assert frechet_distance(a, b) == pytest.approx((m**2).sum() + ((s - t) ** 2).sum(), abs=1e-9, rel=1e-9)


@given(st.integers(0, 2**32 - 1))
def test_symmetric_zero_on_itself_and_equal_to_the_formula_with_a_matrix_root(seed):
    rng = np.random.default_rng(seed)
    a, b = gaussian(rng, 5), gaussian(rng, 5)
    direct = np.square(a.mean - b.mean).sum() + np.trace(a.cov + b.cov - 2 * sqrtm(a.cov @ b.cov).real)
    assert frechet_distance(a, b) == pytest.approx(direct, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_fewer_samples_than_features_is_finite():
    rng = np.random.default_rng(0)
    a, b = (Statistics.fit(rng.normal(size=(8, 40))) for _ in range(2))
    assert np.isfinite(frechet_distance(a, b))


def test_fit_is_the_sample_mean_and_covariance():
    x = np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32)
    fitted = Statistics.fit(x)
    np.testing.assert_allclose(fitted.mean, x.astype(np.float64).mean(0))
    np.testing.assert_allclose(fitted.cov, np.cov(x.astype(np.float64).T))
    assert fitted.mean.dtype == fitted.cov.dtype == np.float64


@pytest.mark.parametrize("bad", [np.ones((1, 4)), np.ones(4), np.full((5, 2), np.nan)])
def test_unusable_features_are_refused(bad):
    with pytest.raises(ValueError, match=r"expected features|not finite"):
        Statistics.fit(bad)


def test_unlike_dimensions_are_refused():
    rng = np.random.default_rng(2)
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(gaussian(rng, 3), gaussian(rng, 4))
