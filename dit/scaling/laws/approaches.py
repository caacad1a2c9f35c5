"""The two other ways of arXiv 2203.15556 to N_opt(C): the envelope of losses, and parabolas at equal FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dit.scaling.laws.law import Law
from dit.scaling.laws.table import Runs

WINDOW = np.log(1.25)  # runs whose FLOPs differ by less are of one budget
SIZES = 4  # that a budget needs for a parabola
BUDGETS = 3  # that a power law of C needs
BIAS = (
    "a parabola in log N is not the law's shape: its exponent is off where alpha and beta differ, the grid of sizes "
    "is wide or its middle is not at the optimum (arXiv 2603.22339); `bias` is by how much, on exact losses of the "
    "fitted law"
)
Groups = list[np.ndarray]  # numbers of the runs of each budget


def budgets(flops: np.ndarray, params: np.ndarray, sizes: int = SIZES) -> Groups:
    """Runs of equal FLOPs, from few FLOPs to many: windows of 25%, the fullest first, of at least `sizes` sizes."""
    log_flops, log_params = np.log(flops), np.log(params)
    left = np.ones(len(flops), bool)
    found: Groups = []
    while left.any():
        begins = log_flops[left][:, None]
        windows = (log_flops >= begins) & (log_flops <= begins + WINDOW) & left
        windows = windows[[len(distinct(log_params[one])) >= sizes for one in windows]]
        if not len(windows):
            break
        own = windows[windows.sum(1).argmax()]
        found.append(np.flatnonzero(own))
        left &= ~own
    return sorted(found, key=lambda own: float(log_flops[own].mean()))


def distinct(values: np.ndarray) -> np.ndarray:
    """Sizes among logarithms: those within 1% are one."""
    ordered = np.sort(values)
    kept: np.ndarray = ordered[np.concatenate([[True], np.diff(ordered) > 0.01])]
    return kept


def approaches(runs: Runs, law: Law) -> dict[str, Any]:
    """{envelope, isoflop}: exponents and coefficients of N_opt(C), D_opt(C), with the points they come from.

    Where there are too few points for one, it has `why` and no exponents. bias: its exponent of N_opt less the law's,
    on losses without noise that the fitted law has at these runs.
    """
    ways: dict[str, Callable[[Runs, np.ndarray], tuple[list[list[float]], str]]] = {
        "envelope": _envelope,
        "isoflop": _parabolas,
    }
    found: dict[str, Any] = {}
    for name, way in ways.items():
        points, why = way(runs, runs.loss)
        if len(points) < BUDGETS:
            found[name] = {"n_opt_exponent": None, "why": why, "points": points}
            continue
        exact, _ = way(runs, law.loss(runs.params, runs.tokens))
        bias = _power(exact)["n_opt_exponent"] - law.n_opt_exponent if len(exact) >= BUDGETS else None
        note = BIAS if name == "isoflop" else "the lowest losses of a grid of sizes: no finer than the grid"
        found[name] = {**_power(points), "bias": bias, "points": points, "note": note}
    return found


def _power(points: list[list[float]]) -> dict[str, float]:
    """Power laws of N_opt and D_opt in C, by least squares of logarithms of points [flops, params, tokens, loss]."""
    flops, params, tokens, _ = np.log(np.array(points)).T
    (n_slope, n_end), (d_slope, d_end) = np.polyfit(flops, params, 1), np.polyfit(flops, tokens, 1)
    return {
        "n_opt_exponent": float(n_slope),
        "d_opt_exponent": float(d_slope),
        "n_opt_coefficient": float(np.exp(n_end)),
        "d_opt_coefficient": float(np.exp(d_end)),
    }


def _envelope(runs: Runs, loss: np.ndarray) -> tuple[list[list[float]], str]:
    """Approach 1: the runs that no run of as many FLOPs or fewer beats."""
    order = np.lexsort((loss, runs.flops))
    lowest = np.concatenate([[np.inf], np.minimum.accumulate(loss[order])[:-1]])
    best = order[loss[order] < lowest]
    points = np.stack([runs.flops[best], runs.params[best], runs.tokens[best], loss[best]], 1)
    # a budget's runs differ a little in FLOPs: of each window the last, which is the lowest
    ends = [
        i
        for i in range(len(points))
        if i + 1 == len(points) or np.log(points[i + 1, 0] / points[i, 0]) > WINDOW
    ]
    return points[ends].tolist(), f"{len(ends)} runs are on the envelope, at least {BUDGETS} are needed"


def _parabolas(runs: Runs, loss: np.ndarray) -> tuple[list[list[float]], str]:
    """Approach 2: at each budget the vertex of a parabola of log L in log N."""
    points, unfit = [], 0
    groups = budgets(runs.flops, runs.params)
    for own in groups:
        x = np.log(runs.params[own])
        middle = x.mean()
        bend, slope, height = np.polyfit(x - middle, np.log(loss[own]), 2)
        at = -slope / (2 * bend) if bend > 0 else np.inf
        if not x.min() - middle <= at <= x.max() - middle:
            unfit += 1  # no optimum inside the grid
            continue
        flops, params = float(np.exp(np.log(runs.flops[own]).mean())), float(np.exp(at + middle))
        tokens = flops / params / runs.flops_per_param_token
        points.append([flops, params, tokens, float(np.exp(height - slope**2 / (4 * bend)))])
    without = f", {unfit} of them without an optimum inside their sizes" if unfit else ""
    why = (
        f"budgets with at least {SIZES} sizes within 25% of FLOPs: {len(groups)}{without}; at least {BUDGETS} with an "
        "optimum inside are needed"
    )
    return points, why
