"""What was measured of a run: RUN/evaluations.jsonl, a row an evaluation, and curves in TensorBoard."""

from __future__ import annotations

import fcntl
import json
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dit.errors import Notice, UserError
from dit.evals.figures import hash_of, protocol_of
from dit.evals.pictures.choice import drawn_how
from dit.evals.protocol import Told
from dit.files import json_line

FILE = "evaluations.jsonl"
CONFIG = "config.yaml"  # which makes a folder a run directory
DEPTH = 3  # folders below one that is none, in which runs are looked for
SHOWN = 10  # of them, in a message
TRAINING = "training"  # what rows say under "by" that training itself measured between two steps
TAKEN_BACK = (
    "taken_back"  # of a line that is no row: rows of training above it, of later steps, count no more
)
COST = "network_evaluations"  # of a row, and of a record of drawn images: the networks', an image
CURVES = (
    "tensorboard/evaluations"  # a folder of its own: training takes back what it wrote itself, and not this
)


def run_of(record: Mapping[str, Any] | None) -> Path | None:
    """The run directory whose checkpoint drew images, by their record; None where there is none, or it is not here."""
    place = (record or {}).get("checkpoint")
    if not isinstance(place, str):
        return None
    folder = Path(place)
    return next((up for up in (folder, *folder.parents) if (up / CONFIG).is_file()), None)


def check_run(folder: Path) -> None:
    """UserError where a folder is no run directory; it names the runs below it, where there are some."""
    if (folder / CONFIG).is_file():
        return
    below = [
        place.parent for depth in range(1, DEPTH + 1) for place in sorted(folder.glob("*/" * depth + CONFIG))
    ]
    if not below:
        raise UserError(
            f"{folder} is no run directory: there is no {CONFIG} in it; give the folder that --run_dir named"
        )
    named = [
        f"  {run}{'' if (run / FILE).is_file() else ' (nothing was measured of it)'}" for run in below[:SHOWN]
    ]
    more = [f"  and {len(below) - SHOWN} more"] if len(below) > SHOWN else []
    raise UserError(
        "\n".join(
            [
                f"{folder} is no run directory: there is no {CONFIG} in it; give one of those below:",
                *named,
                *more,
            ]
        )
    )


def append(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows behind those that are there, in one write under a lock: nothing written before is touched.

    A line that another process did not finish, as it was killed, is ended first. ValueError for what is no JSON.
    """
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    descriptor = os.open(run / FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (("\n" if is_torn else "") + text).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_back(run: Path, step: int) -> None:
    """Say that what training itself measured beyond `step` is of weights that training has gone back behind.

    Nothing is cut off: a line is added, by which `read` leaves those rows out, and not those that were measured of a
    checkpoint. It is added where there is such a row alone.
    """
    if any(_is_beyond(row, step) for row in read(run)):
        append(run, [{TAKEN_BACK: step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}])


def _is_beyond(row: Mapping[str, Any], step: int) -> bool:
    return row.get("by") == TRAINING and row["step"] > step


def read(run: Path) -> list[dict[str, Any]]:
    """All rows that count, oldest first; none where nothing was measured. What is no row is left out, and said."""
    file = run / FILE
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json_line(line)
        except ValueError:
            row = None
        if is_row(row) or (isinstance(row, dict) and TAKEN_BACK in row):
            rows.append(row)
        else:
            warnings.warn(
                f"{file}: line {number} is not a row of figures, and is left out", Notice, stacklevel=2
            )
    return counted(rows)


def counted(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows among a file's lines that count, without those that training has taken back (`take_back`)."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        if TAKEN_BACK in line:
            rows = [row for row in rows if not _is_beyond(row, line[TAKEN_BACK])]
        else:
            rows.append(line)
    return rows


def is_row(row: Any) -> bool:
    """Whether JSON values are a row of figures, with the step and the protocol that they are of."""
    kinds = {"figures": dict, "hash": str, "step": int}
    return isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())


def titled(row: Mapping[str, Any], name: str) -> str:
    """A row's figure with the feature space that it is of, where that is told: "frechet (pixels)"."""
    return f"{name} ({row['features']})" if "features" in row else name


def draw_curves(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the rows' figures to TensorBoard's curves, a curve for each figure and protocol, against the step."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / CURVES)) as writer:
        for row in rows:
            for name, value in curves(row).items():
                writer.add_scalar(name, value, row["step"])


def curves(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's figures by the names of their curves: unlike protocols have curves of their own."""
    return {
        f"{row['features']}/{name} ({hash_of(name, row)})": value for name, value in row["figures"].items()
    }


def drawn_by(spec: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a row says of how its images were drawn, from their record: the settings behind the hash, seed and cost."""
    if spec is None:
        return {}
    cost = {COST: spec[COST]} if spec.get(COST) is not None else {}
    return {"sampler": drawn_how(spec), "seed": (spec.get("sampler") or {}).get("seed"), **cost}


def told(row: Mapping[str, Any], figure: str) -> Told:
    """What a row tells of how a figure came to be."""
    return Told(protocol_of(figure, row.get("protocol") or {}), row.get("sampler"))


def history(run: Path) -> list[str]:
    """Lines to print: the rows of each protocol together, and what distinguishes the protocols from the first one."""
    rows = read(run)
    if not rows:
        check_run(run)
    if not rows:
        raise UserError(
            f"{run / FILE} is not there: nothing was measured of this run yet. Draw images by tools/sample.py, and "
            "give them to tools/evaluate.py"
        )
    groups: dict[tuple[str, str], list[_Of]] = {}
    for row in rows:
        for digest, names in _by_protocol(row).items():
            groups.setdefault((row.get("features", "features not told"), digest), []).append(_Of(row, names))
    lines: list[str] = []
    before: list[tuple[str, _Of]] = []
    for (space, digest), found in groups.items():
        lines.append(f"{space}, protocol {digest}")
        first = found[0]
        earlier = next(((d, one) for d, one in before if {*one.names} & {*first.names}), None)
        if earlier is not None:
            lines += [f"  not to be compared with {earlier[0]}:", *_unlike(earlier[1], first)]
        lines += [_line(one) for one in found]
        before.append((digest, first))
    return lines


class _Of(NamedTuple):
    """A row, and those of its figures that one protocol holds of."""

    row: Mapping[str, Any]
    names: Sequence[str]


def _by_protocol(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """A row's figures by the hash of what they depend on."""
    found: dict[str, list[str]] = {}
    for name in row["figures"]:
        found.setdefault(hash_of(name, row), []).append(name)
    return found


def _unlike(first: _Of, other: _Of) -> list[str]:
    """What the protocol of a figure has otherwise than that of an earlier one, a line for each key."""
    figure = next(name for name in first.names if name in other.names)
    rows = told(first.row, figure).unlike(told(other.row, figure))
    return [f"    {key}: {mine} in the first, {theirs} here" for key, mine, theirs in rows]


def _line(one: _Of) -> str:
    row = one.row
    figures = "  ".join(
        f"{name} {_value(row['figures'][name])}{bracket((row.get('intervals') or {}).get(name))}"
        for name in one.names
    )
    named = row.get("samples", {}).get("named")
    of, seed = (
        f"  of {named}" if named else "",
        f", seed {row['seed']}" if row.get("seed") is not None else "",
    )
    when, weights = str(row.get("time", ""))[:16], row.get("weights", "weights not told")
    return f"  {when}  step {row['step']}, {weights}{seed}: {figures}{of}"


def _value(figure: float | None) -> str:
    return "not finite" if figure is None else f"{figure:.6g}"


def ends(interval: Sequence[float | None] | None) -> tuple[float, float] | None:
    """Both ends of an interval; None where there is none, or an end that is not finite."""
    low, high = interval or (None, None)
    return None if low is None or high is None else (float(low), float(high))


def bracket(interval: Sequence[float | None] | None) -> str:
    """An interval as it is printed behind its figure; nothing where there is none."""
    found = ends(interval)
    return "" if found is None else f" [{found[0]:.5g}, {found[1]:.5g}]"
