"""The study of learning rates over widths: its runs, each an ordinary one, and what they left.

Every run is that of tools/train.py with another width, parametrization, rate or seed; `running.run_plan` runs what is
not complete. At the base width all parametrizations are the same network to the bit, whose runs they share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from dit.config import ConfigError, config, to_dict
from dit.data.shards.manifest import Manifest
from dit.errors import plural
from dit.experiments.diffusion import Experiment
from dit.files import write_atomically
from dit.outputs import write_record
from dit.scaling.collecting import collect
from dit.scaling.mup.rates import Curve, draw, table, verdict
from dit.scaling.mup.telling import write_csv
from dit.scaling.mup.widths import at_width, base_of, checked_widths, parametrized
from dit.scaling.plan import Plan
from dit.scaling.running import Orders
from dit.scaling.study import as_run, lay_out, planned, run_rest, told_missing

BASE = "base"  # begins the names of runs that all parametrizations share
FILES = ("transfer.png", "transfer.csv", "transfer.md", "transfer.json")
Rate = Annotated[float, Field(gt=0)]


@config
class Grid:
    """Which runs there are: one of each width, rate, seed and parametrization."""

    widths: tuple[int, ...] = (64, 256)  # of the model; its heads stay as wide, its depth as it is
    lrs: tuple[Rate, ...] = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)  # peak learning rates
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)  # of weights, order and draws
    parametrizations: tuple[str, ...] = ("standard", "mup")  # that are compared
    base_width: Annotated[int, Field(ge=4)] | None = None  # of mup; null = the configuration's, or the least

    def __post_init__(self) -> None:
        checked_widths(self.widths)
        if len(set(self.lrs)) < 3:
            raise ConfigError(f"a best rate has neighbours: expected three or more lrs, got {list(self.lrs)}")
        for name in ("widths", "lrs", "seeds", "parametrizations"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must be there, each once, got {list(values)}")


@dataclass(frozen=True)
class Cell:
    """One run of the grid. kind: a parametrization, or BASE."""

    kind: str
    width: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The run's."""
        return f"{self.kind}-w{self.width}-lr{self.lr:.6g}-s{self.seed}"


@dataclass(frozen=True)
class Study:
    """A grid over a configuration, in a folder."""

    cfg: Experiment
    grid: Grid
    out: Path

    @property
    def base_width(self) -> int:
        """Of maximal updates."""
        return base_of(self.cfg.model, self.grid.widths, self.grid.base_width)

    def cell(self, parametrization: str, width: int, lr: float, seed: int) -> Cell:
        """Give the run that one point of the grid has, which at the base width others have too."""
        return Cell(BASE if width == self.base_width else parametrization, width, lr, seed)

    @property
    def cells(self) -> list[Cell]:
        """Every run once, narrow ones first, a seed after the other."""
        grid = self.grid
        points = itertools.product(grid.seeds, sorted(grid.widths), grid.parametrizations, sorted(grid.lrs))
        return list(dict.fromkeys(self.cell(name, width, lr, seed) for seed, width, name, lr in points))

    def config(self, cell: Cell) -> Experiment:
        """Give a run's configuration. ConfigError where the width does not go with the model."""
        cfg = self.cfg
        kind = "standard" if cell.kind == BASE else cell.kind
        model = replace(cfg.model, parametrization=parametrized(cfg.model, kind, self.base_width))
        cfg = replace(cfg, model=at_width(model, cell.width))
        return as_run(cfg, self.out, cell.name, seed=cell.seed, lr=cell.lr)

    def plan(self) -> Plan:
        """Write a configuration for each run, and give all runs. DataError where the data are none.

        OutputError where the folder holds another study: of the grid everything may be more or less, of the rest of
        the configuration nothing may differ.
        """
        if self.cfg.data.val is None:
            raise ConfigError(
                "data.val (a folder of held-out shards) is not set: rates are compared by their loss"
            )
        manifest = self.cfg.data.open().manifest
        configs = {cell.name: self.config(cell) for cell in self.cells}
        runs = [planned(name, _size(cfg, manifest), cfg, manifest) for name, cfg in configs.items()]
        plan = Plan({}, runs, (), ())
        lay_out(self.out / FILES[-1], self._identity, configs, plan)
        return plan

    @property
    def _identity(self) -> dict[str, Any]:
        """What all runs share."""
        values = to_dict(self.cfg)
        for section, key in (("optim", "lr"), ("model", "size"), ("model", "width"), ("model", "heads")):
            values[section].pop(key)
        for key in ("run_dir", "seed"):
            values.pop(key)
        return {"config": values, "base_width": self.base_width}

    def curves(self, losses: Mapping[str, float]) -> list[Curve]:
        """Arrange the runs' held-out losses; a run without one failed."""
        rates = tuple(sorted(self.grid.lrs))

        def of(name: str, width: int) -> np.ndarray:
            named = [[self.cell(name, width, lr, seed).name for seed in self.grid.seeds] for lr in rates]
            return np.array([[losses.get(run, math.nan) for run in row] for row in named])

        return [
            Curve(name, width, rates, of(name, width))
            for name in self.grid.parametrizations
            for width in sorted(self.grid.widths)
        ]


def run_study(study: Study, orders: Orders) -> str:
    """Run what is not complete, and write table, CSV, picture and record; give what is to be said.

    A run that fails counts as a rate that is too high, and is named. Raises ScalingError where nothing was measured,
    ConfigError where every rate of a width failed; Stopped where a signal ended it: the same command goes on.
    """
    plan = study.plan()
    run_rest(study.out, plan, orders)
    found = collect(study.out, plan)
    losses = {str(row["run"]): float(row["loss"]) for row in found.rows}
    curves = study.curves(losses)
    said = f"{table(curves)}\n\n{verdict(curves)}\n\n{_protocol(study, found.protocol)}"
    if missing := told_missing(found, "counted as rates that are too high"):
        said += f"\n\n{missing}"
    write_csv(study.out / FILES[1], list(_rows(study, losses)))
    draw(curves, study.out / FILES[0])
    write_atomically(study.out / FILES[2], f"{said}\n".encode())
    identity = study._identity
    write_record(
        study.out / FILES[3], {**identity, "protocol": found.protocol, "verdict": verdict(curves).split("\n")}
    )
    return said


def _size(cfg: Experiment, manifest: Manifest) -> str:
    dims = cfg.cost(manifest).dims
    return f"w{dims.width}d{dims.depth}"


def _protocol(study: Study, losses: str) -> str:
    cfg = study.cfg
    return (
        f"Held-out losses (protocol {losses}) after {cfg.train.steps} steps of {cfg.train.global_batch} samples, "
        f"{plural(len(study.grid.seeds), 'seed')}, EMA weights; base width of mup: {study.base_width} (the same runs)."
    )


def _rows(study: Study, losses: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    grid = study.grid
    points: Sequence[tuple[str, int, float, int]] = list(
        itertools.product(grid.parametrizations, sorted(grid.widths), sorted(grid.lrs), grid.seeds)
    )
    for name, width, lr, seed in points:
        run = study.cell(name, width, lr, seed).name
        yield {
            "parametrization": name,
            "width": width,
            "lr": lr,
            "seed": seed,
            "loss": losses.get(run),
            "run": run,
        }
