"""What a grid of runs says of the best learning rate at each width: curves, and whether the rate carries over.

A rate is compared with the best one by the differences of their held-out losses at the same seed: seeds move all
rates alike, and what is left decides (Student's t). As the best is chosen among all rates, it is the luckiest of those
that are as good: a rate counts as worse where it would by chance in 5 % of studies at most, all rates together
(Bonferroni's bound, one-sided).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from dit.config import ConfigError
from dit.files import write_picture

ERROR = 0.05  # of studies in which chance alone makes a rate clearly worse than the best
Outcome = Literal["the same", "not distinguishable", "another"]


@dataclass(frozen=True)
class Difference:
    """A mean over seeds of differences, and how far chance may move it down; infinite with one seed."""

    mean: float
    half: float

    @classmethod
    def of(cls, differences: np.ndarray, chance: float = ERROR) -> Difference:
        """Sum up paired differences, one a seed: chance moves their mean by more than `half` that rarely (Student's t).

        To one side; the other is as rare.
        """
        count = len(differences)
        if count < 2:
            return cls(float(differences.mean()), math.inf)
        spread = float(differences.std(ddof=1)) / math.sqrt(count)
        return cls(float(differences.mean()), float(stats.t.ppf(1 - chance, count - 1)) * spread)

    @property
    def is_clear(self) -> bool:
        """Whether it is above 0 whatever chance does."""
        return self.mean - self.half > 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


@dataclass(frozen=True)
class Curve:
    """Held-out losses (rates, seeds) of one width; NaN where a run failed."""

    parametrization: str
    width: int
    rates: tuple[float, ...]
    losses: np.ndarray

    @cached_property
    def means(self) -> np.ndarray:
        """(rates,): over seeds; infinite where a run failed."""
        means = self.losses.mean(axis=1)
        return np.where(np.isfinite(means), means, math.inf)

    @cached_property
    def best(self) -> int:
        """Give the place of the rate of least mean loss. ConfigError where every rate has a failed run."""
        if not np.isfinite(self.means).any():
            raise ConfigError(
                f"at width {self.width} ({self.parametrization}) a run of every rate failed; take lower rates"
            )
        return int(self.means.argmin())

    @property
    def is_at_edge(self) -> bool:
        """Whether the best of the rates is the lowest or the highest: the best of all may lie beyond."""
        return self.best in (0, len(self.rates) - 1)

    def behind(self, place: int) -> Difference:
        """Give by how much a rate is worse than the best one; infinite where a run failed."""
        if place == self.best:
            return Difference(0.0, 0.0)
        if not math.isfinite(self.means[place]):
            return Difference(math.inf, 0.0)
        differences = self.losses[place] - self.losses[self.best]
        return Difference.of(differences, ERROR / (len(self.rates) - 1))

    @property
    def spread(self) -> float:
        """The standard deviation over seeds of the loss at the best rate; NaN with one seed."""
        row = self.losses[self.best]
        return float(row.std(ddof=1)) if len(row) > 1 else math.nan

    @cached_property
    def optimum(self) -> tuple[float, float] | None:
        """log2 of the rate at the vertex of a parabola through the best and its neighbours: mean and std over seeds.

        None where the best is at the edge, or a seed's three losses have no minimum.
        """
        if self.is_at_edge:
            return None
        places = [self.best - 1, self.best, self.best + 1]
        x = np.log2([self.rates[place] for place in places])
        vertices = []
        for losses in self.losses[places].T:
            a, b, _ = np.polyfit(x - x[1], losses, 2) if np.isfinite(losses).all() else (0.0, 0.0, 0.0)
            if a <= 0:
                return None
            vertices.append(x[1] - b / (2 * a))
        return float(np.mean(vertices)), float(np.std(vertices, ddof=1)) if len(vertices) > 1 else math.nan


@dataclass(frozen=True)
class Carried:
    """Whether the best rate of a narrow model is a wide one's, in one parametrization."""

    narrow: Curve
    wide: Curve

    @property
    def cost(self) -> Difference:
        """By how much the wide model is worse at the narrow one's best rate than at its own."""
        return self.wide.behind(self.narrow.best)

    @property
    def outcome(self) -> Outcome:
        """The wide model's best rate is the same; another; or another by less than the seeds tell apart."""
        if self.narrow.best == self.wide.best:
            return "the same"
        return "another" if self.cost.is_clear else "not distinguishable"

    @property
    def drift(self) -> str:
        """By how many factors of 2 the best rate moves, between vertices of parabolas; "" where there is none."""
        here, there = self.narrow.optimum, self.wide.optimum
        if here is None or there is None:
            return ""
        spread = math.hypot(here[1], there[1])
        chance = "" if math.isnan(spread) else f" (± {spread:.2f} over seeds)"
        return f"; the vertex of a parabola moves by 2^{there[0] - here[0]:+.2f}{chance}"

    def __str__(self) -> str:
        narrow, wide = self.narrow, self.wide
        first, second = narrow.rates[narrow.best], wide.rates[wide.best]
        said = {
            "the same": f"the best rate of width {narrow.width}, {first:g}, is the best at width {wide.width}",
            "not distinguishable": f"the best rate is {first:g} at width {narrow.width} and {second:g} at width "
            f"{wide.width}, where the two are not distinguishable ({self.cost} of held-out loss)",
            "another": f"the best rate of width {narrow.width}, {first:g}, is not the best at width {wide.width}, "
            f"which is {second:g}: it costs {self.cost} of held-out loss",
        }
        edges = " and ".join(str(curve.width) for curve in (narrow, wide) if curve.is_at_edge)
        beyond = f"; the best is at the edge of the rates at width {edges}: widen them" if edges else ""
        return f"{narrow.parametrization}: {said[self.outcome]}{self.drift}{beyond}"


def carried(curves: Sequence[Curve]) -> list[Carried]:
    """Compare the least width of each parametrization with every other one."""
    found = []
    for name in dict.fromkeys(curve.parametrization for curve in curves):
        first, *others = sorted(
            (c for c in curves if c.parametrization == name), key=lambda curve: curve.width
        )
        found += [Carried(first, other) for other in others]
    return found


def verdict(curves: Sequence[Curve]) -> str:
    """Say for each parametrization whether the rate carries over, then whether μP's does and the standard one's not."""
    found = carried(curves)
    lines = [str(one) for one in found]
    widest = {one.narrow.parametrization: one for one in found}  # the last of each is the widest
    if all(curve.losses.shape[1] == 1 for curve in curves):
        lines.append("Verdict: not decided: one seed does not tell a rate from chance; give --seeds=0,1,2")
    elif {"mup", "standard"} <= set(widest):
        lines.append(_claim(widest["mup"], widest["standard"]))
    return "\n".join(lines)


def _claim(mup: Carried, standard: Carried) -> str:
    claim = "that the best rate carries over by maximal updates and not in the standard parametrization"
    if any(
        one.outcome != "another" and (one.narrow.is_at_edge or one.wide.is_at_edge) for one in (mup, standard)
    ):
        return f"Verdict: not decided, {claim}: a best rate is at the edge of the rates; widen them"
    if mup.outcome == "another":
        return f"Verdict: not shown, {claim}: it does not carry over by maximal updates either"
    if standard.outcome == "another":
        sure = "" if mup.outcome == "the same" else ", within the seeds' spread"
        return f"Verdict: shown{sure}, {claim}"
    return (
        f"Verdict: not shown, {claim}: in the standard one too it is the best, or not distinguishable from it"
    )


def table(curves: Sequence[Curve]) -> str:
    """Give mean losses as Markdown: a line a rate, a column a width; the best bold, those as good as it starred."""
    heads = [f"{c.parametrization}, width {c.width}" for c in curves]
    lines = ["| rate | " + " | ".join(heads) + " |", "|---|" + "---|" * len(curves)]
    lines += [
        f"| {rate:g} | " + " | ".join(_cell(curve, place) for curve in curves) + " |"
        for place, rate in enumerate(curves[0].rates)
    ]
    spreads = " | ".join("–" if math.isnan(c.spread) else f"{c.spread:.4f}" for c in curves)
    lines.append(f"| std over seeds, at the best | {spreads} |")
    return (
        "\n".join(lines)
        + "\n\n\\* not distinguishable from the best (paired by seed; 95 % for all rates together)"
    )


def _cell(curve: Curve, place: int) -> str:
    if not math.isfinite(curve.means[place]):
        return "failed"
    text = f"{curve.means[place]:.4f}"
    return f"**{text}**" if place == curve.best else text if curve.behind(place).is_clear else f"{text} \\*"


def draw(curves: Sequence[Curve], file: Path) -> None:
    """Write a PNG: loss against the rate, a panel a parametrization, a line a width, bars of a standard deviation."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(curve.parametrization for curve in curves))
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.6 * len(names), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        for i, curve in enumerate(c for c in curves if c.parametrization == name):
            known = [place for place in range(len(curve.rates)) if math.isfinite(curve.means[place])]
            spread = curve.losses[known].std(axis=1, ddof=1) if curve.losses.shape[1] > 1 else None
            rates = [curve.rates[place] for place in known]
            label = f"width {curve.width}"
            axis.errorbar(
                rates, curve.means[known], yerr=spread, fmt="o-", ms=4, capsize=2, color=f"C{i}", label=label
            )
            axis.axvline(curve.rates[curve.best], color=f"C{i}", ls=":", lw=1)
        axis.set(title=name, xscale="log", xlabel="learning rate")
        axis.set_xticks(curves[0].rates, [f"{rate:g}" for rate in curves[0].rates], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("held-out loss")
    write_picture(file, figure, dpi=130)
    plt.close(figure)
