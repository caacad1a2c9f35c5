"""Solvers of the probability-flow ODE dx/dt = alpha'(t)·data(x, t) + sigma'(t)·eps(x, t), and the base of all.

Euler and Heun work on increments of alpha and sigma, ∫ alpha' dt = alpha(t₁) − alpha(t₀), never on derivatives:
only data and eps are approximated. On the linear path these are the textbook methods in t; on VP Euler is
DDIM and on VE Heun is EDM's. So no step meets the infinite d_sigma at VP's t = 0, nor the kinks of a discrete
path. The other solvers see times as `Node.ratio` or `Node.log_snr`, with the same two benefits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dit.config import Registry, config
from dit.flow.path import NoisePath
from dit.flow.predict import Cond, Endpoints
from dit.sample.denoise import DenoiseFn

NoiseFn = Callable[[int], Tensor]  # index of the draw → standard normal noise of the shape of x
Noise = Callable[[int], Tensor]  # the same, index 0 … draws − 1 within one step


@dataclass(frozen=True)
class Node:
    """One time on the path, in Python floats (float64): solvers wait for no device."""

    t: float
    alpha: float
    sigma: float

    @property
    def scale(self) -> float:
        """alpha + sigma: x / scale lies on the linear path, at its time `ratio`."""
        return self.alpha + self.sigma

    @property
    def ratio(self) -> float:
        """sigma / (alpha + sigma) in [0, 1]: the time at which the linear path has the same SNR."""
        return self.sigma / self.scale

    @property
    def log_snr(self) -> float:
        """ln(alpha² / sigma²); −inf in pure noise, inf in clean data."""
        return 2.0 * (_log(self.alpha) - _log(self.sigma))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def nodes(path: NoisePath, times: Tensor) -> list[Node]:
    """The path at `times` (n,), n ≥ 2. ValueError if they are not finite, in [0, 1] and strictly falling.

    The last time may be given twice: a grid then wants its end visited (see `Solver.__call__`).
    """
    times = times.detach().double().cpu()
    falls = (
        times.ndim == 1 and len(times) > 1 and bool((times.diff()[:-1] < 0).all() and times[-1] <= times[-2])
    )
    if not falls or not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(
            f"times must fall strictly within [0, 1], shape (n,) with n > 1 (the last may repeat), got {times}"
        )
    return nodes_at(path, times)


def nodes_at(path: NoisePath, times: Tensor) -> list[Node]:
    """The path at any `times` (n,), float64 on the CPU."""
    alpha, sigma = path.alpha_sigma(times)
    return [Node(*values) for values in zip(times.tolist(), alpha.tolist(), sigma.tolist(), strict=True)]


@dataclass(frozen=True)
class At:
    """The denoiser with its condition bound, as the solvers call it: at(x, node)."""

    denoise: DenoiseFn
    path: NoisePath
    cond: Cond

    def __call__(self, x: Tensor, node: Node) -> Endpoints:
        """data and eps at x (B, C, ...), the whole batch at the node's time, in the dtype of x or float32."""
        return self.denoise(x, torch.full((len(x),), node.t, dtype=time_dtype(x), device=x.device), self.cond)

    def node(self, ratio: float) -> Node:
        """The node of this `Node.ratio`, anywhere on the path; on a discrete path it may lie between steps."""
        t = self.path.time_at(-2.0 * torch.logit(torch.tensor([ratio], dtype=torch.float64)))
        return nodes_at(self.path, t)[0]


def time_dtype(x: Tensor) -> torch.dtype:
    """What the denoiser's times are in: the dtype of x, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


class Solver:
    """A one-step method. Subclasses: frozen `@config` classes giving `step`; others override `run`.

    What does not depend on a field is a plain class attribute (`order = 2`), and so no configuration.
    """

    order: int  # of the method
    evaluations: int  # of the denoiser per step

    @property
    def convergence(self) -> int:
        """p, where halving the steps divides the error by 2^p; of the marginals, for stochastic solvers."""
        return self.order

    @property
    def stochastic(self) -> bool:
        """Whether the steps take noise; only then is it drawn."""
        return False

    @property
    def uses_variance(self) -> bool:
        """Whether the network must give a learned variance."""
        return False

    @property
    def draws(self) -> int:
        """How many draws of noise one step may take."""
        return 1

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Noise | None) -> Tensor:
        """x at `after` from x (B, C, ...) at `now`; noise(j): the step's j-th draw, for stochastic solvers."""
        raise NotImplementedError

    def run(self, at: At, x: Tensor, points: list[Node], noise: NoiseFn | None) -> Tensor:
        """x at points[-1] from x (B, C, ...) at points[0]; a single point gives x itself."""
        for i, (now, after) in enumerate(pairwise(points)):
            x = self.step(at, x, now, after, self.noise_of(i, noise))
        return x

    def visited(self, at: At, points: list[Node]) -> list[Node]:
        """The points up to the last at which the denoiser is called, where the end, points[-1], is not clean."""
        return points[:-1]

    def final(self, at: At, x: Tensor, now: Node, end: Node, noise: Noise | None) -> Tensor:
        """Clean latents from x at `now`, the last step before an `end` that is not clean: the data seen there."""
        return at(x, now).data

    def __call__(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        times: Tensor,
        path: NoisePath,
        noise: NoiseFn | None = None,
        cond: Cond | None = None,
    ) -> Tensor:
        """Clean latents from x (B, C, ...) at times[0].

        times: (num_steps + 1,), strictly falling, as a grid gives them. Where the last of them is not clean
        (sigma > 0), the last step is `final`: it returns the data seen from the time before, and the denoiser
        is never called at the end itself, unless the end is given twice. Else the last step is like the others.
        noise: index of the draw → noise; step i takes the draws from i·draws on.

        ValueError for times that do not fall, and when a stochastic solver is given no noise.
        """
        at, points = self._start(denoise, times, path, noise, cond)
        if points[-1].sigma == 0.0:
            return self.run(at, x, _apart(points), noise)
        visited = self.visited(at, points)
        x = self.run(at, x, visited, noise)
        return self.final(at, x, visited[-1], points[-1], self.noise_of(len(points) - 2, noise))

    def integrate(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        times: Tensor,
        path: NoisePath,
        noise: NoiseFn | None = None,
        cond: Cond | None = None,
    ) -> Tensor:
        """x at times[-1] from x at times[0], whatever the noise left there; one step between neighbours.

        Arguments and errors as for `__call__`, but no time may be given twice.
        """
        at, points = self._start(denoise, times, path, noise, cond)
        return self.run(at, x, _apart(points), noise)

    def _start(
        self, denoise: DenoiseFn, times: Tensor, path: NoisePath, noise: NoiseFn | None, cond: Cond | None
    ) -> tuple[At, list[Node]]:
        if self.stochastic and noise is None:
            raise ValueError(f"{self} is stochastic: it needs noise, a function of the index of the draw")
        return At(denoise, path, {} if cond is None else cond), nodes(path, times)

    def noise_of(self, step: int, noise: NoiseFn | None) -> Noise | None:
        """The draws of one step; None for a solver that takes none."""
        if noise is None or not self.stochastic:
            return None
        return lambda j: noise(step * self.draws + j)

    def nfe(self, num_steps: int, to_data: bool = False) -> int | None:
        """Calls of the denoiser for num_steps steps; to_data: the last one is `final`, one call.

        None where the solver decides by itself while it runs.
        """
        return self.evaluations * (num_steps - 1) + (1 if to_data else self.evaluations)


def _apart(points: list[Node]) -> list[Node]:
    if points[-1].t == points[-2].t:
        raise ValueError(f"times must fall strictly, but {points[-1].t} is given twice")
    return points


SOLVERS: Registry[Solver] = Registry("solver")


def advance(x: Tensor, ends: Endpoints, now: Node, after: Node) -> Tensor:
    """x moved from `now` to `after` with data and eps held: exact where they are constant."""
    return x + (after.alpha - now.alpha) * ends.data + (after.sigma - now.sigma) * ends.eps


@SOLVERS.register("euler")
@config
class Euler(Solver):
    """First order. On VP this is DDIM with eta = 0 (arXiv 2010.02502, eq. 12)."""

    order = 1
    evaluations = 1

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Noise | None) -> Tensor:
        return advance(x, at(x, now), now, after)


@SOLVERS.register("heun")
@config
class Heun(Solver):
    """Second order: Euler, then the mean of data and eps at both ends (arXiv 2206.00364, algorithm 1)."""

    order = 2
    evaluations = 2

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Noise | None) -> Tensor:
        here = at(x, now)
        there = at(advance(x, here, now, after), after)
        return advance(x, here.lerp(there, 0.5), now, after)
