"""Steps down a path as Gaussians: the posterior of a step, learned variances, and the terms of the bound.

q(x_s | x_t, data) is Gaussian for any two times s < t of any path. A model's step p(x_s | x_t) takes the same
mean with the `data` it predicts, and a variance between that of the posterior (small) and that of the step
(large). The bound sums what the one costs against the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, config
from dit.flow.auxiliary import AUXILIARIES, Auxiliary, Context
from dit.flow.path import NoisePath, broadcast
from dit.flow.predict import Endpoints

Number = float | Tensor  # a number, or one per sample, (B,)


@dataclass(frozen=True)
class Posterior:
    """q(x_s | x_t, data) = N(on_x·x_t + on_data·data, variance); numbers, or (B,) each.

    step_variance: of q(x_t | x_s); on a DDPM step it is beta, and `variance` is DDPM's beta-tilde.
    """

    on_x: Number
    on_data: Number
    variance: Number
    step_variance: Number

    def mean(self, x: Tensor, data: Tensor) -> Tensor:
        """(B, ...) the posterior's mean, x and data of that shape."""
        return _fit(self.on_x, x) * x + _fit(self.on_data, data) * data


def posterior(now: tuple[Number, Number], before: tuple[Number, Number]) -> Posterior:
    """The posterior of a step down, from (alpha, sigma) at time t (`now`) and at s < t (`before`).

    Numbers or (B,); before = (1, 0) is clean data, where the variance is 0. Two near times cancel: give
    float64. arXiv 2006.11239, eq. 6 and 7 at neighbouring steps; for any two times of any path, Kingma et
    al., arXiv 2107.00630, eq. 27 to 29.
    """
    (alpha, sigma), (alpha_before, sigma_before) = now, before
    ratio = alpha / alpha_before
    step = (sigma - ratio * sigma_before) * (sigma + ratio * sigma_before)
    share = step / (sigma * sigma)
    left = sigma_before * sigma_before
    return Posterior(ratio * left / (sigma * sigma), alpha_before * share, left * share, step)


def range_log_variance(channels: Tensor, log_small: Number, log_large: Number) -> Tensor:
    """The network's extra channels, −1 (log_small) to 1 (log_large), as a log variance of their shape (B, ...).

    Interpolated in the logarithm, and beyond the range where the channels are (arXiv 2102.09672, eq. 15).
    """
    share = (channels + 1.0) / 2.0
    return share * _fit(log_large, channels) + (1.0 - share) * _fit(log_small, channels)


def _fit(value: Number, like: Tensor) -> Number:
    """A number as it is; (B,) as (B, 1, ..., 1) in the dtype of `like` (B, ...), whose own shape stays too."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(like.dtype)
    return value if value.shape == like.shape else broadcast(value, like)


def small(channels: Tensor | None, log_small: Number, log_large: Number) -> Number:
    """The posterior's log variance: right where the data are one point (arXiv 2006.11239, section 3.2)."""
    return log_small


def large(channels: Tensor | None, log_small: Number, log_large: Number) -> Number:
    """The step's log variance: right where the data are standard normal (arXiv 2006.11239, section 3.2)."""
    return log_large


def learned(channels: Tensor | None, log_small: Number, log_large: Number) -> Number:
    """Between the two, as the network says. ConfigError for a network without variance channels."""
    if channels is None:
        raise ConfigError(
            "a learned variance needs a network of twice the channels (model.learn_sigma), and this one "
            "gives none; choose small or large"
        )
    return range_log_variance(channels, log_small, log_large)


LogVariance = Callable[[Tensor | None, Number, Number], Number]
VARIANCES: Mapping[str, LogVariance] = {"small": small, "large": large, "learned": learned}


# --- what a step costs, in nats per element ----------------------------------------------------------------


def gaussian_kl(gap: Tensor, log_variance: Number, other: Number) -> Tensor:
    """KL(N(m, exp(log_variance)) ‖ N(m + gap, exp(other))), elementwise, of the shape of gap (B, ...)."""
    ours, theirs = _fit(log_variance, gap), _fit(other, gap)
    excess = torch.as_tensor(ours - theirs, dtype=gap.dtype, device=gap.device)
    return 0.5 * (torch.expm1(excess) - excess + gap.square() * _exp(-theirs))


def density(data: Tensor, mean: Tensor, log_variance: Number) -> Tensor:
    """log N(data; mean, exp(log_variance)), elementwise: data that are real numbers, such as latents."""
    spread = _fit(log_variance, data)
    return -0.5 * (math.log(2.0 * math.pi) + spread + (data - mean).square() * _exp(-spread))


def discretised(data: Tensor, mean: Tensor, log_variance: Number) -> Tensor:
    """Log probability, elementwise, of the bin around data among 256 in [−1, 1] (arXiv 2006.11239, eq. 13).

    The outer bins reach to infinity. The normal distribution function is the approximation by tanh that DDPM
    and its successors compute with; bins of it add up to 1 all the same.
    """
    scale, half = _exp(-0.5 * _fit(log_variance, data)), 1.0 / 255.0
    above, below = (data - mean + half) * scale, (data - mean - half) * scale
    inner = _normal_cdf(above) - _normal_cdf(below)
    mass = torch.where(data > 0.999, _normal_cdf(-below), inner)
    return torch.where(data < -0.999, _normal_cdf(above), mass).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return torch.sigmoid(math.sqrt(8.0 / math.pi) * (x + 0.044715 * x**3))


def _exp(value: Number) -> Number:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def _log(value: Number) -> Number:
    return value.log() if isinstance(value, Tensor) else math.log(value)


Decoder = Callable[[Tensor, Tensor, Number], Tensor]
DECODERS: Mapping[str, Decoder] = {"density": density, "discretised": discretised}


# --- the auxiliary term that trains a learned variance ------------------------------------------------------


@AUXILIARIES.register("learned_range")
@config
class LearnedRange(Auxiliary):
    """Trains the variance channels by the variational bound's term at t, the mean held (arXiv 2102.09672, eq. 16).

    Bits per dimension: the KL of the step, at k = 0 the discretised decoder. No gradient reaches the mean.
    weight: of the term of one step; at T = 1000 steps 1.0 is the paper's lambda = 0.001 on the whole bound.
    """

    # of the term of one step; 1.0 at 1000 steps is the paper's lambda = 0.001
    weight: Annotated[float, Field(gt=0)] = 1.0
    uses_variance: ClassVar[bool] = True
    metric: ClassVar[str] = "variational_bound"

    def check(self, path: NoisePath) -> None:
        if path.num_steps is None or path.num_steps < 2:
            raise ConfigError(
                f"learned_range needs a path of at least 2 discrete steps, such as ddpm, not {path}"
            )

    def term(self, context: Context) -> Tensor:
        return self(context.path, context.t, context.x, context.data, context.ends)

    def __call__(self, path: NoisePath, t: Tensor, x: Tensor, data: Tensor, ends: Endpoints) -> Tensor:
        """(B,) at t (B,) and x (B, C, ...), data being what x was made of and ends what the network sees.

        Raises ConfigError for a path without steps, or a network without variance channels.
        """
        self.check(path)
        steps = path.num_steps or 0
        k = torch.round(path.snap(t.double()) * steps) - 1.0  # (B,) 0 … T − 1
        step, second = _step(path, k, steps), _step(path, k.clamp(min=1.0), steps)
        log_small, log_large = _log(second.variance), _log(step.step_variance)  # variance 0 at k = 0
        log_variance = learned(ends.log_variance, log_small, log_large)
        seen = ends.data.detach()
        gap = _fit(step.on_data, data) * (seen - data)
        kl = gaussian_kl(gap, log_small, log_variance)
        decoder = -discretised(data, step.mean(x, seen), log_variance)
        bits = torch.where(broadcast(k == 0, kl), decoder, kl).flatten(1).mean(1) / math.log(2.0)
        return self.weight * bits


def _step(path: NoisePath, k: Tensor, num_steps: int) -> Posterior:
    """The posterior of step k (B,) float64 of a discrete path; k = 0 leads to clean data."""
    return posterior(path.alpha_sigma((k + 1.0) / num_steps), path.alpha_sigma(k / num_steps))
