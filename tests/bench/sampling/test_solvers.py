"""The benchmark of solvers: its denoiser is the exact one, and its table tells an order that is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.bench.sampling import solvers
from dit.bench.sampling.solvers import SolversBench, fixed, lines, mixture, problems, run
from dit.flow.path import Linear
from dit.sample.solve import SOLVERS, Euler

SMALL = SolversBench(evaluations=(20, 40, 200), points=4)


def density(x: Tensor, t: Tensor) -> Tensor:
    """ln p_t(x) (B,) of the noisy mixture on the linear path, up to a constant."""
    exact, alpha = mixture(Linear()), 1 - t
    spread = (alpha[:, None] * exact.stds).square() + t[:, None].square()
    apart = x[:, None] - alpha[:, None, None] * exact.means
    return torch.logsumexp(-0.5 * (apart.square().sum(2) / spread + x.shape[1] * spread.log()), 1)


def test_the_denoiser_is_exact() -> None:
    """eps = −sigma·score, the score by differentiating the density; and its ends are those of x."""
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    t = torch.tensor([0.05, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
    (score,) = torch.autograd.grad(density(x, t).sum(), x)
    ends = mixture(Linear())(x, t, {})
    torch.testing.assert_close(ends.eps, -t[:, None] * score)
    torch.testing.assert_close((1 - t)[:, None] * ends.data + t[:, None] * ends.eps, x)


def test_every_solver_that_can_be_is_measured_and_is_of_its_order() -> None:
    found = run(SMALL)
    assert set(found["rows"]) == set(fixed()) == {
        name for name in SOLVERS.names() if not SOLVERS[name]().stochastic and name != "dopri5"
    }  # fmt: skip
    assert found["problems"] == []
    rows = found["rows"]
    assert rows["heun"]["beats_euler"]
    assert rows["midpoint"]["beats_euler"]
    assert not rows["euler"]["beats_euler"]
    assert rows["heun"]["errors"]["200"] < rows["heun"]["errors"]["20"] / 50
    table = lines(found, SMALL)
    assert len(table) == 3 + len(rows)
    assert f"{rows['rk4']['errors']['40']:.2e}" in next(row for row in table if row.startswith("rk4"))


def test_a_solver_of_a_lower_order_is_found(monkeypatch) -> None:
    class Lame(Euler):
        order = 2

    monkeypatch.setattr(solvers, "fixed", lambda: {"euler": Euler(), "lame": Lame()})
    (problem,) = problems(run(SMALL)["rows"])
    assert problem.startswith("lame is of order 2, measured 1.0")
