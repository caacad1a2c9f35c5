"""Distributions of which the posterior given a noisy point is known exactly: Gaussian mixtures, points, boxes.

A training target is a·data + b·eps, and x = alpha·data + sigma·eps. What is left of the target's variance once x is
given is what no network can predict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dit.config import ConfigError
from dit.flow.path import Coeffs
from dit.flow.predict import Row


class Known(Protocol):
    """A distribution of points of `elements` numbers whose posterior is known."""

    @property
    def elements(self) -> int:
        """How many numbers a point has."""

    @property
    def size(self) -> int:
        """How many numbers a sample's posterior is made of: what memory follows."""

    def draw(self, u: Tensor) -> Tensor:
        """Draw points (n, D) from uniform numbers (n, 1 + D) in (0, 1), float64."""

    def target_variance(self, eps: Mixture, coeffs: Coeffs, row: Row, x: Tensor) -> Tensor:
        """Compute var(a·data + b·eps | x), (n,), a mean over elements. coeffs, row: (n,) each; x (n, D)."""


@dataclass(frozen=True)
class Mixture:
    """Gaussians N(means[k], stds[k]²·1) with the probabilities `shares`: means (K, D), stds and shares (K,), float64.

    A std of 0 is a point. Build one by `of`, `gaussian` or `points`.
    """

    means: Tensor
    stds: Tensor
    shares: Tensor

    @classmethod
    def of(cls, means: Tensor, std: float | Tensor = 0.0, shares: Tensor | None = None) -> Mixture:
        """Make a mixture of means (K, ...), one std or one a component (K,), and shares (K,) or equal ones.

        Raises ConfigError for shapes that do not fit, negative numbers, or none at all.
        """
        means = means.detach().double().flatten(1) if means.ndim > 1 else means.detach().double()[:, None]
        stds = torch.as_tensor(std, dtype=torch.float64).detach().expand(len(means)).clone()
        weights = torch.ones(len(means), dtype=torch.float64) if shares is None else shares.detach().double()
        if not means.numel() or weights.shape != stds.shape:
            raise ConfigError(
                f"a mixture takes means (K, ...) and one share for each, got {tuple(means.shape)} and "
                f"{tuple(weights.shape)}"
            )
        if not bool(torch.isfinite(means).all()) or not bool(((stds >= 0) & torch.isfinite(stds)).all()):
            raise ConfigError("a mixture takes finite means and finite stds of at least 0")
        if not bool(((weights >= 0) & torch.isfinite(weights)).all()) or not float(weights.sum()):
            raise ConfigError("the shares of a mixture are at least 0 and not all 0")
        return cls(means, stds, weights / weights.sum())

    @classmethod
    def gaussian(cls, elements: int, mean: float = 0.0, std: float = 1.0) -> Mixture:
        """Make one Gaussian of independent elements."""
        return cls.of(torch.full((1, elements), mean, dtype=torch.float64), std)

    @classmethod
    def points(cls, data: Tensor) -> Mixture:
        """Make the distribution of a finite data set (N, ...): each sample as likely as another."""
        return cls.of(data)

    @property
    def elements(self) -> int:
        """How many numbers a point has."""
        return self.means.shape[1]

    @property
    def size(self) -> int:
        """How many numbers a sample's posterior is made of."""
        return self.means.numel()

    def draw(self, u: Tensor) -> Tensor:
        """Draw points (n, D) from uniform numbers (n, 1 + D) in (0, 1)."""
        chosen = torch.searchsorted(self.shares.cumsum(0), u[:, :1].contiguous())[:, 0]
        chosen = chosen.clamp(max=len(self.means) - 1)  # sums of shares may end below 1 by rounding
        noise: Tensor = torch.special.ndtri(u[:, 1:])
        return self.means[chosen] + self.stds[chosen, None] * noise

    def target_variance(self, eps: Mixture, coeffs: Coeffs, row: Row, x: Tensor) -> Tensor:
        """Compute var(a·data + b·eps | x), (n,), a mean over elements.

        Every pair of components is jointly Gaussian: the target's variance in it is (a·sigma − b·alpha)²·s²·r² /
        (alpha²·s² + sigma²·r²), and the pairs' means, weighed by what x says of each, vary too.
        """
        data, noise = self._paired(eps)
        alpha, sigma, a, b = (v[:, None] for v in (coeffs.alpha, coeffs.sigma, *row))  # (n, 1)
        s2, r2 = data.stds.square(), noise.stds.square()  # (K,)
        spread = alpha.square() * s2 + sigma.square() * r2  # (n, K) variance of x in a component
        spread = spread.clamp(min=torch.finfo(torch.float64).tiny)
        # differences themselves: expanded squares cancel where sigma is small
        apart = x[:, None] - alpha[..., None] * data.means - sigma[..., None] * noise.means  # (n, K, D)
        logits = data.shares.log() - 0.5 * (self.elements * spread.log() + apart.square().sum(2) / spread)
        p = torch.softmax(logits, 1)[..., None]  # (n, K, 1)
        gain = (alpha * a * s2 + sigma * b * r2) / spread  # of the target on x
        target = a[..., None] * data.means + b[..., None] * noise.means + gain[..., None] * apart
        within = (a * sigma - b * alpha).square() * s2 * r2 / spread
        between = (target - (p * target).sum(1, keepdim=True)).square().mean(2)
        found: Tensor = (p[..., 0] * (within + between)).sum(1)
        return found

    def _paired(self, eps: Mixture) -> tuple[Mixture, Mixture]:
        """Both, of all pairs of their components."""
        mine, theirs = len(self.means), len(eps.means)
        shares = (self.shares[:, None] * eps.shares).flatten()
        data = Mixture(self.means.repeat_interleave(theirs, 0), self.stds.repeat_interleave(theirs), shares)
        return data, Mixture(eps.means.repeat(mine, 1), eps.stds.repeat(mine), shares)


@dataclass(frozen=True)
class Boxes:
    """Uniform in boxes of one size, each as likely: lower corners (K, D), side > 0; eps has to be standard normal."""

    corners: Tensor
    side: float

    @property
    def elements(self) -> int:
        """How many numbers a point has."""
        return self.corners.shape[1]

    @property
    def size(self) -> int:
        """How many numbers a sample's posterior is made of."""
        return self.corners.numel()

    def draw(self, u: Tensor) -> Tensor:
        """Draw points (n, D) from uniform numbers (n, 1 + D) in (0, 1)."""
        chosen = (u[:, 0] * len(self.corners)).long().clamp(max=len(self.corners) - 1)
        return self.corners[chosen] + self.side * u[:, 1:]

    def target_variance(self, eps: Mixture, coeffs: Coeffs, row: Row, x: Tensor) -> Tensor:
        """Compute var(a·data + b·eps | x), (n,), a mean over elements: in each box the data are a truncated normal.

        Raises ConfigError where eps is not standard normal.
        """
        if len(eps.means) != 1 or bool(eps.means.any()) or float(eps.stds[0]) != 1.0:
            raise ConfigError("data uniform in boxes have a known posterior with standard normal noise alone")
        alpha, sigma = (v[:, None, None] for v in (coeffs.alpha, coeffs.sigma))
        # data given x and no prior: N(x / alpha, (sigma / alpha)²), cut off at the box
        low = (alpha * self.corners - x[:, None]) / sigma  # (n, K, D)
        high = low + alpha * self.side / sigma
        log_mass, mean, variance = truncated_normal(low, high)
        p = torch.softmax(log_mass.sum(2), 1)[:, :, None]  # (n, K, 1)
        unit = sigma / alpha
        centre = unit * mean  # of the data, from x / alpha
        overall = (p * centre).sum(1, keepdim=True)
        spread = (p * (unit.square() * variance + (centre - overall).square())).sum(1).mean(1)
        a, b = row
        return ((a * coeffs.sigma - b * coeffs.alpha) / coeffs.sigma).square() * spread


def truncated_normal(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ln mass, mean and variance of a standard normal cut off at low < high, of any one shape, float64."""
    flip = low + high > 0  # the side of 0 on which the tail does not cancel
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    below, above = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    log_mass = above + torch.log(-torch.expm1(below - above))
    at_low, at_high = (
        # far out, where nothing is weighed, the exponents are differences of huge numbers: kept finite
        torch.exp((-0.5 * end.square() - 0.5 * math.log(2 * math.pi) - log_mass).clamp(max=60.0))
        for end in (low, high)
    )
    mean = at_low - at_high
    width = high - low
    variance = 1 + low * at_low - high * at_high - mean.square()
    narrow, middle = width < 3e-3, (low + high) / 2  # there the terms cancel; the density is all but flat
    flat = width.log() - 0.5 * middle.square() - 0.5 * math.log(2 * math.pi)
    log_mass = torch.where(narrow, flat, log_mass)
    mean = torch.where(narrow, middle - middle * width.square() / 12, mean)
    variance = torch.where(narrow, width.square() / 12, variance)
    inside = torch.minimum(torch.maximum(mean, low), high)
    return log_mass, torch.where(flip, -inside, inside), variance.clamp(min=0).minimum(width.square() / 4)
