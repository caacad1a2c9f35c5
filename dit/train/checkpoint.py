"""Checkpoints that survive a kill at any moment and load at any number of ranks and any ZeRO stage.

One safetensors file per rank holds that rank's fragments, addressed by parameter name and offset. A checkpoint is
written into `<name>.partial`, every file flushed to disk, checksummed and listed in `meta.json`, marked COMPLETE
and renamed; a directory without COMPLETE is not a checkpoint. Works on fragments; knows nothing of engines.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dit import dist
from dit.dist import PeerError
from dit.errors import UserError
from dit.files import sync
from dit.train.fragments import ADAM_STATE, Fragment

KINDS = ("model", "ema", *ADAM_STATE)
_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}\d{{8,}}")  # a copy that somebody made beside it is not ours


class CheckpointError(UserError):
    """A checkpoint cannot be written, found, trusted or used here."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. meta: what meta.json holds."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was saved."""
        return int(self.meta["step"])


# --- writing -----------------------------------------------------------------------------------------------


def save(
    directory: Path,
    step: int,
    fragments: list[Fragment],
    ema: list[Tensor],
    module: nn.Module,
    meta: dict[str, Any],
) -> Path:
    """Write `directory/step-XXXXXXXX`; collective. Until the last rename, what was there before stays good.

    meta: JSON values, the same on all ranks. Raises CheckpointError on every rank if any rank cannot write.
    """
    final = directory / f"{_PREFIX}{step:08d}"
    partial = directory / f"{final.name}.partial"
    try:
        dist.on_main(lambda: _fresh(partial))
        here = dist.together(lambda: _write_rank(partial, fragments, ema, module))
        entries = dist.gather_objects(here)
        dist.on_main(lambda: _finish(partial, final, entries, {**meta, "step": step}))
    except (OSError, SafetensorError, PeerError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        raise CheckpointError(
            f"could not save {final}: {error}. Earlier checkpoints are untouched; "
            f"{'free space' if full else 'make room for it or mend the directory'} and start the same command again."
        ) from error
    return final


def _fresh(partial: Path) -> None:
    for left_over in [p for p in partial.parent.glob("*.partial") if _NAME.fullmatch(p.stem)]:
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_rank(
    partial: Path, fragments: list[Fragment], ema: list[Tensor], module: nn.Module
) -> dict[str, Any]:
    """Write this rank's file; returns its entry in meta.json."""
    rank = dist.World.from_env().rank
    tensors: dict[str, Tensor] = {}
    for fragment, average in zip(fragments, ema, strict=True):
        pieces = {"model": fragment.weight, "ema": average, **fragment.state}
        if fragment.is_owned:
            tensors.update({f"{kind}/{fragment.name}": _on_cpu(t) for kind, t in pieces.items()})
    if rank == 0:
        tensors.update({f"buffer/{name}": _on_cpu(b) for name, b in persistent_buffers(module).items()})
    path = partial / f"rank-{rank:05d}.safetensors"
    save_file(tensors, path)
    sync(path)
    pieces_of = {f.name: [list(f.shape), f.offset, f.numel] for f in fragments if f.is_owned}
    return {"file": path.name, "sha256": _sha256(path), "bytes": path.stat().st_size, "fragments": pieces_of}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state; those made anew from its shapes do not."""
    kept = module.state_dict()
    return {name: b for name, b in module.named_buffers() if name in kept}


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy of its own: safetensors refuses views of one storage."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _finish(partial: Path, final: Path, entries: list[dict[str, Any]], meta: dict[str, Any]) -> None:
    text = json.dumps({**meta, "files": entries}, indent=1)
    for name, content in (("meta.json", text), ("COMPLETE", hashlib.sha256(text.encode()).hexdigest())):
        (partial / name).write_text(content)
        sync(partial / name)
    sync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prune(directory: Path, keep: int, step: int, keep_every: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, the one just saved; 0 keeps all. Called by rank 0.

    Those beyond it are broken ones that were passed over: they must not count instead of a good one. keep_every: the
    steps that are its multiples stay too.
    """
    old = [p for p in _candidates(directory) if _step_of(p) <= step][keep:] if keep else []
    for path in [p for p in old if not keep_every or _step_of(p) % keep_every]:
        try:
            doomed = path.rename(path.with_suffix(".partial"))  # so that half of one is never taken for one
            shutil.rmtree(doomed)
        except OSError as error:  # no reason to stop training: the next save tries again
            print(f"could not remove the old checkpoint {path}: {error}", flush=True)


# --- finding and reading -----------------------------------------------------------------------------------


def _candidates(directory: Path) -> list[Path]:
    """Directories that have a checkpoint's final name, broken ones too, newest first."""
    found = [p for p in directory.glob(f"{_PREFIX}*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def exists(directory: Path) -> bool:
    """Whether there is a checkpoint below `directory`, be it broken."""
    return bool(_candidates(directory))


def read(path: Path, verify: bool = True) -> Checkpoint:
    """The checkpoint in `path`, its checksums verified. Raises CheckpointError naming what is broken."""
    try:
        text = (path / "meta.json").read_bytes()
        if (path / "COMPLETE").read_bytes().strip() != hashlib.sha256(text).hexdigest().encode():
            raise CheckpointError(f"{path}/meta.json: does not match its checksum in COMPLETE")
        meta = json.loads(text)
        for entry in meta["files"]:
            file = path / entry["file"]
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{file}: missing or cut short (expected {entry['bytes']} bytes)")
            if verify and _sha256(file) != entry["sha256"]:
                raise CheckpointError(f"{file}: its content does not match its checksum")
    except OSError as error:
        raise CheckpointError(f"{path}: not a complete checkpoint: {error}") from None
    return Checkpoint(path, meta)


def latest(directory: Path, report: Any = print) -> Checkpoint | None:
    """The newest good checkpoint below `directory`; a broken one is named through `report` and passed over.

    None where there never was one; an error where all that are there are broken, because starting afresh would
    overwrite them.
    """
    broken = []
    for path in _candidates(directory):
        try:
            return read(path)
        except CheckpointError as error:
            broken.append(str(error))
            report(f"passing over a broken checkpoint: {error}")
    if broken:
        raise CheckpointError(
            "no checkpoint here is usable: " + "; ".join(broken) + ". Move them away to start afresh."
        )
    return None


def resolve(run_or_checkpoint: str | Path) -> Checkpoint:
    """A run directory's newest good checkpoint, or the one checkpoint named."""
    path = Path(run_or_checkpoint)
    if (path / "meta.json").is_file():
        return read(path)
    found = latest(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    if found is None:
        raise CheckpointError(
            f"{path}: no checkpoint here; expected RUN/checkpoints/step-*/COMPLETE or one such directory"
        )
    return found


class Reader:
    """Reads any run of elements of any tensor, from whichever ranks' files hold them."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._files = [
            safe_open(checkpoint.path / e["file"], framework="pt") for e in checkpoint.meta["files"]
        ]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}  # name -> (offset, numel, file)
        for i, entry in enumerate(checkpoint.meta["files"]):
            for name, (shape, offset, numel) in entry["fragments"].items():
                self.shapes[name] = tuple(shape)
                self._pieces.setdefault(name, []).append((offset, numel, i))

    def elements(self, kind: str, name: str, offset: int, numel: int) -> Tensor:
        """(numel,) fp32: elements [offset, offset + numel) of a flattened tensor."""
        out, filled = torch.empty(numel), 0
        for start, length, i in sorted(set(self._pieces.get(name, []))):
            low, high = max(offset + filled, start), min(offset + numel, start + length)
            if low < high and low == offset + filled:
                piece = self._slice(i, f"{kind}/{name}")
                out[filled : filled + high - low] = piece[low - start : high - start]
                filled += high - low
        if filled != numel:
            raise CheckpointError(
                f"{self.checkpoint.path}: {kind}/{name} lacks elements {offset + filled}..{offset + numel}"
            )
        return out

    def _slice(self, file: int, key: str) -> Any:
        try:
            return self._files[file].get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.checkpoint.path / self.checkpoint.meta['files'][file]['file']}: lacks {key} ({error})"
            ) from None

    def whole(self, kind: str, name: str) -> Tensor:
        """A tensor in its full shape."""
        shape = self.shapes[name]
        return self.elements(kind, name, 0, torch.Size(shape).numel()).view(shape)

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers."""
        keys = [k for k in self._files[0].keys() if k.startswith("buffer/")]  # noqa: SIM118 (safe_open is no dict)
        return {k.removeprefix("buffer/"): self._files[0].get_tensor(k) for k in keys}

    def state_dict(self, kind: str) -> dict[str, Tensor]:
        """The whole model's weights ("model" or "ema") with its buffers, for load_state_dict."""
        if kind not in ("model", "ema"):
            raise CheckpointError(f"weights must be 'ema' or 'model', got '{kind}'")
        return {**{name: self.whole(kind, name) for name in self.shapes}, **self.buffers()}


@torch.no_grad()
def load_into(
    checkpoint: Checkpoint, fragments: Iterable[Fragment], ema: list[Tensor], module: nn.Module
) -> None:
    """Fill fragments, their optimizer state, the EMA and buffers from a checkpoint of any topology."""
    reader = Reader(checkpoint)
    for fragment, average in zip(fragments, ema, strict=True):
        if reader.shapes.get(fragment.name) != fragment.shape:
            raise CheckpointError(
                f"{checkpoint.path}: parameter {fragment.name} is {reader.shapes.get(fragment.name)} there and "
                f"{fragment.shape} in this model"
            )
        targets = {"model": fragment.weight, "ema": average, **fragment.state}
        for kind, target in targets.items():
            target.copy_(reader.elements(kind, fragment.name, fragment.offset, fragment.numel))
    saved = reader.buffers()
    for name, buffer in persistent_buffers(module).items():
        buffer.copy_(saved[name])
