"""Runs as a CSV has them: `Runs.read` checks every row that is fitted, and names what cannot be, with its line."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit.config import did_you_mean
from dit.files import expand, read_text, sought
from dit.scaling.laws.law import LawError

NEEDED = ("params", "flops", "loss")
NUMBERS = (*NEEDED, "tokens", "samples", "floor")  # columns whose cells are positive numbers
KNOWN = ("run", *NUMBERS, "seed", "complete", "metric", "protocol")
CHOICES = ("metric", "protocol")  # columns that have one value in what is fitted
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")
NAMED = 5  # rows of one fault that a message names; of more it says how many
USUAL = (
    6.0  # FLOPs of training by parameter and token, where nothing but their product costs (arXiv 2001.08361)
)
RATIO = (0.05, 100.0)  # that FLOPs by parameter and token lie in, in mean
SCATTER = 8.0  # by which a run's may be off the median

Row = dict[str, str]


@dataclass(frozen=True)
class Runs:
    """Runs that a law is fitted to, (n,) each. notes: what was left out or derived, in words.

    lines: of the file. seed: as written, "" where there is none. choice: the metric and the protocol, "" where the
    file has no such column. floor: the exact irreducible loss that a column of that name has, or None.
    tokens_per_sample: where `samples` beside `tokens` tell it, and all tell the same.
    """

    run: list[str]
    lines: list[int]
    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    seed: list[str]
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
        words = {name: [getattr(self, name)[i] for i in at] for name in ("run", "lines", "seed")}
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
        header, rows = _parsed(read_text(place), str(place))
        rows, choice = _chosen(rows, {"metric": metric, "protocol": protocol}, str(place))
        rows, notes = _complete(rows, header, str(place))
        _refuse_twice(rows, header, str(place))
        columns = {name: _numbers(rows, name, str(place)) for name in NUMBERS if name in header}
        runs = _with_tokens(rows, columns, header, choice, notes)
        _refuse_mixed(runs, columns, str(place))
        return runs


def _at(lines: Sequence[int]) -> str:
    """Lines in a message: "line 3", "lines 3, 7 and 9"."""
    shown = [str(line) for line in lines[:NAMED]]
    if len(lines) > NAMED:
        return f"lines {', '.join(shown)} and {len(lines) - NAMED} more"
    return f"line {shown[0]}" if len(shown) == 1 else f"lines {', '.join(shown[:-1])} and {shown[-1]}"


# --- text --------------------------------------------------------------------------------------------------


def _parsed(text: str, named: str) -> tuple[list[str], list[tuple[int, Row]]]:
    """The header, and (line, cells by column) of each row; blank lines, and those that begin with #, are no rows."""
    reader = csv.reader(io.StringIO(text), strict=True)
    header: list[str] | None = None
    rows = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells) or cells[0].lstrip().startswith("#"):
                continue
            if header is None:
                header = cells
                _check_header(header, named)
            elif len(cells) != len(header):
                raise LawError(
                    f"{named}: line {reader.line_num} has {len(cells)} cells, and the header {len(header)}: "
                    f"{','.join(cells)[:80]}"
                )
            else:
                row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise LawError(
            f"{named}: line {reader.line_num} is no CSV ({error}): expected cells with commas between them"
        ) from None
    if header is None:
        raise LawError(f"{named} is empty: expected a header with {', '.join(NEEDED)}, and a line a run")
    if not rows:
        raise LawError(f"{named} has a header and no runs: expected a line a run below it")
    return header, rows


def _check_header(header: Sequence[str], named: str) -> None:
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if twice:
        raise LawError(f"{named}: column '{twice[0]}' is there {header.count(twice[0])} times: keep one")
    near = {name: name.strip().lower() for name in header}
    off = [name for name, plain in near.items() if name != plain and plain in KNOWN]
    if off:
        raise LawError(
            f"{named}: column '{off[0]}' is to be written {near[off[0]]}, without spaces or capitals"
        )
    missing = [name for name in NEEDED if name not in header]
    if not missing:
        return
    told = f"{named}: column{'s' * (len(missing) > 1)} {', '.join(missing)} missing; there are {', '.join(header)}"
    if all(_number(name) is not None for name in header):
        raise LawError(f"{named}: the first line is numbers; expected a header with {', '.join(NEEDED)}")
    for mark, what in ((";", "semicolons"), ("\t", "tabs")):
        if any(mark in name for name in header):
            raise LawError(f"{told[:160]}: {what} stand between the cells, where commas are expected")
    hints = [did_you_mean(name, header) for name in missing]
    raise LawError(f"{told}{next((hint for hint in hints if hint), '')}. Needed are {', '.join(NEEDED)}")


def _number(text: str) -> float | None:
    """The number, which may be inf or nan; None for what is none."""
    try:
        return float(text)
    except ValueError:
        return None


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
        listed = ", ".join(f"'{value}' ({len(lines)} rows)" for value, lines in counts.items())
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
        raise LawError(f"{named}: {_at(odd)}: `complete` is true or false")
    left = [line for line, row in rows if row["complete"].lower() in FALSE]
    kept = [(line, row) for line, row in rows if row["complete"].lower() in TRUE]
    if not kept:
        raise LawError(f"{named}: no run is complete, so there is nothing to fit")
    return kept, [f"{len(left)} runs are not complete and are left out ({_at(left)})"] if left else []


def _refuse_twice(rows: list[tuple[int, Row]], header: Sequence[str], named: str) -> None:
    """LawError for runs that are there twice: by their name, or with all that is known of them."""
    kinds: list[tuple[str, Callable[[Row], tuple[str, ...]]]] = [
        ("are the same run", lambda row: tuple(row.get(name, "") for name in (*NUMBERS, "seed", "run")))
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
                    f"{named}: {_at(lines)} {told} ({', '.join(cell for cell in what if cell)}): keep one of them; "
                    "repetitions with other seeds differ in `run` or `seed`"
                )


# --- numbers -----------------------------------------------------------------------------------------------


def _numbers(rows: list[tuple[int, Row]], column: str, named: str) -> np.ndarray:
    """A column's numbers; LawError for cells that are none, not finite, or not above 0."""
    values = [_number(row[column]) for _, row in rows]
    mend = "mend the cell, or set the run's `complete` to false"
    faults = [
        ("is empty", [not row[column] for _, row in rows]),
        ("is no number", [value is None for value in values]),
        ("is not finite", [value is not None and not math.isfinite(value) for value in values]),
        ("is not above 0", [value is not None and value <= 0 for value in values]),
    ]
    if column == "floor":
        faults[-1] = ("is below 0", [value is not None and value < 0 for value in values])
    for told, where in faults:
        lines = [line for (line, _), is_so in zip(rows, where, strict=True) if is_so]
        if lines:
            cell = next(row[column] for line, row in rows if line == lines[0])
            cell = f" ('{cell}')" if cell else ""
            raise LawError(f"{named}: {_at(lines)}: {column} {told}{cell}; {mend}")
    return np.array(values, float)


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
    is_one = len(ratio) > 0 and np.ptp(ratio) < 1e-6 * ratio.min()
    floors = np.unique(columns.get("floor", ()))
    if len(floors) > 1:
        raise LawError(
            f"column floor has {len(floors)} values, {floors[0]:g} to {floors[-1]:g}: runs of one law have one floor"
        )
    return Runs(
        [row.get("run") or f"line {line}" for line, row in rows], [line for line, _ in rows],
        columns["params"], tokens, columns["flops"], columns["loss"],
        [row.get("seed", "") for _, row in rows], choice, has_tokens,
        float(floors[0]) if len(floors) else None, float(np.median(ratio)) if is_one else None,
        list(header), notes,
    )  # fmt: skip


def _refuse_mixed(runs: Runs, columns: Mapping[str, np.ndarray], named: str) -> None:
    """LawError where tokens are samples in some rows or all, or a column is in another unit."""
    lines = np.array(runs.lines)
    if not runs.has_tokens:
        few = list(lines[runs.tokens < 1])
        if few:
            raise LawError(
                f"{named}: {_at(few)}: flops / (6 · params) is below one token: expected are flops "
                "in FLOPs and params in numbers"
            )
        return
    if "samples" in columns:
        same = np.isclose(runs.tokens, columns["samples"], rtol=1e-9)
        if same.any() and not same.all():
            raise LawError(
                f"{named}: {_at(list(lines[same]))}: tokens are the samples, and elsewhere they are not: write tokens "
                "(samples · tokens an image) in every row"
            )
    each = runs.flops / runs.params / runs.tokens
    middle = float(np.median(each))
    off = (each > SCATTER * middle) | (each < middle / SCATTER)
    if off.any():
        raise LawError(
            f"{named}: {_at(list(lines[off]))}: flops / (params · tokens) is {each[off][0]:.4g}, and {middle:.4g} in "
            "the middle of all runs: samples among tokens? Write tokens (samples · tokens an image) in every row"
        )
    if not RATIO[0] <= middle <= RATIO[1]:
        raise LawError(
            f"{named}: flops / (params · tokens) is {middle:.4g}, where about 6 is usual: "
            + ("tokens look like samples; multiply them by the tokens of an image" if middle > RATIO[1] else
               "flops, params or tokens are in another unit; plain numbers are expected")
        )  # fmt: skip
