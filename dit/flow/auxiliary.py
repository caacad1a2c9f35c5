"""Auxiliary terms of the objective: losses that are added to the main one. Here the axis, and terms of the prediction.

The term that trains a learned variance is in `dit/flow/variance.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from dit.config import Registry, config
from dit.flow.path import Coeffs, NoisePath
from dit.flow.predict import Cond, Endpoints, Prediction
from dit.rng import Draws


@dataclass(frozen=True)
class Context:
    """What a term may be made of: one call of the network, and what it was called with.

    t: (B,). coeffs: of the path at t. data, eps, x: (B, C, ...), x = alpha·data + sigma·eps. output: (B, C or 2C, ...)
    what the network said, in the dtype of data, float32 at least. ends: where it sees data and eps, and its variance
    channels if it has them. draws: of the micro-batch, for a term's own numbers.
    """

    path: NoisePath
    prediction: Prediction
    t: Tensor
    coeffs: Coeffs
    data: Tensor
    eps: Tensor
    x: Tensor
    output: Tensor
    ends: Endpoints
    cond: Cond
    draws: Draws


class Auxiliary:
    """A term beside the main loss. Subclasses are frozen `@config` classes."""

    uses_variance: ClassVar[bool] = False  # needs a network of twice the channels
    metric: ClassVar[str]  # name of its mean in the log, its weight in it

    def check(self, path: NoisePath) -> None:
        """Raise ConfigError for a path on which the term is not defined; on most it is."""

    def term(self, context: Context) -> Tensor:
        """(B,) what is added to each sample's loss, in float32 at least. Waits for no device."""
        raise NotImplementedError


AUXILIARIES: Registry[Auxiliary] = Registry("auxiliary term")

# beyond it a velocity's coefficients are held, where the velocity is infinite: its direction is the same
FASTEST = 1e12
SMOOTHING = 1e-6  # of the squared norm, so that the gradient is finite where the network says 0


@AUXILIARIES.register("direction")
@config
class Direction(Auxiliary):
    """1 − cosine, over the channels, of the predicted and the true velocity (LightningDiT, arXiv 2501.01423, §4.2).

    The mean over positions, from 0 to 2, of the velocities that follow from whatever is predicted. The predicted
    one's norm is smoothed, sqrt(|v|² + 1e-6): a new network says 0, which has no direction, and its term is 1.
    weight: of the term; 1.0 is the paper's.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0  # of the term; 1.0 is the paper's
    metric: ClassVar[str] = "direction"

    def term(self, context: Context) -> Tensor:
        rates = (context.coeffs.d_alpha, context.coeffs.d_sigma)
        d_alpha, d_sigma = (rate.clamp(-FASTEST, FASTEST) for rate in rates)
        coeffs = replace(context.coeffs, d_alpha=d_alpha, d_sigma=d_sigma)
        true = Endpoints(context.data, context.eps).velocity(coeffs)
        said = context.ends.velocity(coeffs)
        norm = true.square().sum(1).sqrt().clamp(min=SMOOTHING**0.5)
        smooth = (said.square().sum(1) + SMOOTHING).sqrt()
        cosine = (true * said).sum(1) / (norm * smooth)
        return self.weight * (1.0 - cosine.reshape(len(cosine), -1).mean(1))
