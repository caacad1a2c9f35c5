"""Kernel distance: the unbiased squared maximum mean discrepancy with a cubic kernel."""

from __future__ import annotations

import numpy as np

from dit.config import config
from dit.evals.metrics.metric import METRICS, ROWS, FeatureSet, Figures, Metric, Side, blocks
from dit.evals.metrics.resampling import GENERATED, REFERENCE, Resampling
from dit.progress import Bar


@METRICS.register("kid")
@config
class Kid(Metric):
    """Squared MMD over all pairs, unbiased, of kernel (x·y/D + 1)³ (Bińkowski et al., 2018, arXiv 1801.01401)."""

    figures = ("kid",)
    is_shifted = True

    def values(self, generated: FeatureSet, reference: Side, draws: Resampling) -> Figures:
        """Resamples are of both sets; a sample that is drawn twice makes no pair with itself."""
        x, y = self.array(generated), self.array(reference)
        found = squared_mmd(x, y, draws.counts(GENERATED, len(x)), draws.counts(REFERENCE, len(y)))
        return {"kid": found}


def squared_mmd(
    x: np.ndarray, y: np.ndarray, x_counts: np.ndarray, y_counts: np.ndarray, rows: int = ROWS
) -> np.ndarray:
    """(R,) unbiased squared MMDs of x (N, D) and y (M, D), counted as x_counts (R, N) and y_counts (R, M) say.

    Each kernel is computed once, for all R, in blocks of rows × rows: memory is 3 such blocks, 2 × rows × D and the
    counts, in float64, whatever N and M.
    """
    steps = [-(-len(features) // rows) for features in (x, y)]
    pairs = sum(n * (n + 1) // 2 for n in steps) + steps[0] * steps[1]
    with Bar[None](total=pairs, unit="block", desc="kid", delay=2, leave=False) as bar:
        within = [_within(x, x_counts, rows, bar), _within(y, y_counts, rows, bar)]
        between = np.zeros(len(x_counts))
        for i, a in blocks(x, rows=rows):
            for j, b in blocks(y, rows=rows):
                between += _weighted(_kernel(a, b), x_counts[:, i], y_counts[:, j])
                bar.update()
    sizes = x_counts.sum(1, dtype=np.float64) * y_counts.sum(1, dtype=np.float64)
    distances: np.ndarray = within[0] + within[1] - 2 * between / sizes
    return distances


def _within(x: np.ndarray, counts: np.ndarray, rows: int, bar: Bar[None]) -> np.ndarray:
    """(R,) mean kernel over pairs of two samples of one set. The kernel is symmetric: half of it is computed."""
    total = np.zeros(len(counts))
    for i, a in blocks(x, rows=rows):
        kernel = _kernel(a, a)
        np.fill_diagonal(kernel, 0.0)
        total += _weighted(kernel, counts[:, i], counts[:, i])
        bar.update()
        for j, b in blocks(x[i.stop :], rows=rows):
            there = slice(i.stop + j.start, i.stop + j.stop)
            total += 2 * _weighted(_kernel(a, b), counts[:, i], counts[:, there])
            bar.update()
    each = counts.astype(np.float64)
    mean: np.ndarray = total / (each.sum(1) ** 2 - np.square(each).sum(1))
    return mean


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) of float64 (n, D) and (m, D)."""
    inner: np.ndarray = a @ b.T / a.shape[1] + 1.0
    cubed: np.ndarray = inner * inner * inner
    return cubed


def _weighted(kernel: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(R,) sums of the kernel (n, m) with counts (R, n) and (R, m)."""
    sums: np.ndarray = ((left.astype(np.float64) @ kernel) * right).sum(1)
    return sums
