"""Ancestral sampling: each step draws from p(x_s | x_t), a Gaussian around what the network's data implies.

A step is stated for any two times of any path by `posterior`; at neighbouring steps of a DDPM path it is the
papers' own, and on fewer (respaced) steps what guided diffusion makes of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dit.config import config
from dit.flow.variance import VARIANCES, Posterior, posterior
from dit.sample.solve import SOLVERS, At, Node, Noise, Solver, advance


def step_posterior(now: Node, after: Node) -> Posterior:
    """q(x at `after` | x at `now`, data) in numbers; its variance is 0 where `after` is clean."""
    return posterior((now.alpha, now.sigma), (after.alpha, after.sigma))


@SOLVERS.register("ddim")
@config
class DDIM(Solver):
    """Eta between the deterministic DDIM (0: Euler, bit for bit) and DDPM (1: `ddpm` with the small variance).

    arXiv 2010.02502, eq. 12 with the noise of eq. 16, sigma² = eta² times the posterior's variance: on any path
    x = alpha·data + sqrt(sigma² − noise²)·eps + noise·z. A step to clean data takes no noise.
    """

    eta: Annotated[float, Field(ge=0, le=1)] = 0.0  # 0 = deterministic, 1 = as noisy as ddpm

    order = 1
    evaluations = 1

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Noise | None) -> Tensor:
        fresh = self.eta**2 * float(step_posterior(now, after).variance)
        kept = math.sqrt(max(after.sigma * after.sigma - fresh, 0.0))
        moved = advance(x, at(x, now), now, replace(after, sigma=kept))
        return moved if noise is None or fresh == 0.0 else moved + math.sqrt(fresh) * noise(0)


@SOLVERS.register("ddpm")
@config
class DDPM(Solver):
    """Ancestral sampling (arXiv 2006.11239, algorithm 2): the posterior's mean at the network's data, and noise.

    variance: of the noise. `small`, the posterior's, is right for data that are one point; `large`, the step's,
    for standard normal data (§3.2); `learned` lies between, as the network says (arXiv 2102.09672, eq. 15), and
    a ValueError tells if it says nothing. A step to clean data takes no noise.
    """

    # of the noise of a step; learned needs learn_sigma
    variance: Literal["small", "large", "learned"] = "small"

    order = 1
    evaluations = 1
    stochastic = True

    @property
    def uses_variance(self) -> bool:
        return self.variance == "learned"

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Noise | None) -> Tensor:
        ends, chosen = at(x, now), step_posterior(now, after)
        mean = chosen.mean(x, ends.data)
        if noise is None or after.sigma == 0.0:
            return mean
        bounds = math.log(float(chosen.variance)), math.log(float(chosen.step_variance))
        channels = None if ends.log_variance is None else ends.log_variance.to(mean.dtype)
        half = 0.5 * VARIANCES[self.variance](channels, *bounds)
        return mean + (half.exp() if isinstance(half, Tensor) else math.exp(half)) * noise(0)
