"""The fit: known laws are found again, and the published data give the optimum that others report."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize

from dit.scaling.laws.fit import Floor, fit
from dit.scaling.laws.law import Law, LawError
from dit.scaling.laws.solver import DELTA, Points, derivatives, huber, objective, predicted
from dit.scaling.laws.table import Runs
from tests.scaling.laws.surfaces import CHINCHILLA, HOFFMANN, LAWS, Grid, points

GRIDS = {
    "twelve sizes": Grid(12, 6),
    "five sizes": Grid(5, 4),
    "small models": Grid(6, 5, off=-1.5),
    "large models": Grid(8, 5, off=1.5),
    "narrow": Grid(5, 5, wide=2.0),
    "tiny budgets": Grid(6, 5, first=1e12, last=1e14),
}


def chinchilla(without: int = 0) -> Points:
    """The published runs, less so many of the highest losses."""
    runs = Runs.read(CHINCHILLA)
    kept = np.sort(np.argsort(runs.loss)[: len(runs) - without])
    return Points.of(runs.params[kept], runs.tokens[kept], runs.loss[kept])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_law_without_noise_is_found_again(law: Law, grid: Grid) -> None:
    found = fit(points(law, grid))
    assert found.converged
    np.testing.assert_allclose(found.law.rows, law.rows, rtol=1e-6)
    assert found.law.n_opt_exponent == pytest.approx(law.beta / (law.alpha + law.beta), rel=1e-7)


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2])
def test_noise_moves_the_law_no_further_than_it_does(noise: float) -> None:
    found = fit(points(HOFFMANN, Grid(8, 6), noise, seed=3)).law
    far = np.abs(found.rows[3:] / HOFFMANN.rows[3:] - 1).max()
    assert 0 < far < 30 * noise


def test_the_published_runs_without_the_five_highest_losses() -> None:
    """The optimum of the same objective, converged (arXiv 2404.10102, which stops a little before it)."""
    found = fit(chinchilla(5))
    law = found.law
    assert found.converged
    assert found.huber <= 1.0184e-3
    assert found.huber == pytest.approx(1.01828e-3, rel=1e-5)
    np.testing.assert_allclose([law.E, law.alpha, law.beta], [1.8173, 0.34731, 0.36717], rtol=1e-4)
    np.testing.assert_allclose([law.A, law.B], [477.8, 2143.0], rtol=1e-3)
    assert found.agreeing > found.starts / 2  # one optimum, from nearly everywhere


def test_all_published_runs() -> None:
    law = fit(chinchilla()).law
    np.testing.assert_allclose([law.alpha, law.beta], [0.349, 0.453], atol=5e-4)


def test_another_optimizer_finds_nothing_lower() -> None:
    own = points(HOFFMANN, Grid(6, 5), 5e-3, seed=1)
    found = fit(own)

    def sum_of(theta: np.ndarray) -> float:
        terms = np.exp(theta[:2, None] - theta[3:, None] * np.stack([own.params, own.tokens])).sum(0)
        return float(huber(np.log(terms + np.exp(theta[2])) - own.loss).sum())

    assert sum_of(found.theta) == pytest.approx(found.huber, rel=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(5):
        near = found.theta + rng.normal(size=5) * [0.5, 0.5, 0.1, 0.03, 0.03]
        ended = minimize(
            sum_of, near, method="Nelder-Mead", options={"maxfev": 2000, "xatol": 1e-9, "fatol": 1e-13}
        )
        assert ended.fun >= found.huber * (1 - 1e-9)


def test_derivatives_are_those_of_the_sum() -> None:
    """Away from where the Huber loss bends: delta is far above all residuals, or far below."""
    own = points(HOFFMANN, Grid(5, 3), 1e-2)
    theta = np.array([[5.0, 6.5, 0.4, 0.32, 0.29]])
    weights = np.random.default_rng(1).exponential(size=(1, len(own)))
    for delta in (10.0, 1e-4):
        gradient, hessian = derivatives(theta, own, weights, delta)

        def slope(at: np.ndarray, delta: float = delta) -> np.ndarray:
            return derivatives(at[None], own, weights, delta)[0][0]

        numeric = approx_fprime(theta[0], lambda at, d=delta: objective(at[None], own, weights, d)[0], 1e-7)
        np.testing.assert_allclose(gradient[0], numeric, rtol=1e-4)
        np.testing.assert_allclose(hessian[0], approx_fprime(theta[0], slope, 1e-7), rtol=1e-3, atol=1e-6)


def test_shares_and_the_huber_loss() -> None:
    log_loss, shares = predicted(np.log([[406.4, 410.7, 1.69, np.exp(0.34), np.exp(0.28)]]), points(HOFFMANN))
    np.testing.assert_allclose(log_loss[0], points(HOFFMANN).loss, rtol=1e-12)
    np.testing.assert_allclose(shares.sum(1), 1.0)
    np.testing.assert_allclose(huber(np.array([-2 * DELTA, DELTA / 2])), [1.5 * DELTA**2, DELTA**2 / 8])


# --- the floor ---------------------------------------------------------------------------------------------


def test_a_floor_that_is_given_stays() -> None:
    free, fixed = (fit(points(HOFFMANN, noise=5e-3), floor) for floor in (Floor(), Floor(1.69)))
    assert abs(fixed.law.E - 1.69) < 1e-12
    assert abs(free.law.E - 1.69) > 1e-6
    assert fixed.huber > free.huber
    exact = fit(points(HOFFMANN), Floor(1.69)).law
    np.testing.assert_allclose(exact.rows, HOFFMANN.rows, rtol=1e-7)


def test_a_law_without_e_has_e_zero() -> None:
    law = Law(0.0, 50.0, 90.0, 0.2, 0.15)
    found = fit(points(law))
    assert found.law.E < 1e-6
    np.testing.assert_allclose(found.law.rows[1:], law.rows[1:], rtol=1e-4)
    # a surface that bends the other way than a floor would
    own = points(law)
    falling = Points(own.params, own.tokens, own.loss - 0.02 * (own.params - own.params.mean()) ** 2)
    assert fit(falling).has_bound_e
    assert fit(falling).law.E == 0.0


@pytest.mark.parametrize(
    ("own", "floor", "said"),
    [
        (points(HOFFMANN, Grid(5, 1)), Floor(), "5 runs, and the law has 5 numbers to fit: at least 6 runs"),
        (
            points(HOFFMANN, Grid(2, 2)),
            Floor(1.0),
            "4 runs, and the law has 4 numbers to fit: at least 5 runs",
        ),
        (points(HOFFMANN, Grid(1, 9)), Floor(), None),
        (  # three seeds of each
            Points.of(*(np.tile(np.exp(c), 3) for c in vars(points(HOFFMANN, Grid(2, 2))).values())),
            Floor(),
            "12 runs at 4 pairs of params and tokens, and the law has 5 numbers to fit: at least 6 unlike pairs",
        ),
        (points(HOFFMANN), Floor(5.0), "a floor of 5 is not below the lowest loss"),
        (points(HOFFMANN), Floor(-1.0), "give one from 0"),
        (points(HOFFMANN), Floor(float("nan")), "a floor of nan"),
    ],
)
def test_what_cannot_be_fitted_is_refused(own: Points, floor: Floor, said: str | None) -> None:
    if said is None:  # one size, trained for nine lengths
        own, said = Points(np.full(9, 20.0), own.tokens, own.loss), "all runs have params = "
    with pytest.raises(LawError, match=said):
        fit(own, floor)
