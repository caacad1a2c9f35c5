"""How well an ODE carries one distribution to another: how straight its paths are, how near it comes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dit.flow.path import NoisePath
from dit.flow.predict import Cond
from dit.sample.denoise import DenoiseFn
from dit.sample.solve import Euler, Solver


@dataclass(frozen=True)
class PathCost:
    """Holds what paths x(t) cost, means over samples of sums over elements.

    energy: ∫ |dx/dt|² dt, which optimal transport makes least (Benamou & Brenier, 2000; its least value is W2²).
    chord: |x(1) − x(0)|², the energy of straight paths at even speed between the same ends.
    """

    energy: float
    chord: float

    @property
    def straightness(self) -> float:
        """∫ |x(1) − x(0) − dx/dt|² dt = energy − chord: 0 for straight paths at even speed (arXiv 2209.03003, §2.2)."""
        return self.energy - self.chord

    @property
    def bend(self) -> float:
        """Straightness as a share of the chord, which does not depend on units."""
        return self.straightness / self.chord


@torch.no_grad()
def trajectory(
    denoise: DenoiseFn,
    x: Tensor,
    times: Tensor,
    path: NoisePath,
    cond: Cond | None = None,
    solver: Solver | None = None,
) -> Tensor:
    """(n, B, ...) x at each of `times` (n,) on the way from x (B, ...) at times[0]; Euler's method by default.

    A one-step solver without noise is needed: it is started anew at each time.
    """
    solver = solver or Euler()
    course = [x]
    for i in range(len(times) - 1):
        course.append(solver.integrate(denoise, course[-1], times[i : i + 2], path, cond=cond))
    return torch.stack(course)


def path_cost(course: Tensor, times: Tensor) -> PathCost:
    """Measure a trajectory (n, B, ...) at times (n,) that span [0, 1], either way; stretches are taken as straight."""
    elements = course.double().flatten(2)  # (n, B, D)
    steps = elements.diff(dim=0).square().sum(2).mean(1)  # (n - 1,)
    energy = (steps / times.to(steps).diff().abs()).sum()
    chord = (elements[-1] - elements[0]).square().sum(1).mean()
    return PathCost(float(energy), float(chord))


def wasserstein2(a: np.ndarray, b: np.ndarray) -> float:
    """The 2-Wasserstein distance of two sets of n points (n, D), by exact assignment in float64, O(n³).

    Two sets of one distribution are apart too, about n^(-1/2) of its spread in the plane: state that floor.
    ValueError for sets of different shapes or points that are not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"two sets of as many points are needed, (n, D) each; got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("points are not finite")
    cost = np.square(a[:, None] - b[None]).sum(2)
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))
