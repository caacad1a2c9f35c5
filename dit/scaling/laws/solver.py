"""Newton's method for many Huber fits of L = E + A/N^α + B/D^β at once: starts and resamples are rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DELTA = 1e-3  # of the Huber loss on log L (arXiv 2203.15556, D.3)
A, B, E, ALPHA, BETA = range(5)  # of theta = (log A, log B, log E, α, β)
STEPS, FEW = 100, 20  # of Newton's method at the last delta, and at each before it, at most
WIDE = (
    1e-1,
    1e-2,
)  # deltas that come first: far from the optimum a Huber loss of 1e-3 has next to no curvature
DONE, NEAR = 1e-12, 1e-3  # relative gain of a step from which it ends, at the last delta, and at those before
EXPONENTS = (1e-6, 8.0)  # that α and β may have


@dataclass(frozen=True)
class Points:
    """What is fitted: logarithms of params, tokens and loss, (n,) each."""

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(cls, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> Points:
        """Take the logarithms of positive numbers, (n,) each."""
        return cls(np.log(params), np.log(tokens), np.log(loss))

    def chosen(self, which: np.ndarray) -> Points:
        """Some of them, by a mask or numbers."""
        return Points(self.params[which], self.tokens[which], self.loss[which])

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def pairs(self) -> int:
        """Count pairs of params and tokens that are unlike, to a relative 1e-5: runs less their repetitions."""
        return len(np.unique(np.round(np.stack([self.params, self.tokens], 1), 5), axis=0))

    @property
    def basis(self) -> np.ndarray:
        """(5, 5): ways for theta to move that hardly hang together, as a term's scale and exponent do.

        Columns are log A, log B, log E, and each exponent with its term held at the mean of log N or log D.
        """
        ways = np.eye(5)
        ways[A, ALPHA], ways[B, BETA] = self.params.mean(), self.tokens.mean()
        return ways


@dataclass(frozen=True)
class Solved:
    """theta (R, 5), huber (R,): the weighted sum at theta; converged (R,): whether no step lowers it any more."""

    theta: np.ndarray
    huber: np.ndarray
    converged: np.ndarray


def predicted(theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
    """log L (R, n) at theta (R, 5), and the shares (R, 3, n) of its terms A/N^α, B/D^β and E, which sum to 1."""
    terms = np.empty((len(theta), 3, len(points)))
    terms[:, 0] = theta[:, A, None] - theta[:, ALPHA, None] * points.params
    terms[:, 1] = theta[:, B, None] - theta[:, BETA, None] * points.tokens
    terms[:, 2] = theta[:, E, None]
    top = terms.max(1)
    terms -= top[:, None]
    np.exp(terms, out=terms)
    total = terms.sum(1)
    terms /= total[:, None]
    return top + np.log(total), terms


def huber(residuals: np.ndarray, delta: float = DELTA) -> np.ndarray:
    """The Huber loss of each: r²/2 within delta, delta·(|r| − delta/2) beyond."""
    size = np.abs(residuals)
    losses: np.ndarray = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    return losses


def objective(theta: np.ndarray, points: Points, weights: np.ndarray, delta: float = DELTA) -> np.ndarray:
    """(R,) sums of Huber losses, each run counted as often as weights (R, n) or (n,) say; inf out of bounds."""
    with np.errstate(over="ignore", invalid="ignore"):
        log_loss, _ = predicted(theta, points)
        sums: np.ndarray = (weights * huber(log_loss - points.loss, delta)).sum(1)
    exponents = theta[:, [ALPHA, BETA]]
    outside = ((exponents < EXPONENTS[0]) | (exponents > EXPONENTS[1])).any(1)
    return np.where(outside | ~np.isfinite(sums), np.inf, sums)


def derivatives(
    theta: np.ndarray, points: Points, weights: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient (R, 5) and Hessian (R, 5, 5) of `objective`.

    With shares p of the terms z (linear in theta, rows v): ∂r = Σ p v, ∂²r = Σ p v vᵀ − ∂r ∂rᵀ.
    """
    log_loss, shares = predicted(theta, points)
    residual = log_loss - points.loss
    slope = weights * np.clip(residual, -delta, delta)  # (R, n)
    first, second = shares[:, 0], shares[:, 1]
    rows = np.stack([first, second, shares[:, 2], -first * points.params, -second * points.tokens], 1)
    gradient = np.einsum("rkn,rn->rk", rows, slope)
    curvature = weights * (np.abs(residual) <= delta) - slope
    hessian = (rows * curvature[:, None]) @ rows.transpose(0, 2, 1)
    bent = slope[:, None] * shares  # (R, 3, n)
    for term, (scale, exponent, at) in enumerate(((A, ALPHA, points.params), (B, BETA, points.tokens))):
        once, twice = bent[:, term] @ at, bent[:, term] @ at**2
        hessian[:, scale, scale] += bent[:, term].sum(1)
        hessian[:, scale, exponent] -= once
        hessian[:, exponent, scale] -= once
        hessian[:, exponent, exponent] += twice
    hessian[:, E, E] += bent[:, 2].sum(1)
    return gradient, hessian


def solve(
    theta: np.ndarray,
    points: Points,
    weights: np.ndarray | None = None,
    *,
    basis: np.ndarray | None = None,
    deltas: tuple[float, ...] = (*WIDE, DELTA),
) -> Solved:
    """Minimise the Huber sum from theta (R, 5), one delta after the other, by Newton's method in a trust region.

    weights: (R, n) or (n,), how much each run counts. basis: (5, k) or (R, 5, k); theta moves by basis @ step alone,
    which holds a parameter fixed, or two in a ratio; all of them are free by default. A log E of −inf stays so: that
    is the law without E.
    """
    times = np.ones((1, len(points))) if weights is None else np.atleast_2d(weights).astype(float)
    ways = points.basis if basis is None else basis
    ways = np.broadcast_to(ways, (len(theta), *ways.shape[-2:]))
    converged = np.zeros(len(theta), bool)
    for delta in deltas:
        how = (STEPS, DONE) if delta == deltas[-1] else (FEW, NEAR)
        theta, sums, converged = _at_delta(theta, points, times, ways, delta, *how)
    return Solved(theta, sums, converged)


def _at_delta(
    theta: np.ndarray,
    points: Points,
    weights: np.ndarray,
    ways: np.ndarray,
    delta: float,
    steps: int,
    done: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """theta, its sums, whether they are at a minimum; rows that are done are left out of further steps."""
    theta = theta.copy()
    sums = objective(theta, points, weights, delta)
    damping = np.full(len(theta), 1e-2)
    converged = np.zeros(len(theta), bool)
    for _ in range(steps):
        busy = np.flatnonzero(~converged)
        if not len(busy):
            break
        own = weights if len(weights) == 1 else weights[busy]
        step, gain = _step(theta[busy], points, own, ways[busy], delta, damping[busy])
        after = theta[busy] + np.where(np.isfinite(theta[busy]), step, 0.0)
        now = objective(after, points, own, delta)
        better = now < sums[busy]
        theta[busy[better]], size = after[better], sums[busy]
        sums[busy[better]] = now[better]
        damping[busy] = np.clip(np.where(better, damping[busy] / 5, damping[busy] * 4), 1e-12, 1e12)
        converged[busy] = gain <= done * size + 1e-28
    return theta, sums, converged


def _step(
    theta: np.ndarray,
    points: Points,
    weights: np.ndarray,
    ways: np.ndarray,
    delta: float,
    damping: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A step of theta (R, 5), and by how much a quadratic model says that it lowers the sum (R,)."""
    gradient, hessian = derivatives(theta, points, weights, delta)
    slopes = np.einsum("rik,ri->rk", ways, gradient)
    bends = ways.transpose(0, 2, 1) @ hessian @ ways
    scale = np.sqrt(np.maximum(np.abs(np.diagonal(bends, axis1=1, axis2=2)), 1e-30))
    values, vectors = np.linalg.eigh(bends / scale[:, :, None] / scale[:, None, :])
    along = np.einsum("rki,rk->ri", vectors, slopes / scale)
    lengths = -along / (np.abs(values) + damping[:, None])
    gain = -(lengths * along + 0.5 * values * lengths**2).sum(1)
    moved = np.einsum("rki,ri->rk", vectors, lengths) / scale
    return np.einsum("rik,rk->ri", ways, moved), gain
