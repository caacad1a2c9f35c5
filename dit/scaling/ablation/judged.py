"""What an ablation measured, and whether each change is better than a baseline, worse, or not distinguishable.

Compared are the differences at the same seed, which moves all changes alike (Student's t). A verdict is given by chance
alone in 5 % of ablations at most, all changes of a figure and budget together and both ways (Bonferroni's bound).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dit.evals.figures import HIGHER_IS_BETTER
from dit.scaling.ablation.study import Ablation, Rate, Variant, gathered, rows_of
from dit.scaling.ablation.velocity import FIGURE
from dit.scaling.collecting import EVALUATIONS, FILE, QUARTER, names_of
from dit.scaling.configs import run_folder
from dit.scaling.mup.rates import ERROR, Difference

Outcome = Literal["better", "worse", "not distinguishable"]
QUARTERS = {
    FIGURE: [q.replace("loss", FIGURE) for q in QUARTER],
    FILE: QUARTER,
}  # figures with those of quarters of t


@dataclass(frozen=True)
class Against:
    """A figure of a change beside a baseline's. difference: of means at the same seeds, ± what chance may do.

    ratio: of the means.
    """

    difference: Difference
    ratio: float
    outcome: Outcome

    @classmethod
    def of(
        cls,
        ours: Mapping[int, float],
        theirs: Mapping[int, float],
        comparisons: int,
        low_is_good: bool = True,
    ) -> Against | None:
        """Compare figures by their seeds, with one of so many comparisons; None where no seed has both."""
        seeds = sorted({*ours} & {*theirs})
        if not seeds:
            return None
        mine, base = (np.array([side[seed] for seed in seeds]) for side in (ours, theirs))
        found = Difference.of(mine - base, ERROR / (2 * max(1, comparisons)))
        is_higher, is_lower = found.is_clear, Difference(-found.mean, found.half).is_clear
        better, worse = (is_lower, is_higher) if low_is_good else (is_higher, is_lower)
        outcome: Outcome = "better" if better else "worse" if worse else "not distinguishable"
        return cls(found, float(mine.mean() / base.mean()) if base.mean() else math.nan, outcome)


@dataclass(frozen=True)
class Figure:
    """One figure of all variants. protocols: of each, which have to be alike where two are compared."""

    name: str
    values: Mapping[Variant, Mapping[int, float]]  # by seed
    protocols: Mapping[Variant, str]

    @property
    def low_is_good(self) -> bool:
        """Whether less of it is better."""
        return self.name.partition(" (")[0] not in HIGHER_IS_BETTER

    def against(self, variant: Variant, baseline: str, comparisons: int) -> Against | None:
        """Compare a variant with a baseline of its budget; None where one has none, or the protocols are unlike."""
        other = Variant(baseline, variant.budget)
        if self.protocols.get(variant) != self.protocols.get(other):
            return None
        return Against.of(
            self.values.get(variant, {}), self.values.get(other, {}), comparisons, self.low_is_good
        )

    def mean_and_spread(self, variant: Variant) -> tuple[float, float] | None:
        """Give mean and standard deviation over seeds (NaN of one); None where there is no figure."""
        values = np.array(list(self.values.get(variant, {}).values()))
        if not len(values):
            return None
        return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan

    @property
    def is_common(self) -> bool:
        """Whether all variants have it by one protocol."""
        return len(set(self.protocols.values())) == 1


@dataclass(frozen=True)
class Found:
    """All that an ablation measured. missing: run -> why it has no held-out loss."""

    rates: Mapping[Variant, Rate]
    figures: Sequence[Figure]
    missing: Mapping[str, str]

    @property
    def main(self) -> list[Figure]:
        """Those of all times together."""
        quarters = {name for names in QUARTERS.values() for name in names}
        return [figure for figure in self.figures if figure.name not in quarters]


def found_of(ablation: Ablation, rates: Mapping[Variant, Rate]) -> Found:
    """Gather every figure at the last step of the runs that are reported."""
    plans = {
        v: ablation.plan([(v, rate.lr, seed) for seed in ablation.spec.seeds]) for v, rate in rates.items()
    }
    folders = [run_folder(ablation.out, run.name) for plan in plans.values() for run in plan.runs]
    there = {name for folder in folders for name in names_of(folder)} - {FILE, FIGURE, *QUARTERS[FIGURE]}
    losses = {v: gathered(ablation.out, plan) for v, plan in plans.items()}
    rows = {v: [] if found is None else list(found.rows) for v, found in losses.items()}
    figures = [_figure(name, rows, column) for name, column in _columns().items()]
    for name in [FIGURE, *QUARTERS[FIGURE], *sorted(there)]:
        own = {v: rows_of(ablation.out, plan, name) for v, plan in plans.items()}
        figures.append(_figure(name, own, "loss"))
    missing: dict[str, str] = {}
    for variant, found in losses.items():
        none = {run.name: f"no {FILE}" for run in plans[variant].runs}
        missing |= none if found is None else dict(found.missing)
    return Found(dict(rates), [figure for figure in figures if figure.values], missing)


def _columns() -> dict[str, str]:
    """The held-out loss and its quarters, with the columns of a collected row in which they are."""
    return {FILE: "loss", **{name: name for name in QUARTER}}


def _figure(name: str, rows: Mapping[Variant, Sequence[Mapping[str, Any]]], column: str) -> Figure:
    values: dict[Variant, dict[int, float]] = {}
    protocols: dict[Variant, str] = {}
    for variant, own in rows.items():
        for row in own:
            if column in row:
                values.setdefault(variant, {})[int(row["seed"])] = float(row[column])
                protocols[variant] = _protocol(row)
    return Figure(name, values, protocols)


def _protocol(row: Mapping[str, Any]) -> str:
    """The hash of how a figure was measured, and what drawing an image took."""
    cost = row.get(EVALUATIONS)
    return str(row["protocol"]) + ("" if cost is None else f", {cost:g} evaluations an image")
