"""What a sweep keeps: a file for each cell, named by the hash of all that decides about its figures."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit.errors import Notice
from dit.evals.evaluation import InSpace
from dit.evals.metrics.resampling import Resampled, Resampling
from dit.evals.protocol import protocol_hash
from dit.evals.sweep.axes import Setting
from dit.outputs import OutputError, read_record, write_record
from dit.sample.generate import SamplerSpec

FOLDER = "cells"


@dataclass(frozen=True)
class Cell:
    """Images of one run at one setting from one seed. spec: None where the solver cannot meet the budget.

    protocol: JSON values, all that decides about the figures: the weights' checksum, the sampler, the images' number
    and classes, the reference, the features. noise: what images of two cells have to share to be from the same noise.
    """

    run: str
    setting: Setting
    seed: int
    spec: SamplerSpec | None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    noise: str = ""

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the protocol."""
        return protocol_hash(dict(self.protocol))

    def __str__(self) -> str:
        words = {key: word for key, word in self.setting.words.items() if word}
        steps = f"nfe={self.setting.steps}" if self.setting.is_budget else f"num_steps={self.setting.steps}"
        axes = ", ".join(f"{key}={word}" for key, word in words.items())
        return f"{self.run}, {axes}, {steps}, seed={self.seed}"


@dataclass(frozen=True)
class Measured:
    """What was found of a cell. not_finite: what was said of an image that is none; then there are no figures.

    spaces: by the features' name: figures, intervals, resamples of each figure, protocol and its hash.
    """

    values: Mapping[str, Any]

    @property
    def not_finite(self) -> str | None:
        """What was said of an image that is none."""
        return self.values.get("not_finite")

    @property
    def nfe(self) -> float | None:
        """Evaluations of the guided denoiser an image."""
        return self.values.get("nfe")

    def figure(self, space: str, name: str) -> float | None:
        """One figure; None where there is none."""
        found: float | None = self.values["spaces"].get(space, {}).get("figures", {}).get(name)
        return found

    def resamples(self, space: str, name: str) -> Resampled | None:
        """The figure and what it is of resamples; None where none were taken."""
        held = self.values["spaces"].get(space, {}).get("resamples", {}).get(name)
        return None if held is None else Resampled(np.array(held["values"]), held["is_shifted"])

    def suffices(self, wanted: Resampling) -> bool:
        """Whether it has the resamples that are wanted."""
        held = self.values.get("bootstrap") or {"resamples": 0, "seed": wanted.seed}
        is_it = (held["resamples"], held["seed"]) == (wanted.count, wanted.seed)
        return wanted.count == 0 or is_it or self.not_finite is not None


def space_as_json(space: InSpace) -> dict[str, Any]:
    """What is kept of a cell in one feature space."""
    resamples = {
        name: {"values": drawn.values.tolist(), "is_shifted": drawn.is_shifted}
        for name, drawn in space.resamples.items()
    }
    return {**space.as_json(), "missing": space.missing, "resamples": resamples}


@dataclass(frozen=True)
class CellFolder:
    """OUT/cells: HASH.json of each cell that is finished, whole or not there."""

    out: Path

    def file(self, cell: Cell) -> Path:
        """Where a cell is kept."""
        return self.out / FOLDER / f"{cell.hash}.json"

    def read(self, cell: Cell, wanted: Resampling) -> Measured | None:
        """What is there of a cell; None where it has to be drawn. A file that is damaged is named, and drawn anew."""
        file = self.file(cell)
        if not file.is_file():
            return None
        try:
            held = read_record(file)
        except OutputError as error:
            warnings.warn(f"{str(error).partition(': give')[0]}: it is drawn anew", Notice, stacklevel=2)
            return None
        if held.get("protocol") != as_json(cell.protocol):
            warnings.warn(
                f"{file} is of another protocol than its name says: it is drawn anew", Notice, stacklevel=2
            )
            return None
        found = Measured(held)
        return found if found.suffices(wanted) else None

    def write(self, cell: Cell, values: Mapping[str, Any]) -> None:
        """Keep what was found of a cell."""
        file = self.file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_record(file, {"cell": str(cell), "hash": cell.hash, "protocol": cell.protocol, **values})


def as_json(values: Mapping[str, Any]) -> Any:
    """Values as they are once written and read."""
    return json.loads(json.dumps(dict(values)))
