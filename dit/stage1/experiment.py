"""The schema of a stage-1 experiment: an autoencoder trained on pixel shards by the same engine and loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, config, from_dict
from dit.data.manifest import Manifest
from dit.dist import World
from dit.model.cost import counted_training_flops
from dit.sample.generate import image_grid, to_uint8
from dit.stage1.autoencoder import AutoencoderConfig, AutoencoderTask
from dit.train import checkpoint
from dit.train.checkpoint import Reader
from dit.train.fragments import Engine
from dit.train.hooks import Hook, SampleGrid, held_out_hook
from dit.train.settings import RunConfig
from dit.train.start import Parts


@config
class PictureConfig:
    """Originals above their reconstructions, drawn during training."""

    every: Annotated[int, Field(ge=0)] = 0  # steps; 0 = never
    count: Annotated[int, Field(ge=1)] = 10  # images


@config
class AutoencoderExperiment(RunConfig):
    """A run of tools/train_vae.py. `data` are pixel shards: tools/encode.py IMAGES OUT --codec=pixels."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    kl_weight: Annotated[float, Field(ge=0)] = 1e-3  # of the KL term, a mean over latent elements
    sample: PictureConfig = PictureConfig()

    def make_parts(self, manifest: Manifest, world: World) -> Parts:
        """Model, task and hooks for these data on this rank."""
        height, width = manifest.input_size
        factor = self.autoencoder.factor
        if manifest.codec["name"] != "pixels":
            raise ConfigError(
                f"{self.data.path} holds latents of codec '{manifest.codec['name']}'; an autoencoder is trained on "
                "pixels: encode the images with --codec=pixels"
            )
        if height % factor or width % factor:
            raise ConfigError(
                f"images of {height}x{width} cannot be halved {len(self.autoencoder.widths) - 1} times"
            )
        task = AutoencoderTask(
            self.kl_weight, (self.autoencoder.latent_channels, height // factor, width // factor)
        )
        module = self.autoencoder.build()
        hooks: list[Hook] = held_out_hook(self, manifest, task, world)
        if self.sample.every:
            draw = self._reconstructions(manifest, task)
            hooks.append(SampleGrid(self.sample.every, draw, Path(self.run_dir) / "samples"))
        flops = counted_training_flops(module, torch.zeros(1, 3, height, width), torch.zeros(1, *task.latent))
        return Parts(module=module, task=task, flops_per_image=flops, hooks=hooks)

    def _reconstructions(self, manifest: Manifest, task: AutoencoderTask) -> Callable[[Engine], np.ndarray]:
        from dit.data.blocks import BlockReader

        stored = BlockReader(manifest).read(0)["latents"][: self.sample.count, 0]
        images = torch.from_numpy(stored.copy()).float()  # (n, 3, H, W)

        def draw(engine: Engine) -> np.ndarray:
            noise = torch.zeros(len(images), *task.latent, device=engine.device)
            output: tuple[Tensor, ...] = engine(images.to(engine.device), noise)  # type: ignore[assignment]
            both = np.concatenate([to_uint8(images), to_uint8(output[0])])
            return image_grid(both, columns=len(images))

        return draw


@dataclass(frozen=True)
class Exported:
    """Where the trained autoencoder was written, for --codec=vae --codec.path."""

    folder: Path
    step: int


def export(run_or_checkpoint: str, folder: Path, weights: str = "ema") -> Exported:
    """Write a run's autoencoder as a diffusers folder (config.json and safetensors)."""
    found = checkpoint.resolve(run_or_checkpoint)
    cfg = from_dict(AutoencoderExperiment, found.meta["config"])
    module = cfg.autoencoder.build()
    module.load_state_dict(Reader(found).state_dict(weights))
    module.vae.save_pretrained(folder, safe_serialization=True)
    return Exported(folder, found.step)
