"""Stochastic solvers: Euler–Maruyama on the reverse SDE, and EDM's Heun with churn.

The reverse SDE with diffusion D(t) ≥ 0 has the probability-flow ODE's marginals, whatever D:

    dx = [velocity − D·score] dt + sqrt(2 D) dW, t falling from 1 to 0

(SiT, arXiv 2401.08740, eq. 5, where D is w/2 and time runs the other way).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dit.config import Registry, config
from dit.flow.path import Coeffs, NoisePath
from dit.flow.predict import Endpoints
from dit.sample.ancestral import step_posterior
from dit.sample.solve import SOLVERS, At, Heun, Node, Noise, NoiseFn, Solver, advance

# --- how much noise the SDE has ----------------------------------------------------------------------------


@config
class Diffusion:
    """D(t) = w(t)/2 of SiT's table 2, as its code has it. norm: a factor, 0 makes the ODE (but for `decreasing`)."""

    norm: Annotated[float, Field(ge=0)] = 1.0  # factor on D(t); 0 = the ODE

    def __call__(self, t: Tensor, coeffs: Coeffs) -> Tensor:
        """D (B,) per unit of t at t (B,) in (0, 1]; it may be inf at t = 1."""
        raise NotImplementedError


DIFFUSIONS: Registry[Diffusion] = Registry("diffusion")


@DIFFUSIONS.register("constant")
@config
class Constant(Diffusion):
    """The norm at all times."""

    def __call__(self, t: Tensor, coeffs: Coeffs) -> Tensor:
        return torch.full_like(t, self.norm)


@DIFFUSIONS.register("sbdm")
@config
class SBDM(Diffusion):
    """Half the g² of the forward SDE that has this path (Song et al., arXiv 2011.13456): beta/2 on VP."""

    def __call__(self, t: Tensor, coeffs: Coeffs) -> Tensor:
        shrinking = coeffs.d_alpha / coeffs.alpha
        return self.norm * coeffs.sigma * (coeffs.d_sigma - shrinking * coeffs.sigma)


@DIFFUSIONS.register("sigma")
@config
class Sigma(Diffusion):
    """As much as there is noise."""

    def __call__(self, t: Tensor, coeffs: Coeffs) -> Tensor:
        return self.norm * coeffs.sigma


@DIFFUSIONS.register("linear")
@config
class LinearDiffusion(Diffusion):
    """norm·t on every path."""

    def __call__(self, t: Tensor, coeffs: Coeffs) -> Tensor:
        return self.norm * t


@DIFFUSIONS.register("decreasing")
@config
class Decreasing(Diffusion):
    """From (1 + norm)²/4 in noise to (1 − norm)²/4 in data."""

    def __call__(self, t: Tensor, coeffs: Coeffs) -> Tensor:
        return 0.25 * (1.0 - self.norm * torch.cos(math.pi * t)).square()


@DIFFUSIONS.register("increasing_decreasing")
@config
class IncreasingDecreasing(Diffusion):
    """Nothing at either end, the norm half way."""

    def __call__(self, t: Tensor, coeffs: Coeffs) -> Tensor:
        return self.norm * torch.sin(math.pi * t).square()


# --- Euler–Maruyama ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """What a last step may use: x and the endpoints seen at `now`, the end, and D times the step."""

    x: Tensor
    ends: Endpoints
    now: Node
    after: Node
    strength: float

    def ode(self) -> Tensor:
        """Euler's step of the probability-flow ODE."""
        return advance(self.x, self.ends, self.now, self.after)

    def mean(self) -> Tensor:
        """Euler–Maruyama's step without its noise."""
        return self.ode() - self.strength / self.now.sigma * self.ends.eps


LASTS: Mapping[str, Callable[[Drift], Tensor]] = {
    "mean": Drift.mean,
    "tweedie": lambda drift: drift.ends.data,
    "euler": Drift.ode,
}


@SOLVERS.register("euler_maruyama")
@config
class EulerMaruyama(Solver):
    """Euler–Maruyama on the reverse SDE (SiT, arXiv 2401.08740, §2.3 and appendix): weak order 1.

    As with Euler, alpha and sigma advance by increments: on the linear path this is SiT's step. Of D times the
    step no more is used than the sigma² that the step leads to, enough to renew the noise there: explicit steps
    of more are unstable. That matters where D is infinite (sbdm at alpha = 0; SiT starts a little later
    instead), near the data, and at very few steps; as the steps get small, D is what was asked for, and the
    marginals are right for any D.

    diffusion: how much noise. last: the step to the end of the grid takes no noise. `tweedie` returns the data
    seen; `mean` follows the SDE's drift (the default of SiT's code, several times as far off at few steps);
    `euler` follows the ODE, which is `tweedie` again where the grid ends in clean data. limit: false takes all of
    D wherever it is finite, as SiT does.
    """

    diffusion: Annotated[Diffusion, DIFFUSIONS] = SBDM()  # how much noise at each time, D(t)
    last: Literal["tweedie", "mean", "euler"] = "tweedie"  # the step without noise: tweedie | mean | euler
    limit: bool = True  # no more of D than keeps the step stable; false = SiT's own steps

    order = 1
    evaluations = 1
    stochastic = True

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Noise | None) -> Tensor:
        if after.sigma == 0.0:
            return self.final(at, x, now, after, noise)
        assert noise is not None
        strength = self.limited(self.strength(at.path, now, after), after.sigma**2)
        mean = Drift(x, at(x, now), now, after, strength).mean()
        return mean + math.sqrt(2.0 * strength) * noise(0)

    def final(self, at: At, x: Tensor, now: Node, end: Node, noise: Noise | None) -> Tensor:
        """The last step, see the field `last`; takes no noise, and at most removes all of it."""
        strength = self.limited(self.strength(at.path, now, end), now.sigma**2)
        return LASTS[self.last](Drift(x, at(x, now), now, end, strength))

    def limited(self, strength: float, most: float) -> float:
        """The strength that is used; an infinite one is always limited."""
        return min(strength, most) if self.limit or math.isinf(strength) else strength

    def strength(self, path: NoisePath, now: Node, after: Node) -> float:
        """D at `now` times the step, in float64."""
        t = torch.tensor([now.t], dtype=torch.float64)
        return float(self.diffusion(t, path.coeffs(t))) * (now.t - after.t)


# --- Heun with churn ---------------------------------------------------------------------------------------


@SOLVERS.register("edm")
@config
class StochasticHeun(Heun):
    """Before each step noise is added, then Heun takes it away again (arXiv 2206.00364, algorithm 2).

    The paper's sigma is the ratio s = sigma / alpha here, on any path; on a discrete one the raised time is the
    nearest step. Noise is raised to (1 + gamma)·s at most, gamma = min(s_churn / num_steps, √2 − 1), and never
    beyond where sampling started; a step to clean data is not churned. Without churn this is Heun.

    s_churn: 0 or more, of all steps together. s_min, s_max: the ratios s at which there is churn. s_noise:
    factor on the added noise, a little above 1 against a loss of detail. The defaults are the paper's for
    ImageNet-64 but for s_noise = 1.003.
    """

    s_churn: Annotated[float, Field(ge=0)] = 40.0  # noise added over all steps; 0 = Heun
    s_min: Annotated[float, Field(ge=0)] = 0.05  # sigma/alpha below which none is added
    s_max: Annotated[float, Field(ge=0)] = 50.0  # sigma/alpha above which none is added
    s_noise: Annotated[float, Field(gt=0)] = 1.0  # factor on what is added

    @property
    def stochastic(self) -> bool:
        return self.s_churn > 0

    def run(self, at: At, x: Tensor, points: list[Node], noise: NoiseFn | None) -> Tensor:
        num_steps = len(points) - 1 + (points[-1].sigma > 0.0)  # the last step to data counts
        gamma = min(self.s_churn / max(num_steps, 1), math.sqrt(2.0) - 1.0)
        for i, (now, after) in enumerate(pairwise(points)):
            draw = self.noise_of(i, noise)
            risen = now if draw is None or after.sigma == 0.0 else self.raised(at, now, points[0], gamma)
            if draw is not None and risen.t > now.t:
                added = math.sqrt(float(step_posterior(risen, now).step_variance))
                x = risen.alpha / now.alpha * x + self.s_noise * added * draw(0)
            x = self.step(at, x, risen, after, None)
        return x

    def raised(self, at: At, now: Node, start: Node, gamma: float) -> Node:
        """The node with 1 + gamma times the noise, at most `start`; `now` where there is no churn."""
        ratio = now.sigma / now.alpha if now.alpha > 0 else math.inf
        if now.t >= start.t or not self.s_min <= ratio <= self.s_max:
            return now
        more = (1.0 + gamma) * ratio
        node = nearest(at.path, at.node(more / (1.0 + more)))
        return min(max(node, now, key=_time), start, key=_time)


def _time(node: Node) -> float:
    return node.t


def nearest(path: NoisePath, node: Node) -> Node:
    """The node itself, or the step of a discrete path nearest to it."""
    if path.num_steps is None:
        return node
    t = path.snap(torch.tensor([max(node.t - 0.5 / path.num_steps, 0.0)], dtype=torch.float64))
    alpha, sigma = path.alpha_sigma(t)
    return Node(float(t), float(alpha), float(sigma))
