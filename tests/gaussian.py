"""Gaussian data and a mixture of two, for which posterior means and the ODE's solution are known exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit.flow.path import PATHS, NoisePath, broadcast
from dit.flow.predict import PREDICTIONS, Cond, Endpoints, Model, Prediction
from dit.sample.denoise import DenoiseFn

PAIRS = [(path(), prediction()) for (_, path), (_, prediction) in product(PATHS.items(), PREDICTIONS.items())]
PAIR_IDS = [f"{PATHS.name_of(path)}-{PREDICTIONS.name_of(prediction)}" for path, prediction in PAIRS]
ALL_PATHS = [path() for _, path in PATHS.items()]


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/golden/<name>.npz."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        return dict(file)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@lru_cache(maxsize=64)
def _times_seen(path: NoisePath) -> tuple[np.ndarray, np.ndarray]:
    """(model times, rising; the t that each stands for)."""
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    seen, order = path.model_time(grid).sort(stable=True)
    last = torch.cat([seen.diff() > 0, torch.ones(1, dtype=torch.bool)])  # k = 0 stands for t = 1/T and below
    return seen[last].numpy(), grid[order][last].numpy()


class Oracle:
    """Data of a known distribution. Subclasses say what is expected of (data, eps) given x."""

    def endpoints(self, path: NoisePath, x: Tensor, t: Tensor) -> Endpoints:
        """E[data | x] and E[eps | x]."""
        raise NotImplementedError

    def denoise(self, path: NoisePath) -> DenoiseFn:
        return lambda x, t, cond: self.endpoints(path, x, t)

    def network(self, path: NoisePath, prediction: Prediction) -> Model:
        """The best network: like a real one it sees the scaled x and the model time alone."""
        known, times = _times_seen(path)

        def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
            t = torch.from_numpy(np.interp(model_time.double().numpy(), known, times)).to(model_time.dtype)
            ends = self.endpoints(path, x / broadcast(path.input_scale(t), x), t)
            return prediction.target(path.coeffs(t), ends.data, ends.eps)

        return model


@dataclass(frozen=True)
class Gaussian(Oracle):
    """Data whose elements are independent N(mean, std²)."""

    mean: float = 1.5
    std: float = 0.4

    def draw(self, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.mean + self.std * normal(*shape, seed=seed, dtype=dtype)

    def endpoints(self, path: NoisePath, x: Tensor, t: Tensor) -> Endpoints:
        """E[data | x] and E[eps | x]: regression on x, whose variance is alpha²·std² + sigma²."""
        c = path.coeffs(t)
        alpha, sigma = broadcast(c.alpha, x), broadcast(c.sigma, x)
        whitened = (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        return Endpoints(self.mean + alpha * self.std**2 * whitened, sigma * whitened)

    def transport(self, path: NoisePath, x: Tensor, start: float, stop: float) -> Tensor:
        """The probability-flow ODE from `start` to `stop`: it keeps (x − alpha·mean) / std of x."""
        alpha, sigma = path.alpha_sigma(torch.tensor([start, stop], dtype=torch.float64))
        spread = (alpha**2 * self.std**2 + sigma**2).sqrt()
        return alpha[1] * self.mean + (x - alpha[0] * self.mean) * spread[1] / spread[0]

    def best_loss(self, path: NoisePath, prediction: Prediction, t: Tensor) -> Tensor:
        """(B,) what the best network's loss is: var(a·data + b·eps | x) = det²·std² / (alpha²·std² + sigma²)."""
        c = path.coeffs(t)
        a, b = prediction.row(c)
        det = a * c.sigma - b * c.alpha
        return det**2 * self.std**2 / (c.alpha**2 * self.std**2 + c.sigma**2)


@dataclass(frozen=True)
class Mixture(Oracle):
    """Data whose elements are independent, N(mean, std²) with probability `share`, else N(−mean, std²)."""

    mean: float = 0.9
    std: float = 0.3
    share: float = 0.7

    def draw(self, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        sign = torch.where(torch.special.ndtr(normal(*shape, seed=seed + 1)) < self.share, 1.0, -1.0)
        return (sign * self.mean + self.std * normal(*shape, seed=seed)).to(dtype)

    def endpoints(self, path: NoisePath, x: Tensor, t: Tensor) -> Endpoints:
        """Those of the two Gaussians, weighed by what x says of each: p = sigmoid(log odds)."""
        c = path.coeffs(t)
        alpha, sigma = broadcast(c.alpha, x), broadcast(c.sigma, x)
        variance = alpha**2 * self.std**2 + sigma**2
        p = torch.sigmoid(math.log(self.share / (1 - self.share)) + 2 * alpha * self.mean * x / variance)
        mean = (2 * p - 1) * self.mean
        whitened = (x - alpha * mean) / variance
        return Endpoints(mean + alpha * self.std**2 * whitened, sigma * whitened)

    def distribution(self, path: NoisePath, x: Tensor, t: float) -> Tensor:
        """P(an element of x_t is below x), of the shape of x."""
        alpha, sigma = (float(v) for v in path.alpha_sigma(torch.tensor([t], dtype=torch.float64)))
        spread = math.hypot(alpha * self.std, sigma)
        above, below = (torch.special.ndtr((x - alpha * m) / spread) for m in (self.mean, -self.mean))
        return self.share * above + (1 - self.share) * below

    def transport(self, path: NoisePath, x: Tensor, start: float, stop: float) -> Tensor:
        """The probability-flow ODE from `start` to `stop`: in one dimension it keeps the quantile."""
        wanted = self.distribution(path, x, start)
        low, high = torch.full_like(x, -1e4), torch.full_like(x, 1e4)
        for _ in range(100):
            middle = (low + high) / 2
            below = self.distribution(path, middle, stop) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2
