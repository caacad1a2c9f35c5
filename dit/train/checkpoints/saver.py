"""Writes checkpoints beside the training, so that a kill at any moment leaves a good one.

The training stands still while the state is copied to the host's memory; threads do the rest. Each rank writes its file
into `<name>.partial` and flushes it to the disk; when all have, rank 0 lists the files with their checksums in
`meta.json`, marks the folder COMPLETE and renames it. Ranks learn of each other's progress by a number that the
training loop compares along the way (`Saver.progress`, `Saver.advance`): nobody waits, and threads call no collective.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.files import sync
from dit.ranks import group
from dit.ranks.group import World
from dit.train.checkpoints import checkpoint, retention
from dit.train.checkpoints.checkpoint import CheckpointError, State
from dit.train.checkpoints.tensorfile import write_tensors
from dit.train.settings import CheckpointConfig

# How far a rank is with what is being saved. Over ranks the greatest counts.
IDLE, WRITTEN, BUSY, FAILED = range(4)
ALL = CheckpointConfig(keep=0)


class Saver:
    """Saves the checkpoints of a run into a folder; but for `progress` every method is collective.

    begin() starts one, after what was begun before is complete; advance() takes it as far as all ranks are; wait()
    completes it. Once complete, what is to be kept no longer is removed.
    """

    def __init__(self, folder: Path, keeping: CheckpointConfig, world: World):
        self.folder, self.keeping, self.world = folder, keeping, world
        self._host: dict[str, Tensor] = {}  # the copies' memory, used again
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[dict[str, Any]] | None = None  # this rank's file -> its entry in meta.json
        self._finishing: Future[None] | None = None  # on rank 0
        self._has_moved = False  # since the ranks' progress was compared
        self._step, self._partial, self._meta = 0, folder, {}  # type: int, Path, dict[str, Any]

    def begin(self, step: int, state: State, meta: Mapping[str, Any]) -> None:
        """Copy the state, and write it from here on. meta: JSON values, the same on all ranks.

        Raises CheckpointError on every rank if any rank cannot write, or could not what was begun before.
        """
        self.wait()
        self._step = step
        self._meta = {**meta, "step": step, "weights": state.weights}
        with self._named():
            self._partial = group.on_main(lambda: retention.fresh(self.folder, step))
            copies, pieces, copied = group.together(lambda: self._copy(state))
        self._writing = self._threads.submit(
            _write, self._partial / f"rank-{self.world.rank:05d}.safetensors", copies, pieces, copied
        )
        self._has_moved = True

    def progress(self) -> int:
        """Tell how far this rank is: IDLE, WRITTEN (its file), BUSY or FAILED. Not collective; waits for nothing."""
        under_way = self._writing or self._finishing
        if under_way is None:
            return IDLE
        if not under_way.done():
            return BUSY
        if under_way.exception() is not None:
            return FAILED
        return WRITTEN if self._writing else IDLE

    def advance(self, most: int) -> None:
        """Go as far as all ranks are. Raises CheckpointError as begin does.

        most: the greatest progress of any rank when the last step was done.
        """
        if self._has_moved:  # that was of the time before
            self._has_moved = False
        elif most == FAILED:
            self.wait()
        elif most == WRITTEN:
            self._commit()

    def wait(self) -> None:
        """Complete what was begun. Raises CheckpointError as begin does."""
        if self._writing is not None:
            self._commit()
        with self._named():
            finishing, self._finishing = self._finishing, None
            group.on_main(lambda: None if finishing is None else finishing.result())

    def close(self, at_once: bool = False) -> None:
        """Let this rank's threads end. Not collective: what one rank of several did not wait for stays incomplete.

        at_once: also what one rank alone has begun, which nobody waits for any more.
        """
        if self.world.size == 1 and not at_once:
            self.wait()
        self._threads.shutdown(wait=not at_once, cancel_futures=at_once)

    def _copy(self, state: State) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
        """The state in memory of its own: by key; what of which parameters it is; an event after which it is there."""
        found = {
            f"{kind}/{fragment.name}": tensor
            for fragment, kinds in state.pieces()
            for kind, tensor in kinds.items()
            if fragment.is_owned
        }
        if self.world.is_main:
            found |= {f"buffer/{name}": buffer for name, buffer in state.buffers().items()}
        copied = None
        for key, tensor in found.items():
            copy = self._host.get(key)
            if copy is None or copy.shape != tensor.shape:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._host[key] = copy
            copy.copy_(tensor.detach(), non_blocking=True)
            if tensor.is_cuda and copied is None:
                copied = torch.cuda.Event()
        if copied is not None:
            copied.record()
        pieces = {f.name: [list(f.shape), f.offset, f.numel] for f in state.fragments if f.is_owned}
        return {key: self._host[key] for key in found}, pieces, copied

    def _commit(self) -> None:
        """Wait for all ranks' files, and have rank 0 make a checkpoint of them."""
        writing, self._writing = self._writing, None
        assert writing is not None
        self._has_moved = True
        with self._named():
            entries = group.gather_objects(group.together(writing.result))
            if self.world.is_main:
                self._finishing = self._threads.submit(
                    _finish, self._partial, entries, self._meta, self.keeping
                )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors inside say which checkpoint could not be saved, and what to do."""
        final = checkpoint.path_of(self.folder, self._step)
        try:
            yield
        except (OSError, RuntimeError) as error:
            if group.is_broken_connection(error):
                raise
            shutil.rmtree(final.with_suffix(".partial"), ignore_errors=True)
            full = any(os.strerror(n) in str(error) for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
            raise CheckpointError(
                f"could not save {final}: {error}. Earlier checkpoints are untouched; "
                f"{'free space' if full else 'make room for it or mend the directory'} and start the same command "
                "again."
            ) from error


def save(folder: Path, step: int, state: State, meta: Mapping[str, Any], world: World) -> Path:
    """Write `folder/step-XXXXXXXX` at once; collective. Raises CheckpointError on every rank if any cannot write."""
    saver = Saver(folder, ALL, world)
    try:
        saver.begin(step, state, meta)
        saver.wait()
    finally:
        saver.close()
    return checkpoint.path_of(folder, step)


def _write(path: Path, tensors: dict[str, Tensor], pieces: dict[str, Any], copied: Any) -> dict[str, Any]:
    """Write this rank's file, once `copied`, a CUDA event, has happened; its entry in meta.json."""
    if copied is not None:
        with torch.cuda.device(copied.device):  # a thread's own is GPU 0
            copied.synchronize()
    digest, size = write_tensors(path, tensors)
    return {"file": path.name, "sha256": digest, "bytes": size, "fragments": pieces}


def _finish(
    partial: Path, entries: list[dict[str, Any]], meta: Mapping[str, Any], keeping: CheckpointConfig
) -> None:
    """Make a checkpoint of the files that are there. Until the rename, what was there before stays good."""
    text = json.dumps({**meta, "files": entries}, indent=1)
    for name, content in (("meta.json", text), ("COMPLETE", hashlib.sha256(text.encode()).hexdigest())):
        (partial / name).write_text(content, encoding="utf-8")
        sync(partial / name)
    sync(partial)
    final = partial.with_suffix("")
    if final.exists():
        retention.remove(final)
    partial.rename(final)
    sync(final.parent)
    retention.prune(final.parent, keeping, meta["step"])
