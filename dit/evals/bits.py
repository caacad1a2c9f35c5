"""How likely a model finds a data set: nats of every sample, and the mean bits per dimension with its error."""

from __future__ import annotations

import math
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
from dit.rng import Draws
from dit.sample.denoise import Denoiser
from dit.sample.finite import NotFiniteError, first_not_finite
from dit.sample.likelihood import LIKELIHOODS, Likelihood, LikelihoodProblem, Ode, bits_per_dim


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

    def measure(self, batch_size: int, world: group.World) -> Tensor:
        """(count,) float64 nats on every rank; sample i is the i-th of the data, whatever is computed with it.

        Collective. NotFiniteError naming the first sample whose nats are not finite.
        """
        reader, found = open_reader(self.manifest), {}
        mine = range(0, self.count, batch_size)[world.rank :: world.size]
        name = LIKELIHOODS.name_of(self.spec.method)
        total = sum(min(batch_size, self.count - start) for start in mine)
        with Bar[None](total=total, unit="sample", hidden=not world.is_main, desc=name) as bar:
            for start in mine:
                index = torch.arange(start, min(start + batch_size, self.count))
                found[start] = self._nats(reader, index, world.device)
                bar.update(len(index))
        everywhere = {k: v for part in group.gather_objects(found) for k, v in part.items()}
        nats = torch.cat([everywhere[start] for start in sorted(everywhere)])
        place = first_not_finite(nats[:, None])
        if place is not None:
            raise NotFiniteError(
                f"sample {place} of {self.manifest.root}: its log-likelihood is {float(nats[place])}; try more steps, "
                "float32, or an earlier checkpoint"
            )
        return nats

    def _nats(self, reader: BlockReader, index: Tensor, device: torch.device) -> Tensor:
        """(B,) float64 on the CPU, of the samples of this index."""
        moments, label = (v.to(device) for v in stored_samples(reader, index))
        slots = index.to(device)
        latents = self.norm.draw(moments, Draws(self.spec.seed, 0, slots, 1))
        drop = torch.full_like(label, self.spec.unconditional, dtype=torch.bool)
        cond = {"label": label, "drop": drop}
        path, prediction = self.denoise.path, self.denoise.prediction
        problem = LikelihoodProblem(self.denoise, path, prediction, cond, slots, self.spec.seed)
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
