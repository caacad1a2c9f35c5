"""Pairs of noise and what a model made of it: the data of a rectified flow (Liu et al., arXiv 2209.03003, algorithm 1).

A data set like any other, of latents in one view, with the noise stored beside them (`Manifest.eps`); the `reflow`
coupling trains on it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.config import from_dict
from dit.data import DataError
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.data.shards.write import BlockCutter, ShardWriter, write_names
from dit.files import sync
from dit.outputs import RECORD, replace_folder, write_record
from dit.unfinished import Blocks


@dataclass(frozen=True)
class Origin:
    """What pairs take over from the model that made them.

    norm: that it was trained with, which becomes the data set's mean and std, so that a model trained on the pairs
    sees the same normalisation. codec: identity of the codec. seed: of the noise.
    """

    norm: LatentNorm
    codec: dict[str, Any]
    classes: tuple[str, ...]
    image_size: int
    seed: int

    @classmethod
    def of(cls, contract: Mapping[str, Any], seed: int) -> Origin:
        """Make it of what a checkpoint holds of its latents."""
        norm = from_dict(LatentNorm, contract["norm"])
        return cls(norm, contract["codec"], tuple(contract["classes"]), contract["image_size"], seed)


@dataclass(frozen=True)
class Pairs:
    """Pairs in the making: what ranks generate waits in `blocks`, for rank 0 to put together."""

    blocks: Blocks
    origin: Origin

    def arrays(self, latents: Tensor, eps: Tensor, index: Tensor, label: Tensor) -> dict[str, np.ndarray]:
        """What is kept of a block.

        latents: (B, C, H, W) as the model sees them, normalised. eps: their noise, of that shape. index, label: (B,)
        int64. DataError where a latent is not finite.
        """
        finite = torch.isfinite(latents).flatten(1).all(1)
        if not bool(finite.all()):
            odd = int(index[~finite.to(index.device)][0])
            raise DataError(f"sample {odd} is not finite: a data set of it would be of no use; try fp32")
        arrays = {"latents": self.origin.norm.invert(latents), "eps": eps.float()}
        arrays = {name: values[:, None].cpu() for name, values in arrays.items()}  # (B, 1, C, H, W): one view
        return {name: values.numpy() for name, values in {**arrays, "label": label.cpu()}.items()}

    def write(self, out: Path, spec: Mapping[str, Any], *, block: int = 256, shard_mb: float = 512.0) -> None:
        """Put the data set together from all blocks, and give it its place. On rank 0.

        The bytes depend on the pairs alone, not on blocks or ranks. spec: JSON values that say how they were made, kept
        beside them. block: pairs in a block of the data set, at most. shard_mb: MB (10^6 bytes) a shard, at most.
        """
        folder = self.blocks.folder / "whole"
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed in here
        folder.mkdir()
        _assemble(self, folder, block, int(shard_mb * 1e6))
        write_record(folder / RECORD, spec)
        sync(folder)
        replace_folder(folder, Path(os.path.abspath(out)))


def _assemble(pairs: Pairs, folder: Path, block: int, shard_bytes: int) -> None:
    """Shards and the manifest from all blocks."""
    origin, cutter, labels = pairs.origin, BlockCutter(block), []
    shape: tuple[int, ...] = ()
    with ShardWriter(folder, shard_bytes) as writer:
        for number in range(pairs.blocks.number):
            held = pairs.blocks.read(number)
            batch = {name: held[name] for name in ("latents", "eps", "label")}
            batch["id"] = held["id"].astype(np.uint64)
            shape = batch["latents"].shape[1:]
            labels.append(batch["label"])
            for arrays in cutter.full(batch):
                writer.add(arrays)
        for arrays in cutter.rest():
            writer.add(arrays)
        writer.finish()
    label = np.concatenate(labels)
    names = write_names(folder, [f"seed-{origin.seed}-sample-{i}" for i in range(len(label))])
    manifest = Manifest(
        samples=len(label),
        array="latents",
        shape=shape,
        dtype="float32",
        eps=True,
        views=("original",),
        posterior="none",
        image_size=origin.image_size,
        transform="none: these are generated",
        classes=origin.classes,
        class_counts=tuple(np.bincount(label[label >= 0], minlength=len(origin.classes)).tolist()),
        unlabelled=int((label < 0).sum()),
        mean=origin.norm.mean,
        std=origin.norm.std,
        codec=origin.codec,
        seed=origin.seed,
        block=cutter.block,
        names=names,
        shards=tuple(writer.shards),
        blocks=tuple(writer.blocks),
    )
    manifest.save(folder)
