"""What a fitted law says of a budget: the best size, its data, its loss with an interval, and hours on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit.scaling.laws.intervals import percentiles
from dit.scaling.laws.law import LawError
from dit.scaling.laws.record import FitRecord

FAR = 100.0  # times the FLOPs of the largest run, beyond which a prediction is marked as far
Interval = tuple[float, float]


@dataclass(frozen=True)
class Device:
    """What hours are counted for. peak: FLOP/s of one; mfu: share of it that training reaches, an assumption."""

    name: str
    peak: float
    mfu: float = 0.4
    count: int = 1

    def __post_init__(self) -> None:
        """Check the numbers. LawError for what cannot be."""
        if not 0 < self.mfu <= 1:
            raise LawError(f"--mfu={self.mfu:g}: expected a share of the peak, above 0 and at most 1")
        if self.count < 1:
            raise LawError(f"--gpus={self.count}: expected 1 or more")

    def hours(self, flops: float) -> float:
        """Hours of one device for so many FLOPs."""
        return flops / (self.peak * self.mfu) / 3600


@dataclass(frozen=True)
class Recipe:
    """How a model of that size is trained. batch: samples a step; lr: the learning rate, None where no rule says."""

    batch: int
    lr: float | None = None


@dataclass(frozen=True)
class Prediction:
    """The optimum at a budget. params, tokens, loss: with intervals of 95% from the bootstrap's laws.

    beyond: the budget over the FLOPs of the largest run. samples: tokens over tokens_per_sample; None where that is
    not known.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    params_interval: Interval
    tokens_interval: Interval
    loss_interval: Interval
    beyond: float
    flops_per_param_token: float
    samples: float | None = None
    recipe: Recipe | None = None
    device: Device | None = None
    of_fit: tuple[str, ...] = ()  # what the fit itself warns of

    @property
    def steps(self) -> int | None:
        """Steps of the recipe's batch; None where samples or batch are not known."""
        if self.recipe is None or self.samples is None:
            return None
        return max(1, round(self.samples / self.recipe.batch))

    @property
    def warnings(self) -> list[str]:
        """What should be known before the prediction is believed."""
        far = f"{self.beyond:.3g} times the FLOPs of the largest run: so far beyond, the law is a guess"
        return [far] * (self.beyond > FAR) + [f"of the fit: {warning}" for warning in self.of_fit]

    def as_json(self) -> dict[str, Any]:
        """The values for a file of figures."""
        device = self.device
        hours = None if device is None else device.hours(self.flops)
        return {
            "figures": {
                "flops": self.flops,
                "params": self.params,
                "tokens": self.tokens,
                "samples": self.samples,
                "loss": self.loss,
                "steps": self.steps,
                "batch": None if self.recipe is None else self.recipe.batch,
                "lr": None if self.recipe is None else self.recipe.lr,
                "gpu_hours": hours,
                "hours": None if device is None or hours is None else hours / device.count,
            },
            "intervals": {
                "params": self.params_interval,
                "tokens": self.tokens_interval,
                "loss": self.loss_interval,
            },
            "device": None if device is None else {
                "name": device.name, "peak": device.peak, "mfu": device.mfu, "count": device.count,
            },
            "beyond": self.beyond,
            "flops_per_param_token": self.flops_per_param_token,
            "warnings": self.warnings,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The prediction as text."""
        rows = [
            ("FLOPs", f"{self.flops:.4g}, {self.beyond:.3g} times the largest run's"),
            ("params N", _with(self.params, self.params_interval)),
            ("tokens D", _with(self.tokens, self.tokens_interval)),
            ("loss", _with(self.loss, self.loss_interval, 5)),
        ]
        if self.samples is not None:
            rows.append(("samples", f"{self.samples:.4g}"))
        if self.recipe is not None:
            rows.append(("batch", f"{self.recipe.batch}"))
            rows += [("lr", f"{self.recipe.lr:.4g}")] if self.recipe.lr is not None else []
        if self.steps is not None:
            rows.append(("steps", f"{self.steps}"))
        if self.device is not None:
            hours = self.device.hours(self.flops)
            rows.append(
                ("GPU-hours", f"{hours:.4g} of {self.device.name} at an assumed MFU of {self.device.mfu:.0%}")
            )
            if self.device.count > 1:
                rows.append(("hours", f"{hours / self.device.count:.4g} on {self.device.count} of them"))
        return [
            *(f"{name:10s} {text}" for name, text in rows),
            f"Intervals are 95% of the bootstrap. FLOPs = {self.flops_per_param_token:.4g} · N · D, as the runs' mean.",
        ]


def _with(value: float, interval: Interval, digits: int = 4) -> str:
    return f"{value:.{digits}g}  [{interval[0]:.{digits}g}, {interval[1]:.{digits}g}]"


def predict(
    record: FitRecord,
    flops: float,
    tokens_per_sample: float | None = None,
    device: Device | None = None,
) -> Prediction:
    """The best size at a budget of training FLOPs, by a fit. tokens_per_sample: in place of the fit's.

    LawError for a budget that is no positive number, or at which the law has no optimum.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise LawError(f"--flops={flops:g}: expected a number of training FLOPs above 0, such as 1e21")
    each = record.tokens_per_sample if tokens_per_sample is None else tokens_per_sample
    if each is not None and not (math.isfinite(each) and each > 0):
        raise LawError(f"--tokens_per_sample={each:g}: expected a number above 0")
    k = record.flops_per_param_token
    params, tokens, loss = record.law.optimum(flops, k)
    if not all(math.isfinite(number) and number > 0 for number in (params, tokens, loss)):
        raise LawError(f"the law has no optimum at {flops:g} FLOPs: one of its terms is as good as not there")
    ends = [tuple(percentiles(values).tolist()) for values in record.draw_laws.optimum(flops, k)]
    return Prediction(
        flops, params, tokens, loss, ends[0], ends[1], ends[2],
        float(flops / np.max(record.column("flops"))), k,
        None if each is None else tokens / each, device=device, of_fit=tuple(record.warnings),
    )  # fmt: skip
