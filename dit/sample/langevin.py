"""Langevin dynamics at the levels of a grid: predictor–corrector sampling and annealed Langevin dynamics.

A Langevin step of size e, x + e·score + sqrt(2e)·z, keeps the distribution of its level, up to its error. With
the score −eps / sigma and e = c·sigma² it needs no division: x − c·sigma·eps + sqrt(2c)·sigma·z.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dit.config import config
from dit.flow.path import broadcast
from dit.sample.ancestral import step_posterior
from dit.sample.solve import SOLVERS, At, Node, Noise, Solver


@SOLVERS.register("predictor_corrector")
@config
class PredictorCorrector(Solver):
    """An ancestral step with the large variance, then Langevin steps where it led (arXiv 2011.13456, §4.2).

    The predictor is that of algorithm 4 on VE, and of algorithm 5 on VP to first order in the step. The
    corrector's step is e = 2·(snr·|z| / |score|)², of norms per sample: the paper's code takes their mean over
    the batch, on which an image must not depend. (Algorithm 5's further factor 1 − beta is left out.) The last
    step returns the data seen before it.

    snr: strength of the correction. It leaves the variance too large by about snr² of itself.
    corrector_steps: Langevin steps at each level, one evaluation each.
    """

    snr: Annotated[float, Field(ge=0)] = 0.16  # strength of a correction
    corrector_steps: Annotated[int, Field(ge=0)] = 1  # Langevin steps after each step

    order = 1
    stochastic = True

    @property
    def draws(self) -> int:
        return 1 + self.corrector_steps

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Noise | None) -> Tensor:
        if after.sigma == 0.0:
            return self.final(at, x, now, after, noise)
        assert noise is not None
        chosen = step_posterior(now, after)
        x = chosen.mean(x, at(x, now).data) + math.sqrt(float(chosen.step_variance)) * noise(0)
        for j in range(self.corrector_steps):
            eps, z = at(x, after).eps, noise(1 + j)
            steep = _square(eps).clamp(min=1e-24)  # |sigma·score|²
            x = langevin_step(x, eps, z, after, 2.0 * self.snr**2 * _square(z) / steep)
        return x

    def nfe(self, num_steps: int, to_data: bool = False) -> int:
        """Prediction and corrections at each step, one evaluation at the last."""
        return (1 + self.corrector_steps) * (num_steps - 1) + 1


@SOLVERS.register("annealed_langevin")
@config
class AnnealedLangevin(Solver):
    """Langevin steps at falling noise levels, then a last look at the data (arXiv 1907.05600, algorithm 1).

    The levels are the grid's, best even in log-SNR: each level's steps must take away the noise that it is below
    the one before. From level to level x / alpha stays: on VE, where alpha is 1, x itself, as in the paper.
    Where alpha rises from (nearly) 0 that knows no bounds, and x becomes at most twice as large as the levels'
    spreads, sqrt(alpha² + sigma²), make it; on VE so do levels of large sigma that fall by more than half.

    step_size: of a Langevin step in units of the level's variance: alpha_i / sigma_i² = epsilon / sigma_L² in
        the paper, 0.2 with its values.
    steps: Langevin steps at each level, one evaluation each (the paper has 100 at each of 10 levels).
    """

    step_size: Annotated[float, Field(gt=0, lt=4)] = 0.2  # in units of the level's variance
    steps: Annotated[int, Field(ge=1)] = 5  # at each level of noise

    order = 1
    stochastic = True

    @property
    def draws(self) -> int:
        return self.steps

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Noise | None) -> Tensor:
        if after.sigma == 0.0:
            return self.final(at, x, now, after, noise)
        bound = 2.0 * math.hypot(after.alpha, after.sigma) / math.hypot(now.alpha, now.sigma)
        scale = min(after.alpha / now.alpha if now.alpha > 0 else math.inf, bound)
        return scale * self.relax(at, x, now, noise)

    def final(self, at: At, x: Tensor, now: Node, end: Node, noise: Noise | None) -> Tensor:
        """The data seen after the last level's steps."""
        return at(self.relax(at, x, now, noise), now).data

    def relax(self, at: At, x: Tensor, now: Node, noise: Noise | None) -> Tensor:
        """The steps of one level."""
        assert noise is not None
        size = torch.full((len(x),), 0.5 * self.step_size, dtype=x.dtype, device=x.device)
        for j in range(self.steps):
            x = langevin_step(x, at(x, now).eps, noise(j), now, size)
        return x

    def nfe(self, num_steps: int, to_data: bool = False) -> int:
        """The steps of each level but clean data, and the last look."""
        return self.steps * num_steps + 1


def langevin_step(x: Tensor, eps: Tensor, z: Tensor, now: Node, size: Tensor) -> Tensor:
    """One step at a level; x, eps, z (B, ...), size (B,) in units of the level's variance sigma²."""
    size = broadcast(size, x)
    return x - size * now.sigma * eps + torch.sqrt(2.0 * size) * now.sigma * z


def _square(v: Tensor) -> Tensor:
    """(B,) squared norm of each sample."""
    return v.flatten(1).square().sum(1)
