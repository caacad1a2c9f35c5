"""CFG-Zero*: classifier-free guidance that fits the null's velocity to the conditional's, and begins at rest."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dit.config import config
from dit.flow.path import Coeffs, broadcast
from dit.flow.predict import Cond, Endpoints, Velocity
from dit.sample.denoise import DenoiseFn
from dit.sample.guide import GUIDANCES, ClassifierFree, Context

_ROUNDING = 1e-6  # of times: a step of a grid at exactly 1 − zero_init is not zeroed, however it was rounded


@GUIDANCES.register("cfg_zero")
@config
class ClassifierFreeZero(ClassifierFree):
    """s·null + scale·(conditional − s·null) of the velocities dx/dt, for each sample s = ⟨conditional, null⟩ / |null|².

    CFG-Zero* (Fan et al., arXiv 2503.18886, eq. 10 and algorithm 1): s·null is the multiple of the null's velocity that
    is nearest to the conditional's, so what is extrapolated is at a right angle to it. s is of all channels. The
    velocity is the path's, whatever the network predicts.

    zero_init: while t > 1 − zero_init the velocity is 0, so that an ODE's x rests there. The paper counts the first 4%
        of steps; a guidance sees t alone, so it is a share of the times: of a uniform grid without shift the same
        steps, of any grid at least the first one, which is more than 4% of fewer than 25 steps. Samplers that add
        noise add it there too. At scale 1 it is all that is left. The null branch is not evaluated there; the
        conditional is, for its learned variance. Looking at t waits for the device.

    interval, channels, rescale: as of cfg.
    """

    # share of the times, from noise on, in which the velocity is 0; 0 = none
    zero_init: Annotated[float, Field(ge=0, lt=1)] = 0.04

    @property
    def is_neutral(self) -> bool:
        return self.scale == 1.0 and self.zero_init == 0.0

    @property
    def needs_label(self) -> bool:
        return self.scale != 1.0

    @property
    def jumps(self) -> bool:
        return self.zero_init > 0 or super().jumps

    def guide(self, denoise: DenoiseFn, context: Context | None) -> DenoiseFn:
        """The guided denoiser; unless the scale is 1 it refuses an empty `cond`."""
        path = self._path(context)
        moving = denoise if self.scale == 1.0 else super().guide(denoise, context)

        def guided(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            ends = moving(x, t, cond)
            rests, rest = broadcast(self._rests(t), x), at_rest(path.coeffs(t), x)
            return Endpoints(
                torch.where(rests, rest.data, ends.data),
                torch.where(rests, rest.eps, ends.eps),
                ends.log_variance,
            )

        return guided if self.zero_init else moving

    def _rests(self, t: Tensor) -> Tensor:
        """(B,) bool: which samples have no velocity yet."""
        return t > 1.0 - self.zero_init + _ROUNDING

    def _rows(self, t: Tensor) -> Tensor | slice:
        if not self.zero_init:
            return super()._rows(t)
        lo, hi = self.interval
        return ((t >= lo) & (t <= hi) & ~self._rests(t)).nonzero()[:, 0]

    @property
    def _needs_path(self) -> bool:
        return True

    def _mix(self, dropped: Endpoints, conditional: Endpoints, coeffs: Coeffs | None, x: Tensor) -> Endpoints:
        assert coeffs is not None  # `_needs_path`
        share = projection(conditional.velocity(coeffs), dropped.velocity(coeffs))
        return super()._mix(at_rest(coeffs, x).lerp(dropped, share), conditional, coeffs, x)


def at_rest(coeffs: Coeffs, x: Tensor) -> Endpoints:
    """The endpoints of x (B, C, ...) whose velocity is 0; data = eps = x on the linear path.

    Endpoints are affine in the velocity: on the line from these to others the velocity grows from 0 in proportion.
    """
    return Velocity().endpoints(coeffs, x, torch.zeros_like(x))


def projection(wanted: Tensor, along: Tensor) -> Tensor:
    """(B,) the s at which s·along is nearest to wanted, each (B, ...), for each sample; 0 where `along` is 0."""
    pairs = torch.stack(
        [wanted * along, along.square()]
    )  # two sums of B each: a lone one is cut among threads
    dot, square = pairs.flatten(2).sum(2)
    return torch.where(square > 0, dot / torch.where(square > 0, square, 1.0), 0.0)
