"""Figures of nearest neighbours: do samples lie where the reference does, and the reference where samples do?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from dit.config import config
from dit.data import DataError
from dit.evals.metrics.metric import METRICS, ROWS, FeatureSet, Figures, Metric, Side, blocks
from dit.evals.metrics.resampling import GENERATED, REFERENCE, Resampling
from dit.progress import Bar
from dit.rng import Purpose, permutation

NEAR = 1e-6  # of |x|² + |y|²: squared distances below it are summed anew from differences
TIE = 1e-7  # of a squared radius: distances that differ by less are equal, whatever order they were summed in


@METRICS.register("neighbours")
@config
class Neighbours(Metric):
    """Improved precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    Each sample has a ball as far as its k-th neighbour in its own set, itself not counted. Precision is the share of
    generated samples in some ball of the reference, recall the share of reference samples in some ball of the generated
    ones; density the mean number of the reference's balls that a generated sample is in, over k; coverage the share
    of the reference's balls with a generated sample in them. On a ball's surface is in it for the first two and not
    for the others, as in their authors' programs.
    """

    k: Annotated[int, Field(ge=1)] = 3  # neighbours of precision and recall
    density_k: Annotated[int, Field(ge=1)] = 5  # neighbours of density and coverage
    references: Annotated[int, Field(ge=2)] | None = (
        None  # reference samples, drawn at random; none = all; ADM: 10000
    )
    seed: Annotated[int, Field(ge=0)] = 0  # of which these are

    figures = ("precision", "recall", "density", "coverage")
    decides = {"k": ("precision", "recall"), "density_k": ("density", "coverage")}  # noqa: RUF012

    @property
    def at_least(self) -> int:
        return max(self.k, self.density_k) + 1

    def check(self, generated: FeatureSet, reference: Side) -> None:
        super().check(generated, reference)
        if self.references is not None:
            found = len(self.array(reference))
            if not self.at_least <= self.references <= found:
                raise DataError(
                    f"neighbours.references is {self.references}; expected {self.at_least} (of k and density_k) to "
                    f"{found} (as many as there are)"
                )

    def values(self, generated: FeatureSet, reference: Side, draws: Resampling) -> Figures:
        """Resamples are of the samples that are counted, generated or reference, given all balls as they are.

        What the balls would be around other samples is not in the intervals: anew drawn pairs of sets spread wider (1.5
        to 1.8 times for 150 and 200 samples of Gaussians in 4 dimensions).
        """
        x, y = self.array(generated), self.array(reference)
        if self.references is not None:
            y = y[np.sort(permutation(self.seed, Purpose.SUBSET, 0, len(y))[: self.references])]
        found = membership(x, y, self.k, self.density_k)
        of_generated, of_reference = draws.counts(GENERATED, len(x)), draws.counts(REFERENCE, len(y))
        return {
            "precision": of_generated @ found.realistic / len(x),
            "recall": of_reference @ found.recalled / len(y),
            "density": of_generated @ found.depth / (self.density_k * len(x)),
            "coverage": of_reference @ found.covered / len(y),
        }


@dataclass(frozen=True)
class Membership:
    """Which samples are in whose balls."""

    realistic: np.ndarray  # (N,) bool: the generated sample is in some reference ball
    depth: np.ndarray  # (N,) int64: in how many of density_k neighbours
    recalled: np.ndarray  # (M,) bool: the reference sample is in some generated ball
    covered: np.ndarray  # (M,) bool: some generated sample is in its ball of density_k neighbours


def membership(x: np.ndarray, y: np.ndarray, k: int, density_k: int, rows: int = ROWS) -> Membership:
    """Of generated x (N, D) and reference y (M, D).

    Distances are computed in blocks of rows × rows: memory is a few such blocks, 2 × rows × D and some numbers for each
    sample, in float64, whatever N and M (at 1,000 rows and D = 2,048 about 0.1 GiB).
    """
    centre = sum(part.sum(0) for _, part in blocks(y, rows=rows)) / len(y)  # less is lost to cancellation
    steps = [-(-len(features) // rows) for features in (x, y)]
    with Bar[None](
        total=steps[0] ** 2 + steps[1] ** 2 + steps[0] * steps[1],
        unit="block",
        desc="neighbours",
        delay=2,
        leave=False,
    ) as bar:
        of_x = radii(x, [k], centre, rows, bar)[0]
        of_y, of_y_density = radii(y, [k, density_k], centre, rows, bar)
        found = Membership(
            np.zeros(len(x), bool), np.zeros(len(x), np.int64), np.zeros(len(y), bool), np.zeros(len(y), bool)
        )
        for i, a in blocks(x, centre, rows):
            for j, b in blocks(y, centre, rows):
                apart = squared_distances(a, b)
                found.realistic[i] |= (apart <= of_y[j] * (1 + TIE)).any(1)
                found.recalled[j] |= (apart <= of_x[i, None] * (1 + TIE)).any(0)
                inside = apart < of_y_density[j] * (1 - TIE)
                found.depth[i] += inside.sum(1)
                found.covered[j] |= inside.any(0)
                bar.update()
    return found


def radii(x: np.ndarray, ks: list[int], centre: np.ndarray, rows: int, bar: Bar[None]) -> np.ndarray:
    """(len(ks), N) squared distances of each of x (N, D) to its k-th neighbour, itself not counted."""
    found = np.empty((len(ks), len(x)))
    most = max(ks)
    for i, a in blocks(x, centre, rows):
        nearest = np.full((len(a), most), np.inf)
        for j, b in blocks(x, centre, rows):
            apart = squared_distances(a, b)
            if i == j:
                np.fill_diagonal(apart, np.inf)
            nearest = np.partition(np.concatenate([nearest, apart], axis=1), most - 1, axis=1)[:, :most]
            bar.update()
        found[:, i] = np.sort(nearest, axis=1)[:, [k - 1 for k in ks]].T
    return found


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) of float64 (n, D) and (m, D), good to about 1e-9 of themselves; exactly 0 for equal rows."""
    sizes = np.square(a).sum(1)[:, None] + np.square(b).sum(1)
    apart: np.ndarray = sizes - 2 * (a @ b.T)
    left, right = np.nonzero(apart < NEAR * sizes)
    for start in range(0, len(left), ROWS):
        i, j = left[start : start + ROWS], right[start : start + ROWS]
        apart[i, j] = np.square(a[i] - b[j]).sum(1)
    return apart
