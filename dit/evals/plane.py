"""Flows between distributions in the plane, small enough to train in seconds: what couplings do to their paths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dit.evals.transport import path_cost, trajectory, wasserstein2
from dit.flow.couple import Coupling, Independent, OptimalTransport, Reflow
from dit.flow.objective import Objective
from dit.flow.predict import Cond
from dit.rng import Draws, Purpose
from dit.sample.denoise import Denoiser
from dit.sample.solve import Euler, Heun, Solver

EULER_STEPS = (1, 2, 4, 8, 64)
FINE = 100  # Euler steps along which a path's energy is summed, and whose end is taken for the ODE's
PAIRS = 16_384  # that a flow makes for the next one, by 25 steps of Heun's method
JUDGED = 1024  # points
COUPLINGS: dict[str, Coupling] = {"independent": Independent(), "ot": OptimalTransport(group=64)}
REFLOWS = {"reflow": "independent", "ot_reflow": "ot"}  # flows trained on the pairs that another has made
PROTOCOL = {
    "objective": "linear path, velocity, uniform times",
    "network": "MLP of three hidden layers, SiLU, x and t with sines and cosines; Adam, cosine to 0",
    "ot_group": 64,
    "pairs": f"{PAIRS}, Heun 25 steps, a new network trained on them for as many steps",
    "judged": f"{JUDGED} scrambled Sobol points; straightness along {FINE} Euler steps",
}
Draw = Callable[[Tensor], Tensor]  # uniform numbers (n, 4) in (0, 1) -> points (n, 2)


# --- distributions -----------------------------------------------------------------------------------------


def normal(u: Tensor) -> Tensor:
    """Standard normal points (Box and Muller)."""
    radius, angle = (-2 * u[:, 0].log()).sqrt(), 2 * math.pi * u[:, 1]
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def eight_gaussians(u: Tensor) -> Tensor:
    """Eight of std 0.3 on a circle of radius 4."""
    angle = (8 * u[:, 2]).floor() * (math.pi / 4)
    return 4 * torch.stack([angle.cos(), angle.sin()], 1) + 0.3 * normal(u)


def moons(u: Tensor) -> Tensor:
    """Two half circles of radius 2 that hook into each other, with noise of std 0.15."""
    lower = (u[:, 2] < 0.5).to(u.dtype)
    angle, sign = math.pi * u[:, 3], 1 - 2 * lower
    arcs = torch.stack([sign * angle.cos() + lower - 0.5, sign * angle.sin() + 0.5 * lower - 0.25], 1)
    return 2 * arcs + 0.15 * normal(u)


def checkerboard(u: Tensor) -> Tensor:
    """The dark squares of a 4 x 4 board of side 4."""
    column = (4 * u[:, 2]).floor()
    row = 2 * (2 * u[:, 3]).floor() + column % 2
    return torch.stack([column + u[:, 0], row + u[:, 1]], 1) - 2


@dataclass(frozen=True)
class PlaneProblem:
    """From points of `source`, at t = 1, to points of `target`, at t = 0."""

    title: str
    source: Draw
    target: Draw
    extent: float  # half the side of a picture of its paths
    inner: float  # and of one of its target


PROBLEMS = {
    "moons": PlaneProblem("Eight Gaussians to two moons", eight_gaussians, moons, 5.2, 3.6),
    "checkerboard": PlaneProblem("Gaussian noise to a checkerboard", normal, checkerboard, 3.6, 2.6),
}


def uniform(seed: int, purpose: Purpose, step: int, count: int) -> Tensor:
    """(count, 4) float64 in (0, 1), a function of these numbers alone."""
    bits = Draws(seed, step, torch.arange(count), count).bits(purpose, 4)
    return (bits.double() + 0.5) * 2.0**-32


def even(seed: int) -> Tensor:
    """(JUDGED, 4) float64 in (0, 1), spread evenly (scrambled Sobol): what is judged by them varies less."""
    drawn = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed).draw(JUDGED, dtype=torch.float64)
    return drawn.clamp(2.0**-32, 1 - 2.0**-32)


# --- training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How each network is trained."""

    steps: int = 2000
    batch: int = 512
    width: int = 128
    lr: float = 3e-3  # of Adam, falling to 0 along a cosine
    seed: int = 0

    def draws(self, step: int) -> Draws:
        """The random numbers of a training step."""
        return Draws(self.seed, step, torch.arange(self.batch), self.batch)


class PlaneNetwork(nn.Module):
    """A velocity in the plane: three hidden layers that see x, t and waves of both (as edges are sharp)."""

    def __init__(self, width: int):
        super().__init__()
        layers = [
            part for a, b in pairwise((17, width, width, width)) for part in (nn.Linear(a, b), nn.SiLU())
        ]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """(B, 2) from x (B, 2) and model_time (B,) in [0, 1000]."""
        t = model_time[:, None] / 1000  # (B, 1)
        waves = [wave(k * x) for k in (1, 2, 4) for wave in (torch.sin, torch.cos)]
        clock = [t, (math.pi * t).cos(), (2 * math.pi * t).sin()]
        velocity: Tensor = self.layers(torch.cat([x, *clock, *waves], 1))
        return velocity


Pairing = Callable[[int], tuple[Tensor, Tensor]]  # step -> data and eps, (B, 2) each


def train(problem: PlaneProblem, budget: Budget, progress: Callable[[], Any]) -> dict[str, Denoiser]:
    """A flow for each coupling, and for the pairs that each of those flows makes."""
    flows = {}
    for name, coupling in COUPLINGS.items():
        flows[name] = fit(drawn(problem, coupling, budget), budget, progress)
    for name, teacher in REFLOWS.items():
        flows[name] = fit(regenerated(problem, flows[teacher], budget), budget, progress)
    return flows


def fit(pairs: Pairing, budget: Budget, progress: Callable[[], Any]) -> Denoiser:
    """A network trained on pairs with the project's objective, which takes eps as it comes, Gaussian or not."""
    objective = Objective(coupling=Reflow())
    torch.manual_seed(budget.seed)
    network = PlaneNetwork(budget.width)
    optimizer = torch.optim.Adam(network.parameters(), lr=budget.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    for step in range(budget.steps):
        data, eps = pairs(step)
        loss = objective.loss(network, data, {}, budget.draws(step), paired=eps)
        optimizer.zero_grad()
        loss.mean.backward()
        optimizer.step()
        schedule.step()
        progress()
    return Denoiser(network, objective.path, objective.prediction)


def drawn(problem: PlaneProblem, coupling: Coupling, budget: Budget) -> Pairing:
    """New points at every step, paired by a coupling."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        data = problem.target(uniform(budget.seed, Purpose.VAL, step, budget.batch)).float()
        eps = problem.source(uniform(budget.seed, Purpose.EPS, step, budget.batch)).float()
        return data, coupling(data, eps, {}, budget.draws(step))[0]

    return batch


def regenerated(problem: PlaneProblem, flow: Denoiser, budget: Budget) -> Pairing:
    """Pairs that a flow has made: points of the source and where its ODE takes them."""
    eps = problem.source(uniform(budget.seed, Purpose.PRIOR, 0, PAIRS)).float()
    data = torch.cat([carry(flow, part, 25, Heun()) for part in eps.split(4096)])

    def batch(step: int) -> tuple[Tensor, Tensor]:
        index = budget.draws(step).integers(Purpose.SAMPLES, PAIRS)
        return data[index], eps[index]

    return batch


@torch.no_grad()
def carry(flow: Denoiser, eps: Tensor, steps: int, solver: Solver) -> Tensor:
    """Where the flow takes points of the source, (n, 2) both, in equal steps of a solver."""
    return solver(flow, eps, times(steps), flow.path)


def times(steps: int) -> Tensor:
    """(steps + 1,) from 1 to 0."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


# --- measuring ---------------------------------------------------------------------------------------------


def judge(problem: PlaneProblem, flow: Denoiser, seed: int) -> dict[str, Any]:
    """How straight a flow is, and what few steps of Euler's method make of it.

    w2: to the target, by the number of steps. error: mean distance from where the ODE itself ends.
    """
    eps, target = problem.source(even(seed + 1)).float(), problem.target(even(seed + 2))
    course = trajectory(flow, eps, times(FINE), flow.path)
    cost = path_cost(course, times(FINE))
    ends = {steps: carry(flow, eps, steps, Euler()) for steps in EULER_STEPS}
    return {
        "energy": cost.energy,
        "straightness": cost.straightness,
        "bend": cost.bend,
        "w2": {n: wasserstein2(end.numpy(), target.numpy()) for n, end in ends.items()},
        "error": {n: float((end - course[-1]).norm(dim=1).mean()) for n, end in ends.items()},
    }


def floor(problem: PlaneProblem, seed: int) -> dict[str, float]:
    """What is known without a flow: W2 of two draws of the target, and W2² of source and target, the least energy."""
    target, other = (problem.target(even(seed + n)).numpy() for n in (2, 3))
    source = problem.source(even(seed + 1)).numpy()
    return {"w2": wasserstein2(target, other), "energy": wasserstein2(source, target) ** 2}
