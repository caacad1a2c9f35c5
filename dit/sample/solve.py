"""Solvers of the probability-flow ODE dx/dt = alpha'(t)·data(x, t) + sigma'(t)·eps(x, t).

All of them work on increments of alpha and sigma, ∫ alpha' dt = alpha(t₁) − alpha(t₀), never on derivatives:
only data and eps are approximated. On the linear path these are the textbook methods in t; on VP Euler is
DDIM and on VE Heun is EDM's. So no step meets the infinite d_sigma at VP's t = 0, nor the kinks of a discrete
path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from dit.config import Registry, config
from dit.flow.path import Path
from dit.flow.predict import Cond, Endpoints
from dit.sample.denoise import DenoiseFn

NoiseFn = Callable[[int], Tensor]  # step index → standard normal noise of the shape of x


@dataclass(frozen=True)
class Node:
    """One time on the path, in Python floats (float64): solvers wait for no device."""

    t: float
    alpha: float
    sigma: float


def nodes(path: Path, times: Tensor) -> list[Node]:
    """The path at `times` (n,). ValueError if they are not finite, in [0, 1] and strictly falling."""
    times = times.detach().double().cpu()
    if times.ndim != 1 or not bool((times.diff() < 0).all()) or not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(f"times must fall strictly within [0, 1], shape (n,), got {times}")
    alpha, sigma = path.alpha_sigma(times)
    return [Node(*values) for values in zip(times.tolist(), alpha.tolist(), sigma.tolist(), strict=True)]


At = Callable[[Tensor, Node], Endpoints]  # the denoiser at a node, the condition bound


def bind(denoise: DenoiseFn, cond: Cond | None) -> At:
    """`denoise` with t filled in for the whole batch, in the dtype of x but at least float32."""

    def at(x: Tensor, node: Node) -> Endpoints:
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = torch.full((len(x),), node.t, dtype=dtype, device=x.device)
        return denoise(x, t, {} if cond is None else cond)

    return at


class Solver:
    """A one-step method. Subclasses: frozen `@config` classes giving `step`; multistep ones `integrate`."""

    order: ClassVar[int]  # of convergence in the step size
    evaluations: ClassVar[int]  # of the denoiser per step
    stochastic: ClassVar[bool] = False  # takes noise at every step; only then is it drawn

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Tensor | None) -> Tensor:
        """x at `after` from x (B, C, ...) at `now`; noise: like x, for stochastic solvers."""
        raise NotImplementedError

    def __call__(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        times: Tensor,
        path: Path,
        noise: NoiseFn | None = None,
        cond: Cond | None = None,
    ) -> Tensor:
        """Clean latents from x (B, C, ...) at times[0].

        times: (num_steps + 1,), strictly falling, as a grid gives them. Where the last of them is not clean
        (sigma > 0), the last step returns the `data` seen from the one before, and the denoiser is never
        called at the end itself; else the last step is like the others.
        """
        last = nodes(path, times)[-1]
        if last.sigma == 0.0:
            return self.integrate(denoise, x, times, path, noise, cond)
        x = self.integrate(denoise, x, times[:-1], path, noise, cond)
        return bind(denoise, cond)(x, nodes(path, times)[-2]).data

    def integrate(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        times: Tensor,
        path: Path,
        noise: NoiseFn | None = None,
        cond: Cond | None = None,
    ) -> Tensor:
        """x at times[-1] from x at times[0], whatever the noise left there; one step between neighbours.

        ValueError when a stochastic solver is given no noise.
        """
        if self.stochastic and noise is None:
            raise ValueError(f"{self} is stochastic: it needs noise, a function of the step index")
        at, points = bind(denoise, cond), nodes(path, times)
        for i, (now, after) in enumerate(pairwise(points)):
            x = self.step(at, x, now, after, noise(i) if noise is not None and self.stochastic else None)
        return x

    def nfe(self, num_steps: int, to_data: bool = False) -> int:
        """Calls of the denoiser for num_steps steps; to_data: the last one returns data, one call."""
        return self.evaluations * (num_steps - 1) + (1 if to_data else self.evaluations)


SOLVERS: Registry[Solver] = Registry("solver")


def advance(x: Tensor, ends: Endpoints, now: Node, after: Node) -> Tensor:
    """x moved from `now` to `after` with data and eps held: exact where they are constant."""
    return x + (after.alpha - now.alpha) * ends.data + (after.sigma - now.sigma) * ends.eps


@SOLVERS.register("euler")
@config
class Euler(Solver):
    """First order. On VP this is DDIM with eta = 0 (arXiv 2010.02502, eq. 12)."""

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Tensor | None) -> Tensor:
        return advance(x, at(x, now), now, after)


@SOLVERS.register("heun")
@config
class Heun(Solver):
    """Second order: Euler, then the mean of data and eps at both ends (arXiv 2206.00364, algorithm 1)."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Tensor | None) -> Tensor:
        here = at(x, now)
        there = at(advance(x, here, now, after), after)
        return advance(x, here.lerp(there, 0.5), now, after)
