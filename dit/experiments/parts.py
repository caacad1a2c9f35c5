"""What an experiment of diffusion or flow brings to the training loop: model, task, hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.data.codecs.codec import CODECS
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.data.storage.remote import public
from dit.experiments.about import named
from dit.experiments.diffusion import Experiment
from dit.experiments.latents import codec_doubts, latent_contract
from dit.experiments.trained import Checkpoints
from dit.flow.predict import Cond, Endpoints
from dit.model.dit import MODELS, DiT
from dit.progress import Bar
from dit.ranks.group import World
from dit.sample.denoise import DenoiseFn
from dit.sample.generate import Sampler, image_grid, labels_for
from dit.sample.guide import Context
from dit.sample.tally import Tally
from dit.train.engines.base import Engine
from dit.train.held_out import held_out_hook
from dit.train.hooks import Hook, SampleGrid
from dit.train.plan import Parts
from dit.train.task import LatentTask


def make_parts(cfg: Experiment, manifest: Manifest, world: World) -> Parts:
    """Make model, task and hooks for these data on this rank.

    ConfigError where the coupling does not fit them or the micro-batch, DataError where their codec cannot be opened.
    """
    norm, task = cfg.norm(manifest), cfg.task(manifest, world)

    def build() -> DiT:
        module = cfg.model.build(manifest.input_size, manifest.channels, len(manifest.classes))
        if cfg.train.compile:
            module.compile_blocks()
        return module

    with torch.device("meta"):
        blocks = cfg.model.build(manifest.input_size, manifest.channels, len(manifest.classes)).blocks
    return Parts(
        build=build,
        task=task,
        flops_per_image=cfg.cost(manifest).training_flops,
        contract=latent_contract(manifest, norm),
        hooks=_hooks(cfg, manifest, norm, task, world),
        leaf_modules=tuple({type(b) for b in blocks}),
        memory=lambda stage, frozen: cfg.memory(manifest, world, stage, frozen),
        about=_about(cfg, manifest),
        doubts=codec_doubts(cfg.codec, manifest.codec, cfg.data.name, reads=not cfg.sample.every),
    )


def _about(cfg: Experiment, manifest: Manifest) -> dict[str, str]:
    """What the start prints of model, objective and codec."""
    cost, dims = (
        cfg.cost(manifest),
        cfg.model.dims(manifest.input_size, manifest.channels, len(manifest.classes)),
    )
    size = f"{cfg.model.size} " if cfg.model.size else ""
    codec = "none" if cfg.codec is None else CODECS.name_of(cfg.codec)
    place = getattr(cfg.codec, "path", None)
    return {
        "model": f"{MODELS.name_of(cfg.model)} {size}(width {dims.width}, depth {dims.depth}, {dims.heads} heads), "
        f"patch {dims.patch}, {dims.tokens} tokens",
        "forward": f"{cost.multiply_adds / 1e9:.3f} G multiply-adds an image = {cost.forward_flops / 1e9:.3f} GFLOP",
        "objective": named(cfg.objective),
        "codec": f"{codec}{f' in {public(str(place))}' if place else ''} (the data's: {manifest.codec['name']}), "
        f"latents normalised by {cfg.latents.norm}",
    }


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
        guidance.check(manifest.channels)
        guidance(lambda x, t, cond: Endpoints(x, x), Context(path, opener))

    def draw(engine: Engine) -> np.ndarray:
        with Bar[None](
            unit="evaluation", desc="pictures", hidden=not engine.world.is_main, leave=False, delay=2
        ) as bar:
            how = (engine, path, prediction, decode, shape, cfg.sample, opener.device)
            rest: dict[str, Any] = {"classes": len(manifest.classes), "codec_advice": advice}
            sampler = Sampler(*how, open=opener, tally=_ShownTally(bar=bar), **rest)
            bar.expect(sampler.nfe)
            images = sampler.images(index, labels_for(index, classes))
        return image_grid(images, columns=min(10, len(classes)))

    return draw


@dataclass
class _ShownTally(Tally):
    """Counts, and moves a bar on at each call of the guided denoiser."""

    bar: Bar[None] = field(kw_only=True)

    def of_calls(self, denoise: DenoiseFn) -> DenoiseFn:
        counted = super().of_calls(denoise)

        def shown(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            self.bar.update()
            return counted(x, t, cond)

        return shown
