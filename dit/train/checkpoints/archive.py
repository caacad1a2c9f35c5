"""A run's folder on disk as training knows it: checkpoints, snapshots of averages, and the probe that checks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit.ranks import group
from dit.ranks.group import World
from dit.train.checkpoints import checkpoint, retention
from dit.train.checkpoints.checkpoint import Checkpoint, State
from dit.train.checkpoints.probe import Probe
from dit.train.checkpoints.saver import ALL, Saver
from dit.train.settings import CheckpointConfig

Say = Callable[[str], object]


def checkpoints_of(run_dir: Path) -> Path:
    """Name the folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def whats_there(run_dir: Path) -> str:
    """Say which checkpoint a run would go on from, by the names of the folders alone."""
    found = checkpoint.candidates(checkpoints_of(run_dir))
    if not found:
        return "there is no checkpoint yet, and the same command starts from the beginning"
    return f"the newest checkpoint is {found[0].name}, and the same command goes on from there"


class Archive:
    """Writes a run's checkpoints and snapshots beside the training, and finds them. But for `newest`, `progress` and
    `close` every method is collective.

    probe: by whose losses a checkpoint is checked before it is written and after it was loaded.
    """

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, probe: Probe, world: World):
        self.cfg, self.probe = cfg, probe
        self.checkpoints = Saver(checkpoints_of(run_dir), cfg, world)
        self.snapshots = Saver(run_dir / "snapshots", ALL, world)

    def newest(self, say: Say, up_to: int | None = None) -> Checkpoint | None:
        """Find the newest good checkpoint, of step `up_to` at most; None where there never was one. Not collective:
        rank 0 finds and verifies for all, since file systems may not show every rank the same.

        say: hears of broken ones. Raises CheckpointError where all are broken.
        """
        return checkpoint.latest(self.checkpoints.folder, say, up_to)

    def save(self, step: int, state: State, meta: Mapping[str, Any]) -> None:
        """Have a checkpoint written: at once, or, where checkpoint.background is set, while training goes on."""
        self.checkpoints.begin(step, state, meta)
        if not self.cfg.background:
            self.checkpoints.wait()

    def has_snapshot(self, step: int) -> bool:
        """Whether the snapshot of a step is there."""
        return group.on_main(lambda: checkpoint.path_of(self.snapshots.folder, step).exists())

    def progress(self) -> tuple[int, int]:
        """Tell how far this rank is with what it writes, a checkpoint and a snapshot. Not collective."""
        return self.checkpoints.progress(), self.snapshots.progress()

    def advance(self, checkpoint_progress: int, snapshot_progress: int) -> None:
        """Go as far as all ranks are, given the greatest of what `progress` told on any of them."""
        self.checkpoints.advance(checkpoint_progress)
        self.snapshots.advance(snapshot_progress)

    def discard(self, beyond: int) -> None:
        """Remove what was saved of steps beyond one."""
        for saver in (self.checkpoints, self.snapshots):
            group.on_main(lambda folder=saver.folder: retention.discard(folder, beyond))  # type: ignore[misc]

    def complete(self) -> None:
        """Wait for what is being written."""
        self.checkpoints.wait()
        self.snapshots.wait()

    def close(self, at_once: bool = False) -> None:
        """End the writing threads. at_once: what they have begun stays incomplete."""
        self.checkpoints.close(at_once)
        self.snapshots.close(at_once)
