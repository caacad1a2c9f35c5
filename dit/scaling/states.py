"""How far the runs of an experiment are, read from their folders alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dit.files import json_line, try_lock
from dit.scaling.configs import branch_point, run_folder
from dit.scaling.plan import Plan, PlannedRun
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.archive import checkpoints_of
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.rows import METRICS
from dit.train.run_dir import LOCK

TAIL = 1 << 16  # bytes of a log in which its last line is
LOGS = "logs"


def log_file(out: Path, name: str) -> Path:
    """Name the file that a run's output goes to."""
    return out / LOGS / f"{name}.log"


def failure_file(out: Path, name: str) -> Path:
    """Name the file that says why a run failed; not there where it did not."""
    return out / LOGS / f"{name}.failed"


def last_row(run_dir: Path) -> Mapping[str, Any]:
    """Read the last whole row of a run's metrics.jsonl; nothing where there is none."""
    file = run_dir / METRICS
    if not file.is_file():
        return {}
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - TAIL))
        lines = opened.read().splitlines()
    for line in reversed(lines):
        try:
            row = json_line(line)
        except ValueError:  # cut off by a kill, or still being written
            continue
        return row if isinstance(row, dict) else {}
    return {}


def last_step(run_dir: Path) -> int:
    """Tell how many steps a run has done, as far as it has logged or saved."""
    saved = [checkpoint.step_of(path) for path in checkpoint.candidates(checkpoints_of(run_dir))[:1]]
    return max([int(last_row(run_dir).get("step", 0)), *saved])


def is_whole(path: Path) -> bool:
    """Whether a complete checkpoint lies there; its checksums are looked at by whoever loads it."""
    try:
        checkpoint.read(path, verify=False)
    except CheckpointError:
        return False
    return True


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file; False where there are no locks."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class RunState:
    """What a run's folder tells of it."""

    out: Path
    run: PlannedRun

    @property
    def folder(self) -> Path:
        """The run directory."""
        return run_folder(self.out, self.run.name)

    @cached_property
    def is_complete(self) -> bool:
        """Whether its last step is saved."""
        return is_whole(checkpoint.path_of(checkpoints_of(self.folder), self.run.steps))

    @cached_property
    def step(self) -> int:
        """Steps done, those before it branched among them."""
        if self.is_complete:
            return self.run.steps
        return min(max(self.run.begins_at, last_step(self.folder)), self.run.steps)

    @property
    def flops_done(self) -> float:
        """Of what it computes itself."""
        run = self.run
        return run.own_flops * (self.step - run.begins_at) / (run.steps - run.begins_at)

    @cached_property
    def is_running(self) -> bool:
        """Whether a process trains it now, whoever started that."""
        return is_held(self.folder / LOCK)

    @cached_property
    def trained_on(self) -> str | None:
        """Digest of its training data, by its newest checkpoint; None where there is none, or that does not say."""
        for path in checkpoint.candidates(checkpoints_of(self.folder)):
            with contextlib.suppress(CheckpointError, OSError):  # broken, or being removed by the run
                digest = checkpoint.read(path, verify=False).meta.get("data", {}).get("digest")
                return None if digest is None else str(digest)
        return None

    @property
    def has_begun(self) -> bool:
        """Whether there is anything of it."""
        return (self.folder / METRICS).is_file() or checkpoint.exists(checkpoints_of(self.folder))

    @property
    def can_begin(self) -> bool:
        """Whether what it begins from is there."""
        return self.run.trunk is None or self.has_begun or is_whole(branch_point(self.out, self.run))

    @property
    def failure(self) -> str | None:
        """What was said when it last failed; None where it did not."""
        file = failure_file(self.out, self.run.name)
        return file.read_text(encoding="utf-8") if file.is_file() else None

    @property
    def speed(self) -> float | None:
        """FLOP/s that it was last seen to train at; None where it has not logged that yet."""
        rate = last_row(self.folder).get("images_per_s")
        return float(rate) * self.run.flops / self.run.samples if rate else None


def states_of(out: Path, plan: Plan) -> list[RunState]:
    """Look at every run of a plan now."""
    return [RunState(out, run) for run in plan.runs]
