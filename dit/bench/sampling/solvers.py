"""How far solvers are from the exact end of the probability-flow ODE, by evaluations of the exact velocity (P6).

Data are a mixture of Gaussians, so that E[data | x] is known in closed form; float64, so that nothing but the steps is
in the way. The end is what the fifth-order method finds at a tolerance far below every error shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit.config import ConfigError, config
from dit.flow.path import Linear, NoisePath, broadcast
from dit.flow.predict import Cond, Endpoints, Velocity
from dit.rng import Draws, Purpose
from dit.sample.adaptive import DormandPrince
from dit.sample.grid import UniformGrid
from dit.sample.solve import SOLVERS, Solver

FEW, MANY = 20, 200  # evaluations: of solvers of order 2 or more, and Euler's that they are to beat
SLACK = 0.25  # by which a measured order may differ from the theory's
INNER, HALVED = (0.95, 0.15), (80, 160)  # times between which the order is measured, and with how many steps
SHAPE = (8,)


@config
class SolversBench:
    """Numbers of evaluations."""

    evaluations: tuple[int, ...] = (10, FEW, 40, 80, 160, MANY, 320, 640)  # an image, ascending
    points: int = 64  # starts in noise, from each of which the error is taken

    def __post_init__(self) -> None:
        if self.points < 1 or not {FEW, MANY} <= {*self.evaluations} or min(self.evaluations) < 1:
            raise ConfigError(
                f"points is at least 1, and evaluations hold {FEW} and {MANY}, which the bound is of; got "
                f"{self.points} and {list(self.evaluations)}"
            )


@dataclass(frozen=True)
class ExactMixture:
    """The exact denoiser of Gaussians N(means[k], stds[k]²·1), each as likely: means (K, D), stds (K,), float64."""

    means: Tensor
    stds: Tensor
    path: NoisePath

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        """data = E[data | x], and the eps that goes with it, for x (B, D), t (B,) above 0."""
        coeffs = self.path.coeffs(t)
        alpha, sigma = broadcast(coeffs.alpha, x), broadcast(coeffs.sigma, x)  # (B, 1)
        spread = (alpha * self.stds).square() + sigma.square()  # (B, K) variance of x in each component
        apart = x[:, None] - alpha[..., None] * self.means  # (B, K, D)
        logits = -0.5 * (apart.square().sum(2) / spread + x.shape[1] * spread.log())
        gain = alpha * self.stds.square() / spread  # (B, K) of data on x
        of_each = self.means + gain[..., None] * apart  # (B, K, D)
        noise = (sigma / spread)[
            ..., None
        ] * apart  # (B, K, D); 0 where sigma is, and nothing is divided by it
        shares = torch.softmax(logits, 1)[..., None]
        return Endpoints((shares * of_each).sum(1), (shares * noise).sum(1))


def mixture(path: NoisePath) -> ExactMixture:
    """Three Gaussians in eight dimensions, of stds 0.5, 0.7 and 0.9 about means of size 1."""
    means = Draws(0, 0, torch.arange(3), 1).normal(Purpose.PRIOR, SHAPE).double()
    return ExactMixture(means, torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64), path)


def fixed() -> dict[str, Solver]:
    """The solvers of the registry that take no noise and as many steps as they are told."""
    made = {name: SOLVERS[name]() for name in SOLVERS.names()}
    return {name: solver for name, solver in made.items() if not solver.stochastic and solver.nfe(1)}


def run(cfg: SolversBench) -> dict[str, Any]:
    """Errors and orders of every solver, as JSON values; `problems` names what is not as theory says."""
    exact = mixture(Linear())
    x = Draws(1, 0, torch.arange(cfg.points), 1).normal(Purpose.PRIOR, SHAPE).double()
    want = _exactly(exact, x, 1.0, 0.0)
    rows: dict[str, Any] = {}
    for name, solver in fixed().items():
        errors = {}
        for evaluations in cfg.evaluations:
            steps = evaluations // solver.evaluations
            if steps >= 1:
                times = UniformGrid()(steps, exact.path, Velocity())
                errors[str(evaluations)] = _rms(solver(exact, x, times, exact.path) - want)
        rows[name] = {"theory": solver.convergence, "order": _order(solver, exact, x), "errors": errors}
    euler = rows["euler"]["errors"][str(MANY)]
    for row in rows.values():
        row["beats_euler"] = row["errors"].get(str(FEW), math.inf) < euler
    return {"rows": rows, "problems": problems(rows)}


def _exactly(exact: ExactMixture, x: Tensor, start: float, end: float) -> Tensor:
    """The ODE's x at `end`, to about 1e-11."""
    times = torch.tensor([start, end], dtype=torch.float64)
    fine = DormandPrince(rtol=1e-12, atol=1e-12, max_steps=100_000)
    return fine.integrate(exact, x, times, exact.path)


def _order(solver: Solver, exact: ExactMixture, x: Tensor) -> float:
    """The order by halving the step between two times on the way, where the last step into clean data plays no part."""
    start, end = INNER
    want, errors = _exactly(exact, x, start, end), []
    for steps in HALVED:
        times = torch.linspace(start, end, steps + 1, dtype=torch.float64)
        errors.append(_rms(solver.integrate(exact, x, times, exact.path) - want))
    return math.log2(errors[0] / errors[1])


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def problems(rows: dict[str, Any]) -> list[str]:
    """What is not of the order that it should be."""
    return [
        f"{name} is of order {row['theory']}, measured {row['order']:.2f}"
        for name, row in rows.items()
        if abs(row["order"] - row["theory"]) > SLACK
    ]


def lines(found: dict[str, Any], cfg: SolversBench) -> list[str]:
    """The errors as a table, a solver a row."""
    head = f"{'':16s} {'order':>6s} {'theory':>6s}" + "".join(f"{n:>10d}" for n in cfg.evaluations)
    table = [
        f"{name:16s} {row['order']:6.2f} {row['theory']:6d}"
        + "".join(
            f"{row['errors'][str(n)]:10.2e}" if str(n) in row["errors"] else f"{'':10s}"
            for n in cfg.evaluations
        )
        for name, row in found["rows"].items()
    ]
    better = [name for name, row in found["rows"].items() if row["beats_euler"]]
    return [
        "root mean square error from noise to data, by evaluations of the exact velocity, in uniform steps",
        head,
        *table,
        f"better at {FEW} evaluations than Euler at {MANY}: {', '.join(better) or 'none'}",
    ]
