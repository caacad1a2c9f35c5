"""Kernel distance: the unbiased squared maximum mean discrepancy with a cubic kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

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

    Each kernel is computed once, for all R, in blocks of rows × rows: memory is 3 such blocks (8 where features lie far
    from 0), 2 × rows × D and the counts, in float64, whatever N and M.
    """
    about = _About.far(y)
    kernel = _kernel if about is None else about.kernel
    centre = 0.0 if about is None else about.centre
    steps = [-(-len(features) // rows) for features in (x, y)]
    pairs = sum(n * (n + 1) // 2 for n in steps) + steps[0] * steps[1]
    with Bar[None](total=pairs, unit="block", desc="kid", delay=2, leave=False) as bar:
        within = [_within(z, w, rows, bar, kernel, centre) for z, w in ((x, x_counts), (y, y_counts))]
        between = np.zeros(len(x_counts))
        for i, a in blocks(x, centre, rows):
            for j, b in blocks(y, centre, rows):
                between += _weighted(kernel(a, b), x_counts[:, i], y_counts[:, j])
                bar.update()
    sizes = x_counts.sum(1, dtype=np.float64) * y_counts.sum(1, dtype=np.float64)
    distances: np.ndarray = within[0] + within[1] - 2 * between / sizes
    if about is not None:
        distances += about.single(x, x_counts) + about.single(y, y_counts)
    return distances


KernelFn = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _About:
    """The kernel about a point m far from 0, where sums of it would cancel but for their last digits.

    With u = x − m, a = m·u/D, q = u·u'/D, c = |m|²/D + 1 and v = c + a + a' the kernel is (v + q)³. What of it depends
    on one sample alone cancels in the distance of sets in which each sample counts once, and is left out of `kernel`.
    """

    centre: np.ndarray  # (D,)
    FAR: ClassVar[float] = 100.0  # |m|² over the mean |u|²: about less the plain sum is as good

    @classmethod
    def far(cls, features: np.ndarray) -> _About | None:
        """About the mean of features; None where they do not lie far from 0."""
        mean = sum(rows.sum(0) for _, rows in blocks(features)) / len(features)
        spread = sum(float(np.square(rows).sum()) for _, rows in blocks(features, mean)) / len(features)
        return cls(mean) if float(mean @ mean) > cls.FAR * spread else None

    @property
    def constant(self) -> float:
        """c."""
        return float(self.centre @ self.centre) / len(self.centre) + 1.0

    def linear(self, u: np.ndarray) -> np.ndarray:
        """a of each row, (n,)."""
        found: np.ndarray = u @ self.centre / len(self.centre)
        return found

    def kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(n, m) of rows less the centre: what of the kernel depends on both samples."""
        mine, theirs = self.linear(a)[:, None], self.linear(b)[None]
        inner, level = a @ b.T / len(self.centre), self.constant + (mine + theirs)
        found: np.ndarray = inner * (3 * level * (level + inner) + inner * inner)
        found += 3 * mine * theirs * (self.constant + level)
        return found

    def single(self, features: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(R,) what the parts that depend on one sample give where samples count several times, and 0 elsewhere."""
        each, c = counts.astype(np.float64), self.constant
        total, squares = each.sum(1, keepdims=True), np.square(each).sum(1, keepdims=True)
        share = each * (squares - each * total) / (total * (total**2 - squares))
        a = np.concatenate([self.linear(u) for _, u in blocks(features, self.centre)])
        found: np.ndarray = 2 * share @ (a * (3 * c * (c + a) + a * a))
        return found


def _within(
    x: np.ndarray,
    counts: np.ndarray,
    rows: int,
    bar: Bar[None],
    kernel_of: KernelFn,
    centre: np.ndarray | float,
) -> np.ndarray:
    """(R,) mean kernel over pairs of two samples of one set. The kernel is symmetric: half of it is computed."""
    total = np.zeros(len(counts))
    for i, a in blocks(x, centre, rows):
        kernel = kernel_of(a, a)
        np.fill_diagonal(kernel, 0.0)
        total += _weighted(kernel, counts[:, i], counts[:, i])
        bar.update()
        for j, b in blocks(x[i.stop :], centre, rows):
            there = slice(i.stop + j.start, i.stop + j.stop)
            total += 2 * _weighted(kernel_of(a, b), counts[:, i], counts[:, there])
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
