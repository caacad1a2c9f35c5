"""Runge–Kutta: the order conditions of every tableau, and one method for all paths."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit.flow.discrete import DiscreteVP
from dit.flow.path import PATHS, Linear, NoisePath
from dit.flow.predict import Cond, Endpoints
from dit.sample.adaptive import DORMAND_PRINCE, ERROR
from dit.sample.runge_kutta import Midpoint, RungeKutta, RungeKutta4, Tableau
from dit.sample.solve import SOLVERS, At, Solver, nodes
from tests.gaussian import ALL_PATHS, Mixture, normal

METHODS = [(cls().tableau, cls().order) for _, cls in SOLVERS.items() if issubclass(cls, RungeKutta)]
METHODS.append((DORMAND_PRINCE, 5))
SNR_SOLVERS = ["euler", "midpoint", "rk4", "dopri5", "dpmpp_2m", "unipc"]  # they see a path by its SNR alone


def conditions(tableau: Tableau) -> list[list[float]]:
    """[p − 1]: the residuals of the conditions of order p (Hairer, Nørsett & Wanner, I, table II.2.1)."""
    n = len(tableau.times)
    c, b = (torch.tensor(v, dtype=torch.float64) for v in (tableau.times, tableau.weights))
    a = torch.zeros(n, n, dtype=torch.float64)
    for i, row in enumerate(tableau.matrix):
        a[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    ac, ac2, aac = a @ c, a @ c**2, a @ (a @ c)
    values = [
        [(b.sum(), 1)],
        [(b @ c, 2)],
        [(b @ c**2, 3), (b @ ac, 6)],
        [(b @ c**3, 4), (b @ (c * ac), 8), (b @ ac2, 12), (b @ aac, 24)],
        [
            (b @ c**4, 5),
            (b @ (c**2 * ac), 10),
            (b @ ac**2, 20),
            (b @ (c * ac2), 15),
            (b @ (a @ c**3), 20),
            (b @ (c * aac), 30),
            (b @ (a @ (c * ac)), 40),
            (b @ (a @ ac2), 60),
            (b @ (a @ aac), 120),
        ],
    ]
    return [[float(value) - 1 / one for value, one in order] for order in values]


@pytest.mark.parametrize(("tableau", "order"), METHODS, ids=lambda v: str(v) if isinstance(v, int) else "")
def test_a_tableau_meets_the_conditions_of_its_order_and_no_more(tableau: Tableau, order: int) -> None:
    assert [len(row) for row in tableau.matrix] == list(range(len(tableau.times)))
    for time, row in zip(tableau.times, tableau.matrix, strict=True):
        assert sum(row) == pytest.approx(time, abs=1e-14)
    residuals = conditions(tableau)
    for residual in residuals[:order]:
        assert residual == pytest.approx([0.0] * len(residual), abs=1e-14)
    assert all(max(map(abs, residual)) > 1e-3 for residual in residuals[order : order + 1])


def test_the_error_estimate_is_that_of_a_method_of_fourth_order() -> None:
    weights = tuple(w - e for w, e in zip(DORMAND_PRINCE.weights, ERROR, strict=True))
    residuals = conditions(Tableau(DORMAND_PRINCE.times, DORMAND_PRINCE.matrix, weights))
    for residual in residuals[:4]:
        assert residual == pytest.approx([0.0] * len(residual), abs=1e-14)
    assert max(map(abs, residuals[4])) > 1e-5


@pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
@pytest.mark.parametrize("name", SNR_SOLVERS)
def test_a_path_is_the_linear_one_at_the_same_noise(name: str, path: NoisePath) -> None:
    """x / (alpha + sigma) goes the same way on every path whose times have the same SNR."""
    linear, solver, oracle = Linear(), SOLVERS[name](), Mixture()
    here = nodes(path, torch.linspace(0.8, 0.2, 7, dtype=torch.float64))
    there = torch.tensor([node.ratio for node in here], dtype=torch.float64)
    x = normal(3, 4)
    got = solver.integrate(oracle.denoise(path), here[0].scale * x, torch.tensor([n.t for n in here]), path)
    want = solver.integrate(oracle.denoise(linear), x, there, linear)
    torch.testing.assert_close(got / here[-1].scale, want, rtol=1e-5, atol=1e-5)


def test_the_midpoint_of_a_discrete_path_lies_between_its_steps() -> None:
    seen: list[float] = []
    path = DiscreteVP()

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        seen.append(float(path.model_time(t)[0]))
        return Mixture().endpoints(path, x, t)

    Midpoint().integrate(denoise, normal(1, 2), torch.tensor([0.5, 0.4, 0.3]), path)
    assert seen[0::2] == [499.0, 399.0]
    assert 399 < seen[1] < 499
    assert 299 < seen[3] < 399
    assert all(k != round(k) for k in seen[1::2])


def test_the_ends_of_a_step_are_exactly_the_given_times() -> None:
    seen: list[float] = []

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        seen.append(float(t[0]))
        return Mixture().endpoints(path, x, t)

    path = ALL_PATHS[PATHS.names().index("vp")]
    RungeKutta4().integrate(denoise, normal(1, 2), torch.tensor([0.7, 0.3, 0.1]).double(), path)
    assert [seen[i] for i in (0, 3, 4, 7)] == torch.tensor([0.7, 0.3, 0.3, 0.1]).double().tolist()
    assert seen[1] == seen[2]
    assert 0.3 < seen[1] < 0.7


def test_a_new_method_is_one_tableau() -> None:
    """Ralston's, against two steps by hand."""

    class Ralston(RungeKutta):
        order = 2
        tableau = Tableau((0.0, 2 / 3), ((), (2 / 3,)), (1 / 4, 3 / 4))

    solver: Solver = Ralston()
    path, oracle, x = Linear(), Mixture(), normal(2, 3)
    at = At(oracle.denoise(path), path, {})
    times = torch.tensor([0.9, 0.6, 0.4], dtype=torch.float64)
    want = x
    for now, after in pairwise(times.tolist()):
        first = at(want, at.node(now))
        middle = now + 2 / 3 * (after - now)
        second = at(want + (middle - now) * (first.eps - first.data), at.node(middle))
        slope = 0.25 * (first.eps - first.data) + 0.75 * (second.eps - second.data)
        want = want + (after - now) * slope
    torch.testing.assert_close(solver.integrate(oracle.denoise(path), x, times, path), want)
    assert solver.nfe(2) == 4
