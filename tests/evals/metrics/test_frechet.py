"""Fréchet distance against closed forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from dit.data import DataError
from dit.evals.metrics import FeatureSet, Statistics
from dit.evals.metrics.frechet import Frechet, SpatialFrechet, frechet_distance
from dit.evals.metrics.metric import ROWS


def gaussian(rng: np.random.Generator, d: int) -> Statistics:
    a = rng.normal(size=(d, d))
    return Statistics(rng.normal(size=d), a @ a.T + np.eye(d), 100)  # sqrtm needs it away from singular


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_commuting_covariances_have_a_closed_form(seed, d):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    s, t, m = rng.uniform(0, 3, d), rng.uniform(0, 3, d), rng.normal(size=d)
    a = Statistics(np.zeros(d), (q * s**2) @ q.T)
    b = Statistics(m, (q * t**2) @ q.T)
    assert frechet_distance(a, b) == pytest.approx((m**2).sum() + ((s - t) ** 2).sum(), abs=1e-9, rel=1e-9)


@given(st.integers(0, 2**32 - 1))
def test_symmetric_zero_on_itself_and_equal_to_the_formula_with_a_matrix_root(seed):
    rng = np.random.default_rng(seed)
    a, b = gaussian(rng, 5), gaussian(rng, 5)
    direct = np.square(a.mean - b.mean).sum() + np.trace(a.cov + b.cov - 2 * sqrtm(a.cov @ b.cov).real)
    assert frechet_distance(a, b) == pytest.approx(direct, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_fewer_samples_than_features_and_more_agree_with_statistics():
    """N < D factors the samples, N > D their covariance; a reference may be either."""
    rng = np.random.default_rng(0)
    for n, m in ((8, 9), (8, 90), (90, 8), (90, 91)):
        x, y = rng.normal(size=(n, 40)), 2 * rng.normal(size=(m, 40)) + 1
        a, b = Statistics.fit(x), Statistics.fit(y)
        direct = np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov)
        direct -= 2 * np.sqrt(np.linalg.eigvals(a.cov @ b.cov).real.clip(min=0)).sum()
        found = Frechet()(FeatureSet(x), FeatureSet(y))["frechet"]
        assert found == pytest.approx(direct, rel=1e-6)
        assert found == pytest.approx(frechet_distance(a, b), rel=1e-9)
        assert found == pytest.approx(Frechet()(FeatureSet(x), b)["frechet"], rel=1e-9)


def test_a_paper_sized_space_with_few_samples():
    """2,048 dimensions, 500 samples: identical sets are at 0; others at what their inner products say."""
    rng = np.random.default_rng(1)
    x = (rng.gamma(0.5, size=(500, 2048)) + 3).astype(np.float32)
    y = (1.1 * rng.gamma(0.5, size=(500, 2048)) + 3).astype(np.float32)
    distance = Frechet()
    assert distance(FeatureSet(x), FeatureSet(x))["frechet"] == pytest.approx(0, abs=1e-6)
    assert distance(FeatureSet(x), FeatureSet(x[::-1]))["frechet"] == pytest.approx(0, abs=1e-6)
    a, b = (z.astype(np.float64) for z in (x, y))
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    inner = centred_a @ centred_b.T / 499  # tr (C_a C_b)^1/2 is the sum of this matrix's singular values
    cross = np.sqrt(np.linalg.eigvalsh(inner @ inner.T).clip(min=0)).sum()
    direct = (
        np.square(a.mean(0) - b.mean(0)).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * cross
    )
    assert distance(FeatureSet(x), FeatureSet(y))["frechet"] == pytest.approx(direct, rel=1e-6)


def test_a_shift_far_away_and_a_shift_of_both():
    x = np.random.default_rng(2).normal(size=(300, 6))
    assert Frechet()(FeatureSet(x), FeatureSet(x + 0.5))["frechet"] == pytest.approx(6 * 0.25, rel=1e-9)
    assert Frechet()(FeatureSet(x + 1e6), FeatureSet(x + 1e6))["frechet"] == pytest.approx(0, abs=1e-6)


def test_spatial_features_are_compared_where_they_are_asked_for():
    rng = np.random.default_rng(3)
    a = FeatureSet(rng.normal(size=(20, 3)), spatial=rng.normal(size=(20, 5)))
    b = FeatureSet(rng.normal(size=(20, 4)), spatial=a.spatial + 1)
    assert SpatialFrechet()(a, b) == {"frechet_spatial": pytest.approx(5.0)}
    with pytest.raises(DataError, match="needs spatial features"):
        SpatialFrechet()(a, FeatureSet(b.features))


def test_fit_is_the_sample_mean_and_covariance():
    x = np.random.default_rng(1).normal(size=(2 * ROWS + 50, 3)).astype(np.float32)
    fitted = Statistics.fit(x)
    np.testing.assert_allclose(fitted.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(fitted.cov, np.cov(x.astype(np.float64).T), rtol=1e-12)
    assert fitted.mean.dtype == fitted.cov.dtype == np.float64


def test_counted_samples_are_as_if_repeated():
    rng = np.random.default_rng(4)
    x, counts = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
    counted, repeated = Statistics.fit(x, counts), Statistics.fit(np.repeat(x, counts, axis=0))
    np.testing.assert_allclose(counted.cov, repeated.cov, rtol=1e-12)
    assert counted.count == counts.sum()


@pytest.mark.parametrize("bad", [np.ones((1, 4)), np.ones(4), np.full((5, 2), np.nan)])
def test_unusable_features_are_refused(bad):
    with pytest.raises(ValueError, match=r"expected features|not finite"):
        Statistics.fit(bad)


def test_what_is_no_pair_of_gaussians_is_refused():
    rng = np.random.default_rng(2)
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(gaussian(rng, 3), gaussian(rng, 4))
    with pytest.raises(DataError, match="eigenvalue -1"):
        frechet_distance(Statistics(np.zeros(2), np.diag([1.0, -1.0])), gaussian(rng, 2))
    with pytest.raises(DataError, match=r"expected \(D,\) and \(D, D\)"):
        Statistics(np.zeros(2), np.eye(3))
