"""Dormand and Prince's method with its own steps: as many as the asked accuracy needs, for each sample alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, config
from dit.flow.alike import everywhere_alike
from dit.flow.path import broadcast
from dit.sample.runge_kutta import Tableau, weighted
from dit.sample.solve import SOLVERS, At, Node, NoiseFn, Solver, nodes_at, time_dtype

# Dormand & Prince, J. Comput. Appl. Math. 6 (1980); Hairer, Nørsett & Wanner, "Solving ODEs I", table 5.2.
DORMAND_PRINCE = Tableau(
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
)
# what the step of fourth order would have given less: the estimate of the error
_FOURTH = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
ERROR = tuple(fifth - fourth for fifth, fourth in zip(DORMAND_PRINCE.weights, _FOURTH, strict=True))

_FIRST_STEP = 0.05  # of the way; a wrong guess costs a rejected step
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 5.0
# the PI controller of Hairer & Wanner, "Solving ODEs II", IV.2
_ERROR_POWER, _BEFORE_POWER = 0.7 / 5, 0.4 / 5


@dataclass(frozen=True)
class _State:
    """Where each sample is: the linear path's time s (B,) float64, x̃ (B, ...), its slope there, what is next.

    step: (B,) the length to try. error: (B,) that of the last step taken, 1 is the tolerance.
    """

    s: Tensor
    y: Tensor
    slope: Tensor
    step: Tensor
    error: Tensor


@SOLVERS.register("dopri5")
@config
class DormandPrince(Solver):
    """Fifth order with the error of each sample held below atol + rtol·|x̃|, in the mean square of its elements.

    Of the times given only the first and the last count. Every sample has its own steps, and the whole batch
    is evaluated until the last sample is there, each at its own time: so an image does not depend on its
    neighbours, and the evaluations are those of the slowest. The variable is that of `runge_kutta`, in which
    clean data and noise are both of their own scale. Each step waits for the device once.

    rtol, atol: of one step, in units of x̃, where data has a std of about 1. Below 1e-6 float32 is in the way.
    max_steps: tries, taken or not, before the ODE is given up with a ConfigError.
    """

    rtol: Annotated[float, Field(gt=0, lt=1)] = 1e-5  # error of a step, relative
    atol: Annotated[float, Field(gt=0)] = 1e-5  # error of a step, where data has a std of about 1
    max_steps: Annotated[int, Field(ge=1)] = 1000  # tries before it gives up
    order = 5
    evaluations = 6

    def nfe(self, num_steps: int, to_data: bool = False) -> None:
        """Not known beforehand: one call, and six for each step tried."""

    def visited(self, at: At, points: list[Node]) -> list[Node]:
        """To the end itself, on a discrete path to its first step: no grid bounds the error here."""
        end = torch.tensor([points[-1].t], dtype=torch.float64)
        return [points[0], *nodes_at(at.path, at.path.snap(end))]

    def run(self, at: At, x: Tensor, points: list[Node], noise: NoiseFn | None) -> Tensor:
        stop = points[-1].ratio
        s = torch.full((len(x),), points[0].ratio, dtype=torch.float64, device=x.device)
        y = x / points[0].scale
        state = _State(s, y, _slope(at, s, y), _FIRST_STEP * (s - stop), torch.ones_like(s))
        for _ in range(self.max_steps):
            if not bool((state.s > stop).any()):
                break
            state = self._try(at, state, stop)
        late = int((state.s > stop).sum())
        if late:
            raise ConfigError(
                f"{self}: {late} of {len(x)} samples were not done after {self.max_steps} steps, the last stands "
                f"at sigma/(alpha + sigma) = {float(state.s.max()):.3g}; raise rtol and atol (the network's own "
                "rounding may exceed them) or max_steps"
            )
        return points[-1].scale * state.y

    def _try(self, at: At, old: _State, stop: float) -> _State:
        """One step of every sample that is not there yet, taken where its error allows."""
        left = old.s - stop
        step = torch.minimum(old.step, left)
        length = -broadcast(step, old.y).to(old.y.dtype)
        slopes, y = [old.slope], old.y
        for time, shares in zip(DORMAND_PRINCE.times[1:], DORMAND_PRINCE.matrix[1:], strict=True):
            y = old.y + length * weighted(shares, slopes)
            slopes.append(
                _slope(at, torch.where(step < left, old.s - time * step, (1 - time) * left + stop), y)
            )
        error = self._error(old.y, y, length * weighted(ERROR, slopes))
        taken = (error <= 1) & (left > 0)
        (factor,) = everywhere_alike(_factor, error, old.error)
        s = torch.where(step < left, old.s - step, stop)
        here = broadcast(taken, y)
        return _State(
            torch.where(taken, s, old.s),
            torch.where(here, y, old.y),
            torch.where(here, slopes[-1], old.slope),
            step * factor,
            torch.where(taken, error.clamp(min=1e-4), old.error),
        )

    def _error(self, before: Tensor, after: Tensor, error: Tensor) -> Tensor:
        """(B,) float64: root mean square of error / tolerance; infinite where the network is not finite."""
        allowed = self.atol + self.rtol * torch.maximum(before.abs(), after.abs())
        mean = (error / allowed).double().square().flatten(1).mean(1)
        return torch.nan_to_num(mean.sqrt(), nan=torch.inf, posinf=torch.inf)


def _factor(error: Tensor, before: Tensor) -> tuple[Tensor]:
    """How much longer the next step may be, (B,): shorter after an error above 1, as `before` is at most 1."""
    factor = _SAFETY * error.clamp(min=1e-10) ** -_ERROR_POWER * before**_BEFORE_POWER
    return (factor.clamp(_SHRINK, _GROW),)


def _slope(at: At, s: Tensor, y: Tensor) -> Tensor:
    """dx̃/ds = eps − data at x̃ (B, ...), each sample at its own s (B,) float64."""

    def place(s: Tensor) -> tuple[Tensor, ...]:
        t = at.path.time_at(-2.0 * torch.logit(s))
        return t, *at.path.alpha_sigma(t)

    t, alpha, sigma = everywhere_alike(place, s)
    ends = at.denoise(broadcast(alpha + sigma, y).to(y.dtype) * y, t.to(time_dtype(y)), at.cond)
    return ends.eps - ends.data
