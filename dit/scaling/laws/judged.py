"""What data cannot carry: warnings beside a fit, and how well the fit of smaller runs predicts the largest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dit.errors import plural
from dit.scaling.laws.approaches import WINDOW, budgets, distinct
from dit.scaling.laws.fit import Fitted, Floor, fit
from dit.scaling.laws.law import LawError
from dit.scaling.laws.solver import DELTA, EXPONENTS, Points
from dit.scaling.laws.table import TRAINED, Runs

SIZES, DECADES = 4, 1.0  # fewer carry no law
TOGETHER = 0.98  # correlation of log N and log D from which their terms can hardly be told apart
OUTLYING = 6.0  # standard deviations of a run that something else than noise has moved
NAMED = 3  # pairs of runs in a warning
SHARE = 1e-3  # of the loss, below which a term is as good as not there


def seeds_spread(runs: Runs) -> float | None:
    """The standard deviation of log loss over runs that differ in their seed alone, pooled; None without such runs.

    Runs of one N and D at several learning rates or batches are no repetitions, nor are those that have one seed twice.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, point in enumerate(_points(runs)):
        groups.setdefault((point, runs.trained[i]), []).append(i)
    repeated = [own for own in groups.values() if len({runs.seed[i] for i in own}) == len(own) > 1]
    squares = [((np.log(runs.loss[own]) - np.log(runs.loss[own]).mean()) ** 2).sum() for own in repeated]
    freedom = sum(len(own) - 1 for own in repeated)
    return float(np.sqrt(sum(squares) / freedom)) if freedom else None


def _points(runs: Runs) -> list[tuple[str, str]]:
    """N and D of each run, as far as they are told apart."""
    return [(f"{n:.6g}", f"{d:.6g}") for n, d in zip(runs.params, runs.tokens, strict=True)]


def held_out(runs: Runs, floor: Floor) -> dict[str, Any]:
    """How the law of all runs but those with the most FLOPs predicts these.

    error: relative, of the predicted loss over the measured, (geometric) mean over the runs; seeds_spread: relative
    spread of runs that differ in their seed alone. Where too few are left to fit, `why` says so.
    """
    largest = runs.flops >= runs.flops.max() / np.exp(WINDOW)
    own, rest = runs.chosen(largest), runs.chosen(~largest)
    told: dict[str, Any] = {"runs": own.run, "flops": float(runs.flops.max()), "fitted_runs": len(rest)}
    try:
        law = fit(Points.of(rest.params, rest.tokens, rest.loss), floor).law
    except LawError as error:
        return {**told, "error": None, "why": f"without the largest runs: {error}"}
    predicted = law.loss(own.params, own.tokens)
    errors = predicted / own.loss - 1
    return {
        **told,
        "predicted": predicted.tolist(),
        "measured": own.loss.tolist(),
        "errors": errors.tolist(),
        "error": float(np.exp(np.log(predicted / own.loss).mean()) - 1),
        "worst": float(np.abs(errors).max()),
        "seeds_spread": seeds_spread(runs),
    }


def warnings(
    runs: Runs, fitted: Fitted, floor: Floor, ci: dict[str, tuple[float, float]], estimates: dict[str, float]
) -> list[str]:
    """All that should be known before the fit is believed, a sentence each; none where there is nothing."""
    return [*_of_design(runs), *_of_fit(runs, fitted, floor), *_of_intervals(ci, estimates)]


def _of_design(runs: Runs) -> Iterator[str]:
    sizes = len(distinct(np.log(runs.params)))
    if sizes < SIZES:
        yield f"{sizes} sizes of model: fewer than {SIZES} do not show how the loss falls with N"
    decades = float(np.log10(runs.flops.max() / runs.flops.min()))
    if decades < DECADES:
        yield f"budgets span {decades:.2f} decades of FLOPs: under one they do not carry an extrapolation"
    together = float(np.corrcoef(np.log(runs.params), np.log(runs.tokens))[0, 1])
    if abs(together) > TOGETHER:
        yield (
            f"N and D go together (correlation {together:.3f} of their logarithms): the two terms can hardly be told "
            "apart; runs of one size with several D, or budgets with several sizes, tell them"
        )
    groups = budgets(runs.flops, runs.params, 3)
    edges = {"smallest": 0, "largest": 0}
    for own in groups:
        params = runs.params[own]
        best = params[runs.loss[own].argmin()]
        edges["smallest"] += bool(best < params.min() * 1.01)
        edges["largest"] += bool(best > params.max() / 1.01)
    for edge, count in edges.items():
        if count:
            side = "smaller" if edge == "smallest" else "larger"
            yield (
                f"at {count} of {len(groups)} budgets the {edge} model is the best: the optimum is at the edge of the "
                f"grid or beyond; add {side} models there"
            )
    yield from _of_studies(runs)
    yield from _of_copies(runs)


def _of_copies(runs: Runs) -> Iterator[str]:
    """Runs of one N and D with one loss to the last digit: no two seeds have that, but a run that is there twice."""
    first: dict[tuple[Any, ...], int] = {}
    again: list[tuple[str, str]] = []
    for i, point in enumerate(_points(runs)):
        held = first.setdefault((point, runs.trained[i], float(runs.loss[i])), i)
        if held != i:
            again.append((runs.run[held], runs.run[i]))
    if again:
        named = "; ".join(f"{was} and {now}" for was, now in again[:NAMED])
        yield (
            f"{plural(len(again), 'run')} with the very loss of another of the same N and D, such as {named}: one run "
            "under two names or seeds makes intervals too narrow; keep one of each"
        )


def _of_studies(runs: Runs) -> Iterator[str]:
    """What else than the seed differs between runs of one N and D: a law is of the best of them."""
    for column, name in enumerate(TRAINED):
        values: dict[tuple[str, str], set[str]] = {}
        for point, cells in zip(_points(runs), runs.trained, strict=True):
            values.setdefault(point, set()).add(cells[column])
        several = sum(len(own) > 1 for own in values.values())
        if several:
            yield (
                f"runs of {several} of {len(values)} pairs of N and D differ in {name}, and the law follows all of "
                f"them, worse ones too: a law of the best {name} takes a table of the best runs alone"
            )


def _of_fit(runs: Runs, fitted: Fitted, floor: Floor) -> Iterator[str]:
    if not fitted.converged:
        yield "the fit did not converge: its numbers are of where it stopped"
    if fitted.agreeing < 2:
        yield f"only one of {fitted.starts} starts came to the lowest Huber sum: there may be a lower one"
    if fitted.has_bound_e:
        yield "E is at its bound, 0: the runs do not show where the loss ends; what is predicted far beyond is too low"
    law = fitted.law
    for name, value in (("alpha", law.alpha), ("beta", law.beta)):
        if not EXPONENTS[0] * 1.01 < value < EXPONENTS[1] / 1.01:
            yield f"{name} is at its bound, {value:.3g}: no power of this kind is in these losses"
    for name, term in (
        ("A/N^alpha", law.A * runs.params**-law.alpha),
        ("B/D^beta", law.B * runs.tokens**-law.beta),
    ):
        if float((term / runs.loss).max()) < SHARE:
            yield f"{name} is below {SHARE:g} of the loss in every run: the runs say nothing of it"
    spread = seeds_spread(runs)
    residuals = np.log(law.loss(runs.params, runs.tokens)) - np.log(runs.loss)
    robust = 1.4826 * float(np.median(np.abs(residuals)))
    off = np.abs(residuals) > max(OUTLYING * robust, 2 * DELTA)
    if off.any():
        yield (
            f"{plural(int(off.sum()), 'run')} off the law by more than {OUTLYING:g} (robust) standard deviations: "
            f"{', '.join(np.array(runs.run)[off][:8])}; a fit without them may differ by more than the intervals say"
        )
    typical = float(np.sqrt((residuals**2).sum() / max(len(runs) - len(floor.free), 1)))
    if spread is not None and spread > typical * 1.5:
        yield (
            f"seeds alone spread the loss by {spread:.2%}, and the residuals are {typical:.2%}: the law follows the "
            "noise; more runs or seeds are needed"
        )


def _of_intervals(ci: dict[str, tuple[float, float]], estimates: dict[str, float]) -> Iterator[str]:
    wide = [name for name, (low, high) in ci.items() if high - low > abs(estimates[name])]
    if wide:
        yield f"intervals wider than the estimate: {', '.join(wide)}"
