"""A training run in memory: what it is made of, how many steps it has done, and how it is saved and resumed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.compiling import CompileWatch
from dit.ranks import group
from dit.ranks.group import World
from dit.ranks.watch import Watch
from dit.train import run_dir
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.archive import Archive
from dit.train.checkpoints.checkpoint import Checkpoint, State, check_same_data
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.faults import Fault, Faults
from dit.train.feed import Feed
from dit.train.meters import Meters
from dit.train.plan import Parts
from dit.train.records import Records
from dit.train.settings import RunConfig
from dit.train.step import StepGraph
from dit.train.task import Task


@dataclass
class Run:
    """All that a training run consists of, and how far it has come. The loop takes it; every method is collective.

    identity: JSON values that go into every checkpoint (config, data, contract, code version).
    graph: launches steps, or None: by train.graphs. peak_flops: of all ranks' devices together, or None. step: done.
    hooks_are_due: those of the last step, which a run that was stopped leaves to its next start.
    """

    cfg: RunConfig
    folder: Path
    identity: dict[str, Any]
    parts: Parts
    engine: Engine
    ema: Ema
    feed: Feed
    records: Records
    faults: Faults
    watch: Watch
    archive: Archive
    graph: StepGraph | None = None
    compile_watch: CompileWatch | None = None  # where something is compiled
    peak_flops: float | None = None
    step: int = 0
    hooks_are_due: bool = False

    @property
    def world(self) -> World:
        """This rank among the others."""
        return self.engine.world

    @property
    def task(self) -> Task:
        """What is trained, as training steps compute it."""
        return self.parts.compiled_task or self.parts.task

    @property
    def meters(self) -> Meters:
        """What is gathered until the next row of the log."""
        return self.records.meters

    @property
    def micro(self) -> int:
        """Samples in one forward pass on one rank."""
        return self.cfg.train.micro(self.world)

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.cfg.optim.lr_at(self.engine.updates, self.cfg.train.steps)

    @property
    def samples_seen(self) -> int:
        """Samples of all steps done but those that were left out."""
        left_out = sum(last - first + 1 for first, last in self.faults.left_out)
        return (self.step - left_out) * self.cfg.train.global_batch

    def say(self, text: str) -> None:
        """Print on rank 0."""
        self.records.say(text)

    def look_at_compiling(self, part: str) -> float:
        """Tell what `part` of a run's cycle, which has just run, has compiled; give the seconds that this took."""
        return 0.0 if self.compile_watch is None else self.compile_watch.look(part)

    # --- saving --------------------------------------------------------------------------------------------

    def save(self) -> Fault | None:
        """Have a checkpoint of the steps done written; `complete` waits for it. The fault, if there is one, for which
        nothing is saved: the weights compute nothing any more, or not the same on all ranks."""
        self.watch.at("save", self.step)
        state, probe = self._state(), self.archive.probe
        losses = probe.losses()
        fault = self.faults.watch_weights(probe.not_finite(state) or probe.apart(losses), self.step)
        if fault is not None:
            return fault
        meta = {
            **self.identity,
            "updates": self.engine.updates,
            "skipped": self.engine.skipped,
            "faults": self.faults.state(),
            "samples": self.samples_seen,
            "meters": self.meters.state(),
            "probe": probe.record(losses),
            "world_size": self.world.size,
            "quarantine": self.feed.agree(),
            "hooks_are_due": self.hooks_are_due,
        }
        self.archive.save(self.step, state, meta)
        return None

    def save_snapshot(self) -> None:
        """Have the averages written that any other can be made of later."""
        self.watch.at("save", self.step)
        averages = State(self.engine.fragments(), self.ema.powers, self.engine.module, is_whole=False)
        self.archive.snapshots.begin(self.step, averages, {**self.identity, "updates": self.engine.updates})

    def is_snapshot_due(self) -> bool:
        """Whether one is to be kept of the last step done."""
        every = self.ema.cfg.snapshot_every
        return every > 0 and self.step > 0 and self.step % every == 0

    def complete(self) -> None:
        """Wait for what is being written."""
        self.watch.at("save", self.step)
        self.archive.complete()

    # --- resuming ------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Go on from the run directory's newest good checkpoint; False where there is none."""
        found = group.on_main(lambda: self.archive.newest(self.say))
        if found is None:
            return False
        run_dir.differences(found.meta["config"], self.cfg, str(found.path))
        check_same_data(found, self.identity)
        self.restore(found)
        self.hooks_are_due = found.meta.get("hooks_are_due", False)
        self.archive.probe.check(found)
        self.look_at_compiling("checkpoint")
        self.say(f"resuming {self.folder} at step {self.step}")
        self._say_if_rate_leaps(found.meta["config"]["train"]["steps"])
        if self.is_snapshot_due() and not self.archive.has_snapshot(self.step):  # killed before it was whole
            self.save_snapshot()
        return True

    def restore(self, found: Checkpoint) -> None:
        """Take a checkpoint's state."""
        meta = found.meta
        self.feed.quarantine.load(meta["quarantine"])
        group.together(lambda: checkpoint.load_into(found, self._state()))
        self.engine.sync_weights()
        self.engine.set_updates(meta["updates"])
        self.engine.skipped = meta["skipped"]
        self.step = found.step
        self.faults.load(meta.get("faults", {}))  # not there: as at the start
        self.meters.load_state(meta["meters"], self.world.is_main)

    def _say_if_rate_leaps(self, before: int) -> None:
        """Say where another train.steps than `before` gives the next update another learning rate."""
        optim, updates, now = self.cfg.optim, self.engine.updates, self.cfg.train.steps
        rate, was = self.lr, optim.lr_at(updates, before)
        if self.step >= now or math.isclose(rate, was, rel_tol=1e-6):
            return
        self.say(
            f"the learning rate goes from {optim.lr_at(max(0, updates - 1), before):.3g} to {rate:.3g}, because "
            f"train.steps went from {before} to {now} and optim.schedule follows from it. For a run of open length "
            "take optim.schedule=constant, which does not: this run's weights go on in a new one with "
            f"--init.from={self.folder} --optim.schedule=constant --run_dir=..."
        )

    def close(self, at_once: bool = False) -> None:
        """End all threads. at_once: what is being written stays incomplete. Not collective."""
        self.records.close()
        self.feed.close()
        self.archive.close(at_once)
        if self.graph is not None:
            self.graph.close()

    def _state(self) -> State:
        return State(self.engine.fragments(), self.ema.averages, self.engine.module)
