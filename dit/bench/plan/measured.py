"""How far off the roofline a device was seen to be: a curve, made of files of `tools/bench.py step`."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit.bench.plan.compute import Work, step_seconds
from dit.bench.plan.devices import CPU, GPUS, DeviceFacts, core
from dit.bench.plan.job import Job
from dit.bench.speed.steppers import CHANNELS, CLASSES, SIDE
from dit.errors import UserError
from dit.files import read_text
from dit.model.cost import cost
from dit.model.dit import DiTConfig

ROW = re.compile(r"ours, stage ([0-3])$")
PROCESSORS = {"x86_64", "amd64", "aarch64", "arm64"}


@dataclass(frozen=True)
class Point:
    """A step that was timed, on one rank. seconds: it took. estimate: by the roofline. work: FLOPs of a pass."""

    file: str
    name: str
    device: str
    job: Job
    stage: int
    work: float
    seconds: float
    estimate: float

    @property
    def factor(self) -> float:
        """How many times as long it took as the roofline has it."""
        return self.seconds / self.estimate


@dataclass(frozen=True)
class Curve:
    """Times as long as the roofline has it, over the work of a pass; 1 where nothing was measured."""

    points: tuple[Point, ...] = ()

    def factor(self, stage: int, work: float) -> float:
        """Interpolate between logarithms of work; beyond the least and the most as there."""
        own = [point for point in self.points if point.stage == stage] or self.points
        if not own:
            return 1.0
        found: dict[float, list[float]] = defaultdict(list)
        for point in own:
            found[math.log(point.work)].append(math.log(point.factor))
        places = sorted(found)
        return math.exp(np.interp(math.log(work), places, [float(np.mean(found[x])) for x in places]))

    @property
    def words(self) -> str:
        """What it is made of; an assumption where nothing was measured."""
        if not self.points:
            return "roofline, not measured: nothing of this device, precision and compilation was"
        files = sorted({Path(point.file).name for point in self.points})
        factors = [point.factor for point in self.points]
        return (
            f"measured on one rank: the roofline times {min(factors):.3g} to {max(factors):.3g}, by work of a pass, "
            f"from {len(self.points)} steps of {', '.join(files)}"
        )


def curve_for(points: Sequence[Point], device: DeviceFacts, job: Job) -> Curve:
    """Take of what was measured what tells of this device, precision and compilation."""
    return Curve(
        tuple(
            point
            for point in points
            if (point.device, point.job.precision, point.job.compiled)
            == (device.name, job.precision, job.compiled)
        )
    )


def read_points(folder: Path | None, file: str | None) -> list[Point]:
    """Read the steps in a folder's files and in one file more. UserError where that one holds none."""
    found = [
        point
        for path in sorted(folder.glob("*.json") if folder else ())
        for point in _points(path, _read(path))
    ]
    if file is not None:
        record = _read(Path(file))
        own = list(_points(Path(file), record))
        if not own:
            raise UserError(
                f"--measured={file}: expected figures of `tools/bench.py step --json_file=` on a device that is known, "
                f"with rows of our steps; found {', '.join(record) or 'nothing'}"
            )
        found = [point for point in found if Path(point.file).resolve() != Path(file).resolve()] + own
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    return record if isinstance(record, dict) else {}


def _points(path: Path, record: dict[str, Any]) -> Iterator[Point]:
    """The steps of one file; none where it holds other figures."""
    how, figures = record.get("protocol"), record.get("figures")
    if (
        not isinstance(how, dict)
        or not isinstance(figures, dict)
        or not {"size", "patch", "compile"} <= set(how)
    ):
        return
    device = known_name(str(how.get("device")))
    if device is None:
        return
    for size, its in figures.items():
        rows = its.get("rows", {}) if isinstance(its, dict) else {}  # else figures of another bench
        for name, row in rows.items():
            if match := ROW.match(name):
                yield _point(path, how, (size, name, int(match[1])), (its, row), device)


def _point(
    path: Path,
    how: dict[str, Any],
    place: tuple[str, str, int],
    found: tuple[dict[str, Any], dict[str, Any]],
    device: str,
) -> Point:
    (size, name, stage), (its, row) = place, found
    model = cost(DiTConfig(size=size, patch=how["patch"]), SIDE, CHANNELS, CLASSES)
    job = Job(model, how["batch"], how["precision"], compiled=how["compile"])
    micro = row["micro_batch"]
    if device == CPU:  # CPU time, which other work on the machine does not lengthen
        facts = core(its["product_flops"], cores=1)
        seconds = job.batch * row["cpu_ms"]["median"] / 1e3 / how.get("threads", 1)
    else:
        facts, seconds = GPUS[device], job.batch / row["images_per_s"]["median"]
    estimate = step_seconds(job, Work(micro, job.batch // micro, stage, 1.0), facts)
    named = f"{size}/{how['patch']} {name}, batch {job.batch}"
    return Point(str(path), named, device, job, stage, micro * model.training_flops, seconds, estimate)


def known_name(device: str) -> str | None:
    """Name a device of a plan by what torch calls it; None for one that is not known."""
    words = set(re.findall(r"\w+", device.lower()))
    if words & PROCESSORS:
        return CPU
    return next((name for name in GPUS if name in words), None)


def held_out(points: Sequence[Point]) -> Iterator[tuple[Point, float, bool]]:
    """Estimate each step from the other files' and sizes' alone: (step, seconds, whether there were any)."""
    for point in points:
        others = [p for p in points if (p.file, p.job.cost) != (point.file, point.job.cost)]
        device = replace(core(1.0), name=point.device)
        curve = curve_for(others, device, point.job)
        yield point, curve.factor(point.stage, point.work) * point.estimate, bool(curve.points)
