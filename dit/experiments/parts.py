"""What an experiment of diffusion or flow brings to the training loop: model, task, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.experiments.diffusion import Experiment
from dit.experiments.latents import latent_contract
from dit.experiments.trained import Checkpoints
from dit.flow.predict import Endpoints
from dit.ranks.group import World
from dit.sample.generate import Sampler, image_grid, labels_for
from dit.sample.guide import Context
from dit.train.engines.base import Engine
from dit.train.hooks import Hook, SampleGrid, held_out_hook
from dit.train.run import Parts
from dit.train.task import LatentTask


def make_parts(cfg: Experiment, manifest: Manifest, world: World) -> Parts:
    """Make model, task and hooks for these data on this rank.

    ConfigError where the coupling does not fit them or the micro-batch, DataError where their codec cannot be opened.
    """
    norm, task = cfg.norm(manifest), cfg.task(manifest, world)
    module = cfg.model.build(manifest.input_size, manifest.channels, len(manifest.classes))
    if cfg.train.compile:
        module.compile_blocks()
    return Parts(
        module=module,
        task=task,
        flops_per_image=cfg.cost(manifest).training_flops,
        contract=latent_contract(manifest, norm),
        hooks=_hooks(cfg, manifest, norm, task, world),
        leaf_modules=tuple({type(b) for b in module.blocks}),
        memory=lambda stage, frozen: cfg.memory(manifest, world, stage, frozen),
    )


def _hooks(
    cfg: Experiment, manifest: Manifest, norm: LatentNorm, task: LatentTask, world: World
) -> list[Hook]:
    hooks = held_out_hook(cfg, manifest, task, world)
    if cfg.sample.every:
        codec = cfg.open_codec(manifest, world.device)
        agreed, device = latent_contract(manifest, norm), world.device
        opener = Checkpoints(cfg.objective.path, agreed, cfg.run_dir, "ema", device, cfg.train.precision)
        draw = _grid(cfg, manifest, lambda x: codec.decode(norm.invert(x)), opener, codec.advice)
        hooks.append(SampleGrid(cfg.sample.every, draw, cfg.folder / "samples"))
    return hooks


def _grid(
    cfg: Experiment, manifest: Manifest, decode: Callable[[Tensor], Tensor], opener: Checkpoints, advice: str
) -> Callable[[Engine], np.ndarray]:
    """What draws the pictures during training, a column a class. advice: the codec's."""
    classes = range(len(manifest.classes)) if manifest.classes else [-1]
    index = torch.arange(cfg.sample.count)
    shape = (manifest.channels, *manifest.input_size)
    path, prediction = cfg.objective.path, cfg.objective.prediction
    for guidance in cfg.sample.guidance:  # what it names is opened now, and not after hours
        guidance(lambda x, t, cond: Endpoints(x, x), Context(path, opener))

    def draw(engine: Engine) -> np.ndarray:
        rest: dict[str, Any] = {"open": opener, "classes": len(manifest.classes), "codec_advice": advice}
        sampler = Sampler(engine, path, prediction, decode, shape, cfg.sample, opener.device, **rest)
        return image_grid(sampler.images(index, labels_for(index, classes)), columns=min(10, len(classes)))

    return draw
