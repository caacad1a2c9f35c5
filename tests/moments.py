"""Exact moments of what a stochastic solver makes: on Gaussian data every step is affine in x and the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.flow.path import NoisePath
from dit.rng import Draws, Purpose
from dit.sample.solve import Solver
from tests.gaussian import Gaussian


@dataclass(frozen=True)
class Moments:
    """Of one element of x."""

    mean: float
    variance: float

    def distance(self, mean: float, std: float) -> float:
        """Wasserstein-2 to N(mean, std²)."""
        return math.hypot(self.mean - mean, math.sqrt(self.variance) - std)


def marginal(oracle: Gaussian, path: NoisePath, t: float) -> Moments:
    """Those of x_t."""
    alpha, sigma = (float(v) for v in path.alpha_sigma(torch.tensor([t], dtype=torch.float64)))
    return Moments(alpha * oracle.mean, alpha**2 * oracle.std**2 + sigma**2)


def exact_moments(
    solver: Solver, oracle: Gaussian, path: NoisePath, times: Tensor, *, to_data: bool = True
) -> Moments:
    """At the end of `times`, x_t at the first of them being right; read off the responses to x and each draw.

    Only for solvers whose steps do not depend on x or the noise otherwise, as predictor–corrector's do.
    """
    count = (len(times) - 1) * solver.draws
    x = torch.zeros(2 + count, 1, dtype=torch.float64)
    x[1] = 1.0

    def noise(i: int) -> Tensor:
        return torch.zeros_like(x).index_fill_(0, torch.tensor([2 + i]), 1.0)

    solve = solver if to_data else solver.integrate
    got = solve(oracle.denoise(path), x, times, path, noise, {})[:, 0]
    response, start = got[1:] - got[0], marginal(oracle, path, float(times[0]))
    return Moments(
        float(got[0] + response[0] * start.mean),
        float(response[0] ** 2 * start.variance + response[1:].square().sum()),
    )


def standard(x: Tensor, i: int) -> Tensor:
    """The i-th draw for a batch like x."""
    return Draws(0, i, torch.arange(len(x)), len(x)).normal(Purpose.SOLVER, x.shape[1:]).to(x.dtype)
