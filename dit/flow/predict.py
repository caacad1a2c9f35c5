"""What the network predicts, as a row (a, b): pred = a·data + b·eps.

With x = alpha·data + sigma·eps, one 2×2 solve gives data and eps from any prediction, and the same row builds
the training target: a new prediction is one `row`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, Registry, config
from dit.flow.path import Coeffs, NoisePath, broadcast, check_time, combine

Cond = Mapping[str, Tensor]  # each (B, ...): "label" int64 (−1: none), "drop" bool (True: null condition)
Model = Callable[[Tensor, Tensor, Cond], Tensor]  # (x (B, C, ...), model_time (B,), cond) → (B, C or 2C, ...)
Row = tuple[Tensor, Tensor]  # (a, b), each (B,)


def check_cond(cond: Cond, count: int) -> None:
    """Raise ValueError for a condition that is no dictionary, or not of `count` samples. Waits for no device."""
    if not isinstance(cond, Mapping):
        raise ValueError(
            f'cond: expected a dictionary, as {{"label": (B,) int64}}, got {type(cond).__name__}'
        )
    for name, value in cond.items():
        if value.shape[:1] != (count,):
            raise ValueError(
                f"cond['{name}'] has the shape {tuple(value.shape)}, and there are {count} samples"
            )


def check_labels(label: Tensor, num_classes: int) -> None:
    """Raise ValueError for labels (B,) that are no class of a model; negative ones are none. Waits for their device."""
    if label.is_floating_point():
        raise ValueError(f"label: expected whole numbers, as int64, got {label.dtype}")
    if len(label) and int(label.max()) >= num_classes:
        has = f"classes 0 to {num_classes - 1}" if num_classes else "no classes"
        raise ValueError(f"label {int(label.max())}: this model has {has}; a negative label is no class")


@dataclass(frozen=True)
class Endpoints:
    """Where the network thinks the path through x begins and ends: data and eps, each of the shape of x.

    log_variance: the learned-variance channels as the network gave them, or None; no part of any row.
    """

    data: Tensor
    eps: Tensor
    log_variance: Tensor | None = None

    def velocity(self, coeffs: Coeffs) -> Tensor:
        """dx/dt = d_alpha·data + d_sigma·eps (the probability-flow ODE; SiT, arXiv 2401.08740, eq. 3)."""
        return combine(coeffs.d_alpha, self.data, coeffs.d_sigma, self.eps)

    def score(self, coeffs: Coeffs) -> Tensor:
        """∇ log p_t(x) = −eps / sigma; infinite at sigma = 0 (Song et al., arXiv 2011.13456)."""
        return -self.eps / broadcast(coeffs.sigma, self.eps)

    def lerp(self, other: Endpoints, weight: float | Tensor) -> Endpoints:
        """self + weight·(other − self), weight a number or (B,), of any size; log_variance is `other`'s."""
        if isinstance(weight, Tensor):
            weight = broadcast(weight, self.data)
        return Endpoints(
            self.data + weight * (other.data - self.data),
            self.eps + weight * (other.eps - self.eps),
            other.log_variance,
        )

    def with_data(self, coeffs: Coeffs, x: Tensor, data: Tensor) -> Endpoints:
        """The endpoints of the same x (B, ...) with other data: eps = (x − alpha·data) / sigma.

        Where sigma is 0 x says nothing of eps, and it stays.
        """
        sigma = broadcast(coeffs.sigma, x)
        clean = sigma == 0
        eps = (x - broadcast(coeffs.alpha, x) * data) / torch.where(clean, 1.0, sigma)
        return Endpoints(data, torch.where(clean, self.eps, eps), self.log_variance)


class Prediction:
    """What the network is trained to say. Subclasses are frozen `@config` classes that give `row`."""

    def row(self, coeffs: Coeffs) -> Row:
        """(a, b), each (B,), with pred = a·data + b·eps. May be infinite where the prediction is unusable."""
        raise NotImplementedError

    def target(self, coeffs: Coeffs, data: Tensor, eps: Tensor) -> Tensor:
        """The training target a·data + b·eps, (B, ...)."""
        a, b = self.row(coeffs)
        return combine(a, data, b, eps)

    def endpoints(self, coeffs: Coeffs, x: Tensor, pred: Tensor) -> Endpoints:
        """data and eps from x (B, C, ...) and pred (B, C or 2C, ...): the 2×2 solve, in float32 at least.

        Finite on the usable interval alone, see `usable`. Channels beyond C become log_variance.
        """
        pred, extra = split_channels(pred, x)
        a, b = self.row(coeffs)
        det = a * coeffs.sigma - b * coeffs.alpha
        return Endpoints(
            combine(coeffs.sigma / det, pred, -b / det, x),
            combine(a / det, x, -coeffs.alpha / det, pred),
            extra,
        )


PREDICTIONS: Registry[Prediction] = Registry("prediction")


@PREDICTIONS.register("data")
@config
class Data(Prediction):
    """Clean latents."""

    def row(self, coeffs: Coeffs) -> Row:
        return torch.ones_like(coeffs.alpha), torch.zeros_like(coeffs.alpha)


@PREDICTIONS.register("eps")
@config
class Eps(Prediction):
    """The noise (DDPM, arXiv 2006.11239, eq. 14)."""

    def row(self, coeffs: Coeffs) -> Row:
        return torch.zeros_like(coeffs.alpha), torch.ones_like(coeffs.alpha)


@PREDICTIONS.register("velocity")
@config
class Velocity(Prediction):
    """dx/dt (flow matching, arXiv 2210.02747, eq. 9); on the linear path eps − data."""

    def row(self, coeffs: Coeffs) -> Row:
        return coeffs.d_alpha, coeffs.d_sigma


@PREDICTIONS.register("v")
@config
class V(Prediction):
    """v = alpha·eps − sigma·data (Salimans & Ho, arXiv 2202.00512, appendix D). Not the velocity."""

    def row(self, coeffs: Coeffs) -> Row:
        return -coeffs.sigma, coeffs.alpha


@PREDICTIONS.register("score")
@config
class Score(Prediction):
    """The score of x given data, −eps / sigma (Song et al., arXiv 2011.13456, eq. 7)."""

    def row(self, coeffs: Coeffs) -> Row:
        return torch.zeros_like(coeffs.alpha), -1.0 / coeffs.sigma


@PREDICTIONS.register("edm")
@config
class EDM(Prediction):
    """The output of EDM's preconditioned network (Karras et al., arXiv 2206.00364, eq. 7–8), on any path.

    F = (sigma/sigma_data·data − alpha·sigma_data·eps) / sqrt(sigma² + alpha²·sigma_data²); its variance is 1
    for data of standard deviation sigma_data. EDM itself is this on the path `ve`, with weight and times `edm`.
    """

    sigma_data: Annotated[float, Field(gt=0)] = 1.0  # standard deviation of the latents

    def row(self, coeffs: Coeffs) -> Row:
        signal = coeffs.alpha * self.sigma_data
        size = torch.hypot(coeffs.sigma, signal)
        return coeffs.sigma / (self.sigma_data * size), -signal / size


@PREDICTIONS.register("reverse_velocity")
@config
class ReverseVelocity(Prediction):
    """−dx/dt: the velocity from noise to data, as SiT and most flow matching code have it (their t is our 1 − t)."""

    def row(self, coeffs: Coeffs) -> Row:
        return -coeffs.d_alpha, -coeffs.d_sigma


def split_channels(pred: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(prediction of the shape of x, learned-variance channels or None) of a network's output.

    ValueError when the output is neither of x's shape nor of twice its channels (axis 1).
    """
    if pred.shape == x.shape:
        return pred, None
    if x.ndim > 1 and pred.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        first, second = pred.chunk(2, dim=1)
        return first, second
    raise ValueError(
        f"the network gave {tuple(pred.shape)} for x of shape {tuple(x.shape)}; expected the same shape, "
        "or twice the channels with a learned variance"
    )


def call_network(model: Model, path: NoisePath, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """model(c_in(t)·x, model_time(t), cond): the one way in which training and sampling call the network.

    x: (B, C, ...); t: (B,) float32 or float64, and so is what the embedder gets, whatever autocast says.
    """
    check_time(t)
    return model(broadcast(path.input_scale(t), x) * x, path.model_time(t), cond)


# --- where a prediction can be used ------------------------------------------------------------------------

DELTA = 1e-3
DELTA_STEPS = (
    1e-6  # at the steps of a discrete path, all of which are trained at and sampled, as by its authors
)


@lru_cache(maxsize=1024)
def usable(path: NoisePath, prediction: Prediction) -> tuple[float, float]:
    """The longest interval [t_lo, t_hi] of times at which the prediction determines data and eps.

    There the row (a, b) is finite, at most 1/δ times as long as (alpha, sigma), and the sine of the angle between
    the two is at least δ: else the 2×2 solve magnifies the network's error over 1/δ times. δ is 1e-3; from
    the first step of a discrete path on it is 1e-6: `iddpm` ends at alpha = 5e-5, and its authors predict eps.
    Computed in float64, to rounding, from the path and the row alone; kept. ConfigError when there is none.

    On a discrete path the interval ends at a step, so that clamping a time to it gives a step; below the first
    step it ends where it does. Of the registered paths, as they are by default, the ends cut off are: t = 0 for
    data and score (all but `ve`, whose sigma(0) > 0) and for the velocities of `vp`, `ddpm`, `iddpm`, whose
    slope is infinite there; t = 1 for eps and score on `linear` and `cosine`. Nothing is cut off for v and edm on
    any path.
    """
    ends = torch.logspace(-12, -2, 401, dtype=torch.float64)
    t = torch.cat([torch.linspace(0, 1, 2001, dtype=torch.float64), ends, 1 - ends]).unique()  # sorted
    start, stop = _longest_run(_is_usable(path, prediction, t).tolist())
    if stop - start < 2:
        raise ConfigError(
            f"prediction {prediction} is usable nowhere on path {path}: it never determines data and eps; "
            "choose another prediction, v is usable wherever alpha² + sigma² is not 0"
        )
    lo, hi = float(t[start]), float(t[stop - 1])
    if start > 0:
        lo = _bisect(path, prediction, bad=float(t[start - 1]), good=lo)
    if stop < len(t):
        hi = _bisect(path, prediction, bad=float(t[stop]), good=hi)
    return (lo, hi) if path.num_steps is None else _to_steps(path.num_steps, lo, hi)


def _to_steps(num_steps: int, lo: float, hi: float) -> tuple[float, float]:
    """The interval less the pieces of it beyond its first and last step; lo stays where no step lies below it."""
    if hi < 1.0:
        hi = math.floor(hi * num_steps + 1e-6) / num_steps
    if lo * num_steps > 1.0:
        lo = math.ceil(lo * num_steps - 1e-6) / num_steps
    return lo, hi


def _is_usable(path: NoisePath, prediction: Prediction, t: Tensor) -> Tensor:
    """(B,) bool."""
    first_step = math.inf if path.num_steps is None else (1.0 - 1e-9) / path.num_steps
    delta = torch.full_like(t, DELTA).masked_fill(t >= first_step, DELTA_STEPS)
    c = path.coeffs(t)
    a, b = prediction.row(c)
    row, size = torch.hypot(a, b), torch.hypot(c.alpha, c.sigma)
    sine = (a * c.sigma - b * c.alpha).abs() / (row * size)  # nan if the row is infinite or 0: False below
    return torch.isfinite(row) & (row * delta <= size) & (sine >= delta)


def _longest_run(flags: list[bool]) -> tuple[int, int]:
    """[start, stop) of the longest run of True; (0, 0) if there is none."""
    best, start = (0, 0), 0
    for i, flag in enumerate([*flags, False]):
        if not flag:
            best, start = max(best, (start, i), key=lambda run: run[1] - run[0]), i + 1
    return best


def _bisect(path: NoisePath, prediction: Prediction, bad: float, good: float) -> float:
    """The usable time nearest to `bad`, between the two, to a few parts in 1e15 of their distance."""
    for _ in range(10):
        t = bad + (good - bad) * torch.linspace(0, 1, 33, dtype=torch.float64)
        t[-1] = good
        first = int(_is_usable(path, prediction, t).int().argmax())
        bad, good = float(t[first - 1]), float(t[first])
    return good


def check_times(path: NoisePath, prediction: Prediction, times: Tensor) -> None:
    """ConfigError if any of `times` (n,) lies outside the usable interval of (path, prediction).

    The well-known case is eps at t = 1 on a path that ends in pure noise (arXiv 2305.08891, §3.2).
    """
    lo, hi = usable(path, prediction)
    times = times.detach().double().cpu()
    outside = times[~((times >= lo * (1 - 1e-6)) & (times <= hi * (1 + 1e-6)))]  # nan is outside too
    if len(outside):
        raise ConfigError(
            f"prediction {prediction} cannot be used on path {path} at t = {float(outside[0]):.6g}: it "
            f"determines data and eps only for t in [{lo:.6g}, {hi:.6g}]; stay inside, or choose another "
            "prediction such as v"
        )


def check_steps(path: NoisePath, prediction: Prediction) -> None:
    """ConfigError if the prediction cannot be used at a step of a discrete path; nothing on another path."""
    if path.num_steps is not None:
        steps = torch.arange(1, path.num_steps + 1, dtype=torch.float64) / path.num_steps
        check_times(path, prediction, steps)
