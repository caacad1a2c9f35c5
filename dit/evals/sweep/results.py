"""What a sweep found, seeds put together: means, their errors, and differences of what is from the same noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit.evals.metrics.resampling import interval
from dit.evals.sweep.axes import Setting
from dit.evals.sweep.cells import Cell, Measured
from dit.evals.sweep.floors import Floor

LEAST_IS_BEST = ("frechet", "frechet_spatial", "fid", "sfid", "kid", "mind")  # of the others the greatest is


@dataclass(frozen=True)
class Value:
    """A figure, or a difference of two, over seeds. error: standard error over them, None of a single one.

    interval: of LEVEL, from resamples of images (their numbers the same in whatever is compared); None without.
    """

    mean: float
    error: float | None = None
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Sequence[float], resamples: Sequence[np.ndarray], is_shifted: bool) -> Value:
        """values: one for each seed. resamples: (1 + B,) of each seed, or none."""
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        ends = interval(np.mean(resamples, axis=0), is_shifted) if len(resamples) == len(values) else None
        return cls(float(np.mean(values)), error, ends)

    def text(self, digits: int = 4) -> str:
        """As "1.234 ± 0.012 [1.201, 1.259]"."""
        words = f"{self.mean:.{digits}g}"
        if self.error is not None:
            words += f" ± {self.error:.2g}"
        if self.interval is not None:
            words += f" [{self.interval[0]:.{digits}g}, {self.interval[1]:.{digits}g}]"
        return words


@dataclass(frozen=True)
class Group:
    """The cells of one run and setting, one for each seed, with what was found of each."""

    run: str
    setting: Setting
    cells: tuple[tuple[Cell, Measured | None], ...]

    @property
    def lacking(self) -> str:
        """Why there are no figures: "", or what stands in the table in their place."""
        if any(cell.spec is None for cell, _ in self.cells):
            return "-"
        return "not finite" if any(m is None or m.not_finite for _, m in self.cells) else ""

    @property
    def nfe(self) -> float | None:
        """Evaluations of the guided denoiser an image, the mean over seeds."""
        found = [m.nfe for _, m in self.cells if m is not None and m.nfe is not None]
        return float(np.mean(found)) if found else None

    def value(self, space: str, name: str) -> Value | None:
        """A figure; None where there is none."""
        return None if self.lacking else self._value(space, name, None)

    def minus(self, other: Group, space: str, name: str) -> Value | None:
        """This less another one, seed by seed; None where a figure lacks, or their noise is not the same."""
        same = [a.noise == b.noise for (a, _), (b, _) in zip(self.cells, other.cells, strict=True)]
        return None if self.lacking or other.lacking or not all(same) else self._value(space, name, other)

    def _value(self, space: str, name: str, other: Group | None) -> Value | None:
        values, resamples, is_shifted = list[float](), list[np.ndarray](), False
        theirs = [None] * len(self.cells) if other is None else [m for _, m in other.cells]
        for (_, ours), their in zip(self.cells, theirs, strict=True):
            mine = None if ours is None else ours.figure(space, name)
            base = 0.0 if their is None else their.figure(space, name)
            if ours is None or mine is None or base is None:
                return None
            values.append(mine - base)
            drawn = ours.resamples(space, name)
            less = None if their is None else their.resamples(space, name)
            if drawn is not None and (their is None or less is not None):
                resamples.append(drawn.values - (0.0 if less is None else less.values))
                is_shifted = drawn.is_shifted
        return Value.of(values, resamples, is_shifted)


@dataclass(frozen=True)
class Results:
    """Everything that was found. floors: by feature space. spaces: figures by feature space, in order."""

    groups: tuple[Group, ...]
    spaces: Mapping[str, tuple[str, ...]]
    about: Mapping[str, Any]  # JSON values that all cells share
    floors: Mapping[str, Floor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        cells: Sequence[tuple[Cell, Measured | None]],
        about: Mapping[str, Any],
        floors: Mapping[str, Floor],
    ) -> Results:
        """Put the seeds of each run and setting together."""
        together: dict[tuple[str, Setting], list[tuple[Cell, Measured | None]]] = {}
        for cell, found in cells:
            together.setdefault((cell.run, cell.setting), []).append((cell, found))
        spaces: dict[str, dict[str, None]] = {}
        for _, found in cells:
            for name, space in (found.values.get("spaces", {}) if found else {}).items():
                spaces.setdefault(name, {}).update(dict.fromkeys(space["figures"]))
        groups = tuple(Group(run, setting, tuple(own)) for (run, setting), own in together.items())
        return cls(groups, {name: tuple(own) for name, own in spaces.items()}, about, floors)

    @property
    def runs(self) -> list[str]:
        """Names of the runs."""
        return list(dict.fromkeys(group.run for group in self.groups))

    @property
    def figures(self) -> Iterator[tuple[str, str]]:
        """(feature space, figure), all of them."""
        return ((space, name) for space, names in self.spaces.items() for name in names)

    def best(self, space: str, name: str, groups: Sequence[Group] | None = None) -> Group | None:
        """The group whose figure is the best, of all or of these; None where there is none."""
        sign = 1 if name in LEAST_IS_BEST else -1
        found = [(g.value(space, name), g) for g in (self.groups if groups is None else groups)]
        known = [(sign * value.mean, index) for index, (value, _) in enumerate(found) if value is not None]
        return found[min(known)[1]][1] if known else None

    def against_best(self, space: str, name: str) -> list[tuple[Group, Value]]:
        """Every other group less the best one, where their noise is the same."""
        best = self.best(space, name)
        if best is None:
            return []
        pairs = [(g, g.minus(best, space, name)) for g in self.groups if g is not best]
        return [(g, value) for g, value in pairs if value is not None]

    def against_first(self, space: str, name: str) -> list[tuple[Group, Value]]:
        """Groups of the other runs less the first run's at the same setting, where their noise is the same."""
        first = {g.setting: g for g in self.groups if g.run == self.runs[0]}
        pairs = [(g, first.get(g.setting)) for g in self.groups if g.run != self.runs[0]]
        found = [(g, g.minus(base, space, name)) for g, base in pairs if base is not None]
        return [(g, value) for g, value in found if value is not None]

    def as_json(self) -> dict[str, Any]:
        """JSON values: a row for each group and figure."""
        rows = []
        for space, name in self.figures:
            best = {id(g): value for g, value in self.against_best(space, name)}
            first = {id(g): value for g, value in self.against_first(space, name)}
            for group in self.groups:
                values = {
                    "value": group.value(space, name),
                    "minus_best": best.get(id(group)),
                    "minus_first_run": first.get(id(group)),
                }
                kept = {key: None if v is None else dataclasses.asdict(v) for key, v in values.items()}
                where = {"run": group.run, **group.setting.words, "steps": group.setting.steps}
                rows.append({**where, "nfe": group.nfe, "features": space, "figure": name, **kept})
        floors = {name: floor.as_json() for name, floor in self.floors.items()}
        hashes = [cell.hash for g in self.groups for cell, _ in g.cells if cell.spec is not None]
        return {"cells": hashes, "rows": rows, "floors": floors}
