"""Fréchet distance between Gaussians fitted to features, in float64 and without a matrix square root that fails."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dit.config import config
from dit.data import DataError
from dit.evals.metrics.metric import METRICS, FeatureSet, Figures, Metric, Side, Statistics
from dit.evals.metrics.resampling import GENERATED, REFERENCE, Resampling
from dit.progress import Bar

__all__ = ["Frechet", "SpatialFrechet", "Statistics", "frechet_distance"]
NEGATIVE = 1e-6  # of the greatest eigenvalue: what rounding explains of a negative one


@METRICS.register("frechet")
@config
class Frechet(Metric):
    """Fréchet distance of Gaussians with the sets' means and unbiased covariances (Heusel et al., 2017)."""

    figures = ("frechet",)
    takes_statistics = True
    is_shifted = True

    def values(self, generated: FeatureSet, reference: Side, draws: Resampling) -> Figures:
        """Resamples are of both sets; a reference of statistics stays as it is. Each costs what the figure does."""
        of_generated = self._factors(generated, draws, GENERATED)
        of_reference = self._factors(reference, draws, REFERENCE)
        name, found = self.figures[0], []
        with Bar[None](total=1 + draws.count, unit="distance", desc=name, delay=2, leave=False) as bar:
            for a, b in zip(of_generated, of_reference, strict=True):
                found.append(a.distance(b))
                bar.update()
        return {name: np.array(found)}

    def _factors(self, side: Side, draws: Resampling, which: int) -> Iterator[_Factor]:
        """Of a set as it is, then of its resamples."""
        if isinstance(side, Statistics):
            yield from itertools.repeat(_Factor.of(side), 1 + draws.count)
            return
        array = self.array(side)
        for counts in draws.counts(which, len(array)):
            yield _Factor.of(array, counts)


@METRICS.register("frechet_spatial")
@config
class SpatialFrechet(Frechet):
    """The same of features that still know where in the picture they are (Nash et al., 2021, arXiv 2103.03841)."""

    figures = ("frechet_spatial",)
    needs = "spatial"
    is_expected = False


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) (Dowson & Landau, 1982; Heusel et al., 2017).

    With C = F^T F the last trace is the sum of the singular values of F_a F_b^T. They come from the factors and not
    from a product of covariances, whose eigenvalues, each rounded to about 1e-16 of the greatest, are 1e-8 of it under
    the root. Singular covariances (fewer samples than features) are as good as others.
    """
    if a.mean.shape != b.mean.shape:
        raise DataError(f"features of {a.mean.shape[0]} and {b.mean.shape[0]} dimensions cannot be compared")
    return _Factor.of(a).distance(_Factor.of(b))


@dataclass(frozen=True)
class _Factor:
    """A Gaussian as mean (D,) and factor (R, D), of which factor^T factor is the covariance."""

    mean: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, side: np.ndarray | Statistics, counts: np.ndarray | None = None) -> _Factor:
        """Of features (N, D), each counted so often, or of their statistics."""
        if isinstance(side, Statistics):
            return cls(side.mean, _root(side))
        if len(side) > side.shape[1]:
            return cls.of(Statistics.fit(side, counts))
        counts = np.ones(len(side), np.int64) if counts is None else counts
        rows = side[counts > 0].astype(np.float64)
        often = counts[counts > 0]
        mean = often @ rows / often.sum()
        return cls(mean, (rows - mean) * np.sqrt(often / (often.sum() - 1))[:, None])

    def distance(self, other: _Factor) -> float:
        """Below zero only by rounding, which counts as zero."""
        common = np.linalg.svd(self.factor @ other.factor.T, compute_uv=False).sum()
        traces = np.square(self.factor).sum() + np.square(other.factor).sum()
        return max(float(np.square(self.mean - other.mean).sum() + traces - 2 * common), 0.0)


def _root(of: Statistics) -> np.ndarray:
    """A factor (D, D) of a covariance. DataError for a matrix that is none."""
    values, vectors = np.linalg.eigh(np.asarray(of.cov, np.float64))
    if values[0] < -NEGATIVE * abs(values[-1]):
        raise DataError(
            f"a covariance has the eigenvalue {values[0]:.3g} beside {values[-1]:.3g}: expected none below 0"
        )
    if of.count is not None:  # so many samples span fewer dimensions: others have rounding, large by its root
        values[: max(len(values) - of.count + 1, 0)] = 0
    root: np.ndarray = (vectors * np.sqrt(values.clip(min=0))).T
    return root
