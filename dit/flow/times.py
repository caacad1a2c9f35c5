"""Which times are trained at: maps of a uniform number u in (0, 1) to t in [0, 1].

A new distribution is one `quantile`. A time shift is a map of times, used here and by the samplers' grids
alike; the path is untouched.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dit.config import Registry, config
from dit.flow.path import Path, check_time

Shift = Annotated[float, Field(gt=0)]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s·t / (1 + (s − 1)·t): more noise for s > 1 (Stable Diffusion 3, arXiv 2403.03206, eq. 23)."""
    return t if shift == 1.0 else shift * t / (1.0 + (shift - 1.0) * t)


class Times:
    """A distribution of training times. Subclasses are frozen `@config` classes with a field `shift`."""

    shift: float

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse distribution function, before the shift: u in (0, 1), (B,) → t in [0, 1], (B,)."""
        raise NotImplementedError

    def __call__(self, u: Tensor, path: Path) -> Tensor:
        """t (B,) from uniform u (B,) in (0, 1), float32 or float64; a discrete path's t are its steps.

        The objective clamps t to the usable interval, which depends on the prediction too.
        """
        return path.snap(shift_time(self.quantile(check_time(u)), self.shift))


TIMES: Registry[Times] = Registry("times")


@TIMES.register("uniform")
@config
class Uniform(Times):
    """t uniform in (0, 1), then shifted."""

    shift: Shift = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        return u


@TIMES.register("logit_normal")
@config
class LogitNormal(Times):
    """logit t is normal (arXiv 2403.03206, eq. 19), then shifted. mean > 0 leans towards noise."""

    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0
    shift: Shift = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
