"""Multistep exponential integrators in half the log-SNR: one evaluation a step, its predecessors remembered.

With lambda = ln(alpha/sigma) the ODE has the exact solution (DPM-Solver++, arXiv 2211.01095, eq. 8)

    x(t) = sigma_t/sigma_s·x(s) + alpha_t ∫ exp(lambda − lambda_t)·data dlambda from lambda_s to lambda_t,

and only `data` is approximated, by a polynomial through what was seen before. Where lambda is infinite there is
no polynomial: a step out of pure noise (alpha = 0), the one after it and the step into clean data hold `data`
constant instead, which is Euler's step there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from dit.config import config
from dit.sample.solve import SOLVERS, At, Node, NoiseFn, Solver


@dataclass(frozen=True)
class _Seen:
    """What the denoiser said at a node."""

    node: Node
    data: Tensor


def _half(node: Node) -> float:
    """lambda = ln(alpha / sigma)."""
    return 0.5 * node.log_snr


def _usable(seen: list[_Seen], after: Node, order: int) -> list[_Seen]:
    """The latest of `seen`, newest first, at most `order` of them: the newest alone where lambda is infinite."""
    if not math.isfinite(_half(seen[0].node)) or not math.isfinite(_half(after)):
        return seen[:1]
    return [s for s in seen[:order] if math.isfinite(_half(s.node))]


def _held(x: Tensor, seen: _Seen, after: Node) -> tuple[Tensor, float]:
    """(x at `after` with data held, exp(−h) − 1), h the step in lambda: arXiv 2211.01095, eq. 9 with k = 1."""
    phi = math.expm1(_half(seen.node) - _half(after))  # −1 for an infinite step
    return after.sigma / seen.node.sigma * x - after.alpha * phi * seen.data, phi


@SOLVERS.register("dpmpp_2m")
@config
class DPMSolver(Solver):
    """DPM-Solver++(2M), second order (arXiv 2211.01095, algorithm 2)."""

    order = 2
    evaluations = 1

    def run(self, at: At, x: Tensor, points: list[Node], noise: NoiseFn | None) -> Tensor:
        seen: list[_Seen] = []
        for now, after in pairwise(points):
            seen = [_Seen(now, at(x, now).data), *seen[:1]]
            usable = _usable(seen, after, 2)
            x, phi = _held(x, usable[0], after)
            if len(usable) == 2:
                step, before = _half(after) - _half(now), _half(now) - _half(usable[1].node)
                x = x - after.alpha * phi * step / (2 * before) * (usable[0].data - usable[1].data)
        return x


@SOLVERS.register("unipc")
@config
class UniPC(Solver):
    """UniPC with data prediction and B(h) = exp(−h) − 1 (arXiv 2302.04867; the paper's B2).

    order: p of the predictor UniP-p; the corrector UniC-p costs no evaluation, as it takes the one made for the
    next step, and lifts the method to order p + 1. The first steps know fewer points: with p = 3 they leave an
    error of third order, which fades as the noise does. The last step has no corrector.
    """

    order: Annotated[int, Field(ge=1, le=3)] = 2  # of the predictor, 1 to 3
    evaluations = 1

    @property
    def convergence(self) -> int:
        return self.order + 1

    def run(self, at: At, x: Tensor, points: list[Node], noise: NoiseFn | None) -> Tensor:
        if len(points) == 1:
            return x
        seen = [_Seen(points[0], at(x, points[0]).data)]
        for after in points[1:-1]:
            usable = _usable(seen, after, self.order)
            found = at(_unified(x, usable, after, None), after).data
            x = _unified(x, usable, after, found)
            seen = [_Seen(after, found), *seen][: self.order]
        return _unified(x, _usable(seen, points[-1], self.order), points[-1], None)


def _unified(x: Tensor, seen: list[_Seen], after: Node, found: Tensor | None) -> Tensor:
    """x at `after`: UniP of order len(seen), or UniC when the data `found` there is given."""
    newest = seen[0]
    held, phi = _held(x, newest, after)
    step = _half(after) - _half(newest.node)
    places = [(_half(s.node) - _half(newest.node)) / step for s in seen[1:]]
    slopes = [(s.data - newest.data) / r for s, r in zip(seen[1:], places, strict=True)]
    if found is not None:
        places, slopes = [*places, 1.0], [*slopes, found - newest.data]
    for share, slope in zip(_shares(places, step), slopes, strict=True):
        held = held - after.alpha * phi * share * slope
    return held


def _shares(places: list[float], step: float) -> list[float]:
    """What each difference weighs, from the order conditions R·a·B(h) = phi (arXiv 2302.04867, theorem 3.1).

    A single one weighs 1/2, as in the authors' code: that meets its condition to the order needed. Out of pure
    noise it is the trapezoidal rule in alpha/sigma.
    """
    if len(places) <= 1:
        return [0.5] * len(places)
    b, phi, factorial = [], math.expm1(-step) / -step - 1.0, 1.0
    for k in range(1, len(places) + 1):
        b.append(phi * factorial / math.expm1(-step))
        factorial *= k + 1
        phi = phi / -step - 1.0 / factorial
    rows = np.vander(places, increasing=True).T
    shares: list[float] = np.linalg.solve(rows, np.array(b)).tolist()
    return shares
