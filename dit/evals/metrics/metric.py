"""What figures are computed from, the base of all of them, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit.config import Registry
from dit.data import DataError
from dit.evals.metrics.resampling import Resampling

WORDS = {
    "features": "features",
    "logits": "logits",
    "spatial": "spatial features",
}  # of a FeatureSet's fields
ROWS = 1000  # samples that are converted to float64 and multiplied at a time

Figures = dict[str, np.ndarray]  # name → (1 + B,): of the sets as they are, then of B resamples


@dataclass(frozen=True)
class FeatureSet:
    """Features of N samples, one row each. DataError for arrays that are none: another shape, type, or not finite."""

    features: np.ndarray  # (N, D) floating point
    logits: np.ndarray | None = None  # (N, K) of a classifier, before any softmax
    spatial: np.ndarray | None = None  # (N, S), of places in the picture (Inception's 2,023 for sFID)
    name: str = "features"  # of the set, in messages

    def __post_init__(self) -> None:
        for field, words in WORDS.items():
            if (array := getattr(self, field)) is not None:
                self._check(words, array)

    def _check(self, kind: str, array: np.ndarray) -> None:
        said = f"{self.name}: {kind} of shape {array.shape}, {array.dtype}"
        if array.ndim != 2:
            images = "; these look like images, of which a network has to make features first"
            raise DataError(
                f"{said}; expected a row of numbers for each sample (N, D){images * (array.ndim == 4)}"
            )
        if array.dtype.kind != "f":
            raise DataError(f"{said}; expected floating point numbers")
        if 0 in array.shape:
            raise DataError(f"{said}: there are none")
        if len(array) != len(self.features):
            raise DataError(
                f"{said}, but {len(self.features)} samples have features: they must be of the same samples"
            )
        bad = np.flatnonzero(~np.isfinite(array).all(1))
        if len(bad):
            raise DataError(
                f"{self.name}: {kind} of {len(bad)} of {len(array)} samples are not finite, first in row {bad[0]}"
            )
        if len(array) > 1 and kind != "logits" and (array == array[0]).all():
            raise DataError(
                f"{self.name}: {kind} are the same for all {len(array)} samples, so that there is nothing to measure: "
                "is the model collapsed, or was one image read again and again?"
            )

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Statistics:
    """mean (D,) and cov (D, D), float64, of `count` samples' features; None where nobody says how many."""

    mean: np.ndarray
    cov: np.ndarray
    count: int | None = None

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.cov.shape != 2 * self.mean.shape:
            raise DataError(f"statistics: mean of shape {self.mean.shape} and covariance of {self.cov.shape}; "
                            "expected (D,) and (D, D)")  # fmt: skip
        if not (np.isfinite(self.mean).all() and np.isfinite(self.cov).all()):
            raise DataError("statistics are not finite")

    @classmethod
    def fit(cls, features: np.ndarray, weights: np.ndarray | None = None) -> Statistics:
        """Mean and unbiased covariance of features (N, D), N > 1.

        weights: (N,), how often each sample counts; once without. ValueError where features are not finite or too few.
        Memory: D² numbers and a block of ROWS rows.
        """
        if features.ndim != 2 or len(features) < 2:
            raise DataError(f"expected features (N, D) of at least 2 samples, got {features.shape}")
        if not np.isfinite(features).all():
            raise DataError("features are not finite")
        counts = np.ones(len(features)) if weights is None else np.asarray(weights, np.float64)
        total = counts.sum()
        mean = sum(counts[part] @ rows for part, rows in blocks(features)) / total
        cov = np.zeros((len(mean), len(mean)))
        for part, rows in blocks(features, mean):
            cov += (rows * counts[part, None]).T @ rows
        return cls(mean, cov / (total - 1), int(total))


Side = FeatureSet | Statistics


def blocks(
    features: np.ndarray, centre: np.ndarray | float = 0.0, rows: int = ROWS
) -> Iterator[tuple[slice, np.ndarray]]:
    """(which rows, float64 (≤ rows, D) less the centre), through all of features (N, D)."""
    for start in range(0, len(features), rows):
        part = slice(start, min(start + rows, len(features)))
        yield part, features[part].astype(np.float64) - centre


class Metric(ABC):
    """One or several figures of generated samples beside a reference. Its fields are the figures' protocol."""

    figures: ClassVar[tuple[str, ...]]  # their names
    needs: ClassVar[str] = "features"  # what is looked at of a FeatureSet: features, logits or spatial
    looks_at_reference: ClassVar[bool] = True
    is_expected: ClassVar[bool] = True  # whether a set without what is needed lacks it, or seldom has it
    takes_statistics: ClassVar[bool] = False  # whether the reference's mean and covariance will do
    # Whether a resample's figures are off, beside their spread, for having some samples several times. Intervals are
    # then centred on the figure.
    is_shifted: ClassVar[bool] = False
    # Fields that some of the figures alone depend on, with these figures
    decides: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @abstractmethod
    def values(self, generated: FeatureSet, reference: Side, draws: Resampling) -> Figures:
        """Compute the figures of the sets as they are, and of each resample. `check` has passed."""

    def array(self, side: Side) -> np.ndarray:
        """What is looked at of a set. DataError where the set lacks it."""
        if isinstance(side, Statistics):
            raise DataError(
                f"{self.figures[0]} needs a set's features; there are their mean and covariance alone"
            )
        found: np.ndarray | None = getattr(side, self.needs)
        if found is None:
            raise DataError(f"{side.name}: {self.figures[0]} needs {WORDS[self.needs]}, and the set has none")
        return found

    def can_see(self, generated: FeatureSet, reference: Side) -> bool:
        """Whether the sets have what is needed of them, however little of it."""
        sides = [generated, reference] if self.looks_at_reference else [generated]
        return all(
            self.takes_statistics if isinstance(side, Statistics) else getattr(side, self.needs) is not None
            for side in sides
        )

    def check(self, generated: FeatureSet, reference: Side) -> None:
        """Refuse sets that the figures cannot be computed of, by a DataError."""
        sides = [generated, reference] if self.looks_at_reference else [generated]
        widths = []
        for side in sides:
            if isinstance(side, Statistics) and self.takes_statistics:
                widths.append(len(side.mean))
                continue
            array = self.array(side)
            widths.append(array.shape[1])
            if len(array) < self.at_least:
                named = side.name if isinstance(side, FeatureSet) else ""
                raise DataError(
                    f"{named}: {len(array)} sample(s), and {self.figures[0]} needs at least {self.at_least}"
                )
        if len(set(widths)) > 1:
            raise DataError(
                f"{generated.name} has {WORDS[self.needs]} of {widths[0]} dimensions, the reference of {widths[1]}: "
                "expected those of one network"
            )

    @property
    def at_least(self) -> int:
        """How many samples a set needs."""
        return 2

    def __call__(self, generated: FeatureSet, reference: Side) -> dict[str, float]:
        """Compute {figure: value}. DataError where the sets do not suffice."""
        self.check(generated, reference)
        found = self.values(generated, reference, Resampling())
        return {name: float(values[0]) for name, values in found.items()}


METRICS: Registry[Metric] = Registry("metric")
