"""Images and pairs drawn from a trained model into folders: what they depend on is recorded, and compared first."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.config import ConfigError, to_dict
from dit.data.shards.pairs import Origin, Pairs, pair_files
from dit.experiments.trained import Precision, Trained
from dit.outputs import RECORD, Blocks, OutputError, claim, unfinished
from dit.ranks import group
from dit.sample.drawing import Pictures, Product, draw
from dit.sample.generate import Sampler, SamplerSpec, labels_for
from dit.sample.grid import GRIDS
from dit.sample.solve import SOLVERS
from dit.version import code_version

GROWING = "num_samples"  # of pictures: more may be drawn to those that are there
NOT_COMPARED = (
    "checkpoint",
    "device",
    "code",
)  # where the checkpoint lies, and what drew: `digest` says what it is


@dataclass(frozen=True)
class DrawOrder:
    """What is to be drawn, and where to. Image i is of class classes[i mod n].

    batch_size: images at a time. codec_keys: {"codec.path": ...}, over where training had it. out: folder for pictures.
    save_pairs: folder for a data set of noise and latents. overwrite: what is there is replaced.
    """

    classes: list[int]
    num_samples: int
    batch_size: int
    precision: Precision = "fp32"
    codec_keys: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None
    save_pairs: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if min(self.num_samples, self.batch_size) < 1:
            raise ConfigError(
                f"num_samples {self.num_samples} and batch_size {self.batch_size} must be at least 1"
            )
        if self.out is not None and self.out == self.save_pairs:
            raise ConfigError(f"--out and --save_pairs are both {self.out}: give each a folder of its own")


def produce(trained: Trained, spec: SamplerSpec, order: DrawOrder, world: group.World) -> None:
    """Draw what is ordered, or go on with what was begun, and say what became of it. Collective.

    Raises OutputError where something else lies there, ConfigError for what cannot be drawn, NotFiniteError naming
    the first image that is none.
    """
    check_effect(spec, order.classes, trained, world)
    keys = order.codec_keys if order.out else None
    sampler = trained.sampler(spec, keys, world.device, order.precision)
    _ = sampler.denoise  # opens what guidance names, before anything is drawn
    record = described(trained, sampler) | {
        "codec": dict(order.codec_keys),
        "precision": order.precision,
        "classes": order.classes,
        "batch_size": order.batch_size,
        "num_samples": order.num_samples,
    }
    unmade = group.on_main(lambda: _unmade(order, record))
    if unmade:
        _draw(trained, sampler, order, unmade, record, world)
    if world.is_main:
        for made in filter(None, (order.out, order.save_pairs)):
            print(_line(made, order, made in unmade))


def _unmade(order: DrawOrder, record: Mapping[str, Any]) -> dict[Path, dict[str, Any] | None]:
    """The folders that are not complete, with the record of what is complete of them. OutputError, as `claim`."""
    found: dict[Path, dict[str, Any] | None] = {}
    spec = compared(record)
    if order.out is not None:
        files = Pictures.files(order.out)
        held = claim(files, spec, record=files[-1], overwrite=order.overwrite, growing=GROWING)
        if held is None or held[GROWING] < order.num_samples:
            found[order.out] = held
    if order.save_pairs is not None:
        out = order.save_pairs
        files = [path for path in pair_files(out) if path.exists()]
        if files and not (out / RECORD).is_file():
            raise OutputError(f"{out} exists already: remove it or choose another name")
        if claim(files, spec, record=out / RECORD, overwrite=order.overwrite) is None:
            found[out] = None
    return found


def compared(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record decides about the images."""
    return {key: value for key, value in record.items() if key not in NOT_COMPARED}


@dataclass(frozen=True)
class _PairsDrawn:
    """Pairs as a product of drawing."""

    out: Path
    pairs: Pairs
    sampler: Sampler

    @property
    def blocks(self) -> Blocks:
        return self.pairs.blocks

    def arrays(self, latents: Tensor, index: Tensor, label: Tensor) -> dict[str, np.ndarray]:
        return self.pairs.arrays(latents, self.sampler.noise(index), index, label)

    def write(self, labels: Tensor, about: Mapping[str, Any]) -> None:
        self.pairs.write(self.out, about)


def _draw(
    trained: Trained,
    sampler: Sampler,
    order: DrawOrder,
    unmade: Mapping[Path, dict[str, Any] | None],
    record: dict[str, Any],
    world: group.World,
) -> None:
    """Draw into the blocks of each folder, and put together what they hold."""
    size, spec = (order.num_samples, order.batch_size), compared(record)
    labels = labels_for(torch.arange(order.num_samples), order.classes)
    products: list[Product] = []
    with contextlib.ExitStack() as stack:
        for out, held in unmade.items():
            blocks = stack.enter_context(unfinished(out, record, spec, size, order.overwrite))
            if out == order.save_pairs:
                origin = Origin.of(trained.contract, sampler.spec.seed)
                products.append(_PairsDrawn(out, Pairs(blocks, origin), sampler))
            else:
                pictures = Pictures(out, blocks, sampler)
                products.append(pictures)
                if held is not None:
                    group.on_main(partial(pictures.take, held))
        draw(sampler, labels, products, world)
        for product in products:
            group.on_main(partial(product.write, labels, record))


def _line(made: Path, order: DrawOrder, is_new: bool) -> str:
    """What a folder holds now."""
    already = "" if is_new else ", drawn already by the same spec; give --overwrite to draw them anew"
    if made == order.save_pairs:
        return f"{order.num_samples} pairs in {made}: train on them with objective.coupling=reflow{already}"
    return f"{order.num_samples} images in {made / 'samples.npz'}; look at {made / 'grid.png'}{already}"


def check_effect(spec: SamplerSpec, chosen: list[int], trained: Trained, world: group.World) -> None:
    """Refuse guidance that would cost as always and change nothing; note where the run's own pictures differ."""
    check_labelled(spec, chosen, trained)
    own = trained.experiment.sample
    differing = [
        f"--{key}={registry.name_of(getattr(own, key))}"
        for key, registry in (("solver", SOLVERS), ("grid", GRIDS))
        if registry.name_of(getattr(own, key)) != registry.name_of(getattr(spec, key))
    ]
    if differing and world.is_main:
        print(f"note: this run's own config draws with {' '.join(differing)}")


def check_labelled(spec: SamplerSpec, chosen: list[int], trained: Trained) -> None:
    """Refuse guidance by class of images of no class, which would cost as always and change nothing: ConfigError."""
    if spec.needs_label and set(chosen) == {-1} and trained.contract["classes"]:
        raise ConfigError(
            "guidance by class has no effect on --classes=-1, no class; leave one of the two out"
        )


def described(trained: Trained, sampler: Sampler) -> dict[str, Any]:
    """What made the samples: the models, the spec, the machine and the code."""
    return {
        "checkpoint": str(trained.path),
        "digest": trained.digest,
        "step": trained.step,
        "weights": trained.weights,
        "guidance_checkpoints": sampler.open.opened if sampler.open else {},
        "sampler": to_dict(sampler.spec),
        "device": sampler.device.type,
        "code": code_version(),
    }
