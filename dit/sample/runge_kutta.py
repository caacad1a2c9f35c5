"""Explicit Runge–Kutta methods of any order on any path, each a Butcher tableau.

x̃ = x / (alpha + sigma) lies on the linear path at its time s = `Node.ratio`, and there dx̃/ds = eps − data: finite
and smooth on every path, wherever the network is. On the linear path s is t, and these are the textbook
methods. Between the steps of a discrete path they ask the network for fractions of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit.config import config
from dit.sample.solve import SOLVERS, At, Node, Noise, Solver


@dataclass(frozen=True)
class Tableau:
    """An explicit method with n stages.

    times: (n,) where in the step each stage looks, in [0, 1]. matrix: row i has the i shares of the slopes
    before stage i. weights: (n,) shares of all slopes in the step.
    """

    times: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


def weighted(shares: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """Σ share·slope, the shares of 0 left out; at least one is not 0."""
    terms = [share * slope for share, slope in zip(shares, slopes, strict=True) if share != 0.0]
    return sum(terms[1:], terms[0])


class RungeKutta(Solver):
    """The method of `tableau`. Subclasses are `@config` classes that give it."""

    tableau: Tableau

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        return len(self.tableau.times)

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Noise | None) -> Tensor:
        start, length = x / now.scale, after.ratio - now.ratio
        slopes: list[Tensor] = []
        for time, shares in zip(self.tableau.times, self.tableau.matrix, strict=True):
            node = self._node(at, now, after, time)
            y = start + length * weighted(shares, slopes) if slopes else start
            ends = at(node.scale * y, node)
            slopes.append(ends.eps - ends.data)
        return after.scale * (start + length * weighted(self.tableau.weights, slopes))

    def _node(self, at: At, now: Node, after: Node, time: float) -> Node:
        """The node at `time` of the step; its ends are exactly the given ones."""
        ends = {0.0: now, 1.0: after}
        return ends[time] if time in ends else at.node(now.ratio + time * (after.ratio - now.ratio))


@SOLVERS.register("midpoint")
@config
class Midpoint(RungeKutta):
    """Second order: the slope at the middle of the step, found by Euler."""

    order = 2
    tableau = Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0))


@SOLVERS.register("rk4")
@config
class RungeKutta4(RungeKutta):
    """The classical method of fourth order."""

    order = 4
    tableau = Tableau(
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    )
