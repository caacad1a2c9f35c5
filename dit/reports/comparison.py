"""What sets runs apart: keys, the first step at which they part, and which of them is better by which figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from dit.evals.figures import FLOOR, HIGHER_IS_BETTER, hash_of
from dit.evals.protocol import Told
from dit.evals.record import ends, titled, told
from dit.reports.told import RunTold
from dit.train.run_dir import is_operational

NOT_COMPARED = ("run_dir",)  # different in every two runs, and of no effect
ROUNDING = 1e-6  # relative: losses closer than this are the same, summed in another order
# What decides which loss is a mean of what: runs that differ here have training losses of different things
DECIDES_LOSS = (
    "objective", "data", "latents", "model.learn_sigma", "train.label_drop",
    "autoencoder.name", "kl_weight", "pixel", "perceptual", "discriminator",
)  # fmt: skip
HELD_OUT_LOSS = "held-out loss"
HELD_OUT = (
    "loss",
    "accuracy",
    "psnr",
    "ssim",
)  # of held_out.jsonl; and distances, named after their features


@dataclass(frozen=True)
class Difference:
    """A key that has not the same value in all runs. values: of each run, in their order; None where it has none."""

    key: str
    values: tuple[Any, ...]

    @property
    def is_identity(self) -> bool:
        """Whether a run with another value is another run, rather than the same on other machines."""
        return not is_operational(self.key)


@dataclass(frozen=True)
class Parting:
    """Where two runs part. step: the first logged step at which they differ; None where they never do.

    what: "batches" (their batch_hash), or "losses" of the same batches. compared: steps that both have logged.
    """

    step: int | None
    what: str
    compared: int
    relative: float = 0.0  # of the losses at that step

    def __str__(self) -> str:
        """Say it in a line."""
        if not self.compared:
            return "they have logged no step in common"
        if self.step is None:
            return f"the same in all {self.compared} logged steps that both have: batches, and losses within 1e-6"
        if self.what == "batches":
            return f"other batches from step {self.step} on (its batch_hash is another)"
        how = (
            f"by {self.relative:.2g} of their size"
            if math.isfinite(self.relative)
            else "where one is not finite"
        )
        return f"the same batches; losses part at step {self.step}, {how}"


def parting(a: RunTold, b: RunTold) -> Parting:
    """Find the first logged step at which two runs differ: in their batches, or else in their losses."""
    others = {row["step"]: row for row in b.steps}
    both = [(row, others[row["step"]]) for row in a.steps if row["step"] in others]
    for mine, theirs in both:
        if mine.get("batch_hash") != theirs.get("batch_hash"):
            return Parting(mine["step"], "batches", len(both))
        if (apart := _apart(mine.get("loss"), theirs.get("loss"))) > ROUNDING:
            return Parting(mine["step"], "losses", len(both), apart)
    return Parting(None, "", len(both))


def _apart(a: float | None, b: float | None) -> float:
    """The relative difference of two losses; a loss that was not finite is written as None."""
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


class Alike(NamedTuple):
    """What figures have in common that are put side by side: their name, their protocol's hash, and which weights."""

    figure: str
    digest: str
    weights: str | None  # "ema", "model", ...; None where nobody says

    def __str__(self) -> str:
        """Name the figure, and the weights where they are not the average that is taken unless asked otherwise."""
        return self.figure if self.weights in (None, "ema") else f"{self.figure} of {self.weights} weights"


@dataclass(frozen=True)
class Measured:
    """A figure of a run at a step. digest: the hash of how it was measured; told: that in full, where it is on file.

    interval: what the bootstrap gave, lower and upper end, or None. weights: which of the run's.
    """

    run: RunTold
    figure: str
    digest: str
    step: int
    value: float
    interval: tuple[float, float] | None = None
    told: Told | None = None
    weights: str | None = None

    @property
    def alike(self) -> Alike:
        """What has to be the same in another one that it is compared with."""
        return Alike(self.figure, self.digest, self.weights)

    @property
    def samples(self) -> int:
        """Samples that the run had seen: steps of other batches are other amounts of training."""
        return self.step * self.run.batch

    @property
    def is_low_good(self) -> bool:
        """Whether less of it is better."""
        return self.figure.partition(" (")[0] not in HIGHER_IS_BETTER


def measured(run: RunTold) -> Iterator[Measured]:
    """Every figure that a run has on file: of its evaluations, and of held-out data."""
    for row in run.evaluations:
        intervals, weights = row.get("intervals") or {}, row.get("weights")
        for name, value in row["figures"].items():
            if isinstance(value, int | float) and not name.endswith(FLOOR):
                figure, interval = titled(row, name), ends(intervals.get(name))
                how = told(row, name) if "protocol" in row else None
                yield Measured(
                    run, figure, hash_of(name, row), row["step"], float(value), interval, how, weights
                )
    for row in run.held_out:
        digest, weights = str(row.get("protocol")), row.get("weights")
        for name, value in row.items():
            if isinstance(value, int | float) and (name in HELD_OUT or name.startswith("frechet_")):
                yield Measured(run, f"held-out {name}", digest, row["step"], float(value), weights=weights)


@dataclass(frozen=True)
class Contest:
    """One figure that two runs or more have by the same protocol. standings: one of each run, the best first."""

    alike: Alike
    standings: Sequence[Measured]

    @classmethod
    def of(cls, found: Sequence[Measured]) -> Contest:
        """Make one of all there is of a figure, in the order in which it was measured.

        Of each run that after as many samples as the others', the most that all have; where there is none, the newest.
        """
        by_run: dict[int, dict[int, Measured]] = {}
        for one in found:
            by_run.setdefault(id(one.run), {})[one.samples] = one
        common = set.intersection(*({*each} for each in by_run.values()))
        taken = [each[max(common or each)] for each in by_run.values()]
        sign = 1 if found[0].is_low_good else -1
        return cls(found[0].alike, sorted(taken, key=lambda one: sign * one.value))

    def __str__(self) -> str:
        """Say which run is best, by how much, and whether that may be chance."""
        best, second = self.standings[:2]
        order = "lower" if best.is_low_good else "higher"
        if best.value == second.value:
            return f"{best.run.name} and {second.run.name} are equal by {self.alike}: {best.value:.4g}"
        words = f"{best.run.name} is best by {self.alike} ({order} is better): {best.value:.4g} against "
        words += f"{second.value:.4g} of {second.run.name}, {_lead(best.value, second.value, order)}"
        if best.samples != second.samples:
            same = best.run.batch == second.run.batch
            batches = "" if same else f" of {best.run.batch} and {second.run.batch} samples"
            words += f"; at steps {best.step} and {second.step}{batches}, which are not the same amount of training"
        if best.interval and second.interval:
            is_clear = best.interval[1] < second.interval[0] or second.interval[1] < best.interval[0]
            words += (
                "; their intervals do not touch"
                if is_clear
                else "; their intervals overlap: it may be chance"
            )
        return words


def _lead(best: float, second: float, order: str) -> str:
    """How far the best is from the second, in words: a share of the second where that has a meaning."""
    gap = abs(best - second)
    if min(best, second) <= 0 or gap > second:  # as of a kernel distance, which may fall below 0
        return f"{gap:.4g} {order}"
    return f"{100 * gap / second:.2g}% {order} than that"


@dataclass(frozen=True)
class Comparison:
    """Several runs beside each other."""

    runs: Sequence[RunTold]

    @cached_property
    def differences(self) -> list[Difference]:
        """The keys that differ, those that decide what a run computes first."""
        keys = sorted({key for run in self.runs for key in run.config} - {*NOT_COMPARED})
        rows = [Difference(key, tuple(run.config.get(key) for run in self.runs)) for key in keys]
        differing = [row for row in rows if any(value != row.values[0] for value in row.values)]
        return sorted(differing, key=lambda row: not row.is_identity)

    @cached_property
    def partings(self) -> list[tuple[RunTold, Parting]]:
        """For each run but the first, where it parts from the first."""
        return [(run, parting(self.runs[0], run)) for run in self.runs[1:]]

    @cached_property
    def unlike(self) -> list[str]:
        """The keys because of which the runs' training losses are of different things; none where they are not."""
        inside = tuple(f"{prefix}." for prefix in DECIDES_LOSS)
        return [row.key for row in self.differences if row.is_identity and f"{row.key}.".startswith(inside)]

    @cached_property
    def figures(self) -> dict[Alike, list[Measured]]:
        """All that the runs have on file, of one figure, protocol and kind of weights together."""
        found: dict[Alike, list[Measured]] = {}
        for run in self.runs:
            for one in measured(run):
                found.setdefault(one.alike, []).append(one)
        return found

    @cached_property
    def contests(self) -> list[Contest]:
        """Every figure that two runs or more have by one protocol; those of drawn images before held-out losses."""
        shared = [ones for ones in self.figures.values() if len({id(one.run) for one in ones}) > 1]
        return [Contest.of(ones) for ones in sorted(shared, key=lambda ones: ones[0].figure == HELD_OUT_LOSS)]

    @cached_property
    def not_comparable(self) -> list[str]:
        """A line for each figure that runs have, but never by one protocol; it says what of their protocols differs."""
        contested, lines = {contest.alike.figure for contest in self.contests}, []
        for figure in dict.fromkeys(alike.figure for alike in self.figures):
            groups = [ones for alike, ones in self.figures.items() if alike.figure == figure]
            if figure in contested or len({id(one.run) for ones in groups for one in ones}) < 2:
                continue
            first = groups[0][-1]
            other = next(ones[-1] for ones in groups if ones[-1].run is not first.run)
            lines.append(
                f"{figure} of {first.run.name} and of {other.run.name} were measured otherwise "
                f"({_unlike(first, other)})"
            )
        return lines


def _unlike(a: Measured, b: Measured) -> str:
    """What of two protocols differs, where both are told, or else of the weights."""
    if a.digest == b.digest:
        return f"of {a.weights} and {b.weights} weights"
    weights = f"of {a.weights} and {b.weights} weights, " if a.weights != b.weights else ""
    words = f"{weights}protocols {a.digest} and {b.digest}"
    if a.told is None or b.told is None:  # of held-out losses the hash alone is on file
        return (
            f"{words}: other held-out data, val.samples or objective, or an older version's way to take them"
        )
    return f"{words}: " + ", ".join(
        f"{key} {mine} and {theirs}" for key, mine, theirs in a.told.unlike(b.told)
    )
