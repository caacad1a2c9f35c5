"""Paths from data to noise: x = alpha(t)·data + sigma(t)·eps, with t = 0 data and t = 1 noise.

A new path is a subclass that gives `alpha_sigma`; the time derivatives come from forward-mode differentiation
unless it also gives `coeffs` in closed form (the tests hold the two against each other).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dit.config import Registry, config


def broadcast(value: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, ..., 1) with as many axes as `like` (B, ...): the one place where times meet images.

    ValueError for any other shape: (C,) or (B, 1) against (B, C, H, W) would broadcast silently and wrongly.
    """
    if value.ndim != 1 or like.ndim < 1 or len(value) != len(like):
        raise ValueError(
            f"one number per sample expected: shape ({like.shape[0] if like.ndim else 'B'},) "
            f"for x of shape {tuple(like.shape)}, got {tuple(value.shape)}"
        )
    return value.reshape(-1, *[1] * (like.ndim - 1))


def check_time(t: Tensor) -> Tensor:
    """`t` itself, (B,) float32 or float64; ValueError otherwise. bfloat16 steps by 1/256 near 1."""
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"t must be float32 or float64, got {t.dtype}; never cast the time down")
    if t.ndim != 1:
        raise ValueError(f"t must have shape (B,), got {tuple(t.shape)}")
    return t


@dataclass(frozen=True)
class Coeffs:
    """Path coefficients and their time derivatives at some times, each (B,), in the dtype of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def mix(self, data: Tensor, eps: Tensor) -> Tensor:
        """x = alpha·data + sigma·eps; all (B, ...)."""
        return combine(self.alpha, data, self.sigma, eps)


def combine(a: Tensor, data: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    """a·data + b·eps with a, b (B,) and data, eps of one shape (B, ...); at least float32, as a and b are."""
    if data.shape != eps.shape:
        raise ValueError(f"data and eps must have one shape, got {tuple(data.shape)} and {tuple(eps.shape)}")
    return broadcast(a, data) * data + broadcast(b, eps) * eps


class Path:
    """One way from data (t = 0) to noise (t = 1). Subclasses are frozen `@config` classes, hashable."""

    num_steps: int | None = None  # discrete paths: the network is trained at t = (k + 1) / num_steps alone

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each of the shape and dtype of t in [0, 1]; differentiable by torch.func.jvp."""
        raise NotImplementedError

    def coeffs(self, t: Tensor) -> Coeffs:
        """Coefficients and derivatives at t (B,), float32 or float64. Derivatives may be inf at the ends."""
        check_time(t)
        if torch.is_inference_mode_enabled():  # where forward derivatives are silently 0 (torch 2.11)
            with torch.inference_mode(False):
                return Path.coeffs(self, t.clone())
        values, slopes = torch.func.jvp(self.alpha_sigma, (t,), (torch.ones_like(t),))  # type: ignore[misc]
        return Coeffs(*values, *slopes)

    def model_time(self, t: Tensor) -> Tensor:
        """What the network's embedder gets for t (B,), same dtype: 1000·t, the range of its sinusoids."""
        return 1000.0 * t

    def input_scale(self, t: Tensor) -> Tensor:
        """(B,) factor on x before the network (c_in of EDM, arXiv 2206.00364, eq. 7); else 1."""
        return torch.ones_like(t)

    def snap(self, t: Tensor) -> Tensor:
        """The time trained at that stands for t: t, or on a discrete path the step whose bin holds t."""
        return t

    def prior(self, eps: Tensor) -> Tensor:
        """Where sampling starts: sigma(1)·eps, the marginal at t = 1 without its trace of data. Any shape."""
        _, sigma = self.alpha_sigma(torch.ones(1, dtype=torch.float64))  # on the CPU: no device sync
        return float(sigma) * eps


PATHS: Registry[Path] = Registry("path")


@PATHS.register("linear")
@config
class Linear(Path):
    """Rectified flow: alpha = 1 − t, sigma = t (Liu et al., arXiv 2209.03003, eq. 1; time reversed)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t, t

    def coeffs(self, t: Tensor) -> Coeffs:
        alpha, sigma = self.alpha_sigma(check_time(t))
        return Coeffs(alpha, sigma, -torch.ones_like(t), torch.ones_like(t))


@PATHS.register("vp")
@config
class VP(Path):
    """Variance preserving SDE with beta(t) linear in t (Song et al., arXiv 2011.13456, eq. 33).

    log alpha = −½ ∫ beta = −¼ t² (beta_max − beta_min) − ½ t beta_min, per unit of t. d_sigma is infinite at
    t = 0, where sigma grows like sqrt(beta_min · t).
    """

    beta_min: Annotated[float, Field(gt=0)] = 0.1
    beta_max: Annotated[float, Field(gt=0)] = 20.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return from_log_alpha(-0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min)

    def coeffs(self, t: Tensor) -> Coeffs:
        alpha, sigma = self.alpha_sigma(check_time(t))
        slope = -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))
        return Coeffs(alpha, sigma, *vp_derivatives(alpha, sigma, slope))


def from_log_alpha(log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) with alpha² + sigma² = 1; in float32 sqrt(1 − alpha²) is 9% wrong at t = 1e-6."""
    return log_alpha.exp(), torch.sqrt(-torch.expm1(2.0 * log_alpha))


def vp_derivatives(alpha: Tensor, sigma: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """(d_alpha, d_sigma) where alpha² + sigma² = 1 and (log alpha)' = slope; d_sigma is inf at sigma = 0."""
    return alpha * slope, -alpha.square() * slope / sigma


# How far from a step, in steps, a float32 time may lie and still mean that step: (k + 1) / T as float32,
# times T, is off by up to T·6e-8. 8000 steps are the most for which this is safely below the slack.
_SLACK = 1e-3
_MAX_STEPS = 8000


@PATHS.register("ddpm")
@config
class DiscreteVP(Path):
    """DDPM: step k = 0 … T − 1 is t = (k + 1)/T, alpha² there the product of 1 − beta.

    arXiv 2006.11239, eq. 4. The betas rise linearly. Between steps log alpha is linear in t; at a step the
    derivative is that of the piece below it, which ends in t. t = 0 is clean data, one step below k = 0.
    """

    num_steps: Annotated[int, Field(ge=1, le=_MAX_STEPS)] = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02

    def betas(self) -> Tensor:
        """(T,) float64 on the CPU. Another discrete schedule is a subclass with other betas."""
        return torch.linspace(self.beta_start, self.beta_end, self.num_steps, dtype=torch.float64)

    def _piece(self, t: Tensor) -> Tensor:
        """Index 0 … T − 1 of the piece (k/T, (k + 1)/T] that holds t, of the dtype of t."""
        return torch.clamp(torch.ceil(t * self.num_steps - _SLACK) - 1.0, 0, self.num_steps - 1)

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log alpha, its slope per unit of t)."""
        piece = self._piece(t)
        start, drop = _log_alpha_table(self, t.device, t.dtype)
        index = piece.long()
        return start[index] + (t * self.num_steps - piece) * drop[index], drop[index] * self.num_steps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return from_log_alpha(self._log_alpha(t)[0])

    def coeffs(self, t: Tensor) -> Coeffs:
        log_alpha, slope = self._log_alpha(check_time(t))
        alpha, sigma = from_log_alpha(log_alpha)
        return Coeffs(alpha, sigma, *vp_derivatives(alpha, sigma, slope))

    def snap(self, t: Tensor) -> Tensor:
        """The step whose bin (k/T, (k + 1)/T] holds t: uniform t gives uniform k."""
        return (self._piece(t) + 1.0) / self.num_steps

    def model_time(self, t: Tensor) -> Tensor:
        """Exactly k at a step; between steps a fraction, as in DPM-Solver (arXiv 2206.00927, §3.4)."""
        k = t * self.num_steps - 1.0
        nearest = torch.round(k)
        return torch.where((k - nearest).abs() < _SLACK, nearest, k).clamp(min=0.0)

    def prior(self, eps: Tensor) -> Tensor:
        """N(0, I), as DDPM samples, though sigma(1) is a little less than 1."""
        return eps


@lru_cache(maxsize=64)
def _log_alpha_table(path: DiscreteVP, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(log alpha at the start of each piece, its drop over the piece), each (T,); summed in float64.

    Kept per device, so that a training step copies nothing to it.
    """
    with torch.inference_mode(False):
        drop = 0.5 * torch.log1p(-path.betas())
        start = torch.cumsum(drop, 0) - drop
        return start.to(device, dtype), drop.to(device, dtype)
