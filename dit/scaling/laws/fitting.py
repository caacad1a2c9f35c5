"""From runs to fit.json: the fit, the approaches beside it, intervals, the held-out rung and warnings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit.scaling.laws.approaches import approaches
from dit.scaling.laws.cells import number
from dit.scaling.laws.fit import Fitted, Floor, fit
from dit.scaling.laws.intervals import NAMES, bootstrap, figures, percentiles, profile
from dit.scaling.laws.judged import held_out, warnings
from dit.scaling.laws.law import Law, LawError
from dit.scaling.laws.record import FitRecord
from dit.scaling.laws.solver import DELTA, Points
from dit.scaling.laws.table import Runs

LEAST = 100  # draws: fewer tell nothing of a 95% interval


@dataclass(frozen=True)
class Order:
    """What to fit, and how. floor: fit, exact, or E's value; bootstrap: resamples; seed: of these alone."""

    source: Path
    metric: str | None = None
    protocol: str | None = None
    floor: str = "fit"
    bootstrap: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what needs no file. LawError for what cannot be."""
        if self.bootstrap < LEAST:
            raise LawError(
                f"--bootstrap={self.bootstrap}: expected at least {LEAST} resamples, 2000 are usual"
            )


def fit_file(order: Order) -> FitRecord:
    """Fit the law to a CSV of runs. LawError where the file, or the floor, cannot be used."""
    runs = Runs.read(order.source, order.metric, order.protocol)
    floor, told = read_floor(order.floor, runs)
    return fit_runs(runs, floor, told, order)


def read_floor(text: str, runs: Runs) -> tuple[Floor, dict[str, Any]]:
    """The floor that `fit`, `exact` or a number means, and how fit.json tells it. LawError for anything else."""
    if text == "fit":
        return Floor(), {"kind": "fit", "value": None}
    if text == "exact":
        if runs.floor is None:
            raise LawError(
                f"--floor=exact needs a column `floor` with the exact irreducible loss; there are "
                f"{', '.join(runs.columns)}. Give its value, or --floor=fit"
            )
        return Floor(runs.floor), {"kind": "exact", "value": runs.floor}
    value = number(text)
    if value is None:
        raise LawError(f"--floor={text}: expected fit, exact or a number")
    return Floor(value), {"kind": "value", "value": value}


def fit_runs(runs: Runs, floor: Floor, told: dict[str, Any], order: Order) -> FitRecord:
    """The record of a fit to runs that were read. told: the floor, as fit.json has it."""
    points = Points.of(runs.params, runs.tokens, runs.loss)
    fitted = fit(points, floor)
    law = fitted.law
    draws = bootstrap(points, fitted, floor, order.bootstrap, order.seed)
    lower, upper = percentiles(figures(Law.of(draws)))
    ci = {name: (float(lo), float(hi)) for name, lo, hi in zip(NAMES, lower, upper, strict=True)}
    estimates = dict(zip(NAMES, figures(law).tolist(), strict=True))
    without = fit(points, Floor(0.0)) if floor.fixed is None else None
    return FitRecord(
        law=law,
        ci=ci,
        warnings=[*runs.notes, *warnings(runs, fitted, floor, ci, estimates)],
        protocol=runs.choice["protocol"],
        metric=runs.choice["metric"],
        huber=fitted.huber,
        delta=DELTA,
        converged=fitted.converged,
        flops_per_param_token=runs.flops_per_param_token,
        tokens_per_sample=runs.tokens_per_sample,
        runs=_rows(runs, law),
        approaches=approaches(runs, law),
        without_E=None if without is None else _without(without),
        profile=profile(points, fitted, floor),
        draws=Law.of(draws).rows,
        seed=order.seed,
        held_out=held_out(runs, floor),
        floor=told,
        columns=runs.columns,
        source=order.source.name,
    )


def _without(fitted: Fitted) -> dict[str, float]:
    law = fitted.law
    return {
        **{name: float(getattr(law, name)) for name in ("A", "B", "alpha", "beta")},
        "n_opt_exponent": law.n_opt_exponent,
        "d_opt_exponent": law.d_opt_exponent,
        "huber": fitted.huber,
    }


def _rows(runs: Runs, law: Law) -> list[dict[str, Any]]:
    """What fit.json says of each run. residual: log(loss) − log(predicted)."""
    predicted = law.loss(runs.params, runs.tokens)
    numbers = {
        "params": runs.params,
        "tokens": runs.tokens,
        "flops": runs.flops,
        "loss": runs.loss,
        "predicted": predicted,
        "residual": np.log(runs.loss) - np.log(predicted),
    }
    return [
        {"run": name, "seed": seed or None, **{key: float(values[i]) for key, values in numbers.items()}}
        for i, (name, seed) in enumerate(zip(runs.run, runs.seed, strict=True))
    ]
