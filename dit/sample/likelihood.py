"""log p(data) of a model: by the probability-flow ODE, or bounded from below by the variational bound.

Both give nats of the density of what the model sees. Conditions count: with labels it is log p(data | label).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, Registry, config
from dit.flow.path import NoisePath
from dit.flow.predict import Cond, Endpoints, Prediction, check_steps, usable
from dit.flow.variance import DECODERS, VARIANCES, Posterior, gaussian_kl, posterior
from dit.rng import Draws, Purpose
from dit.sample.denoise import DenoiseFn
from dit.sample.grid import GRIDS, Grid, UniformGrid
from dit.sample.runge_kutta import RungeKutta4, weighted
from dit.sample.solve import At, Node, nodes


def bits_per_dim(nats: Tensor, dimensions: int) -> Tensor:
    """Bits per dimension, (B,), of log densities in nats (B,) of so many dimensions: −nats / (D·ln 2)."""
    return -nats / (dimensions * math.log(2.0))


@dataclass(frozen=True)
class LikelihoodProblem:
    """Whose density it is. slots: (B,) int64 on data's device; the random numbers of a sample are those of its slot."""

    denoise: DenoiseFn
    path: NoisePath
    prediction: Prediction
    cond: Cond
    slots: Tensor
    seed: int = 0

    def draws(self, step: int) -> Draws:
        """The random numbers of one evaluation."""
        return Draws(self.seed, step, self.slots, 1)

    def prior_std(self, first: Node) -> float:
        """Return that of the normal distribution from which sampling starts at its first node."""
        return float(self.path.prior(torch.ones(1, dtype=torch.float64), first.t))


class Likelihood:
    """A way to log p(data). Subclasses are frozen `@config` classes."""

    @property
    def of_levels(self) -> bool:
        """Whether it holds only for pixels as they are, in 256 levels from −1 to 1."""
        return False

    def __call__(self, problem: LikelihoodProblem, data: Tensor) -> Tensor:
        """(B,) float64 nats: log p(data), data (B, C, ...), or a lower bound of its mean."""
        raise NotImplementedError


LIKELIHOODS: Registry[Likelihood] = Registry("likelihood")


# --- the probability-flow ODE ------------------------------------------------------------------------------


class Divergence:
    """A way to the divergence of a vector field. Subclasses are frozen `@config` classes."""

    def __call__(self, problem: LikelihoodProblem, evaluation: int, x: Tensor, slope: Tensor) -> Tensor:
        """(B,) float64 from x (B, ...) and the field there, `slope`, computed from it with gradients on."""
        raise NotImplementedError


DIVERGENCES: Registry[Divergence] = Registry("divergence", default="hutchinson")


@DIVERGENCES.register("exact")
@config
class Exact(Divergence):
    """The trace of the Jacobian, one backward pass a dimension."""

    def __call__(self, problem: LikelihoodProblem, evaluation: int, x: Tensor, slope: Tensor) -> Tensor:
        total = _none(x)
        for i in range(x[0].numel()):
            axis = torch.zeros_like(x).flatten(1)
            axis[:, i] = 1.0
            total = total + _curvature(x, slope, axis.reshape(x.shape))
        return total


@DIVERGENCES.register("hutchinson")
@config
class Hutchinson(Divergence):
    """vᵀJv for v of random signs, one backward pass a probe: unbiased (arXiv 1810.01367, eq. 7).

    Every evaluation draws new probes, so that their errors average out over the solve.
    """

    probes: Annotated[int, Field(ge=1)] = 1  # of random signs per evaluation

    def __call__(self, problem: LikelihoodProblem, evaluation: int, x: Tensor, slope: Tensor) -> Tensor:
        total = _none(x)
        for probe in range(self.probes):
            draws = problem.draws(evaluation * self.probes + probe)
            signs = 2 * (draws.bits(Purpose.LIKELIHOOD, x[0].numel()) & 1) - 1
            total = total + _curvature(x, slope, signs.reshape(x.shape).to(x.dtype))
        return total / self.probes


def _none(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.float64, device=x.device)


def _curvature(x: Tensor, slope: Tensor, v: Tensor) -> Tensor:
    """(B,) float64 vᵀ·(d slope / d x)·v; 0 for a slope that does not depend on x."""
    if not slope.requires_grad:
        return _none(x)
    (pulled,) = torch.autograd.grad(slope, x, v, retain_graph=True, materialize_grads=True)
    return (pulled * v).flatten(1).double().sum(1)


@dataclass(frozen=True)
class _Watched(At):
    """The denoiser as a solver calls it, noting at every call the divergence of dx~/ds."""

    problem: LikelihoodProblem
    divergence: Divergence
    found: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, node: Node) -> Endpoints:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ends = super().__call__(x, node)
            slope = node.scale * (ends.eps - ends.data)  # d slope / dx is then d (dx~/ds) / dx~
            self.found.append(self.divergence(self.problem, len(self.found), x, slope))
        return Endpoints(ends.data.detach(), ends.eps.detach())


@LIKELIHOODS.register("ode")
@config
class Ode(Likelihood):
    """The instantaneous change of variables along the probability-flow ODE (arXiv 2011.13456, eq. 39).

    Solved for x~ = x/(alpha + sigma) in s = sigma/(alpha + sigma), where dx~/ds = eps − data is finite on every
    path, by the solver `rk4`; the prior is what sampling starts from. Where path or prediction do not begin at
    clean data (VE, data, a discrete path's first step), it is the density of data with the noise that is there.
    Differentiates the network: not under torch.inference_mode.

    num_steps: of four evaluations each. power: steps lie at s ~ u^power for even u: finer near the data for more
    than 1, where the density of data near a surface changes fastest.
    """

    num_steps: Annotated[int, Field(ge=1)] = 32  # of the solver, four evaluations each
    power: Annotated[float, Field(gt=0)] = 2.0  # more = finer steps near data
    divergence: Annotated[Divergence, DIVERGENCES] = Hutchinson()  # how the trace of the Jacobian is found

    def __call__(self, problem: LikelihoodProblem, data: Tensor) -> Tensor:
        data = data.to(torch.promote_types(data.dtype, torch.float32))
        at = _Watched(problem.denoise, problem.path, problem.cond, problem, self.divergence)
        solver, points = RungeKutta4(), self.points(at)
        x, growth = points[0].alpha * data, _none(data)
        for now, after in pairwise(points):
            x = solver.step(at, x, now, after, None)
            slopes = at.found[-len(solver.tableau.weights) :]
            growth = growth + (after.ratio - now.ratio) * weighted(solver.tableau.weights, slopes)
        density = DECODERS["density"](x, torch.zeros_like(x), 2.0 * math.log(problem.prior_std(points[-1])))
        scaled = math.log(points[-1].scale) + math.log(points[0].alpha) - math.log(points[0].scale)
        return growth + density.double().flatten(1).sum(1) + data[0].numel() * scaled

    def points(self, at: _Watched) -> list[Node]:
        """(num_steps + 1) nodes, from the first to the last at which the network is trained and usable."""
        path = at.path
        lo, hi = usable(path, at.problem.prediction)
        lo = max(lo, 1.0 / path.num_steps) if path.num_steps else lo
        noisy, clean = nodes(path, torch.tensor([hi, lo], dtype=torch.float64))
        shares = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64)[1:-1] ** self.power
        between = clean.ratio + (noisy.ratio - clean.ratio) * shares
        return [clean, *(at.node(ratio) for ratio in between.tolist()), noisy]


# --- the variational bound ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """The parts of the bound in nats, (B,) float64 each: what it says of −log p(data) is their sum.

    prior: KL of the noisiest latents to the prior. steps: the sum of the steps' KL. decoder: the last step's
    −log p(data | x), a density for the decoder `density`, a probability for `discretised`.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """(B,) nats."""
        return self.prior + self.steps + self.decoder


@LIKELIHOODS.register("bound")
@config
class Bound(Likelihood):
    """The variational bound of DDPM-type models (arXiv 2006.11239, eq. 5), a single draw of x for every term.

    num_steps: evaluations, at the times of `grid`; none is every step of a discrete path. variance: of the
    model's steps; learned ones are those trained by `learned_range`. The smallest variance of the last step,
    where the posterior's is 0, is that of the step before (arXiv 2102.09672): with `small` a grid that is fine
    at its end is punished. decoder: density for latents, discretised for pixels of 256 levels in [−1, 1].
    """

    # terms of the bound; null = every step of a discrete path
    num_steps: Annotated[int, Field(ge=2)] | None = None
    grid: Annotated[Grid, GRIDS] = UniformGrid()  # how the times of the terms are spaced
    # of the model's steps; learned needs learn_sigma
    variance: Literal["small", "large", "learned"] = "large"
    # density of latents, or discretised: 256 levels of pixels
    decoder: Literal["density", "discretised"] = "density"

    @property
    def of_levels(self) -> bool:
        return self.decoder == "discretised"

    def __call__(self, problem: LikelihoodProblem, data: Tensor) -> Tensor:
        return -self.terms(problem, data).total

    def times(self, problem: LikelihoodProblem, dimension: int | None = None) -> Tensor:
        """(num_steps + 1,) float64, falling to the data. dimension: numbers in a latent.

        ConfigError where the path has no steps of its own.
        """
        path, num_steps = problem.path, self.num_steps
        if num_steps is not None:
            grid = self.grid if dimension is None else self.grid.sized(dimension)
            return grid(num_steps, path, problem.prediction)
        if path.num_steps is None:
            raise ConfigError(
                f"path {path} has no steps of its own: say num_steps, of which the bound is made"
            )
        times = torch.arange(path.num_steps, -1, -1, dtype=torch.float64) / path.num_steps
        check_steps(path, problem.prediction)
        return times[times <= usable(path, problem.prediction)[1]]  # from where sampling would start

    def terms(self, problem: LikelihoodProblem, data: Tensor) -> Terms:
        """The bound's terms for data (B, C, ...), in float32 at least."""
        data = data.to(torch.promote_types(data.dtype, torch.float32))
        points = nodes(problem.path, self.times(problem, data[0].numel()))
        first, std = points[0], problem.prior_std(points[0])
        prior = gaussian_kl(-first.alpha * data, 2.0 * math.log(first.sigma), 2.0 * math.log(std))
        steps, decoder, log_small = _none(data), _none(data), 0.0
        for i, (now, before) in enumerate(pairwise(points)):
            is_last = i == len(points) - 2
            end = (1.0, 0.0) if is_last else (before.alpha, before.sigma)
            step = posterior((now.alpha, now.sigma), end)
            log_small = log_small if is_last else math.log(step.variance)
            cost = self._cost(problem, data, now, step, log_small, i, is_last).double().flatten(1).sum(1)
            steps, decoder = (steps, cost) if is_last else (steps + cost, decoder)
        return Terms(prior.double().flatten(1).sum(1), steps, decoder)

    @torch.no_grad()
    def _cost(
        self,
        problem: LikelihoodProblem,
        data: Tensor,
        now: Node,
        step: Posterior,
        log_small: float,
        i: int,
        last: bool,
    ) -> Tensor:
        """Nats per element, (B, C, ...), of the step down from `now`."""
        eps = problem.draws(i).normal(Purpose.LIKELIHOOD, data.shape[1:]).to(data.dtype)
        x = now.alpha * data + now.sigma * eps
        ends = At(problem.denoise, problem.path, problem.cond)(x, now)
        log_large = math.log(step.step_variance)
        log_variance = VARIANCES[self.variance](ends.log_variance, log_small, log_large)
        if last:
            return -DECODERS[self.decoder](data, step.mean(x, ends.data), log_variance)
        return gaussian_kl(step.on_data * (ends.data - data), log_small, log_variance)
