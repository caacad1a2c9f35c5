"""What of a run outlives its process: its checkpoints, resuming from them, and going back to one behind a fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit.data.loading.stream import Stream
from dit.progress import say
from dit.ranks import group
from dit.ranks.watch import Watch
from dit.train.checkpoints import checkpoint, retention
from dit.train.checkpoints.checkpoint import Checkpoint, CheckpointError, State, check_same_data
from dit.train.checkpoints.probe import Probe
from dit.train.checkpoints.saver import ALL, Saver
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.faults import Fault, Faults, FaultsConfig, TrainingError
from dit.train.hooks import Hook
from dit.train.meters import Meters, RunLog
from dit.train.optim import OptimConfig
from dit.train.quarantine import SharedQuarantine
from dit.train.settings import CheckpointConfig, TrainConfig
from dit.train.task import Samples, Task


@dataclass
class PersistentRun:
    """A run's parts, and what of it lasts: checkpoints, resuming, going back. Every method is collective.

    identity: JSON values that go into every checkpoint (config, data contract, code version).
    check_config: refuses (by an error) to go on with a checkpoint of another config, given that and its name.
    samples: a fixed synthetic batch whose loss a checkpoint records and a load must find again.
    flops_per_image: of a training step. peak_flops: of all ranks' devices together, or None.
    """

    seed: int
    train: TrainConfig
    optim: OptimConfig
    saving: CheckpointConfig
    guard: FaultsConfig
    engine: Engine
    ema: Ema
    task: Task
    stream: Stream
    run_dir: Path
    identity: dict[str, Any]
    samples: Samples
    check_config: Callable[[Mapping[str, Any], str], object]
    flops_per_image: float
    peak_flops: float | None
    from_scratch: bool = True
    prefetch: int = 4  # batches
    hooks: list[Hook] = field(default_factory=list)
    log: RunLog = field(init=False)  # from run() on

    def __post_init__(self) -> None:
        self.world = self.engine.world
        self.step = 0  # steps done
        self.quarantine = SharedQuarantine(self.stream.quarantine, self.say)
        self.batches: Any = None  # of the stream, under way
        self.meters = Meters(self.engine.device)
        self.micro = self.train.micro(self.world)
        self.watch = Watch(self.world, self.train.hang_timeout, self.run_dir)
        self.probe = Probe(self.task, self.engine, self.ema, self.samples, self.train.precision)
        self.faults = Faults(self.guard, self.train.max_skipped, self.run_dir, self.world.rank)
        self.folder = self.run_dir / "checkpoints"
        self.saver = Saver(self.folder, self.saving)
        self.snapshots = Saver(self.run_dir / "snapshots", ALL)
        self.hooks_are_due = False  # the last step's, which a run that was stopped leaves to the next start

    def resume(self) -> bool:
        """Go on from the run directory's newest good checkpoint; False where there is none. Collective."""
        # rank 0 finds and verifies for all: file systems may not show every rank the same
        found = group.on_main(lambda: checkpoint.latest(self.folder, self.say))
        if found is None:
            return False
        self.check_config(found.meta["config"], str(found.path))
        check_same_data(found, self.identity)
        self._restore(found)
        self.hooks_are_due = found.meta.get("hooks_are_due", False)
        self.probe.check(found)
        self.say(f"resuming {self.run_dir} at step {self.step}")
        taken = group.on_main(lambda: checkpoint.path_of(self.snapshots.folder, self.step).exists())
        if self.is_snapshot_due() and not taken:  # the run was killed before it was whole
            self.save_snapshot()
        return True

    def _restore(self, found: Checkpoint) -> None:
        meta = found.meta
        self.quarantine.load(meta["quarantine"])
        group.together(lambda: checkpoint.load_into(found, self._state()))
        self.engine.sync_weights()
        self.engine.set_updates(meta["updates"])
        self.engine.skipped = meta["skipped"]
        self.step = found.step
        self.faults.load(meta.get("faults", {}))  # not there: as at the start
        self.meters.load_state(meta["meters"], self.world.is_main)

    def _state(self) -> State:
        return State(self.engine.fragments(), self.ema.averages, self.engine.module)

    def save(self) -> None:
        """Have a checkpoint of the steps done written; `saver.wait()` completes it. Collective.

        TrainingError where the weights compute nothing any more, unless the run goes back.
        """
        self.watch.at("save", self.step)
        state, losses = self._state(), self.probe.losses()
        complaint = self.probe.spoilt(state) or self.probe.apart(losses)
        fault = self.faults.watch_weights(complaint, self.step)
        if fault is not None:
            self.mend(fault)  # which saves, or raises
            return
        meta = {
            **self.identity,
            "updates": self.engine.updates,
            "skipped": self.engine.skipped,
            "faults": self.faults.state(),
            "samples": self.samples_seen(),
            "meters": self.meters.state(),
            "probe": self.probe.record(losses),
            "world_size": self.world.size,
            "quarantine": self.quarantine.agree(self.stop_reading),
            "hooks_are_due": self.hooks_are_due,
        }
        self.saver.begin(self.step, state, meta)
        if not self.saving.background:
            self.saver.wait()

    def save_snapshot(self) -> None:
        """The averages that any other can be made of later."""
        self.watch.at("save", self.step)
        averages = State(self.engine.fragments(), self.ema.powers, self.engine.module, is_whole=False)
        self.snapshots.begin(self.step, averages, {**self.identity, "updates": self.engine.updates})

    def is_snapshot_due(self) -> bool:
        """After the last step done."""
        every = self.ema.cfg.snapshot_every
        return every > 0 and self.step > 0 and self.step % every == 0

    def samples_seen(self) -> int:
        left_out = sum(last - first + 1 for first, last in self.faults.left_out)
        return (self.step - left_out) * self.train.global_batch

    def mend(self, fault: Fault) -> bool:
        """Whether the run went back behind a fault; where it may not or cannot, it stops, or only says so."""
        found = None
        if self.faults.may_return:
            self.complete()
            found = group.on_main(lambda: self._before(fault))
        if found is not None:
            self._go_back(found, fault)
            return True
        if fault.is_fatal:
            self.complete()
            raise TrainingError(fault.why)
        self.say(fault.why)
        return False

    def _before(self, fault: Fault) -> Checkpoint | None:
        """On rank 0: the newest good checkpoint from when all was well."""
        try:
            return checkpoint.latest(self.folder, self.say, fault.good)
        except CheckpointError as error:  # the fault itself is the news
            self.say(f"there is no way back behind step {fault.good}: {error}")
            return None

    def _go_back(self, found: Checkpoint, fault: Fault) -> None:
        """Take the checkpoint's state, and go on with the step after this one: those between are left out."""
        step, returned = self.step, self.faults.returned + 1
        self.stop_reading()
        for folder in (self.folder, self.snapshots.folder):
            group.on_main(lambda folder=folder: retention.discard(folder, found.step))  # type: ignore[misc]
        self._restore(found)
        self.faults.leave_out(found.step + 1, step, returned)
        self.step = self._logged = step
        self.log.cut(found.step)
        self.say(
            f"{fault.why}\nwent back to {found.path} by itself ({returned} of faults.returns = {self.guard.returns}) "
            f"and leaves out steps {found.step + 1} to {step}"
        )
        self.save()
        self.saver.wait()  # so that the same command goes on here, and does not meet it again

    def complete(self) -> None:
        """Wait for what is being written."""
        self.watch.at("save", self.step)
        self.saver.wait()
        self.snapshots.wait()

    def stop_reading(self) -> None:
        """Forget batches that were read ahead."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def say(self, text: str) -> None:
        """Print on rank 0, beside a progress bar."""
        if self.world.is_main:
            say(text)
