"""How much each time counts: maps of (coefficients, row) to a factor on the prediction's own loss.

A weight is stated on the eps loss, the squared error seen in eps, or on the data loss, and converted to the
loss of whatever is predicted, which must not change it. The products are arranged so that they stay finite
where a factor is infinite and another 0. det = a·sigma − b·alpha.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dit.config import Registry, config
from dit.flow.path import Coeffs
from dit.flow.predict import DELTA, Row


def _det(coeffs: Coeffs, row: Row) -> Tensor:
    a, b = row
    return a * coeffs.sigma - b * coeffs.alpha


def eps_factor(coeffs: Coeffs, row: Row) -> Tensor:
    """(B,) (alpha / det)²: the eps loss is this times the prediction's own loss, x being given.

    A weight stated on the eps loss is returned as w·eps_factor(coeffs, row). The data loss is (sigma / det)².
    """
    return (coeffs.alpha / _det(coeffs, row)).square()


def snr_decay(coeffs: Coeffs, limit: float) -> Tensor:
    """(B,) −½ d log-SNR/dt = −d_alpha/alpha + d_sigma/sigma = ½ g²/sigma², from 0 to at most `limit`.

    g is the diffusion of the path's SDE (SiT, arXiv 2401.08740, appendix A). Infinite where alpha or sigma is 0.
    """
    decay = coeffs.d_sigma / coeffs.sigma - coeffs.d_alpha / coeffs.alpha
    return decay.clamp(0.0, limit)


class Weight:
    """A weight of the loss in time. Subclasses are frozen `@config` classes."""

    def __call__(self, coeffs: Coeffs, row: Row) -> Tensor:
        """(B,) factor on the mean squared error of the prediction that `row` describes, finite and >= 0."""
        raise NotImplementedError


WEIGHTS: Registry[Weight] = Registry("weight")


@WEIGHTS.register("uniform")
@config
class UniformWeight(Weight):
    """1: the plain mean squared error of whatever is predicted."""

    def __call__(self, coeffs: Coeffs, row: Row) -> Tensor:
        return torch.ones_like(coeffs.alpha)


@WEIGHTS.register("eps")
@config
class EpsWeight(Weight):
    """1 on the eps loss (DDPM's simple loss, arXiv 2006.11239, eq. 14), whatever is predicted.

    With the score predicted it is sigma², the loss that SiT calls unweighted.
    """

    def __call__(self, coeffs: Coeffs, row: Row) -> Tensor:
        return eps_factor(coeffs, row)


@WEIGHTS.register("velocity")
@config
class VelocityWeight(Weight):
    """The velocity loss, whatever is predicted (SiT, arXiv 2401.08740, section 3): (det_velocity / det)².

    Where the velocity is unusable, at the very data end of VP paths where it is infinite, it is held at 1/δ²
    times the loss of v.
    """

    def __call__(self, coeffs: Coeffs, row: Row) -> Tensor:
        size = coeffs.alpha.square() + coeffs.sigma.square()
        velocity = _det(coeffs, (coeffs.d_alpha, coeffs.d_sigma)) / size
        return velocity.square().clamp(max=DELTA**-2) / (_det(coeffs, row) / size).square()


@WEIGHTS.register("likelihood")
@config
class LikelihoodWeight(Weight):
    """½ g²/sigma² on the eps loss: with uniform times a bound on the likelihood (arXiv 2101.09258, eq. 7).

    max: the largest weight on the eps loss. Without it the ends count without bound.
    """

    max: Annotated[float, Field(gt=0)] = 1000.0  # largest weight on the eps loss

    def __call__(self, coeffs: Coeffs, row: Row) -> Tensor:
        return snr_decay(coeffs, self.max) * eps_factor(coeffs, row)


@WEIGHTS.register("min_snr")
@config
class MinSNR(Weight):
    """min(SNR, gamma) on the data loss, SNR = alpha²/sigma² (Hang et al., arXiv 2303.09556, eq. 7).

    That is min(1, gamma/SNR) on the eps loss.
    """

    gamma: Annotated[float, Field(gt=0)] = 5.0  # SNR above which the weight on the data loss grows no more

    def __call__(self, coeffs: Coeffs, row: Row) -> Tensor:
        least = torch.minimum(coeffs.alpha.square(), self.gamma * coeffs.sigma.square())
        return least / _det(coeffs, row).square()


@WEIGHTS.register("edm")
@config
class EDMWeight(Weight):
    """(s² + sigma_data²) / (s·sigma_data)² on the data loss, s = sigma/alpha (Karras et al., arXiv 2206.00364, tab. 1).

    With EDM's own F predicted it is 1.
    """

    sigma_data: Annotated[float, Field(gt=0)] = 1.0  # standard deviation of the latents

    def __call__(self, coeffs: Coeffs, row: Row) -> Tensor:
        size = coeffs.alpha.square() + (coeffs.sigma / self.sigma_data).square()
        return size / _det(coeffs, row).square()


@WEIGHTS.register("sigmoid")
@config
class SigmoidWeight(Weight):
    """sigmoid(bias − log-SNR)·½ g²/sigma² on the eps loss (Kingma & Gao, arXiv 2303.00848, eq. 8 and section 5).

    So with uniform times the weight per unit of log-SNR is the sigmoid, on any path. bias: the log-SNR at which
    it is one half; a larger one counts more of the nearly clean.
    """

    # log-SNR at which the weight is one half; more = the nearly clean count more
    bias: Annotated[float, Field(ge=-50, le=50)] = 0.0

    def __call__(self, coeffs: Coeffs, row: Row) -> Tensor:
        odds = math.exp(self.bias) * coeffs.sigma.square()
        share = odds / (coeffs.alpha.square() + odds)
        # 0·inf is avoided by a limit so high that the share is 0 before it is reached
        return share * snr_decay(coeffs, 1e12) * eps_factor(coeffs, row)
