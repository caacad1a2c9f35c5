"""The schema of a stage-1 experiment: an autoencoder trained on pixel shards by the same engine and loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, config, from_dict
from dit.data.shards.manifest import Manifest
from dit.data.shards.readers import open_reader
from dit.model.cost import counted_training_flops
from dit.ranks.group import World
from dit.sample.generate import image_grid, to_uint8
from dit.stage1.autoencoder import AUTOENCODERS, Autoencoder, AutoencoderConfig, Kl, Quantizer
from dit.stage1.autoencoder_task import L2, PIXEL_LOSSES, AutoencoderTask, PixelLoss
from dit.stage1.discriminator import DiscriminatorConfig, Opposed
from dit.stage1.figures import ReconstructionFigures
from dit.stage1.perceptual import PerceptualConfig
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import CheckpointError, Reader
from dit.train.ema import Average
from dit.train.engines.base import Engine
from dit.train.held_out import held_out_hook, open_held_out
from dit.train.hooks import Hook, SampleGrid
from dit.train.plan import Parts
from dit.train.settings import RunConfig

KL_WEIGHT = 1e-3


@config
class PictureConfig:
    """Originals above their reconstructions, drawn during training."""

    every: Annotated[int, Field(ge=0)] = 0  # steps between pictures; 0 = never
    count: Annotated[int, Field(ge=1)] = 10  # images in a picture


@config
class AutoencoderExperiment(RunConfig):
    """A run of tools/train_vae.py. `data` are pixel shards: tools/encode.py IMAGES OUT --codec=pixels."""

    autoencoder: Annotated[AutoencoderConfig, AUTOENCODERS] = Kl()  # what is trained: its kind, and its shape
    kl_weight: Annotated[float, Field(ge=0)] = KL_WEIGHT  # of the KL term, a mean over latent elements
    pixel: Annotated[PixelLoss, PIXEL_LOSSES] = L2()  # loss of a reconstruction's pixels
    perceptual: PerceptualConfig | None = None  # loss in a frozen network's features; null = none
    discriminator: DiscriminatorConfig | None = None  # adversarial loss; null = none
    sample: PictureConfig = PictureConfig()  # originals above their reconstructions, drawn during training

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.autoencoder.has_posterior and self.kl_weight != KL_WEIGHT:
            raise ConfigError(
                f"kl_weight = {self.kl_weight:g} is of the kl autoencoder; {AUTOENCODERS.name_of(self.autoencoder)} "
                "has no KL term: leave it out"
            )

    def make_parts(self, manifest: Manifest, world: World) -> Parts:
        """Model, task and hooks for these data on this rank."""
        height, width = manifest.input_size
        factor = self.autoencoder.factor
        if manifest.codec["name"] != "pixels":
            raise ConfigError(
                f"{self.data.name} holds latents of codec '{manifest.codec['name']}'; an autoencoder is trained on "
                "pixels: encode the images with --codec=pixels"
            )
        if height % factor or width % factor:
            raise ConfigError(
                f"images of {height}x{width} cannot be halved {len(self.autoencoder.widths) - 1} times"
            )
        with torch.device("meta"):
            module = self.build((height, width))
        chosen = self.perceptual
        perceptual = None if chosen is None else chosen.build(height, width, world.device)
        task = AutoencoderTask(
            autoencoder=self.autoencoder,
            weight=self.kl_weight if self.autoencoder.has_posterior else 1.0,
            latent=(self.autoencoder.latent_channels, height // factor, width // factor),
            pixel=self.pixel,
            perceptual=perceptual,
            discriminator=self.discriminator,
        )
        return Parts(
            build=lambda: self.build((height, width)),
            task=task,
            flops_per_image=training_flops(module, task, (height, width)),
            contract={} if perceptual is None else {"perceptual": perceptual.identity},
            hooks=self._hooks(manifest, task, world),
            leaf_modules=tuple({type(m) for m in module.modules() if isinstance(m, Quantizer)}),
            about=self._about(task),
            on_host="a discriminator is used from a step of its own on" if self.discriminator else "",
        )

    def _about(self, task: AutoencoderTask) -> dict[str, str]:
        """What the start prints of model and objective."""
        kind, (channels, height, width) = AUTOENCODERS.name_of(self.autoencoder), task.latent
        terms = [PIXEL_LOSSES.name_of(self.pixel)]
        terms += [f"{self.kl_weight:g} x KL"] if self.autoencoder.has_posterior else []
        terms += ["perceptual"] if self.perceptual else []
        terms += ["discriminator"] if self.discriminator else []
        return {
            "model": f"autoencoder {kind}, to latents of {channels}x{height}x{width}",
            "objective": " + ".join(terms),
        }

    def build(self, size: tuple[int, int]) -> Autoencoder | Opposed:
        """What is trained on images of size (H, W), with random weights from torch's global generator."""
        autoencoder = self.autoencoder.build()
        if self.discriminator is None:
            return autoencoder
        return Opposed(autoencoder, self.discriminator.build(*size))

    def _hooks(self, manifest: Manifest, task: AutoencoderTask, world: World) -> list[Hook]:
        alone = replace(task, discriminator=None)  # its scores mean nothing beside those of another run
        hooks: list[Hook] = held_out_hook(self, manifest, alone, world)
        held_out = open_held_out(self, manifest, alone, world)
        if held_out is not None:
            hooks.append(ReconstructionFigures(self.val.every, alone, held_out))
        if self.sample.every:
            draw = self._reconstructions(alone)
            hooks.append(SampleGrid(self.sample.every, draw, self.folder / "samples"))
        return hooks

    def _reconstructions(self, task: AutoencoderTask) -> Callable[[Engine], np.ndarray]:
        data, _ = self.data.open().parts[0]
        stored = open_reader(data).read(0)["latents"][: self.sample.count, 0]
        images = torch.from_numpy(stored.copy()).float()  # (n, 3, H, W)

        def draw(engine: Engine) -> np.ndarray:
            noise = torch.zeros(len(images), *task.latent, device=engine.device)
            output: tuple[Tensor, ...] = engine(images.to(engine.device), noise)  # type: ignore[assignment]
            both = np.concatenate([to_uint8(images), to_uint8(output[0])])
            return image_grid(both, columns=len(images))

        return draw


def training_flops(module: Autoencoder | Opposed, task: AutoencoderTask, size: tuple[int, int]) -> float:
    """FLOPs of a training step and image, 2 per multiply-add: 3 forward passes of the autoencoder and of the backbone
    (forward on both images, backward on one), 8 of the discriminator (forward and backward on both, and in the
    reconstruction alone)."""
    image = torch.zeros(1, 3, *size)
    total = counted_training_flops(module, image, torch.zeros(1, *task.latent))
    if isinstance(module, Opposed):
        total += 8 / 3 * counted_training_flops(module.discriminator, image)
    if task.perceptual is not None:
        total += counted_training_flops(task.perceptual.backbone, image)
    return total


@dataclass(frozen=True)
class Exported:
    """Where the trained autoencoder was written, for --codec=vae --codec.path."""

    folder: Path
    step: int
    average: Average


def export(run_or_checkpoint: str, folder: Path, weights: str = "ema") -> Exported:
    """Write a run's autoencoder as a diffusers folder (config.json and safetensors), without its discriminator.

    CheckpointError where there is no checkpoint, or none of an autoencoder.
    """
    found = checkpoint.resolve(run_or_checkpoint)
    if "autoencoder" not in found.meta["config"]:
        raise CheckpointError(f"{found.path} holds no autoencoder; train one with tools/train_vae.py")
    cfg = from_dict(AutoencoderExperiment, found.meta["config"])
    module = cfg.autoencoder.build()
    held = Reader(found).state_dict(weights)
    own = "autoencoder." if cfg.discriminator else ""
    module.load_state_dict({k.removeprefix(own): v for k, v in held.items() if k.startswith(own)})
    module.vae.save_pretrained(folder, safe_serialization=True)
    return Exported(folder, found.step, Average.of_checkpoint(found.meta, weights))
