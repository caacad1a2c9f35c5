"""Monge Inception Distance: the sliced 2-Wasserstein distance of two sets of features, by sorting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from dit.config import config
from dit.evals.metrics.metric import METRICS, FeatureSet, Figures, Metric, Side, blocks
from dit.evals.metrics.resampling import GENERATED, REFERENCE, Resampling
from dit.progress import Bar
from dit.rng import Draws, Purpose

AT_A_TIME = 20  # directions


@METRICS.register("mind")
@config
class Mind(Metric):
    """scale · D · mean over directions of W2² of the projections (Berthet et al., 2026, arXiv 2605.06797)."""

    projections: Annotated[int, Field(ge=1)] = 1000  # directions, uniform on the sphere
    seed: Annotated[int, Field(ge=0)] = 0  # of the directions
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = (
        3.0  # times D: 3 is the paper's, which brings figures near those of FID
    )

    figures = ("mind",)
    is_shifted = True

    def values(self, generated: FeatureSet, reference: Side, draws: Resampling) -> Figures:
        """Resamples are of both sets, each projected on the same directions."""
        x, y = self.array(generated), self.array(reference)
        picks = [
            [np.repeat(np.arange(len(side)), row) for row in draws.counts(which, len(side))]
            for which, side in ((GENERATED, x), (REFERENCE, y))
        ]
        total = np.zeros(1 + draws.count)
        quantiles = Quantiles.of(len(x), len(y))
        with Bar[None](total=self.projections, unit="direction", desc="mind", delay=2, leave=False) as bar:
            for start in range(0, self.projections, AT_A_TIME):
                u = self.directions(start, min(start + AT_A_TIME, self.projections), x.shape[1])
                a, b = _project(x, u), _project(y, u)
                for row, (i, j) in enumerate(zip(*picks, strict=True)):
                    total[row] += quantiles.squared_w2(a[:, i], b[:, j]).sum()
                bar.update(len(u))
        return {"mind": self.scale * x.shape[1] * total / self.projections}

    def directions(self, first: int, end: int, dimensions: int) -> np.ndarray:
        """(end - first, D) float64 unit vectors, of numbers `first` to `end`, each a function of the seed."""
        slots = torch.arange(first, end)
        drawn = (
            Draws(self.seed, 0, slots, self.projections)
            .normal(Purpose.DIRECTIONS, (dimensions,))
            .double()
            .numpy()
        )
        unit: np.ndarray = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        return unit


@dataclass(frozen=True)
class Quantiles:
    """Where the quantile functions of N and M values are constant at once: which values these are, and how long.

    W2² of two sets on a line is the integral of (F⁻¹ − G⁻¹)² over [0, 1], which for N ≠ M is a sum over at most
    N + M − 1 stretches: exact, with no values left out or interpolated.
    """

    left: np.ndarray  # (S,) indices of the N values, sorted
    right: np.ndarray  # (S,) of the M
    lengths: np.ndarray  # (S,) float64, of sum 1

    @classmethod
    def of(cls, n: int, m: int) -> Quantiles:
        """Of n and m values."""
        ours, theirs = (
            np.arange(1, n + 1) * m,
            np.arange(1, m + 1) * n,
        )  # where one ends, in 1 / (n·m): exact integers
        ends = np.union1d(ours, theirs)
        return cls(
            np.searchsorted(ours, ends), np.searchsorted(theirs, ends), np.diff(ends, prepend=0) / (n * m)
        )

    def squared_w2(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(L,) of values (L, N) and (L, M)."""
        gaps = np.sort(a, axis=1)[:, self.left] - np.sort(b, axis=1)[:, self.right]
        distances: np.ndarray = np.square(gaps) @ self.lengths
        return distances


def _project(features: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(L, N) float64 of features (N, D) on directions (L, D)."""
    return np.concatenate([directions @ rows.T for _, rows in blocks(features)], axis=1)
