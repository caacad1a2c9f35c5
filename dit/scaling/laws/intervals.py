"""How sure a fit is: the bootstrap over runs, all resamples at once, and profiles of the Huber loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import gammaincinv

from dit.progress import Bar
from dit.rng import Draws, Purpose
from dit.scaling.laws.fit import Fitted, Floor
from dit.scaling.laws.law import Law
from dit.scaling.laws.solver import ALPHA, BETA, DELTA, EXPONENTS, A, B, E, Points, predicted, solve

LEVEL = 0.95
CHI2 = 3.841458820694124  # 0.95 quantile of chi² with one degree of freedom
BLOCK = 250  # resamples at a time, so that the bar moves and memory stays small
NAMES = ("E", "A", "B", "alpha", "beta", "n_opt_exponent", "d_opt_exponent")
PROFILED = NAMES[:6]  # the last is 1 − the one before
FIRST, REACH, HALVINGS = 1e-4, 18, 14  # of a profile's search: first step, doublings, halvings after
PLACES = {"A": A, "B": B, "E": E, "alpha": ALPHA, "beta": BETA}  # in theta


def figures(law: Law) -> np.ndarray:
    """The figures of NAMES, (7,) or (R, 7)."""
    ends = np.stack([law.n_opt_exponent, law.d_opt_exponent], -1)
    return np.concatenate([law.rows, ends], -1)


# --- bootstrap ---------------------------------------------------------------------------------------------


def weights(draws: int, spreads: np.ndarray, seed: int) -> np.ndarray:
    """(draws, n): how much each run weighs in each resample, of mean 1 and standard deviations (n,).

    Gamma variables, a function of the seed; with spreads of 1 this is the Bayesian bootstrap (Rubin 1981). Where runs
    are counted whole, a resample may lack a size or a budget, and its law may be anything; here each keeps some weight.
    """
    bits = Draws(seed, 0, torch.arange(draws), max(draws, 1)).bits(Purpose.RESAMPLE, len(spreads)).numpy()
    shape = spreads**-2.0
    drawn: np.ndarray = gammaincinv(shape, (bits + 0.5) * 2.0**-32) / shape
    return drawn


def spreads(points: Points, fitted: Fitted, floor: Floor) -> np.ndarray:
    """(n,): by how much a run's weight is to vary, (1 − h)^(−q²), so that intervals cover as much as they say.

    A run with leverage h draws the fit to itself, and its residual is too small by 1 − h (MacKinnon and White 1985,
    HC3). That matters to residuals within delta alone, a share q of them: the slope of the Huber loss has the same
    size at all others. The power of q is no theorem: of 0, 1 and 2 it is the one with which intervals of known laws
    cover nearest to 95% at every noise (docs/scaling.md has the figures).
    """
    log_loss, (shares,) = predicted(fitted.theta[None], points)
    first, second, third = shares
    rows = np.stack([first, second, third, -first * points.params, -second * points.tokens], 1) @ points.basis
    own = rows[:, [way for way in floor.free if np.abs(rows[:, way]).max() > 0]]
    frame, _ = np.linalg.qr(own / np.linalg.norm(own, axis=0))
    within = float((np.abs(log_loss[0] - points.loss) <= DELTA).mean())
    left: np.ndarray = np.maximum(1 - (frame**2).sum(1), 1 / len(points))
    return left ** -(within**2)


def bootstrap(points: Points, fitted: Fitted, floor: Floor, draws: int, seed: int = 0) -> np.ndarray:
    """(draws, 5) thetas: the law fitted to resamples of the runs, from the optimum of all of them."""
    own = weights(draws, spreads(points, fitted, floor), seed)
    start = _with_some_floor(fitted, points)
    found = np.empty((draws, 5))
    with Bar[None](total=draws, unit="resample", desc="bootstrap", delay=2.0) as bar:
        for begin in range(0, draws, BLOCK):
            rows = slice(begin, min(begin + BLOCK, draws))
            found[rows] = refit(start, points, own[rows], points.basis[:, floor.free])
            bar.update(rows.stop - rows.start)
    return found


def refit(start: np.ndarray, points: Points, weights: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """(R, 5): the law with each row of weights, from one start by two ways, straight and over wider deltas."""
    starts = np.tile(start, (len(weights), 1))
    straight = solve(starts, points, weights, basis=basis, deltas=(DELTA,))
    around = solve(starts, points, weights, basis=basis)
    return np.where((around.huber < straight.huber)[:, None], around.theta, straight.theta)


def _with_some_floor(fitted: Fitted, points: Points) -> np.ndarray:
    """theta of the optimum; with a small E where the best is 0, so that resamples may find another."""
    theta = fitted.theta.copy()
    if fitted.has_bound_e:
        theta[E] = points.loss.min() + np.log(0.05)
    return theta


def percentiles(values: np.ndarray) -> np.ndarray:
    """(2, ...): lower and upper ends of LEVEL of values (draws, ...)."""
    ends: np.ndarray = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return ends


# --- profiles ----------------------------------------------------------------------------------------------


def profile(points: Points, fitted: Fitted, floor: Floor) -> dict[str, tuple[float | None, float | None]]:
    """Intervals of LEVEL by name: what a figure may be before the Huber sum, all else refitted, is too large.

    Too large is where 2·κ·(sum − lowest sum) exceeds chi²'s quantile, κ = mean ψ' / mean ψ² of the residuals, by which
    that difference of an M-estimator is distributed as chi² (Huber and Ronchetti 2009, 13.3). None is an open end.
    """
    names = [name for name in PROFILED if name != "E" or floor.fixed is None]
    kappa = _kappa(points, fitted.theta, len(floor.free))
    law = dict(zip(NAMES, figures(fitted.law).tolist(), strict=True))
    found: dict[str, tuple[float | None, float | None]] = {name: (law[name], law[name]) for name in PROFILED}
    if np.isfinite(kappa):
        start = _with_some_floor(fitted, points)
        found |= _ends(names, start, points, floor, fitted.huber + 0.5 * CHI2 / kappa)
        if fitted.has_bound_e and floor.fixed is None:
            found["E"] = 0.0, found["E"][1]
    low, high = found["n_opt_exponent"]
    found["d_opt_exponent"] = None if high is None else 1 - high, None if low is None else 1 - low
    return found


def _kappa(points: Points, theta: np.ndarray, free: int) -> float:
    """mean ψ' / mean ψ² of the residuals, inf where there are none.

    ψ' is 1 within delta, where few runs lie: their share is taken from a band as wide as half the residuals.
    """
    residuals = np.abs(predicted(theta[None], points)[0][0] - points.loss)
    left = len(points) - free
    squares = float((np.minimum(residuals, DELTA) ** 2).sum()) / left
    if squares < 1e-24:
        return float("inf")
    band = max(float(np.median(residuals)), DELTA)
    return DELTA / band * float((residuals <= band).mean()) / squares


def _ends(
    names: Sequence[str], start: np.ndarray, points: Points, floor: Floor, most: float
) -> dict[str, tuple[float | None, float | None]]:
    """Where the Huber sum comes to `most`, below and above the optimum, by name; E and scales are moved by factors."""
    middles, limits = zip(*(_coordinate(name, start) for name in names), strict=True)
    offsets = FIRST * 2.0 ** np.arange(REACH) * np.array([[-1.0], [1.0]])  # (2, REACH)
    lowest, highest = np.array(limits).T[:, :, None, None]
    values = np.clip(np.array(middles)[:, None, None] + offsets, lowest, highest)  # (names, 2, REACH)
    is_over = _sums(names, values, start, points, floor) > most
    last = np.where(is_over.any(2), is_over.argmax(2), REACH - 1)[..., None]
    before = np.take_along_axis(values, np.maximum(last - 1, 0), 2)
    near = np.where(last > 0, before, np.array(middles)[:, None, None])
    far = np.take_along_axis(values, last, 2)
    for _ in range(HALVINGS):
        between = 0.5 * (near + far)
        beyond = _sums(names, between, start, points, floor) > most
        near, far = np.where(beyond, near, between), np.where(beyond, between, far)
    found: dict[str, tuple[float | None, float | None]] = {}
    for name, ends, over in zip(names, far[..., 0], np.asarray(is_over.any(2)), strict=True):
        scaled = np.exp(ends) if name in ("E", "A", "B") else ends
        low, high = (
            float(end) if is_so else None for end, is_so in zip(scaled, np.asarray(over), strict=True)
        )
        found[name] = (0.0 if name == "E" and low is None else low), high
    return found


def _coordinate(name: str, theta: np.ndarray) -> tuple[float, tuple[float, float]]:
    """What is moved for a figure, at theta, and how far it may go."""
    if name == "n_opt_exponent":
        return float(theta[BETA] / (theta[ALPHA] + theta[BETA])), (1e-3, 1 - 1e-3)
    inside = EXPONENTS if name in ("alpha", "beta") else (-100.0, 250.0)
    return float(theta[PLACES[name]]), inside


def _sums(
    names: Sequence[str], values: np.ndarray, start: np.ndarray, points: Points, floor: Floor
) -> np.ndarray:
    """The lowest Huber sums with each of the figures held at values (names, ...): as many numbers."""
    held = [_held(name, own.ravel(), start, points, floor) for name, own in zip(names, values, strict=True)]
    theta, ways = (np.concatenate(parts) for parts in zip(*held, strict=True))
    return solve(theta, points, basis=ways).huber.reshape(values.shape)


def _held(
    name: str, values: np.ndarray, start: np.ndarray, points: Points, floor: Floor
) -> tuple[np.ndarray, np.ndarray]:
    """Where a fit with a figure held at each of R values begins, (R, 5), and the ways that are left, (R, 5, k − 1)."""
    theta = np.tile(start, (len(values), 1))
    ways = np.tile(points.basis, (len(values), 1, 1))
    if name == "n_opt_exponent":
        shares = np.stack([1 - values, values], 1)  # of α and β in their sum
        moved = shares * (start[ALPHA] + start[BETA])
        theta[:, [A, B]] += (moved - start[[ALPHA, BETA]]) * points.basis[[A, B], [ALPHA, BETA]]
        theta[:, [ALPHA, BETA]] = moved
        both = (ways[:, :, [ALPHA, BETA]] * shares[:, None]).sum(2, keepdims=True)
        kept = [way for way in floor.free if way not in (ALPHA, BETA)]
        return theta, np.concatenate([ways[:, :, kept], both], 2)
    at = PLACES[name]
    theta[:, at] = values
    if at in (ALPHA, BETA):  # the term stays as it is in the middle of the runs
        scale = A if at == ALPHA else B
        theta[:, scale] += (values - start[at]) * points.basis[scale, at]
    elif at in (A, B):  # and here its exponent follows
        exponent = ALPHA if at == A else BETA
        theta[:, exponent] += (values - start[at]) / points.basis[at, exponent]
        theta[:, exponent] = np.clip(theta[:, exponent], *EXPONENTS)
        ways[:, at, exponent] = 0.0
    return theta, ways[:, :, [way for way in floor.free if way != at]]
