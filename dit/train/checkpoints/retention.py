"""Which checkpoints stay, and making room for new ones."""

from __future__ import annotations

import shutil
from pathlib import Path

from dit.train.checkpoints.checkpoint import NAME, CheckpointError, candidates, path_of, read, step_of
from dit.train.settings import CheckpointConfig


def fresh(directory: Path, step: int) -> Path:
    """Make an empty folder to write the checkpoint of a step into; what was left of unfinished ones is removed."""
    for left_over in [p for p in directory.glob("*.partial") if NAME.fullmatch(p.name.partition(".")[0])]:
        shutil.rmtree(left_over, ignore_errors=True)
    partial = path_of(directory, step).with_suffix(".partial")
    partial.mkdir(parents=True)
    return partial


def prune(directory: Path, keeping: CheckpointConfig, step: int) -> None:
    """Remove all but the newest `keeping.keep` checkpoints up to `step`, the one just saved; 0 keeps all. On rank 0.

    Broken ones do not count instead of good ones, nor do those beyond it, which were passed over. Those that are to be
    kept for good (`keep_every`, `at`) stay too.
    """
    keep = keeping.keep
    old = [p for p in candidates(directory) if step_of(p) <= step and _looks_whole(p)][keep:] if keep else []
    for path in [p for p in old if not keeping.is_for_good(step_of(p))]:
        remove(path)


def _looks_whole(path: Path) -> bool:
    try:
        read(path, verify=False)
    except CheckpointError:
        return False
    return True


def discard(directory: Path, beyond: int) -> None:
    """Remove the checkpoints of steps beyond one: of a course that a run does not take. Called by rank 0."""
    for path in [p for p in candidates(directory) if step_of(p) > beyond]:
        remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint; what cannot be removed is said, and stays."""
    try:
        doomed = path.rename(path.with_suffix(".old.partial"))  # so that half of one is never taken for one
        shutil.rmtree(doomed)
    except OSError as error:  # no reason to stop training
        print(f"could not remove the old checkpoint {path}: {error}", flush=True)
