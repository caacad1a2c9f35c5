"""The fit of the law to runs: variable projection gives the starts, a Huber loss on log L the optimum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import minimum_filter

from dit.errors import plural
from dit.scaling.laws.law import Law, LawError
from dit.scaling.laws.solver import ALPHA, BETA, A, B, E, Points, Solved, solve

GRID = np.geomspace(0.02, 3.0, 48)  # exponents that are tried, for alpha and for beta
STARTS = 24  # of the refinement: the best cells of the grid, no two of them neighbours
WITHOUT = -np.inf  # log E of the law without E
# Of a bounded E: which terms take part; a least-squares solution of one of these subsets is the non-negative one.
SUBSETS = ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,))
SAME = 1e-9  # relative difference of Huber sums that counts as none


@dataclass(frozen=True)
class Floor:
    """What is known of E. fixed: its value, 0 for the law without E, or None where it is fitted."""

    fixed: float | None = None

    @property
    def free(self) -> list[int]:
        """Columns of `Points.basis` along which theta may move."""
        return [A, B, ALPHA, BETA] if self.fixed is not None else [A, B, E, ALPHA, BETA]


@dataclass(frozen=True)
class Fitted:
    """An optimum. theta (5,): log A, log B, log E, alpha, beta. huber: the sum there. converged: no step lowers it.

    agreeing: how many of the `starts` came to this optimum. has_bound_e: E was free and the best is 0.
    """

    theta: np.ndarray
    huber: float
    converged: bool
    agreeing: int
    starts: int
    has_bound_e: bool = False

    @property
    def law(self) -> Law:
        """The law itself."""
        return Law.of(self.theta)


def fit(points: Points, floor: Floor | None = None) -> Fitted:
    """Fit the law to runs, E as `floor` has it; free by default. LawError where the numbers cannot carry a fit.

    alpha and beta are taken from a grid, with E, A and B by non-negative least squares of relative errors (variable
    projection: Golub and Pereyra 1973; arXiv 2603.22339); the best cells are starts for Newton's method on the summed
    Huber loss of log L, delta 1e-3 (arXiv 2404.10102), and the lowest end counts.
    """
    floor = Floor() if floor is None else floor
    _refuse_few(points, floor)
    starts = projected_starts(points, floor)
    best = _best(solve(starts, points, basis=points.basis[:, floor.free]))
    if floor.fixed is not None:
        return best
    bound = fit(points, Floor(0.0))
    if bound.huber <= best.huber * (1 + SAME):
        return Fitted(bound.theta, bound.huber, bound.converged, bound.agreeing, bound.starts, True)
    return best


def _best(found: Solved) -> Fitted:
    order = np.argsort(found.huber)
    best = order[0]
    low = found.huber[best]
    agree = int((found.huber <= low * (1 + 1e-6) + 1e-20).sum())
    # the same sum within rounding: the one that says that it has converged
    best = next((i for i in order if found.converged[i] and found.huber[i] <= low * (1 + SAME) + 1e-24), best)
    return Fitted(
        found.theta[best], float(found.huber[best]), bool(found.converged[best]), agree, len(found.huber)
    )


def _refuse_few(points: Points, floor: Floor) -> None:
    needed = len(floor.free) + 1
    if len(points) < needed:
        raise LawError(
            f"{plural(len(points), 'run')}, and the law has {needed - 1} numbers to fit: at least {needed} runs are "
            "needed"
        )
    if points.pairs < needed:
        raise LawError(
            f"{len(points)} runs at {points.pairs} pairs of params and tokens, and the law has {needed - 1} numbers to "
            f"fit: at least {needed} unlike pairs are needed; seeds and rates repeat one, and tell only of noise"
        )
    for name, values in (("params", points.params), ("tokens", points.tokens)):
        if np.ptp(values) < 1e-6:
            raise LawError(
                f"all runs have {name} = {np.exp(values[0]):.6g}: the law needs runs of at least two, better four"
            )
    lowest = float(np.exp(points.loss.min()))
    if np.ptp(points.loss) < 1e-9:
        raise LawError(f"all runs have the loss {lowest:g}: there is nothing that N and tokens lower")
    if floor.fixed is not None and not 0 <= floor.fixed < lowest:
        raise LawError(
            f"a floor of {floor.fixed:g} is not below the lowest loss, {lowest:g}: give one from 0 to below that, "
            "or --floor=fit"
        )


# --- variable projection -----------------------------------------------------------------------------------


def projected_starts(points: Points, floor: Floor) -> np.ndarray:
    """(R, 5) thetas of the best cells of the grid of exponents, each lower than its neighbours or among the lowest."""
    alphas, betas = (axis.ravel() for axis in np.meshgrid(GRID, GRID, indexing="ij"))
    coefficients, misfit = project(points, alphas, betas, floor)
    square = misfit.reshape(len(GRID), len(GRID))
    is_lowest = (square <= minimum_filter(square, 3, mode="nearest")).ravel()
    order = np.argsort(np.where(is_lowest, misfit - misfit.max(), misfit), kind="stable")
    spread = order[np.unique(np.geomspace(1, len(order), STARTS).astype(int)) - 1]
    chosen = np.unique([*np.flatnonzero(is_lowest)[:STARTS], *spread])
    tiny = 1e-6 * np.exp(points.loss.min())
    theta = np.empty((len(chosen), 5))
    # a term that least squares leaves out starts at a millionth of the loss, not at 0, from where no way leads back
    theta[:, A] = np.log(np.maximum(coefficients[chosen, 0], tiny)) + alphas[chosen] * points.params.mean()
    theta[:, B] = np.log(np.maximum(coefficients[chosen, 1], tiny)) + betas[chosen] * points.tokens.mean()
    theta[:, E] = np.log(np.maximum(coefficients[chosen, 2], tiny))
    theta[:, ALPHA], theta[:, BETA] = alphas[chosen], betas[chosen]
    if floor.fixed is not None:
        theta[:, E] = np.log(floor.fixed) if floor.fixed else WITHOUT
    return theta


def project(
    points: Points, alphas: np.ndarray, betas: np.ndarray, floor: Floor
) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative least squares of relative errors at each of R pairs of exponents.

    Returns A/N^alpha and B/D^beta at the mean of log N and log D, and E, (R, 3), and the sums of squares (R,).
    """
    loss = np.exp(points.loss)
    columns = np.stack([
        np.exp(-alphas[:, None] * (points.params - points.params.mean())) / loss,
        np.exp(-betas[:, None] * (points.tokens - points.tokens.mean())) / loss,
        np.broadcast_to(1 / loss, (len(alphas), len(loss))),
    ])  # (3, R, n)  # fmt: skip
    target = np.ones(len(loss)) - (floor.fixed or 0.0) / loss
    gram, right = np.einsum("irn,jrn->rij", columns, columns), np.einsum("irn,n->ri", columns, target)
    best, lowest = np.zeros((len(alphas), 3)), np.full(len(alphas), np.inf)
    for subset in SUBSETS:
        if floor.fixed is not None and 2 in subset:
            continue
        inside = np.ix_(range(len(alphas)), subset, subset)
        ridge = 1e-13 * np.trace(gram[inside], axis1=1, axis2=2)[:, None, None] * np.eye(len(subset))
        part = np.linalg.solve(gram[inside] + ridge, right[:, subset, None])[..., 0]
        whole = np.zeros((len(alphas), 3))
        whole[:, subset] = part
        misfit = ((np.einsum("ri,irn->rn", whole, columns) - target) ** 2).sum(1)
        better = (part >= 0).all(1) & (misfit < lowest)
        best[better], lowest[better] = whole[better], misfit[better]
    return best, lowest
