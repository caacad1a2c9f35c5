"""Discrete paths (DDPM): a network trained at T steps alone, alpha² at a step the product of 1 − beta.

A new schedule is a subclass that gives `betas`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dit.config import config
from dit.flow.path import (
    PATHS,
    Coeffs,
    NoisePath,
    check_time,
    from_log_alpha,
    log_alpha_at,
    log_snr_of,
)

# How far from a step, in steps, a float32 time may lie and still mean that step: (k + 1) / T as float32,
# times T, is off by up to T·6e-8. 8000 steps are the most for which this is safely below the slack.
_SLACK = 1e-3
_MAX_STEPS = 8000


@config
class DiscretePath(NoisePath):
    """Step k = 0 … T − 1 is t = (k + 1)/T, alpha² there the product of 1 − beta (arXiv 2006.11239, eq. 4).

    Between steps log alpha is linear in t; at a step the derivative is that of the piece below it, which ends
    in t. t = 0 is clean data, one step below k = 0.

    zero_terminal_snr: shift and stretch alpha over the steps so that the last is pure noise, alpha(1) = 0
    exactly (arXiv 2305.08891, alg. 1); alpha, not its logarithm, is then linear in the last piece. Prediction
    eps or score is refused with it, since pure noise tells nothing of the data.
    """

    num_steps: Annotated[int, Field(ge=1, le=_MAX_STEPS)] = 1000  # noise levels T from data to noise
    zero_terminal_snr: bool = False  # make the last level pure noise

    def __post_init__(self) -> None:
        if self.zero_terminal_snr and self.num_steps < 2:
            raise ValueError(
                "zero_terminal_snr needs num_steps of at least 2, got 1: its only step would be noise"
            )

    def betas(self) -> Tensor:
        """(T,) float64 on the CPU, in (0, 1), before the change for zero terminal SNR."""
        raise NotImplementedError

    def _piece(self, t: Tensor) -> Tensor:
        """Index 0 … T − 1 of the piece (k/T, (k + 1)/T] that holds t, of the dtype of t."""
        return torch.clamp(torch.ceil(t * self.num_steps - _SLACK) - 1.0, 0, self.num_steps - 1)

    def _place(self, t: Tensor) -> Tensor:
        """t in steps, T·t; t within rounding of a step is that step: (k + 1)/T as a float is a little off."""
        place = t * self.num_steps
        off = place.round() - place
        close = off.abs() <= torch.finfo(t.dtype).eps * place
        return place + torch.where(close, off, 0.0).detach()

    def _log_alpha(self, t: Tensor) -> Tensor:
        """log alpha, but for the last piece of zero terminal SNR."""
        piece, place = self._piece(t), self._place(t)
        start, drop = _log_alpha_table(self, t.device, t.dtype)
        index = piece.long()
        # Within the slack above a step the value is that of the next piece, though the slope is of this one:
        # log alpha stays continuous.
        above = (place - piece - 1.0).clamp(min=0.0).detach()
        kink = drop[(index + 1).clamp(max=self.num_steps - 1)] - drop[index]
        return start[index] + (place - piece) * drop[index] + above * kink

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = from_log_alpha(self._log_alpha(t))
        if not self.zero_terminal_snr:
            return alpha, sigma
        before = _log_alpha_table(self, t.device, t.dtype)[0][-1]
        left = ((1.0 - t) * self.num_steps).clamp(max=1.0)
        last, end = self._in_last_piece(t), before.exp() * left
        lost = before.exp() * (1.0 - left) - torch.expm1(before)  # 1 − end
        return torch.where(last, end, alpha), torch.where(last, torch.sqrt(lost * (1.0 + end)), sigma)

    def _in_last_piece(self, t: Tensor) -> Tensor:
        return self._place(t) > self.num_steps - 1.0

    def coeffs(self, t: Tensor) -> Coeffs:
        alpha, sigma = self.alpha_sigma(check_time(t))
        start, drop = _log_alpha_table(self, t.device, t.dtype)
        piece = self._piece(t)
        d_alpha = alpha * drop[piece.long()] * self.num_steps
        if self.zero_terminal_snr:
            d_alpha = torch.where(piece == self.num_steps - 1.0, -self.num_steps * start[-1].exp(), d_alpha)
        return Coeffs(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def log_snr(self, t: Tensor) -> Tensor:
        value = log_snr_of(self._log_alpha(t))
        if not self.zero_terminal_snr:
            return value
        alpha, sigma = self.alpha_sigma(t)
        return torch.where(self._in_last_piece(t), 2.0 * (alpha.log() - sigma.log()), value)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Looked up in the table of steps in float64; between steps like log alpha."""
        start, drop = _log_alpha_table(self, log_snr.device, torch.float64)
        log_alpha = log_alpha_at(log_snr.double())
        piece = (torch.searchsorted(-start, -log_alpha.contiguous()) - 1).clamp(0, self.num_steps - 1)
        share = (log_alpha - start[piece]) / drop[piece]
        if self.zero_terminal_snr:
            share = torch.where(piece == self.num_steps - 1, 1.0 - torch.exp(log_alpha - start[-1]), share)
        return ((piece + share.clamp(0.0, 1.0)) / self.num_steps).to(log_snr.dtype)

    def snap(self, t: Tensor) -> Tensor:
        """The step whose bin (k/T, (k + 1)/T] holds t: uniform t gives uniform k."""
        return (self._piece(t) + 1.0) / self.num_steps

    def model_time(self, t: Tensor) -> Tensor:
        """Exactly k at a step; between steps a fraction, as in DPM-Solver (arXiv 2206.00927, §3.4)."""
        k = t * self.num_steps - 1.0
        nearest = torch.round(k)
        return torch.where((k - nearest).abs() < _SLACK, nearest, k).clamp(min=0.0)

    def prior(self, eps: Tensor, t: float = 1.0) -> Tensor:
        """N(0, I), as DDPM samples, though sigma(1) is a little less than 1."""
        return eps


@PATHS.register("ddpm")
@config
class DiscreteVP(DiscretePath):
    """DDPM: betas rise linearly from beta_start to beta_end (arXiv 2006.11239, §4)."""

    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4  # variance added by the first step
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02  # variance added by the last step

    def betas(self) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, self.num_steps, dtype=torch.float64)


@PATHS.register("iddpm")
@config
class CosineDDPM(DiscretePath):
    """Improved DDPM: alpha²(t) = f(t)/f(0), f = cos²(π/2 · (t + s)/(1 + s)) (arXiv 2102.09672, eq. 17).

    offset: s, which keeps the first betas from vanishing. max_beta: the cap on beta near t = 1.
    """

    offset: Annotated[float, Field(gt=0)] = 0.008  # s, which keeps the first betas from vanishing
    max_beta: Annotated[float, Field(gt=0, lt=1)] = 0.999  # cap on beta near t = 1

    def betas(self) -> Tensor:
        t = torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps
        kept = torch.cos((t + self.offset) / (1.0 + self.offset) * (0.5 * math.pi)).square()
        return (1.0 - kept[1:] / kept[:-1]).clamp(max=self.max_beta)


@lru_cache(maxsize=64)
def _log_alpha_table(path: DiscretePath, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(log alpha at the start of each piece, its drop over the piece), each (T,); summed in float64.

    With zero terminal SNR the last drop, an infinite one, stands as −1, the slope with which that piece begins.
    Kept per device, so that a training step copies nothing to it.
    """
    with torch.inference_mode(False):
        drop = 0.5 * torch.log1p(-path.betas())
        if path.zero_terminal_snr:
            drop = _without_signal_at_the_end(drop)
        start = torch.cumsum(drop, 0) - drop
        return start.to(device, dtype), drop.to(device, dtype)


def _without_signal_at_the_end(drop: Tensor) -> Tensor:
    """(T,) drops of log alpha when alpha is shifted to end in 0 and stretched to begin where it did."""
    alpha = torch.cumsum(drop, 0).exp()
    falls = (alpha[:-1] - alpha[-1]).log().diff()  # a stretch is the same for all, so the first drop sets it
    return torch.cat([drop[:1], falls, drop.new_tensor([-1.0])])
