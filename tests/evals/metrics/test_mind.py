"""MIND against exact transport on lines, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from dit.evals.metrics import FeatureSet
from dit.evals.metrics.mind import AT_A_TIME, Mind, Quantiles


def transport(a: np.ndarray, b: np.ndarray) -> float:
    """W2² of two sets on a line as a linear program: any plan may be chosen, sorted or not."""
    n, m = len(a), len(b)
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    cost = np.square(a[:, None] - b).ravel()
    return float(linprog(cost, A_eq=np.concatenate([rows, columns]), b_eq=marginals, method="highs").fun)


@pytest.mark.parametrize(("n", "m"), [(1, 5), (5, 5), (4, 6), (7, 5)])
def test_one_direction_is_exact_transport(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(3, n)), rng.normal(size=(3, m)) + 1
    found = Quantiles.of(n, m).squared_w2(a, b)
    assert found == pytest.approx([transport(x, y) for x, y in zip(a, b, strict=True)], rel=1e-9)


@given(st.integers(1, 60), st.integers(1, 60))
def test_stretches_of_the_quantile_functions(n: int, m: int) -> None:
    at = Quantiles.of(n, m)
    assert at.lengths.sum() == pytest.approx(1)
    assert (at.lengths > 0).all()
    assert len(at.lengths) == n + m - np.gcd(n, m)
    np.testing.assert_allclose(np.bincount(at.left, at.lengths), np.full(n, 1 / n), rtol=1e-9)
    np.testing.assert_allclose(np.bincount(at.right, at.lengths), np.full(m, 1 / m), rtol=1e-9)


def test_the_whole_is_the_scaled_mean_over_its_directions() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(6, 4)) + 0.5
    metric = Mind(projections=AT_A_TIME + 3, seed=5)
    each = [transport(x @ u, y @ u) for u in metric.directions(0, metric.projections, 4)]
    assert metric(FeatureSet(x), FeatureSet(y))["mind"] == pytest.approx(3 * 4 * np.mean(each), rel=1e-9)


def test_a_shift_and_identical_sets() -> None:
    """E (u·s)² is |s|²/D on the sphere, so that a shift by s is at 3 |s|²."""
    x = np.random.default_rng(1).normal(size=(50, 8))
    shift = np.full(8, 0.7)
    found = Mind(projections=4000)(FeatureSet(x), FeatureSet(x + shift))["mind"]
    assert found == pytest.approx(3 * np.square(shift).sum(), rel=0.05)
    assert Mind()(FeatureSet(x), FeatureSet(x[::-1]))["mind"] == pytest.approx(0, abs=1e-20)
    doubled = np.repeat(x, 2, axis=0)  # the same distribution in other counts
    assert Mind()(FeatureSet(x), FeatureSet(doubled))["mind"] == pytest.approx(0, abs=1e-20)


def test_directions_are_fixed_unit_and_spread_evenly() -> None:
    u = Mind().directions(0, 3000, 16)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(u.T @ u / 3000, np.eye(16) / 16, atol=0.01)
    np.testing.assert_array_equal(Mind().directions(100, 120, 16), u[100:120])
    np.testing.assert_allclose(u[0, :3], PINNED, rtol=1e-5)
    assert not np.allclose(Mind(seed=1).directions(0, 1, 16), u[:1])


PINNED = [0.51492544, -0.03912206, -0.02670822]
