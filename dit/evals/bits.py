"""How likely a model finds a data set: nats of every sample, and the mean bits per dimension with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from dit.config import ConfigError, config, to_dict
from dit.data.codecs.norm import LatentNorm, codec_norm
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.data.shards.readers import open_reader
from dit.progress import Bar
from dit.ranks import group
from dit.ranks.asked import EndAsked, telling
from dit.rng import Draws
from dit.sample.denoise import Denoiser, stopping
from dit.sample.finite import NotFiniteError, first_not_finite
from dit.sample.likelihood import LIKELIHOODS, Likelihood, LikelihoodProblem, Ode, bits_per_dim
from dit.unfinished import Blocks

NATS = "nats"  # array of a block


@config
class LikelihoodSpec:
    """Everything that decides about the figure besides weights and data. count: 0 = all of the data."""

    method: Annotated[Likelihood, LIKELIHOODS] = Ode()  # how log p(data) is found
    count: int = 256  # samples, the first of the data; 0 = all
    seed: int = 0  # of probes, noise and posterior draws
    unconditional: bool = False  # whether every label is dropped


@dataclass(frozen=True)
class LikelihoodOf:
    """The likelihood of a data set under a model. norm: that the model was trained with.

    Raises ConfigError for a method that is of levels of pixels, where the model sees something else.
    """

    denoise: Denoiser
    norm: LatentNorm
    manifest: Manifest
    spec: LikelihoodSpec

    def __post_init__(self) -> None:
        if self.spec.method.of_levels:
            check_levels(self.norm, self.manifest)

    @property
    def count(self) -> int:
        """Samples that are measured, the first of the data."""
        return min(self.spec.count or self.manifest.samples, self.manifest.samples)

    def protocol(self, precision: str) -> dict[str, Any]:
        """JSON values: what has to be the same for two figures to be compared."""
        values = {
            **to_dict(self.spec),
            "count": self.count,
            "data": self.manifest.digest,
            "precision": precision,
        }
        return {**values, "norm": to_dict(self.norm)}  # of other latents the figure is another

    def measure(self, blocks: Blocks, world: group.World, asked: EndAsked | None = None) -> Tensor:
        """(count,) float64 nats on every rank; sample i is the i-th of the data, whatever is computed with it.

        blocks: where the nats of each batch are kept as they are found; those that lie there are not computed again.
        Collective. Raises NotFiniteError naming a sample whose nats are not finite, Stopped where any rank was asked
        to end.
        """
        missing = blocks.missing({NATS})
        _say_already(blocks, missing, world)
        # a rank that fails alone would leave the others waiting for it
        with telling(lambda: _kept(blocks)):
            group.together(
                lambda: self._measure(blocks, missing[world.rank :: world.size], world, asked or EndAsked())
            )
        return group.on_main(lambda: _all_nats(blocks))

    def _measure(self, blocks: Blocks, mine: Sequence[int], world: group.World, asked: EndAsked) -> None:
        """Find the nats of these blocks, and keep those that are finite. NotFiniteError at the first that is not."""
        reader, name = open_reader(self.manifest), LIKELIHOODS.name_of(self.spec.method)
        total = sum(len(blocks.samples(number)) for number in mine)
        with Bar[None](total=total, unit="sample", hidden=not world.is_main, desc=name) as bar:
            for number in mine:
                index = torch.tensor([*blocks.samples(number)])
                nats = self._nats(reader, index, world.device, asked)
                self._check(nats, blocks.samples(number).start)
                blocks.add(number, {NATS: nats.numpy()})
                bar.update(len(index))

    def _check(self, nats: Tensor, first: int) -> None:
        place = first_not_finite(nats[:, None])
        if place is not None:
            raise NotFiniteError(
                f"sample {first + place} of {self.manifest.root}: its log-likelihood is {float(nats[place])}; try "
                "more steps, float32, or an earlier checkpoint"
            )

    def _nats(self, reader: BlockReader, index: Tensor, device: torch.device, asked: EndAsked) -> Tensor:
        """(B,) float64 on the CPU, of the samples of this index."""
        moments, label = (v.to(device) for v in stored_samples(reader, index))
        slots = index.to(device)
        latents = self.norm.draw(moments, Draws(self.spec.seed, 0, slots, 1))
        drop = torch.full_like(label, self.spec.unconditional, dtype=torch.bool)
        cond = {"label": label, "drop": drop}
        path, prediction = self.denoise.path, self.denoise.prediction
        denoise = stopping(self.denoise, asked)  # a batch may take longer than there is time
        problem = LikelihoodProblem(denoise, path, prediction, cond, slots, self.spec.seed)
        return self.spec.method(problem, latents).cpu()

    def summary(self, nats: Tensor) -> dict[str, Any]:
        """The figures of nats (n,), n > 1; the standard error is over samples."""
        dimensions = self.manifest.channels * math.prod(self.manifest.input_size)
        bits = bits_per_dim(nats, dimensions)
        stored = sum(math.log2(std) for std in self.norm.std) / len(self.norm.std)
        mean, error = float(bits.mean()), float(bits.std()) / math.sqrt(len(bits))
        return {
            "bits_per_dim": mean,
            "standard_error": error,
            "bits_per_dim_stored": mean + stored,
            "nats": float(nats.mean()),
            "samples": len(nats),
            "dimensions": dimensions,
        }


def _all_nats(blocks: Blocks) -> Tensor:
    """The nats of all blocks, in the order of the samples."""
    return torch.from_numpy(np.concatenate([blocks.read(number)[NATS] for number in range(blocks.number)]))


def _say_already(blocks: Blocks, missing: Sequence[int], world: group.World) -> None:
    """Say how many samples lie there at the start, if any do."""
    done = blocks.count - sum(len(blocks.samples(number)) for number in missing)
    if world.is_main and done:
        print(f"{done} of {blocks.count} samples are measured already; going on with the others")


def _kept(blocks: Blocks) -> str:
    """What is said where an end was asked for."""
    done = sum(len(blocks.samples(number)) for number in blocks.there())
    return f"{done} of {blocks.count} samples are measured and kept; the same command goes on"


def check_levels(norm: LatentNorm, manifest: Manifest) -> None:
    """ConfigError unless what a model sees of these data are pixels in 256 levels from −1 to 1."""
    codec = manifest.codec["name"]
    if codec == "pixels" and norm == codec_norm(manifest.codec):
        return
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (norm.mean, norm.std))
    of = "pixels" if codec == "pixels" else f"latents of the codec '{codec}'"
    raise ConfigError(
        f"method.decoder = discretised is of pixels in 256 levels from -1 to 1, and this model sees {of} less a mean "
        f"of ({mean}), over a std of ({std}): take --method.decoder=density, or a run that was trained on pixels with "
        "latents.norm=codec"
    )


def stored_samples(reader: BlockReader, index: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (n, 2 or 1, C, H, W) and labels (n,) of consecutive samples in stored order, in their first view."""
    manifest, moments, labels, position = reader.manifest, [], [], 0
    for i, block in enumerate(manifest.blocks):
        inside = index[(index >= position) & (index < position + block.samples)].numpy() - position
        position += block.samples
        if len(inside):
            arrays = reader.read(i)
            moments.append(arrays[manifest.array][inside, 0])
            labels.append(arrays["label"][inside])
    stacked = torch.from_numpy(np.concatenate(moments))
    stacked = stacked if manifest.array == "moments" else stacked.unsqueeze(1)
    return stacked, torch.from_numpy(np.concatenate(labels))
