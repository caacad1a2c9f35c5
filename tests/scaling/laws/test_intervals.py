"""Intervals: of the bootstrap, whose resamples are what they would be alone, and of the profile."""

from __future__ import annotations

import numpy as np
import pytest

from dit.scaling.laws.fit import Fitted, Floor, fit
from dit.scaling.laws.intervals import (
    NAMES,
    bootstrap,
    figures,
    percentiles,
    profile,
    refit,
    spreads,
    weights,
)
from dit.scaling.laws.law import Law
from dit.scaling.laws.solver import Points, solve
from tests.scaling.laws.surfaces import HOFFMANN, Grid, points
from tests.scaling.laws.test_fit import chinchilla

TRUE = figures(HOFFMANN)


def test_resamples_are_fits_of_their_own() -> None:
    """Each resample alone, from many starts, ends where it ended among all others."""
    own = points(HOFFMANN, Grid(6, 5), 5e-3)
    fitted = fit(own)
    drawn = weights(40, np.ones(len(own)), 7)
    together = refit(fitted.theta, own, drawn, own.basis)
    rng = np.random.default_rng(0)
    for theta, weight in zip(together[:8], drawn, strict=False):
        starts = fitted.theta + rng.normal(size=(20, 5)) * [1.0, 1.0, 0.2, 0.05, 0.05]
        alone = solve(starts, own, np.tile(weight, (20, 1)))
        here = solve(theta[None], own, weight[None], deltas=(1e-3,)).huber[0]
        assert here <= alone.huber.min() * (1 + 1e-7)


def test_a_resample_with_whole_weights_is_a_table_with_rows_repeated() -> None:
    own = points(HOFFMANN, Grid(6, 5), 5e-3)
    counts = np.random.default_rng(3).multinomial(len(own), np.full(len(own), 1 / len(own)))
    theta = refit(fit(own).theta, own, counts[None].astype(float), own.basis)[0]
    np.testing.assert_allclose(
        theta, fit(own.chosen(np.repeat(np.arange(len(own)), counts))).theta, rtol=1e-6
    )


def test_weights_are_a_function_of_the_seed() -> None:
    wanted = np.linspace(0.7, 1.6, 50)
    first, again, other = (weights(2000, wanted, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not (first == other).any()
    assert (first > 0).all()
    np.testing.assert_allclose(first.mean(0), 1, atol=0.15)
    np.testing.assert_allclose(first.std(0), wanted, rtol=0.2)


def test_weights_vary_as_residuals_are_shrunk() -> None:
    """HC3 where all residuals are within delta, and the plain bootstrap where hardly any is."""
    small, large = (points(HOFFMANN, Grid(5, 5), noise, seed=2) for noise in (1e-5, 0.3))
    theta = np.log([406.4, 410.7, 1.69, np.exp(0.34), np.exp(0.28)])
    at = Fitted(theta, 0.0, True, 1, 1)
    leverages = 1 - 1 / spreads(small, at, Floor())
    assert leverages.sum() == pytest.approx(5)
    assert (1 - 1 / spreads(small, at, Floor(1.69))).sum() == pytest.approx(4)
    np.testing.assert_allclose(spreads(large, at, Floor()), 1, atol=0.05)


def test_without_noise_there_is_no_interval() -> None:
    own = points(HOFFMANN)
    found = fit(own)
    ends = percentiles(figures(Law.of(bootstrap(own, found, Floor(), 100))))
    np.testing.assert_allclose(ends, np.stack([TRUE, TRUE]), rtol=1e-6)
    for name, value in zip(NAMES, TRUE, strict=True):
        np.testing.assert_allclose(profile(own, found, Floor())[name], value, rtol=1e-6)


def test_errors_of_the_published_fit() -> None:
    """Standard errors of arXiv 2404.10102, table 2: E 0.03, A 124.58, alpha 0.02, beta 0.02 from 4,000 resamples."""
    own = chinchilla(5)
    drawn = figures(Law.of(bootstrap(own, fit(own), Floor(), 500)))
    published = {"E": 0.03, "A": 124.58, "B": 1293.23, "alpha": 0.02, "beta": 0.02}
    for name, error in published.items():
        assert 0.6 < drawn[:, NAMES.index(name)].std() / error < 1.4, name


def test_profiles_are_where_the_sum_has_risen_as_much_above_and_below() -> None:
    """With noise well within delta the fit is least squares, whose profile is known: t intervals for small noise."""
    own = points(HOFFMANN, Grid(8, 6), 1e-4, seed=5)
    fitted = fit(own)
    found = profile(own, fitted, Floor())
    shares = np.stack(
        [HOFFMANN.A * np.exp(-HOFFMANN.alpha * own.params), HOFFMANN.B * np.exp(-HOFFMANN.beta * own.tokens)]
    )
    loss = np.exp(own.loss)
    slopes = (
        np.stack(
            [shares[0], shares[1], np.full(len(own), 1.69), -shares[0] * own.params, -shares[1] * own.tokens]
        )
        / loss
    )
    errors = 1e-4 * np.sqrt(np.diag(np.linalg.inv(slopes @ slopes.T)))
    for name, error, centre in (("alpha", errors[3], fitted.theta[3]), ("beta", errors[4], fitted.theta[4])):
        low, high = found[name]
        assert low is not None
        assert high is not None
        assert low < centre < high
        assert (high - low) / (2 * 1.96 * error) == pytest.approx(
            1, abs=0.35
        )  # the noise's own estimate is off too
        assert (high - centre) / (centre - low) == pytest.approx(1, abs=0.1)
    assert found["d_opt_exponent"] == tuple(
        1 - end for end in found["n_opt_exponent"][::-1] if end is not None
    )


def test_a_floor_that_is_given_has_no_interval() -> None:
    own = points(HOFFMANN, noise=5e-3)
    floor = Floor(1.69)
    fitted = fit(own, floor)
    drawn = figures(Law.of(bootstrap(own, fitted, floor, 100)))
    np.testing.assert_allclose(drawn[:, 0], 1.69)
    assert profile(own, fitted, floor)["E"] == pytest.approx((1.69, 1.69))
    free = percentiles(figures(Law.of(bootstrap(own, fit(own), Floor(), 100))))
    ends = percentiles(drawn)
    at = NAMES.index("alpha")
    assert ends[1, at] - ends[0, at] < free[1, at] - free[0, at]


def test_where_the_best_floor_is_zero_resamples_may_have_another() -> None:
    law = Law(0.02, 50.0, 90.0, 0.2, 0.15)
    own = next(
        made for made in (points(law, noise=1e-2, seed=seed) for seed in range(20)) if fit(made).has_bound_e
    )
    drawn = Law.of(bootstrap(own, fit(own), Floor(), 100)).E
    assert drawn.min() >= 0
    assert drawn.max() > 0.02
    low, high = profile(own, fit(own), Floor())["E"]
    assert low == 0
    assert high is None or high > 0.02


def covered(draws: int, noise: float, grid: Grid) -> np.ndarray:
    """(7,): the share of draws whose 95% interval has the true figure."""
    hits = []
    for seed in range(draws):
        own: Points = points(HOFFMANN, grid, noise, seed)
        low, high = percentiles(figures(Law.of(bootstrap(own, fit(own), Floor(), 300, seed))))
        hits.append((low <= TRUE) & (high >= TRUE))
    return np.mean(hits, 0)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [5e-4, 5e-3])
def test_intervals_cover_what_is_true(noise: float) -> None:
    """7 sizes at 5 budgets. Of 100 draws at a true coverage of 95%, fewer than 88 come once in 400 times."""
    assert (covered(100, noise, Grid(7, 5)) >= 0.88).all()
