"""One set of weights of a run as one safetensors file, to sample from and to pass on; and averages made afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit.config import ConfigError
from dit.files import expand, sync
from dit.outputs import claim, claim_file
from dit.progress import Bar
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import EXPORT, Checkpoint, CheckpointError, Reader
from dit.train.checkpoints.tensorfile import holds, write_tensors
from dit.train.ema import MAIN, Average, ema_of
from dit.train.posthoc import WIDEST, Profile, combination, power_of

KEPT = ("config", "contract", "step", "updates", "code", "torch", "data")  # of meta.json


@dataclass(frozen=True)
class Weights:
    """weights: a state dict. meta: what their checkpoint says of them. kind: "model", "ema" or another average."""

    tensors: Mapping[str, Tensor]
    buffers: tuple[str, ...]
    meta: Mapping[str, Any]
    kind: str

    @property
    def average(self) -> Average:
        """Which average these are, and how much of the first weights it still holds."""
        return Average.of_checkpoint(self.meta, self.kind)

    @property
    def line(self) -> str:
        """Which weights these are, in words."""
        return f"{self.average} of step {self.meta['step']}, after {self.meta.get('updates', '?')} updates"

    def write(self, out: Path, overwrite: bool = False) -> bool:
        """Write a safetensors file, there whole or not at all; False where the same file is there already.

        Its tensors have the state dict's names. Raises OutputError where the file is of something else (overwrite: it
        is replaced), ConfigError for another ending.
        """
        _check_place(out)
        meta = {**self.meta, "weights": [self.kind], "buffers": list(self.buffers)}
        words = {EXPORT: json.dumps(meta)}
        if claim_file(out, lambda: holds(out, self.tensors, words), overwrite=overwrite):
            return False
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        write_tensors(partial, self.tensors, words)
        partial.replace(out)
        sync(out.absolute().parent)
        return True


def _check_place(out: Path) -> None:
    """What can be said before weights are read."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: expected a file name that ends in .safetensors")
    claim([out], overwrite=True)


def of_checkpoint(found: Checkpoint, kind: str) -> Weights:
    """A checkpoint's. kind: "model", "ema" or another average in it; CheckpointError if it is none."""
    reader = Reader(found)
    meta = {key: found.meta[key] for key in KEPT if key in found.meta}
    return Weights(reader.state_dict(kind), tuple(reader.buffers()), meta, kind)


def of_width(run_dir: Path, width: float) -> tuple[Weights, float]:
    """The average of any width (sigma_rel) at the newest snapshot of a run, and how far its profile is off (0 to 1).

    Its kind is "ema". Raises ConfigError for a width that is none, CheckpointError where there are no snapshots.
    """
    if not 0 < width < WIDEST:
        raise ConfigError(f"the width must be above 0 and below {WIDEST:.3f}, got {width:g}")
    there = checkpoint.snapshots(run_dir / "snapshots")
    found = [s for s in there if ema_of(s.meta["config"]).averaged(s.meta["updates"])]
    if not found:
        raise CheckpointError(
            f"{run_dir}/snapshots has no averages to make others of; train with --ema.power='[0.05, 0.1]' "
            "--ema.snapshot_every=STEPS"
        )
    sources = [(s, kind) for s in found for kind in s.weights]
    averaged = [ema_of(s.meta["config"]).averaged(s.meta["updates"]) for s in found]
    profiles = [
        Profile(power_of(float(k.removeprefix("power_"))), n)
        for s, n in zip(found, averaged, strict=True)
        for k in s.weights
    ]
    factors, off = combination(profiles, Profile(power_of(width), averaged[-1]))
    readers = {s.path: Reader(s) for s in found}
    newest = readers[found[-1].path]
    tensors: dict[str, Tensor] = {}
    for name in Bar(newest.shapes, total=len(newest.shapes), unit="tensor", leave=False):
        total = torch.zeros(newest.shapes[name], dtype=torch.float64)
        for (snapshot, kind), factor in zip(sources, factors.tolist(), strict=True):
            total.add_(readers[snapshot.path].whole(kind, name), alpha=factor)
        tensors[name] = total.float()
    buffers = newest.buffers()
    kept = {key: found[-1].meta[key] for key in KEPT if key in found[-1].meta}
    return Weights({**tensors, **buffers}, tuple(buffers), {**kept, "width": width}, MAIN), off


class Exported(NamedTuple):
    """What was exported, without the tensors. off: as `of_width` has it. is_new: whether the file was written now."""

    weights: Weights
    off: float | None
    is_new: bool


def export(
    run_or_checkpoint: str, out: str, kind: str, width: float | None, overwrite: bool = False
) -> Exported:
    """Write a file that tools/sample.py takes. width: an average of this width, of a run directory's snapshots."""
    _check_place(Path(expand(out)))
    if width is not None and kind != MAIN:
        raise ConfigError(
            f"a width is of an average that is made now; leave weights = {kind} out, or the width"
        )
    if width is None:
        weights, off = of_checkpoint(checkpoint.resolve(run_or_checkpoint), kind), None
    else:
        weights, off = of_width(Path(expand(run_or_checkpoint)), width)
    is_new = weights.write(Path(expand(out)), overwrite)
    return Exported(replace(weights, tensors={}), off, is_new)
