"""Pairs of noise and what a model made of it: the data of a rectified flow (Liu et al., arXiv 2209.03003, algorithm 1).

A data set like any other, of latents in one view, with the noise stored beside them (`Manifest.eps`); the `reflow`
coupling trains on it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.config import from_dict
from dit.data import DataError
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.data.shards.write import BlockCutter, ShardWriter, folder_beside, write_names
from dit.files import expand, write_atomically
from dit.ranks import group

SPEC = "spec.json"  # how the pairs were made, for people to read


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


@dataclass
class PairWriter:
    """Takes what a rank generates. Batches wait in files of `folder`, which all ranks share, for rank 0 to sort."""

    folder: Path
    origin: Origin
    firsts: list[int] = field(default_factory=list)  # the first index of each batch that this rank added

    def add(self, index: Tensor, latents: Tensor, eps: Tensor, label: Tensor) -> None:
        """Take in a batch of consecutive indices.

        latents: (B, C, H, W) as the model sees them, normalised. eps: their noise, of that shape. index, label: (B,)
        int64. DataError where a latent is not finite.
        """
        finite = torch.isfinite(latents).flatten(1).all(1)
        if not bool(finite.all()):
            odd = int(index[~finite.to(index.device)][0])
            raise DataError(f"sample {odd} is not finite: a data set of it would be of no use; try fp32")
        arrays = {"latents": self.origin.norm.invert(latents), "eps": eps.float()}
        arrays = {name: values[:, None].cpu() for name, values in arrays.items()}  # (B, 1, C, H, W): one view
        np.savez(self._part(int(index[0])), label=label.cpu(), id=index.cpu(), **arrays)  # type: ignore[arg-type]
        self.firsts.append(int(index[0]))

    def _part(self, first: int) -> Path:
        return self.folder / f"part-{first:012d}.npz"

    def batches(self, firsts: list[int]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the batches that begin at these indices, in order; their files are removed. ValueError for a gap."""
        expected = 0
        for first in sorted(firsts):
            with np.load(self._part(first)) as held:
                batch = {name: held[name] for name in ("latents", "eps", "label", "id")}
            self._part(first).unlink()
            if batch["id"].tolist() != list(range(expected, expected + len(batch["id"]))):
                raise ValueError(
                    f"pairs from {first} on follow those up to {expected}: indices must be 0, 1, 2, ..."
                )
            expected += len(batch["id"])
            yield {**batch, "id": batch["id"].astype(np.uint64)}


@contextlib.contextmanager
def writing(
    out: str | Path,
    origin: Origin,
    spec: Mapping[str, Any],
    *,
    block: int = 256,
    shard_mb: float = 512.0,
) -> Iterator[PairWriter]:
    """Write a new folder `out` of pairs: each rank adds its share of the indices 0, 1, 2, ... Collective.

    It is there, whole, when rank 0 leaves; after any failure there is nothing. The bytes depend on the pairs alone,
    not on batches or ranks. spec: JSON values that say how they were made, kept beside them. block: pairs a block at
    most. shard_mb: MB (10^6 bytes) a shard at most. Raises DataError where `out` exists or a latent is not finite.
    """
    with contextlib.ExitStack() as stack:
        folder = group.on_main(lambda: stack.enter_context(folder_beside(Path(expand(str(out))).resolve())))
        writer = PairWriter(folder, origin)
        yield writer
        gathered = group.gather_objects(writer.firsts)  # waits for all ranks
        firsts = [first for part in gathered for first in part]
        if group.World.from_env().is_main:
            _assemble(writer, firsts, block, int(shard_mb * 1e6))
            write_atomically(folder / SPEC, (json.dumps(dict(spec), indent=1) + "\n").encode())


def _assemble(pairs: PairWriter, firsts: list[int], block: int, shard_bytes: int) -> None:
    """Shards and the manifest from the batches of all ranks."""
    origin, cutter, labels = pairs.origin, BlockCutter(block), []
    shape: tuple[int, ...] = ()
    with ShardWriter(pairs.folder, shard_bytes) as writer:
        for batch in pairs.batches(firsts):
            shape = batch["latents"].shape[1:]
            labels.append(batch["label"])
            for arrays in cutter.full(batch):
                writer.add(arrays)
        for arrays in cutter.rest():
            writer.add(arrays)
        writer.finish()
    label = np.concatenate(labels)
    names = write_names(pairs.folder, [f"seed-{origin.seed}-sample-{i}" for i in range(len(label))])
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
    manifest.save(pairs.folder)
