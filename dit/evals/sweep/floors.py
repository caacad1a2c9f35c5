"""How far apart real images are: the best to hope for, at the very counts that samples are compared at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit.evals.metrics.metric import WORDS, FeatureSet, Metric, Side
from dit.evals.sides import Sides
from dit.rng import Purpose, permutation

STEP = 1  # of the draws: 0 is that of images chosen from a set


@dataclass(frozen=True)
class Floor:
    """Figures of real images, a value for each split, of so many in the samples' place and the reference's.

    reference: None where that is statistics of whoever knows how many.
    """

    figures: Mapping[str, list[float]]
    samples: int
    reference: int | None

    def mean(self, figure: str) -> float | None:
        """Over the splits; None where there is none of this figure."""
        return float(np.mean(self.figures[figure])) if figure in self.figures else None

    def spread(self, figure: str) -> float | None:
        """The standard deviation over the splits; None of a single one."""
        values = self.figures.get(figure, [])
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"figures": dict(self.figures), "samples": self.samples, "reference": self.reference}


def floor_of(
    held_out: FeatureSet,
    side: Sides,
    metrics: Mapping[str, Metric],
    count: int,
    splits: int,
    names: Mapping[str, str],
) -> Floor:
    """Figures of `count` real images beside as many as the reference has, from `splits` random splits of all of them.

    held_out: `count` images or more. All, held out or reference, are put together and split at random, so that both
    sides are of one distribution. Where the reference is statistics alone, so many of the held-out images are taken at
    random and compared with these. names: what figures are called in this space.
    """
    found: dict[str, list[float]] = {}
    reference: int | None = None
    for metric in metrics.values():
        other = side.for_metric(metric)
        reference = len(other) if isinstance(other, FeatureSet) else other.count
        for split in range(splits):
            ours, theirs = _split(held_out, other, count, split)
            for name, value in metric(ours, theirs).items():
                found.setdefault(names.get(name, name), []).append(value)
    return Floor(found, count, reference)


def _split(held_out: FeatureSet, reference: Side, count: int, split: int) -> tuple[FeatureSet, Side]:
    if not isinstance(reference, FeatureSet):
        order = permutation(split, Purpose.SUBSET, STEP, len(held_out))
        return _rows([held_out], order[:count]), reference
    order = permutation(split, Purpose.SUBSET, STEP, len(held_out) + len(reference))
    both = [held_out, reference]
    return _rows(both, order[:count]), _rows(both, order[count : count + len(reference)])


def _rows(sets: list[FeatureSet], rows: np.ndarray) -> FeatureSet:
    """These rows of sets put together; of arrays that all of them have."""
    taken = {}
    for field in WORDS:
        arrays = [getattr(each, field) for each in sets]
        if all(array is not None for array in arrays):
            taken[field] = np.concatenate(arrays)[rows]
    return FeatureSet(**taken, name=" and ".join(each.name for each in sets))
