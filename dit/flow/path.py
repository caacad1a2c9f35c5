"""Paths from data to noise: x = alpha(t)·data + sigma(t)·eps, with t = 0 data and t = 1 noise.

A new path is a subclass that gives `alpha_sigma`; the time derivatives come from forward-mode differentiation
unless it also gives `coeffs` in closed form (the tests hold the two against each other), the inverse of log_snr
from bisection unless it gives `time_at`. Discrete paths are in `dit/flow/discrete.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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


class NoisePath:
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
                return NoisePath.coeffs(self, t.clone())
        values, slopes = torch.func.jvp(self.alpha_sigma, (t,), (torch.ones_like(t),))  # type: ignore[misc]
        return Coeffs(*values, *slopes)

    def log_snr(self, t: Tensor) -> Tensor:
        """ln(alpha² / sigma²) at t in [0, 1], of its shape and dtype; falls, inf in clean data, −inf in noise."""
        alpha, sigma = self.alpha_sigma(t)
        return 2.0 * (alpha.log() - sigma.log())

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`: t in [0, 1] of the shape, dtype and device of log_snr; waits for no device.

        A log-SNR beyond those of the path, ±inf included, gives the end nearest to it.
        """
        wanted = log_snr.double()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        clean = wanted >= self.log_snr(low)
        for _ in range(64):  # to 2^-64: exact to rounding but for t < 1e-4, where 5e-20 is left
            middle = 0.5 * (low + high)
            early = self.log_snr(middle) > wanted
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return torch.where(clean, 0.0, high).to(log_snr.dtype)

    def model_time(self, t: Tensor) -> Tensor:
        """What the network's embedder gets for t (B,), same dtype: 1000·t, the range of its sinusoids."""
        return 1000.0 * t

    def input_scale(self, t: Tensor) -> Tensor:
        """(B,) factor on x before the network (c_in of EDM, arXiv 2206.00364, eq. 7); else 1."""
        return torch.ones_like(t)

    def snap(self, t: Tensor) -> Tensor:
        """The time trained at that stands for t: t, or on a discrete path the step whose bin holds t."""
        return t

    def prior(self, eps: Tensor, t: float = 1.0) -> Tensor:
        """Where sampling starts, at t: sigma(t)·eps, the marginal without its trace of data. Any shape."""
        _, sigma = self.alpha_sigma(torch.tensor([t], dtype=torch.float64))  # on the CPU: no device sync
        return float(sigma) * eps


PATHS: Registry[NoisePath] = Registry("path")


@config
class ContinuousPath(NoisePath):
    """A path whose network sees the time as a straight function of t.

    model_time_data, model_time_noise: model_time at t = 0 and t = 1. The default 1000·t spans the embedder's
    sinusoids; (1, 0) is the time of SiT's weights, which runs from noise to data.
    """

    model_time_data: float = 0.0  # what the network is told for t = 0, data
    model_time_noise: float = 1000.0  # what the network is told for t = 1, noise

    def __post_init__(self) -> None:
        if not math.isfinite(self.model_time_data) or not math.isfinite(self.model_time_noise):
            raise ValueError(
                f"model_time_data and model_time_noise must be finite, got {self.model_time_data} and "
                f"{self.model_time_noise}; choose two numbers such as 0 and 1000"
            )
        if self.model_time_data == self.model_time_noise:
            raise ValueError(
                f"model_time_data and model_time_noise are both {self.model_time_data}: the network would not "
                "see the time; choose two numbers such as 0 and 1000"
            )

    def model_time(self, t: Tensor) -> Tensor:
        """model_time_data + (model_time_noise − model_time_data)·t; (B,), same dtype."""
        return self.model_time_data + (self.model_time_noise - self.model_time_data) * t


@PATHS.register("linear")
@config
class Linear(ContinuousPath):
    """Rectified flow: alpha = 1 − t, sigma = t (Liu et al., arXiv 2209.03003, eq. 1; time reversed)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t, t

    def coeffs(self, t: Tensor) -> Coeffs:
        alpha, sigma = self.alpha_sigma(check_time(t))
        return Coeffs(alpha, sigma, torch.full_like(t, -1.0), torch.ones_like(t))

    def log_snr(self, t: Tensor) -> Tensor:
        return 2.0 * (torch.log1p(-t) - t.log())

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)


@PATHS.register("cosine")
@config
class Cosine(ContinuousPath):
    """alpha = cos(πt/2), sigma = sin(πt/2): the generalised variance preserving path of SiT (arXiv 2401.08740, §2).

    A continuous path; `iddpm` is the discrete one with cosine betas.
    """

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        quarter = 0.5 * math.pi
        return torch.sin(quarter * (1.0 - t)), torch.sin(quarter * t)  # cos would not be 0 at t = 1

    def coeffs(self, t: Tensor) -> Coeffs:
        alpha, sigma = self.alpha_sigma(check_time(t))
        return Coeffs(alpha, sigma, -0.5 * math.pi * sigma, 0.5 * math.pi * alpha)

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-0.5 * log_snr)) / (0.5 * math.pi)


@PATHS.register("vp")
@config
class VP(ContinuousPath):
    """Variance preserving SDE with beta(t) linear in t (Song et al., arXiv 2011.13456, eq. 33).

    log alpha = −½ ∫ beta = −¼ t² (beta_max − beta_min) − ½ t beta_min, per unit of t. d_sigma is infinite at
    t = 0, where sigma grows like sqrt(beta_min · t).
    """

    beta_min: Annotated[float, Field(gt=0)] = 0.1  # noise rate at t = 0, per unit of t
    beta_max: Annotated[float, Field(gt=0)] = 20.0  # noise rate at t = 1, per unit of t

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return from_log_alpha(self._log_alpha(t))

    def coeffs(self, t: Tensor) -> Coeffs:
        alpha, sigma = self.alpha_sigma(check_time(t))
        slope = -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))
        return Coeffs(alpha, sigma, *vp_derivatives(alpha, sigma, slope))

    def log_snr(self, t: Tensor) -> Tensor:
        return log_snr_of(self._log_alpha(t))

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The root of ½ t² (beta_max − beta_min) + t beta_min = ∫ beta (arXiv 2206.00927, appendix D.4)."""
        rise, whole = self.beta_max - self.beta_min, 0.5 * (self.beta_min + self.beta_max)
        integral = 2.0 * log_alpha_at(log_snr).abs()
        inside = integral.clamp(max=whole)
        root = torch.sqrt((self.beta_min**2 + 2.0 * rise * inside).clamp(min=0.0))
        return torch.where(integral >= whole, 1.0, (2.0 * inside / (self.beta_min + root)).clamp(max=1.0))


@PATHS.register("ve")
@config
class VE(NoisePath):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (arXiv 2011.13456, eq. 30).

    The network gets x / sqrt(sigma² + sigma_data²) and ln(sigma) / 4 (EDM, arXiv 2206.00364, table 1).
    sigma(0) is sigma_min, not 0: grids end there, and the last step returns data. sigma_data: the standard
    deviation of the latents.
    """

    sigma_min: Annotated[float, Field(gt=0)] = 0.002  # noise level at t = 0, in units of the data
    sigma_max: Annotated[float, Field(gt=0)] = 80.0  # noise level at t = 1, in units of the data
    sigma_data: Annotated[float, Field(gt=0)] = 1.0  # standard deviation of the latents

    def __post_init__(self) -> None:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"sigma_min = {self.sigma_min} must be below sigma_max = {self.sigma_max}: noise grows with t"
            )

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * torch.exp(self._log_ratio * t)

    def coeffs(self, t: Tensor) -> Coeffs:
        alpha, sigma = self.alpha_sigma(check_time(t))
        return Coeffs(alpha, sigma, torch.zeros_like(t), self._log_ratio * sigma)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2.0 * (math.log(self.sigma_min) + self._log_ratio * t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        return ((-0.5 * log_snr - math.log(self.sigma_min)) / self._log_ratio).clamp(0.0, 1.0)

    def model_time(self, t: Tensor) -> Tensor:
        """ln(sigma) / 4, as c_noise of EDM."""
        return -0.125 * self.log_snr(t)

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in of EDM, 1 / sqrt(sigma² + sigma_data²)."""
        _, sigma = self.alpha_sigma(t)
        return torch.rsqrt(sigma.square() + self.sigma_data**2)


# --- where alpha² + sigma² = 1 ----------------------------------------------------------------------------


def from_log_alpha(log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) with alpha² + sigma² = 1; in float32 sqrt(1 − alpha²) is 9% wrong at t = 1e-6."""
    return log_alpha.exp(), torch.sqrt(-torch.expm1(2.0 * log_alpha))


def vp_derivatives(alpha: Tensor, sigma: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """(d_alpha, d_sigma) where alpha² + sigma² = 1 and (log alpha)' = slope; d_sigma is inf at sigma = 0."""
    return alpha * slope, -alpha.square() * slope / sigma


def log_snr_of(log_alpha: Tensor) -> Tensor:
    """ln(alpha² / sigma²) where alpha² + sigma² = 1; where alpha itself underflows too."""
    return 2.0 * log_alpha - torch.log(-torch.expm1(2.0 * log_alpha))


def log_alpha_at(log_snr: Tensor) -> Tensor:
    """The inverse of `log_snr_of`: alpha² = sigmoid(log_snr)."""
    return 0.5 * torch.nn.functional.logsigmoid(log_snr)
