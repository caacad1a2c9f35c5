"""A checkpoint in a second folder: the same files under another name, where the file system can."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dit.files import sync
from dit.train.checkpoints.checkpoint import Checkpoint, CheckpointError, path_of, read


def take_over(found: Checkpoint, directory: Path) -> Path:
    """Have a checkpoint under `directory` as well, whole or not at all; what is there of that step already stays.

    Its files are hard-linked, or copied where that cannot be: across file systems, or of another user. A checkpoint's
    files are never written again once it has its name, and removing a name leaves the other: neither folder can harm
    the other's. Raises CheckpointError.
    """
    final = path_of(directory, found.step)
    if final.exists():
        return final
    partial = final.with_suffix(".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in [*(entry["file"] for entry in found.meta["files"]), "meta.json", "COMPLETE"]:
            _link(found.path / name, partial / name)
        read(partial, verify=False)
        sync(partial)
        partial.rename(final)
        sync(directory)
    except OSError as error:
        raise CheckpointError(
            f"could not take {found.path} over into {directory}: {error}. Start the same command again once that is "
            "mended; where a running job has removed it meanwhile, have that one keep it (checkpoint.at)"
        ) from error
    return final


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except (
        OSError
    ):  # another file system, or one without hard links; a source that is gone is told by the copy
        shutil.copyfile(source, target)
        sync(target)
