"""Runs as a CSV has them: `Runs.read` checks every row that is fitted, and names what cannot be, with its line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit.errors import plural
from dit.files import expand, read_text, sought
from dit.scaling.laws.cells import NUMBERS, Row, number, parsed
from dit.scaling.laws.law import LawError
from dit.scaling.laws.units import USUAL, at_lines, refuse_mixed

TRAINED = ("lr", "batch")  # columns of what else than N, D and the seed a run's loss hangs on
CHOICES = ("metric", "protocol")  # columns that have one value in what is fitted
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")
LARGEST = 2**26  # bytes of a file: 10,000 runs of 6 kB
ROUNDED = 1e-3  # by which tokens over samples differ where both are written with a few digits
SPAN = (1e-36, 1e36)  # that numbers lie in: to the largest exponent, what is beyond is no number any more


@dataclass(frozen=True)
class Runs:
    """Runs that a law is fitted to, (n,) each. notes: what was left out or derived, in words.

    lines: of the file. seed: as written, "" where there is none. trained: the cells of TRAINED, "" where there is no
    such column. choice: the metric and the protocol, in the same way. floor: the exact irreducible loss that a column
    of that name has, or None. tokens_per_sample: where `samples` beside `tokens` tell it, and all tell the same.
    """

    run: list[str]
    lines: list[int]
    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    seed: list[str]
    trained: list[tuple[str, ...]]
    choice: Mapping[str, str]
    has_tokens: bool
    floor: float | None
    tokens_per_sample: float | None
    columns: list[str]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.run)

    @property
    def flops_per_param_token(self) -> float:
        """k in flops = k · params · tokens: the geometric mean over the runs; 6 where tokens were derived by it."""
        if not self.has_tokens:
            return USUAL
        return float(np.exp(np.log(self.flops / self.params / self.tokens).mean()))

    def chosen(self, which: np.ndarray) -> Runs:
        """The runs of a mask (n,)."""
        at = np.flatnonzero(which)
        numbers = {name: getattr(self, name)[at] for name in ("params", "tokens", "flops", "loss")}
        words = {name: [getattr(self, name)[i] for i in at] for name in ("run", "lines", "seed", "trained")}
        changed: dict[str, Any] = {**numbers, **words}
        return dataclasses.replace(self, **changed)

    @classmethod
    def read(cls, path: Path, metric: str | None = None, protocol: str | None = None) -> Runs:
        """The runs of a CSV file. metric, protocol: of which to take the rows, where there are several.

        LawError, with lines and what to do, for columns that are missing, cells that are no positive numbers, runs
        that are there twice, several metrics or protocols, and tokens that are not in one unit; FileError where it is
        no text.
        """
        place = Path(expand(str(path)))
        if place.is_dir():
            raise LawError(f"{place} is a folder; expected a CSV of runs, such as {place / 'runs.csv'}")
        if not place.is_file():
            raise LawError(f"{place}: there is no such file{sought(place)}; expected a CSV of runs")
        if place.stat().st_size > LARGEST:
            raise LawError(
                f"{place} has {place.stat().st_size / 2**20:.0f} MiB, more than any table of runs: expected a line a "
                "run"
            )
        header, rows = parsed(read_text(place), str(place))
        rows, choice = _chosen(rows, {"metric": metric, "protocol": protocol}, str(place))
        rows, notes = _complete(rows, header, str(place))
        _refuse_twice(rows, header, str(place))
        columns = {name: _numbers(rows, name, str(place)) for name in NUMBERS if name in header}
        runs = _with_tokens(rows, columns, header, choice, notes)
        refuse_mixed(columns, runs.lines, str(place))
        return runs


# --- which rows --------------------------------------------------------------------------------------------


def _chosen(
    rows: list[tuple[int, Row]], wanted: Mapping[str, str | None], named: str
) -> tuple[list[tuple[int, Row]], dict[str, str]]:
    """The rows of one metric and one protocol, and which they are; LawError where there are several, or not that."""
    choice = {}
    for column in CHOICES:
        want = wanted[column]
        there = list(dict.fromkeys(row.get(column, "") for _, row in rows))
        counts = {value: [line for line, row in rows if row.get(column, "") == value] for value in there}
        listed = ", ".join(f"'{value}' ({plural(len(lines), 'row')})" for value, lines in counts.items())
        if want is not None and want not in counts:
            raise LawError(
                f"{named} has no {column} '{want}': there {'is' if len(there) == 1 else 'are'} "
                f"{listed if there != [''] else 'no such column, or nothing in it'}"
            )
        if want is None and len(there) > 1:
            raise LawError(
                f"{named} has rows of {len(there)} {column}s, and a law is of one: {listed}. Choose with --{column}="
            )
        value = there[0] if want is None else want
        rows = [(line, row) for line, row in rows if row.get(column, "") == value]
        choice[column] = value
    return rows, choice


def _complete(
    rows: list[tuple[int, Row]], header: Sequence[str], named: str
) -> tuple[list[tuple[int, Row]], list[str]]:
    """The rows of runs that are complete, and what to say of the others."""
    if "complete" not in header:
        return rows, []
    odd = [line for line, row in rows if row["complete"].lower() not in (*TRUE, *FALSE)]
    if odd:
        raise LawError(f"{named}: {at_lines(odd)}: `complete` is true or false")
    left = [line for line, row in rows if row["complete"].lower() in FALSE]
    kept = [(line, row) for line, row in rows if row["complete"].lower() in TRUE]
    if not kept:
        raise LawError(f"{named}: no run is complete, so there is nothing to fit")
    return kept, [f"not complete and left out: {plural(len(left), 'run')} ({at_lines(left)})"] if left else []


def _refuse_twice(rows: list[tuple[int, Row]], header: Sequence[str], named: str) -> None:
    """LawError for runs that are there twice: by their name, or with all that is known of them."""
    kinds: list[tuple[str, Callable[[Row], tuple[str, ...]]]] = [
        (
            "are the same run",
            lambda row: tuple(_plain(row.get(name, "")) for name in (*NUMBERS, "seed", "run")),
        )
    ]
    if "run" in header:
        kinds.append(("have the same `run`", lambda row: (row["run"],) if row["run"] else ()))
    for told, key in kinds:
        seen: dict[tuple[str, ...], list[int]] = {}
        for line, row in rows:
            seen.setdefault(key(row), []).append(line)
        for what, lines in seen.items():
            if what and len(lines) > 1:
                raise LawError(
                    f"{named}: {at_lines(lines)} {told} ({', '.join(cell for cell in what if cell)}): keep one of "
                    "them; repetitions with other seeds differ in `run` or `seed`"
                )


# --- numbers -----------------------------------------------------------------------------------------------


def _numbers(rows: list[tuple[int, Row]], column: str, named: str) -> np.ndarray:
    """A column's numbers; LawError for cells that are none, not finite, or not above 0."""
    values = [number(row[column]) for _, row in rows]
    mend = "mend the cell, or set the run's `complete` to false"
    faults = [
        ("is empty", [not row[column] for _, row in rows]),
        ("is no number", [value is None for value in values]),
        ("is not finite", [value is not None and not math.isfinite(value) for value in values]),
        ("is not above 0", [value is not None and value <= 0 for value in values]),
        (
            f"is beyond {SPAN[0]:g} to {SPAN[1]:g}, and so in no unit that is meant",
            [bool(value) and not SPAN[0] <= abs(value or 0) <= SPAN[1] for value in values],
        ),
    ]
    if column == "floor":
        faults[3] = ("is below 0", [value is not None and value < 0 for value in values])
    for told, where in faults:
        lines = [line for (line, _), is_so in zip(rows, where, strict=True) if is_so]
        if lines:
            cell = next(row[column] for line, row in rows if line == lines[0])
            cell = f" ('{cell}')" if cell else ""
            raise LawError(f"{named}: {at_lines(lines)}: {column} {told}{cell}; {mend}")
    return np.array(values, float)


def _plain(cell: str) -> str:
    """A cell as it is compared: 0.001 and 1e-3 are one."""
    value = number(cell)
    return cell if value is None else f"{value:.12g}"


def _with_tokens(
    rows: list[tuple[int, Row]],
    columns: Mapping[str, np.ndarray],
    header: Sequence[str],
    choice: Mapping[str, str],
    notes: list[str],
) -> Runs:
    has_tokens = "tokens" in columns
    tokens = columns["tokens"] if has_tokens else columns["flops"] / (USUAL * columns["params"])
    if not has_tokens:
        notes = [*notes, f"no column `tokens`: they are flops / ({USUAL:g} · params)"]
    ratio = tokens / columns["samples"] if has_tokens and "samples" in columns else np.zeros(0)
    is_one = len(ratio) > 0 and np.ptp(ratio) < ROUNDED * ratio.min()
    floors = np.unique(columns.get("floor", ()))
    if len(floors) > 1:
        raise LawError(
            f"column floor has {len(floors)} values, {floors[0]:g} to {floors[-1]:g}: runs of one law have one floor"
        )
    return Runs(
        [row.get("run") or f"line {line}" for line, row in rows], [line for line, _ in rows],
        columns["params"], tokens, columns["flops"], columns["loss"],
        [row.get("seed", "") for _, row in rows],
        [tuple(_plain(row.get(name, "")) for name in TRAINED) for _, row in rows], choice, has_tokens,
        float(floors[0]) if len(floors) else None, float(np.median(ratio)) if is_one else None,
        list(header), notes,
    )  # fmt: skip
