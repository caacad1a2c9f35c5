"""What a report of a scaling law is made of: the fit, the columns of its runs' CSV, and the bands of its bootstrap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit.errors import UserError
from dit.files import expand, read_text
from dit.scaling.laws.approaches import budgets
from dit.scaling.laws.cells import number, parsed
from dit.scaling.laws.intervals import percentiles
from dit.scaling.laws.record import FitRecord
from dit.scaling.laws.table import Runs

RATES = 3  # learning rates that a size needs, at one number of tokens, for an optimum between them
ALIKE = 1e-6  # relative difference of numbers that are one


class ReportError(UserError):
    """A report cannot be made of what was given."""


@dataclass(frozen=True)
class Band:
    """Optima at budgets flops (n,): params, tokens and loss, each (3, n): the law's, and 95% of the bootstrap's."""

    flops: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Rates:
    """Losses of one size and number of tokens at several learning rates, rising. best: between them, or None."""

    params: float
    tokens: float
    lr: np.ndarray
    loss: np.ndarray
    best: float | None


@dataclass(frozen=True)
class Material:
    """A fit, and more of its runs. more: numbers by column of the CSV, one a run of the fit, NaN where none is."""

    fit: FitRecord
    source: str
    more: Mapping[str, np.ndarray]
    budget: float | None = None  # FLOPs for which a prediction was asked

    @property
    def groups(self) -> list[np.ndarray]:
        """Runs of equal FLOPs: at least three sizes each, from few FLOPs to many."""
        return budgets(self.fit.column("flops"), self.fit.column("params"), 3)

    @property
    def span(self) -> np.ndarray:
        """Budgets from the smallest run's to ten times the largest's, or to the one that was asked for."""
        flops = self.fit.column("flops")
        top = max(10 * float(flops.max()), 1.5 * (self.budget or 0.0))
        return np.geomspace(min(float(flops.min()), self.budget or math.inf), top, 160)

    def band(self, flops: np.ndarray | Sequence[float]) -> Band:
        """The optima at budgets (n,), with their intervals."""
        k, flops = self.fit.flops_per_param_token, np.atleast_1d(np.asarray(flops, float))
        best = self.fit.law.optimum(flops, k)
        laws = self.fit.draw_laws
        with np.errstate(over="ignore", invalid="ignore"):
            drawn = [laws.optimum(float(at), k) for at in flops]
        ends = [percentiles(np.stack([np.atleast_1d(one[i]) for one in drawn], 1)) for i in range(3)]
        return Band(flops, *(np.stack([mid, *end]) for mid, end in zip(best, ends, strict=True)))

    @property
    def forward_flops(self) -> np.ndarray | None:
        """(n,) FLOPs of one evaluation of the network for a sample: a third of its training; None without `samples`."""
        samples = self.more.get("samples")
        return None if samples is None else self.fit.column("flops") / samples / 3

    @property
    def rates(self) -> list[Rates]:
        """Sizes that were trained at several learning rates, small ones first."""
        if "lr" not in self.more:
            return []
        keys = [tuple(f"{row[name]:.4g}" for name in ("params", "tokens")) for row in self.fit.runs]
        loss, rate, found = self.fit.column("loss"), self.more["lr"], []
        for key in dict.fromkeys(keys):
            own = np.array([i for i, other in enumerate(keys) if other == key and rate[i] > 0])
            different = np.unique(rate[own]) if len(own) else np.zeros(0)
            if len(different) >= RATES:
                means = np.array([loss[own][rate[own] == one].mean() for one in different])
                first = self.fit.runs[own[0]]
                found.append(
                    Rates(first["params"], first["tokens"], different, means, vertex(different, means))
                )
        return sorted(found, key=lambda one: (one.tokens, one.params))


def vertex(lr: np.ndarray, loss: np.ndarray) -> float | None:
    """Where a parabola of loss in log lr through the lowest point and its neighbours is lowest; None at an end."""
    at = int(loss.argmin())
    if at in (0, len(lr) - 1):
        return None
    near = slice(at - 1, at + 2)
    bend, slope, _ = np.polyfit(np.log(lr[near] / lr[at]), loss[near], 2)
    return float(lr[at] * np.exp(-slope / (2 * bend)))


def read_material(
    fit: FitRecord, source: str, table: Path | None = None, budget: float | None = None
) -> Material:
    """A fit and, where it is given, the CSV that it is of. ReportError for a CSV of other runs, or a budget of none.

    Whatever numbers the CSV has are taken: samples, lr, evaluations (of the network for a sample that is drawn).
    """
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise ReportError(f"--flops={budget:g}: expected a number of training FLOPs above 0, such as 1e21")
    more = {} if table is None else _columns(fit, Path(expand(str(table))))
    return Material(fit, source, more, budget)


def _columns(fit: FitRecord, place: Path) -> dict[str, np.ndarray]:
    """Numbers of the fit's runs by column."""
    checked = Runs.read(place, fit.metric or None, fit.protocol or None)
    _check_same(fit, checked, place)
    header, numbered = parsed(read_text(place), str(place))
    lines, at = dict(numbered), dict(zip(checked.run, checked.lines, strict=True))
    rows = [lines[at[str(row["run"])]] for row in fit.runs]
    own = {name: np.array([_number(row[name]) for row in rows]) for name in header}
    return {name: values for name, values in own.items() if np.isfinite(values).any()}


def _check_same(fit: FitRecord, runs: Runs, place: Path) -> None:
    """ReportError unless every run of the fit is among these, with the same numbers."""
    there = {name: i for i, name in enumerate(runs.run)}
    missing = [str(row["run"]) for row in fit.runs if str(row["run"]) not in there]
    advice = "give the CSV that was fitted, or fit this one"
    if missing:
        raise ReportError(
            f"{place} is of other runs than the fit: {len(missing)} of its {len(fit.runs)} are not there, "
            f"{_some(missing)}; {advice}"
        )
    off = [
        f"{row['run']} has {name} {getattr(runs, name)[there[str(row['run'])]]:.6g}, and {row[name]:.6g} in the fit"
        for row in fit.runs
        for name in ("params", "flops", "loss")
        if not math.isclose(getattr(runs, name)[there[str(row["run"])]], row[name], rel_tol=ALIKE)
    ]
    if off:
        raise ReportError(f"{place} has changed since the fit: {off[0]}; {advice}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (" and more" if len(names) > 3 else "")


def _number(text: str) -> float:
    """The number in a cell, NaN for a word."""
    value = number(text)
    return math.nan if value is None else value


def residuals(fit: FitRecord) -> np.ndarray:
    """(n,) measured over predicted loss, less 1."""
    found: np.ndarray = np.expm1(fit.column("residual"))
    return found


def smaller(fit: FitRecord, flops: float, shares: Sequence[float] = (1.0, 0.5, 0.25)) -> list[dict[str, Any]]:
    """What models smaller than the optimum at a budget take to come to its loss, by the law.

    share: of the optimum's parameters, and so of the FLOPs of an evaluation. tokens and training: as multiples of the
    optimum's; None where no number of tokens suffices.
    """
    law, (params, tokens, loss) = fit.law, fit.law.optimum(flops, fit.flops_per_param_token)
    found: list[dict[str, Any]] = []
    for share in shares:
        left = loss - law.E - law.A * (share * params) ** -law.alpha
        more = (law.B / left) ** (1 / law.beta) / tokens if left > 0 else None
        found.append({"share": share, "tokens": more, "training": None if more is None else share * more})
    return found
