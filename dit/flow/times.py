"""Which times are trained at: maps of a uniform number u in (0, 1) to t in [0, 1].

A new distribution is one `quantile`. A time shift is a map of times, used here and by the samplers' grids
alike; the path is untouched.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, Registry, config
from dit.flow.alike import everywhere_alike
from dit.flow.path import NoisePath, check_time

Shift = Annotated[float, Field(gt=0)] | Literal["dimension"]
BASE_DIMENSION = 4096  # numbers in a latent for which the shift `dimension` is 1: 4 x 32 x 32


def shift_of(shift: Shift, dimension: int | None) -> float:
    """The shift as a number; `dimension` is √(m / 4096) for latents of m numbers (RAE, arXiv 2510.11690, §4.2).

    The same noise hides less of larger latents (SD3, arXiv 2403.03206, §5.3.2). ConfigError where m is not known.
    """
    if shift != "dimension":
        return shift
    if dimension is None:
        raise ConfigError("shift: dimension is of the latents' shape, which is not known here; give a number")
    return math.sqrt(dimension / BASE_DIMENSION)


def shift_time(t: Tensor, shift: Shift, dimension: int | None = None) -> Tensor:
    """t' = s·t / (1 + (s − 1)·t): more noise for s > 1 (Stable Diffusion 3, arXiv 2403.03206, eq. 23).

    dimension: numbers in a latent, for the shift of that name.
    """
    shift = shift_of(shift, dimension)
    return t if shift == 1.0 else shift * t / (1.0 + (shift - 1.0) * t)


class Times:
    """A distribution of training times. Subclasses are frozen `@config` classes with a field `shift`."""

    shift: Shift

    def quantile(self, u: Tensor, path: NoisePath) -> Tensor:
        """The inverse distribution function, before the shift: u in (0, 1), (B,) → t in [0, 1], (B,).

        path: for distributions of the noise level, whose time is the path's.
        """
        raise NotImplementedError

    def __call__(self, u: Tensor, path: NoisePath, dimension: int | None = None) -> Tensor:
        """t (B,) from uniform u (B,) in (0, 1), float32 or float64; a discrete path's t are its steps.

        A u gives the same t, to the bit, at every place in every batch (I1): so neither the micro-batch nor the
        number of ranks matters. The objective clamps t to the usable interval, which depends on the prediction too.
        dimension: numbers in a latent, for the shift of that name; ConfigError where it is wanted and None.
        """

        def time(u: Tensor) -> tuple[Tensor]:
            return (path.snap(shift_time(self.quantile(u, path), self.shift, dimension)),)

        (t,) = everywhere_alike(time, check_time(u))
        return t


TIMES: Registry[Times] = Registry("times")


@TIMES.register("uniform")
@config
class Uniform(Times):
    """t uniform in (0, 1), then shifted."""

    shift: Shift = (
        1.0  # of times; more than 1 = more often near noise; dimension = √(numbers in a latent / 4096)
    )

    def quantile(self, u: Tensor, path: NoisePath) -> Tensor:
        return u


@TIMES.register("logit_normal")
@config
class LogitNormal(Times):
    """logit t is normal (arXiv 2403.03206, eq. 19), then shifted. mean > 0 leans towards noise."""

    mean: float = 0.0  # of logit t; above 0 leans towards noise
    std: Annotated[float, Field(gt=0)] = 1.0  # standard deviation of logit t
    shift: Shift = (
        1.0  # of times; more than 1 = more often near noise; dimension = √(numbers in a latent / 4096)
    )

    def quantile(self, u: Tensor, path: NoisePath) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@TIMES.register("mode")
@config
class Mode(Times):
    """Uniform times pulled to the middle (arXiv 2403.03206, eq. 20), then shifted.

    t(u) = u + scale·(u − sin²(π u / 2)), which is the paper's formula at 1 − u, so that t rises with u. scale > 0
    has its mode at 1/2, 0 is uniform, < 0 favours the ends; within [−1, 2/(π − 2)] t rises everywhere.
    """

    # above 0 has its mode at 1/2, 0 = uniform, below 0 favours the ends
    scale: Annotated[float, Field(ge=-1, le=2 / (math.pi - 2))] = 1.29
    shift: Shift = (
        1.0  # of times; more than 1 = more often near noise; dimension = √(numbers in a latent / 4096)
    )

    def quantile(self, u: Tensor, path: NoisePath) -> Tensor:
        low = torch.minimum(u, 1.0 - u)  # t(1 − u) = 1 − t(u): near 1 the formula cancels in float32
        t = low + self.scale * (low - torch.sin(low * (math.pi / 2)).square())
        return torch.where(u < 0.5, t, 1.0 - t)


@TIMES.register("edm")
@config
class EDMTimes(Times):
    """sigma/alpha is log-normal, on any path (EDM, arXiv 2206.00364, table 1), then shifted.

    mean, std: of ln(sigma/alpha), for data of unit variance; EDM's −1.2 and 1.2 are for a std of 1/2. Levels
    beyond the path's are taken at its ends.
    """

    mean: float = -1.2  # of ln(sigma/alpha); EDM's -1.2 is for data of std 1/2
    std: Annotated[float, Field(gt=0)] = 1.2  # standard deviation of ln(sigma/alpha)
    shift: Shift = (
        1.0  # of times; more than 1 = more often near noise; dimension = √(numbers in a latent / 4096)
    )

    def quantile(self, u: Tensor, path: NoisePath) -> Tensor:
        return path.time_at(-2.0 * (self.mean + self.std * torch.special.ndtri(u)))
