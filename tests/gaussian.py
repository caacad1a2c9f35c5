"""Gaussian data N(mean, std²), for which posterior means, the ODE's solution and the best loss are known exactly."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path as File

import numpy as np
import torch
from torch import Tensor

from dit.flow.path import PATHS, Path, broadcast
from dit.flow.predict import PREDICTIONS, Cond, Endpoints, Model, Prediction
from dit.sample.denoise import DenoiseFn

PAIRS = [(path(), prediction()) for (_, path), (_, prediction) in product(PATHS.items(), PREDICTIONS.items())]
PAIR_IDS = [f"{PATHS.name_of(path)}-{PREDICTIONS.name_of(prediction)}" for path, prediction in PAIRS]
ALL_PATHS = [path() for _, path in PATHS.items()]


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/golden/<name>.npz."""
    with np.load(File(__file__).parent / "golden" / f"{name}.npz") as file:
        return dict(file)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Gaussian:
    """Data whose elements are independent N(mean, std²)."""

    mean: float = 1.5
    std: float = 0.4

    def draw(self, *shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.mean + self.std * normal(*shape, seed=seed, dtype=dtype)

    def endpoints(self, path: Path, x: Tensor, t: Tensor) -> Endpoints:
        """E[data | x] and E[eps | x]: regression on x, whose variance is alpha²·std² + sigma²."""
        c = path.coeffs(t)
        alpha, sigma = broadcast(c.alpha, x), broadcast(c.sigma, x)
        whitened = (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        return Endpoints(self.mean + alpha * self.std**2 * whitened, sigma * whitened)

    def denoise(self, path: Path) -> DenoiseFn:
        return lambda x, t, cond: self.endpoints(path, x, t)

    def network(self, path: Path, prediction: Prediction) -> Model:
        """The best network: like a real one it sees the scaled x and the model time alone."""
        grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
        seen, order = path.model_time(grid).sort(stable=True)
        last = torch.cat(
            [seen.diff() > 0, torch.ones(1, dtype=torch.bool)]
        )  # k = 0 stands for t = 1/T and below
        known, times = seen[last].numpy(), grid[order][last].numpy()

        def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
            t = torch.from_numpy(np.interp(model_time.double().numpy(), known, times)).to(model_time.dtype)
            ends = self.endpoints(path, x / broadcast(path.input_scale(t), x), t)
            return prediction.target(path.coeffs(t), ends.data, ends.eps)

        return model

    def transport(self, path: Path, x: Tensor, start: float, stop: float) -> Tensor:
        """The probability-flow ODE from `start` to `stop`: it keeps (x − alpha·mean) / std of x."""
        alpha, sigma = path.alpha_sigma(torch.tensor([start, stop], dtype=torch.float64))
        spread = (alpha**2 * self.std**2 + sigma**2).sqrt()
        return alpha[1] * self.mean + (x - alpha[0] * self.mean) * spread[1] / spread[0]

    def best_loss(self, path: Path, prediction: Prediction, t: Tensor) -> Tensor:
        """(B,) what the best network's loss is: var(a·data + b·eps | x) = det²·std² / (alpha²·std² + sigma²)."""
        c = path.coeffs(t)
        a, b = prediction.row(c)
        det = a * c.sigma - b * c.alpha
        return det**2 * self.std**2 / (c.alpha**2 * self.std**2 + c.sigma**2)
