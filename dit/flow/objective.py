"""The training objective: path + prediction + times + weight + coupling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from dit.config import ConfigError, config
from dit.flow.couple import COUPLINGS, Coupling, Independent, Metrics
from dit.flow.path import PATHS, Linear, Path
from dit.flow.predict import (
    PREDICTIONS,
    Cond,
    Model,
    Prediction,
    Velocity,
    call_network,
    check_times,
    split_channels,
    usable,
)
from dit.flow.times import TIMES, Times, Uniform
from dit.flow.weight import WEIGHTS, UniformWeight, Weight
from dit.rng import Draws, Purpose


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch, in float32 at least.

    mean: scalar to differentiate. per_sample: (B,), weighted, its mean is `mean`.
    t: (B,), None for a loss without times (stage 1). metrics: scalars to log.
    """

    mean: Tensor
    per_sample: Tensor
    t: Tensor | None
    metrics: Metrics


@dataclass(frozen=True)
class FirstLoss:
    """What the loss of a network that says 0 must be on unit-variance latents.

    mean: the expected loss. std: of one sample's loss, for Gaussian latents of independent elements.
    """

    mean: float
    std: float

    def standard_error(self, samples: int) -> float:
        """Of the mean loss of so many samples."""
        return self.std / math.sqrt(samples)

    def deviation(self, per_sample: Tensor) -> float:
        """How many standard errors the mean of per_sample (n,), n > 1, lies from the expected loss.

        Real latents spread more than Gaussian ones, so the larger of the two standard errors counts.
        """
        observed = float(per_sample.double().std()) / math.sqrt(len(per_sample))
        error = max(observed, self.standard_error(len(per_sample)))
        return (float(per_sample.double().mean()) - self.mean) / error


@config
class Objective:
    """What is minimised: E weight·|pred − target|² over data, eps and t, the square a mean over elements."""

    path: Annotated[Path, PATHS] = Linear()
    prediction: Annotated[Prediction, PREDICTIONS] = Velocity()
    times: Annotated[Times, TIMES] = Uniform()
    weight: Annotated[Weight, WEIGHTS] = UniformWeight()
    coupling: Annotated[Coupling, COUPLINGS] = Independent()

    def loss(self, model: Model, data: Tensor, cond: Cond, draws: Draws) -> Loss:
        """The loss of clean latents (B, C, ...); every random number is a function of `draws` alone.

        Nothing here waits for the device, the OT coupling aside.
        """
        data = data.to(torch.promote_types(data.dtype, torch.float32))
        if len(draws.slots) != len(data):
            raise ValueError(f"draws for {len(draws.slots)} slots were given for {len(data)} samples")
        t = self.time(draws.uniform(Purpose.TIME).to(data.dtype))
        eps = draws.normal(Purpose.EPS, data.shape[1:]).to(data.dtype)
        eps, metrics = self.coupling(data, eps, cond)
        per_sample = self.per_sample(model, data, eps, t, cond)
        return Loss(per_sample.mean(), per_sample, t, metrics)

    def time(self, u: Tensor) -> Tensor:
        """t (B,) from uniform u (B,): the times' distribution, clamped here to the usable interval."""
        lo, hi = usable(self.path, self.prediction)
        return self.times(u, self.path).clamp(lo, hi)

    def per_sample(self, model: Model, data: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(B,) weighted loss at given data, eps (B, C, ...) and t (B,), in float32 at least."""
        coeffs = self.path.coeffs(t)
        x = coeffs.mix(data, eps)
        target = self.prediction.target(coeffs, data, eps)
        pred, _ = split_channels(call_network(model, self.path, x, t, cond), x)
        error = (pred.to(target.dtype) - target).square().flatten(1).mean(1)
        return self.weight(coeffs, self.prediction.row(coeffs)) * error

    def first_loss(self, numel: int, correlation: float = 0.0) -> FirstLoss:
        """Expected loss of a network that says 0, for unit-variance latents of `numel` elements per sample.

        correlation: of data and eps, what the OT coupling logs as `ot_cost_drop`. The target variance is then
        a² + b² + 2·a·b·correlation, averaged over the training times.
        """
        u, share = _quadrature()
        t = self.time(u)
        coeffs = self.path.coeffs(t)
        a, b = self.prediction.row(coeffs)
        loss = self.weight(coeffs, (a, b)) * (a.square() + b.square() + 2 * correlation * a * b)
        mean = float((share * loss).sum())
        second = float((share * loss.square()).sum()) * (1 + 2 / numel)  # chi-squared with `numel` degrees
        return FirstLoss(mean, math.sqrt(max(second - mean**2, 0.0)))

    def check(self) -> None:
        """ConfigError for a path and a prediction that cannot be trained or sampled together.

        The usable interval must reach from nearly clean data to nearly pure noise, where sampling starts, and
        hold every step of a discrete path.
        """
        lo, hi = usable(self.path, self.prediction)
        alpha, sigma = self.path.alpha_sigma(torch.tensor([lo, hi], dtype=torch.float64))
        if sigma[0] > 0.1 * alpha[0] or alpha[1] > 0.1 * sigma[1]:
            raise ConfigError(
                f"prediction {self.prediction} is usable on path {self.path} only for t in "
                f"[{lo:.6g}, {hi:.6g}], which does not reach from data to noise; "
                "choose another prediction such as v"
            )
        if self.path.num_steps is not None:
            steps = torch.arange(1, self.path.num_steps + 1, dtype=torch.float64) / self.path.num_steps
            check_times(self.path, self.prediction, steps)


def _quadrature(points: int = 1024, octaves: int = 40) -> tuple[Tensor, Tensor]:
    """Nodes u in (0, 1) and their shares, float64: midpoints, finer by halves towards both ends.

    Targets may grow like 1/t (VP's velocity), which an even rule would miss.
    """
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 ** torch.arange(octaves, 0, -1).double()])
    width = edges.diff().unsqueeze(1) / points
    half = (edges[:-1].unsqueeze(1) + width * (torch.arange(points) + 0.5)).flatten()
    share = width.expand(-1, points).flatten()
    return torch.cat([half, 1 - half]), torch.cat([share, share])
