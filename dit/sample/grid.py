"""Grids: the times a sampler visits, from noise down to the end of the usable interval."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.config import ConfigError, Registry, config
from dit.flow.path import Path
from dit.flow.predict import Prediction, Velocity, usable
from dit.flow.times import Shift, shift_time


def sampling_interval(path: Path, prediction: Prediction) -> tuple[float, float]:
    """[t_lo, t_hi]: where both the prediction and the path's velocity are usable.

    VP's velocity is infinite at t = 0, so t_lo is above 0 there even for a prediction that is fine at t = 0,
    and solvers end by returning data instead of evaluating the network near the singularity.
    """
    (lo, hi), (lo_path, hi_path) = usable(path, prediction), usable(path, Velocity())
    return max(lo, lo_path), min(hi, hi_path)


class Grid:
    """A way to space times. Subclasses are frozen `@config` classes that give `spacing`."""

    shift: float

    def spacing(self, num_steps: int, path: Path) -> Tensor:
        """(num_steps + 1,) float64 on the CPU, falling from 1 to 0, before shift and interval."""
        raise NotImplementedError

    def __call__(self, num_steps: int, path: Path, prediction: Prediction) -> Tensor:
        """(num_steps + 1,) float64 on the CPU, strictly falling from t_hi to t_lo of the sampling interval.

        On a discrete path all but the last are steps of that path. ConfigError when num_steps is below 1 or
        more than the path has.
        """
        if num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1, got {num_steps}")
        lo, hi = sampling_interval(path, prediction)
        times = lo + (hi - lo) * shift_time(self.spacing(num_steps, path), self.shift)
        times[0], times[-1] = hi, lo  # exactly: an end at 0 must be 0
        times[:-1] = path.snap(times[:-1])
        if not bool((times.diff() < 0).all()):
            raise ConfigError(
                f"{num_steps} steps on path {path} with shift {self.shift} visit a time twice; use fewer"
            )
        return times


GRIDS: Registry[Grid] = Registry("grid")


@GRIDS.register("uniform")
@config
class UniformGrid(Grid):
    """Even steps in t, then shifted like training times: shift > 1 spends more steps near noise."""

    shift: Shift = 1.0

    def spacing(self, num_steps: int, path: Path) -> Tensor:
        return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
