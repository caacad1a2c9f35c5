"""The plan as a command: estimated, printed as a table, compared with what was measured, written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dit.bench.plan import planner, table, validate
from dit.bench.plan.job import Asked
from dit.bench.plan.measured import read_points
from dit.bench.sheet import Sheet
from dit.config import to_dict
from dit.configfile import load
from dit.experiments.diffusion import Experiment
from dit.progress import Bar

FIGURES = Path(__file__).resolve().parents[3] / "benchmarks"


def plan(
    config: str, asked: Asked, is_validated: bool, json_file: str | None, overrides: Mapping[str, str]
) -> None:
    """Estimate a run of a configuration file with these keys over it."""
    cfg = load(Experiment, config, overrides)
    sheet = Sheet.begin(json_file, config=config, **to_dict(asked), **overrides)
    points = read_points(FIGURES, asked.measured)
    found = planner.plan(cfg, asked, points)
    print(*table.lines(found), sep="\n", flush=True)
    if is_validated:
        with Bar[None](total=len(validate.HERE.ranks), unit="size") as bar:
            rows = [*validate.of_files(points), *validate.of_this_machine(points, progress=bar.update)]
        print(*table.validation_lines(rows), sep="\n")
        found["validation"] = rows
    sheet.write_plan(found)
