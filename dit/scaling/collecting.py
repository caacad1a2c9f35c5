"""The results of an experiment as one table: a line for each run, with its held-out loss or another figure."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit.errors import Notice, plural
from dit.evals import record
from dit.evals.valloss import QUARTERS
from dit.files import as_csv, write_atomically
from dit.scaling.laws import cells
from dit.scaling.plan import Plan, PlannedRun
from dit.scaling.planned import ScalingError
from dit.scaling.states import RunState
from dit.train.rows import HELD_OUT, logged

FILE = "held_out_loss"
EVALUATIONS = "evaluations"  # of the networks for an image, of figures of drawn images
QUARTER = [f"loss_q{i + 1}" for i in range(QUARTERS)]
COLUMNS = (
    *cells.COLUMNS, "params_total", "protocol", "size", "width", "depth", "heads", "budget", "kind", "steps", "batch",
    "lr", *QUARTER, EVALUATIONS,
)  # fmt: skip


class NothingMeasured(ScalingError):
    """No run has the figure that was asked for."""


@dataclass(frozen=True)
class Figure:
    """What was measured of a run at a step. more: other columns."""

    value: float
    step: int
    protocol: str
    more: Mapping[str, float]


@dataclass(frozen=True)
class Collected:
    """The table, and what is not in it: run -> why. trained_on: digest of training data -> runs, of those in it."""

    rows: Sequence[Mapping[str, Any]]
    missing: Mapping[str, str]
    protocol: str
    trained_on: Mapping[str, Sequence[str]] = field(default_factory=dict)


def collect(
    out: Path, plan: Plan, metric: str = FILE, protocol: str | None = None, partial: bool = False
) -> Collected:
    """Gather a figure of every run at its last step.

    metric: held_out_loss (EMA weights, on samples and draws that are the same for all), or a figure's name in
    RUN/evaluations.jsonl. protocol: its hash, where there are several. partial: take the newest figure of runs that are
    not complete too. Raises NothingMeasured where there is nothing, ScalingError where figures are of several
    protocols.
    """
    found: list[tuple[PlannedRun, bool, list[Figure]]] = []
    missing: dict[str, str] = {}
    for run in plan.runs:
        state = RunState(out, run)
        figures = _figures(state.folder, metric)
        if not state.is_complete and not partial:
            missing[run.name] = (
                f"not complete: step {state.step} of {run.steps}" if state.has_begun else "not begun"
            )
            continue
        last = max((f.step for f in figures), default=0)
        wanted = run.steps if state.is_complete else last
        figures = [f for f in figures if f.step == wanted and protocol in (None, f.protocol)]
        if figures:
            found.append((run, state.is_complete, figures))
        else:
            missing[run.name] = f"no {metric} at step {wanted}" if last else f"no {metric}"
    if not found:
        raise NothingMeasured(_nothing(out, plan, metric, protocol, missing))
    shared = protocol or _shared_protocol(found)
    rows = [_row(run, done, _of(figures, shared), metric) for run, done, figures in found]
    return Collected(rows, missing, shared, _by_data(out, [run for run, _, _ in found]))


def _by_data(out: Path, runs: Iterable[PlannedRun]) -> dict[str, list[str]]:
    """Digest of training data -> names of the runs that were trained on them, as far as they say."""
    found: dict[str, list[str]] = {}
    for run in runs:
        digest = RunState(out, run).trained_on
        if digest is not None:
            found.setdefault(digest, []).append(run.name)
    return found


def write_table(collected: Collected, file: Path) -> None:
    """Write the table as CSV."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, as_csv(COLUMNS, collected.rows).encode())


def _nothing(out: Path, plan: Plan, metric: str, protocol: str | None, missing: Mapping[str, str]) -> str:
    of = "" if protocol is None else f" of protocol {protocol}"
    whys = "\n".join(f"  {name}: {why}" for name, why in missing.items())
    known = sorted({name for run in plan.runs for name in names_of(RunState(out, run).folder)})
    return f"{out} has no {metric}{of} of any run:\n{whys}\nThere are: {', '.join(known) or 'no figures yet'}"


def _row(run: PlannedRun, is_complete: bool, figure: Figure, metric: str) -> dict[str, Any]:
    """A line of the table; of a run that is not complete, as many samples as its figure is of."""
    share = figure.step / run.steps
    return {
        **{name: getattr(run, name) for name in COLUMNS if hasattr(run, name)},
        "run": run.name,
        "samples": figure.step * run.batch,
        "tokens": run.tokens // run.samples * figure.step * run.batch,
        "flops": run.flops if is_complete else run.flops * share,
        "loss": figure.value,
        "metric": metric,
        "complete": "true" if is_complete else "false",
        "protocol": figure.protocol,
        "steps": figure.step,
        **figure.more,
    }


# --- what the runs left ----------------------------------------------------------------------------------------


def _figures(run_dir: Path, metric: str) -> list[Figure]:
    """Every figure of this name of a run, oldest first."""
    if metric == FILE:
        return [
            Figure(row["loss"], row["step"], row["protocol"], {q: row[q] for q in QUARTER if q in row})
            for row in _held_out(run_dir)
        ]
    return [
        Figure(row["figures"][name], row["step"], row["hash"], _cost(row))
        for row in record.read(run_dir)
        for name in row["figures"]
        if metric in (name, record.titled(row, name))
    ]


def _cost(row: Mapping[str, Any]) -> dict[str, float]:
    """What drawing an image took, where a row of figures tells it."""
    return {EVALUATIONS: row[record.COST]} if record.COST in row else {}


def names_of(run_dir: Path) -> set[str]:
    """Name all figures of a run, as `collect` takes them."""
    measured = {record.titled(row, name) for row in record.read(run_dir) for name in row["figures"]}
    return measured | ({FILE} if _held_out(run_dir) else set())


def _held_out(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of held_out.jsonl that have a loss."""
    kinds = {"loss": float, "step": int, "protocol": str}
    rows = logged(run_dir / HELD_OUT)
    return [row for row in rows if all(isinstance(row.get(key), kind) for key, kind in kinds.items())]


def _shared_protocol(found: Iterable[tuple[PlannedRun, bool, Sequence[Figure]]]) -> str:
    """The one protocol that every run has a figure of. ScalingError where there is none, or there are several."""
    of_runs = {run.name: {figure.protocol for figure in figures} for run, _, figures in found}
    shared = set.intersection(*of_runs.values())
    if len(shared) == 1:
        return shared.pop()
    rows: dict[str, list[str]] = {}
    for name, protocols in of_runs.items():
        for one in sorted(protocols):
            rows.setdefault(one, []).append(name)
    listed = "\n".join(f"  {one}: {', '.join(names)}" for one, names in rows.items())
    what = "of several protocols" if shared else "not all of one protocol"
    raise ScalingError(
        f"figures are {what}, and losses of different ones are not compared; choose --protocol=HASH:\n{listed}"
    )


def _of(figures: Sequence[Figure], protocol: str) -> Figure:
    """The newest figure of a protocol."""
    return [figure for figure in figures if figure.protocol == protocol][-1]


def warn_of_missing(collected: Collected) -> None:
    """Say which runs are not in the table, in one Notice; and in another that they are of several sets of data."""
    if len(collected.trained_on) > 1:
        sets = "; ".join(
            f"{digest[:12]}: {', '.join(names)}" for digest, names in collected.trained_on.items()
        )
        warnings.warn(
            f"runs were trained on {len(collected.trained_on)} unlike sets of data, and one law is of one: {sets}",
            Notice,
            stacklevel=2,
        )
    if collected.missing:
        whys = "; ".join(f"{name} ({why})" for name, why in collected.missing.items())
        warnings.warn(f"{plural(len(collected.missing), 'run')} left out: {whys}", Notice, stacklevel=2)
