"""What a run directory tells of its run, read from its files alone: nothing of it is opened or computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dit.config import ConfigError, flatten, from_dict, to_dict
from dit.configfile import read_own
from dit.errors import UserError
from dit.evals import record
from dit.experiments.diffusion import Experiment
from dit.files import expand
from dit.model.cost import cost
from dit.scalars import resolved
from dit.train.checkpoints import checkpoint
from dit.train.rows import HELD_OUT, METRICS, logged
from dit.train.run_dir import CONFIG, HISTORY

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunTold:
    """A run as its files tell it. name: what it is called beside others.

    config: dotted key -> value. steps: rows of metrics.jsonl, held_out: of held_out.jsonl, evaluations: of
    evaluations.jsonl, each in the order of their steps. starts: of history.jsonl.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    steps: Sequence[Row] = field(repr=False)
    held_out: Sequence[Row] = field(repr=False)
    evaluations: Sequence[Row] = field(repr=False)
    starts: Sequence[Row] = field(repr=False)

    @classmethod
    def read(cls, run_dir: str | Path, name: str = "") -> RunTold:
        """Read a run directory. Raises UserError where it is none, or has logged nothing yet."""
        folder = Path(expand(str(run_dir)))
        record.check_run(folder)
        steps = list(logged(folder / METRICS))
        if not steps:
            raise UserError(
                f"{folder} has logged no step yet ({METRICS}): wait for train.log_every steps, or leave it out"
            )
        _check(steps, folder / METRICS, {"step": int, "samples": int})
        held_out, starts = (list(logged(folder / file)) for file in (HELD_OUT, HISTORY))
        config = _config(folder)
        _check([config], folder / CONFIG, {"train.steps": int, "train.global_batch": int})
        return cls(name or folder.name, folder, config, steps, held_out, record.read(folder), starts)

    @property
    def last(self) -> Row:
        """The last logged step."""
        return self.steps[-1]

    @property
    def planned(self) -> int:
        """Steps that it was told to take."""
        return int(self.config["train.steps"])

    @property
    def draws(self) -> bool:
        """Whether it is a diffusion run, which images can be drawn from."""
        return any(key.startswith("model.") for key in self.config)

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return int(self.config["train.global_batch"])

    @cached_property
    def flops_per_sample(self) -> float | None:
        """Of a training step, 2 per multiply-add; None where neither a start nor a checkpoint tells the model's."""
        told = [start["flops_per_sample"] for start in self.starts if "flops_per_sample" in start]
        return float(told[-1]) if told else self._counted()

    def _counted(self) -> float | None:
        """The same of a run that began before its starts told it: from its newest checkpoint that can be read."""
        for path in checkpoint.candidates(self.folder / "checkpoints"):
            try:
                meta = checkpoint.read(path, verify=False).meta
                experiment = from_dict(Experiment, meta["config"])
                channels, height, width = meta["contract"]["shape"]
                size, classes = (height, width), len(meta["contract"]["classes"])
            except (UserError, KeyError):
                continue  # a broken one, or no diffusion run's
            return float(cost(experiment.model, size, channels, classes).training_flops)
        return None

    @cached_property
    def seconds(self) -> list[float]:
        """Training time up to each logged step: what its speeds add up to, without starts, saving and pictures."""
        total, before, found = 0.0, 0, []
        for row in self.steps:
            rate = row.get("images_per_s")
            total += (row["samples"] - before) / rate if rate else 0.0
            before = row["samples"]
            found.append(total)
        return found

    def seconds_at(self, steps: Sequence[float]) -> list[float]:
        """Training time up to steps, between logged ones in proportion."""
        logged = [0, *(row["step"] for row in self.steps)]
        return [float(value) for value in np.interp(steps, logged, [0.0, *self.seconds])]


def _check(rows: Sequence[Row], path: Path, kinds: Mapping[str, type]) -> None:
    """UserError for a row that lacks a key, or has another kind of value there: a file of no run, or damaged."""
    for number, row in enumerate(rows, 1):
        for key, kind in kinds.items():
            if not isinstance(row.get(key), kind):
                raise UserError(
                    f"{path} has {row.get(key)!r} for {key} in row {number}, expected {kind.__name__}: it is damaged, "
                    "or of a run that cannot be compared"
                )


def _config(folder: Path) -> dict[str, Any]:
    """The keys of config.yaml, dotted, with the defaults of keys that it is older than where its kind is known."""
    own = read_own(folder / CONFIG)
    try:
        return flatten(to_dict(from_dict(Experiment, own)))
    except ConfigError:  # of another kind of run, or of another version
        return flatten(resolved(own))


def read_all(runs: Sequence[str]) -> list[RunTold]:
    """Read several runs, each given as PATH or NAME=PATH, with as much of each path in its name as tells them apart.

    Raises UserError for fewer than two, one that is given twice, and two of one name.
    """
    if len(runs) < 2:
        raise UserError(f"two runs or more are compared, got {len(runs)}: give RUN_A RUN_B ...")
    pairs = [
        (word.partition("=")[0], word.partition("=")[2]) if _is_named(word) else ("", word) for word in runs
    ]
    folders = [Path(expand(path)).resolve() for _, path in pairs]
    twice = [str(f) for f in folders if folders.count(f) > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice: compare different runs")
    names = [name or short for (name, _), short in zip(pairs, told_apart(folders), strict=True)]
    same = [name for name in names if names.count(name) > 1]
    if same:
        raise UserError(f"two runs are called {same[0]}: write NAME=PATH")
    return [RunTold.read(path, name) for (_, path), name in zip(pairs, names, strict=True)]


def _is_named(word: str) -> bool:
    """Whether it is NAME=PATH; a folder whose own name has an = in it is a path."""
    return "=" in word and not Path(expand(word)).exists() and "/" not in word.partition("=")[0]


def told_apart(folders: Sequence[Path]) -> list[str]:
    """For each folder the shortest end of its path that no other has."""
    names = []
    for folder in folders:
        parts = folder.parts
        for count in range(1, len(parts) + 1):
            if sum(other.parts[-count:] == parts[-count:] for other in folders) == 1:
                break
        names.append("/".join(parts[-count:]))
    return names
