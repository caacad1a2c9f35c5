"""Grids: the times a sampler visits, from noise down to the end of the usable interval."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, repeat
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, Registry, config
from dit.flow.path import NoisePath
from dit.flow.predict import Prediction, Velocity, usable
from dit.flow.times import Shift, shift_of, shift_time


def sampling_interval(path: NoisePath, prediction: Prediction) -> tuple[float, float]:
    """[t_lo, t_hi]: where both the prediction and the path's velocity are usable.

    VP's velocity is infinite at t = 0, so t_lo is above 0 there even for a prediction that is fine at t = 0,
    and solvers end by returning data instead of evaluating the network near the singularity.
    """
    (lo, hi), (lo_path, hi_path) = usable(path, prediction), usable(path, Velocity())
    return max(lo, lo_path), min(hi, hi_path)


class Grid:
    """A way to space times. Subclasses are frozen `@config` classes that give `times`."""

    def times(self, num_steps: int, path: NoisePath, lo: float, hi: float) -> Tensor:
        """(num_steps + 1,) float64 on the CPU, falling from about hi to about lo; not snapped yet."""
        raise NotImplementedError

    def sized(self, dimension: int) -> Grid:
        """This grid for latents of so many numbers each: the shift `dimension` becomes one."""
        shift: Shift | None = getattr(self, "shift", None)
        if shift != "dimension":
            return self
        return replace(self, shift=shift_of(shift, dimension))  # type: ignore[type-var]

    def __call__(self, num_steps: int, path: NoisePath, prediction: Prediction) -> Tensor:
        """(num_steps + 1,) float64 on the CPU, strictly falling from t_hi to t_lo of the sampling interval.

        Sampling starts from the prior at t_hi. On a discrete path all but the last are steps of that path, each
        another: those that would share one make room for each other.
        Where the path is not clean at t_lo (VE), the last two may both be t_lo: the network is then asked there.
        ConfigError when num_steps is below 1 or more than the grid can tell apart.
        """
        if num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1, got {num_steps}")
        lo, hi = sampling_interval(path, prediction)
        times = self.times(num_steps, path, lo, hi).clamp(lo, hi)
        times[-1] = lo  # exactly: an end at 0 must be 0
        times[:-1] = _own_steps(path.snap(times[:-1]), path)
        falls = times.diff() < 0
        if num_steps > 1 and times[-2] == lo:
            falls[-1] = float(path.alpha_sigma(times[-1:])[1]) > 0
        if not bool(falls.all()):
            raise ConfigError(
                f"{num_steps} steps of grid {self} on path {path} visit a time twice; use fewer, or another grid"
            )
        return times


def _own_steps(times: Tensor, path: NoisePath) -> Tensor:
    """Steps of a discrete path from noise to data, (n,), moved until each is another one; n at most its steps."""
    if path.num_steps is None:
        return times
    before = torch.arange(len(times))
    after = before.flip(0)
    step = torch.round(times * path.num_steps) - after
    step = step.flip(0).cummax(0).values.flip(0) + after  # up from the data
    return torch.minimum(step, path.num_steps - before) / path.num_steps  # and down from the noise


GRIDS: Registry[Grid] = Registry("grid")


class ShiftedGrid(Grid):
    """Even steps of some variable, shifted like training times: shift > 1 spends more of them near noise."""

    shift: Shift

    def spacing(self, u: Tensor) -> Tensor:
        """Times from u (n,), both falling from 1 to 0, before shift and interval."""
        raise NotImplementedError

    def times(self, num_steps: int, path: NoisePath, lo: float, hi: float) -> Tensor:
        u = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
        times = lo + (hi - lo) * shift_time(self.spacing(u), self.shift)
        times[0] = hi
        return times


@GRIDS.register("uniform")
@config
class UniformGrid(ShiftedGrid):
    """Even steps in t."""

    shift: Shift = (
        1.0  # of times; more than 1 = finer steps near noise; dimension = √(numbers in a latent / 4096)
    )

    def spacing(self, u: Tensor) -> Tensor:
        return u


@GRIDS.register("quadratic")
@config
class QuadraticGrid(ShiftedGrid):
    """Even steps in sqrt(t): finer near data (DDIM, arXiv 2010.02502, appendix D.2)."""

    shift: Shift = (
        1.0  # of times; more than 1 = finer steps near noise; dimension = √(numbers in a latent / 4096)
    )

    def spacing(self, u: Tensor) -> Tensor:
        return u.square()


class NoiseGrid(Grid):
    """Times at chosen noise levels sigma/alpha: num_steps of them from sigma_max to sigma_min, then the end.

    On other paths than EDM's the first is t_hi, whatever its level, and levels that the path or the prediction
    does not have are left out of the range. A shift maps the times that were found.
    """

    sigma_min: float
    sigma_max: float
    shift: Shift

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min} must be below sigma_max = {self.sigma_max}")

    def levels(self, most: float, least: float, num_steps: int) -> Tensor:
        """(num_steps,) float64, from `most` down to `least`."""
        raise NotImplementedError

    def times(self, num_steps: int, path: NoisePath, lo: float, hi: float) -> Tensor:
        ends = torch.tensor([hi, lo], dtype=torch.float64)
        alpha, sigma = path.alpha_sigma(path.snap(ends))
        most, least = (sigma / alpha).tolist()
        levels = self.levels(min(self.sigma_max, most), max(self.sigma_min, least), num_steps)
        times = shift_time(path.time_at(-2.0 * levels.log()), self.shift)
        times[0] = hi
        return torch.cat([torch.where((times - lo).abs() < 1e-12, lo, times), ends[1:]])


@GRIDS.register("karras")
@config
class KarrasGrid(NoiseGrid):
    """EDM's: even steps in (sigma/alpha)^(1/rho), finer near data (arXiv 2206.00364, eq. 5)."""

    sigma_min: Annotated[float, Field(gt=0)] = 0.002  # least noise level sigma/alpha
    sigma_max: Annotated[float, Field(gt=0)] = 80.0  # largest noise level sigma/alpha
    rho: Annotated[float, Field(gt=0)] = 7.0  # more = finer steps near data
    shift: Shift = (
        1.0  # of times; more than 1 = finer steps near noise; dimension = √(numbers in a latent / 4096)
    )

    def levels(self, most: float, least: float, num_steps: int) -> Tensor:
        power = 1.0 / self.rho
        return torch.linspace(most**power, least**power, num_steps, dtype=torch.float64) ** self.rho


@GRIDS.register("log_snr")
@config
class LogSNRGrid(NoiseGrid):
    """Even steps in the log-SNR (DPM-Solver, arXiv 2206.00927), between two noise levels sigma/alpha."""

    sigma_min: Annotated[float, Field(gt=0)] = 0.002  # least noise level sigma/alpha
    sigma_max: Annotated[float, Field(gt=0)] = 160.0  # largest sigma/alpha; vp and ddpm have a little less
    shift: Shift = (
        1.0  # of times; more than 1 = finer steps near noise; dimension = √(numbers in a latent / 4096)
    )

    def levels(self, most: float, least: float, num_steps: int) -> Tensor:
        return torch.linspace(math.log(most), math.log(least), num_steps, dtype=torch.float64).exp()


@GRIDS.register("respaced")
@config
class RespacedGrid(Grid):
    """The integer steps that guided diffusion and DiT visit; for discrete paths alone.

    sections: how many steps in each of as many equal parts of the path, data first; () is one part with
        num_steps. In a part the steps are even and rounded, both ends taken.
    stride: `even`, that; `ddim`, the one integer stride from k = 0 that gives num_steps, which may begin below
        the path's last step (k = 960 for 25 of 1000).
    """

    # even = rounded even steps; ddim = one integer stride from k = 0
    stride: Literal["even", "ddim"] = "even"
    sections: tuple[Annotated[int, Field(ge=1)], ...] = ()  # steps in each equal part, data first

    def __post_init__(self) -> None:
        if self.stride == "ddim" and self.sections:
            raise ConfigError(
                f"sections {list(self.sections)} have no meaning with stride ddim: leave one out"
            )

    def times(self, num_steps: int, path: NoisePath, lo: float, hi: float) -> Tensor:
        if path.num_steps is None:
            raise ConfigError(f"grid {self} is for discrete paths; path {path} has no steps: use uniform")
        steps = self.steps(num_steps, path.num_steps)
        return torch.tensor([*((k + 1) / path.num_steps for k in reversed(steps)), lo], dtype=torch.float64)

    def steps(self, num_steps: int, total: int) -> list[int]:
        """The steps k visited, rising, of 0 … total − 1. ConfigError if there is no such map."""
        if num_steps < 2:
            raise ConfigError(
                f"grid {self} needs num_steps of at least 2: its map of 1 is step 0, next to data"
            )
        if self.stride == "ddim":
            return _strided(num_steps, total)
        sections = self.sections or (num_steps,)
        if sum(sections) != num_steps:
            raise ConfigError(f"sections {sections} of grid {self} must add up to num_steps = {num_steps}")
        sizes = [total // len(sections) + (i < total % len(sections)) for i in range(len(sections))]
        starts = accumulate(sizes, initial=0)
        return [k for part in zip(starts, sizes, sections, strict=False) for k in _even(*part)]


def _strided(num_steps: int, total: int) -> list[int]:
    for stride in range(1, total + 1):
        if len(range(0, total, stride)) == num_steps:
            return list(range(0, total, stride))
    raise ConfigError(f"no integer stride makes {num_steps} steps of {total}; take a divisor of {total}")


def _even(start: int, size: int, count: int) -> list[int]:
    """`count` even steps of start … start + size − 1, added up and rounded as the reference does."""
    if count > size:
        raise ConfigError(f"a section of {size} steps cannot give {count}; use fewer steps")
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    return [start + round(offset) for offset in accumulate(repeat(stride, count - 1), initial=0.0)]
