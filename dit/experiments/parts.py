"""What an experiment of diffusion or flow brings to the training loop: model, task, hooks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from dit.compiling import keep_on_disk
from dit.data.codecs.codec import CODECS
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.data.storage.remote import public
from dit.experiments.about import named
from dit.experiments.diffusion import Experiment
from dit.experiments.drawer import Drawer, ShownTally
from dit.experiments.figures import costs_of, figures_hook
from dit.experiments.latents import codec_doubts, latent_contract
from dit.flow.couple import COUPLINGS, Coupling
from dit.flow.times import shift_of
from dit.model.cost import Memory
from dit.model.dit import DiT
from dit.model.fp8 import FP8
from dit.model.kernels.choice import KERNELS, Auto
from dit.model.kinds import MODELS
from dit.model.parametrization import PARAMETRIZATIONS
from dit.model.recompute import Recompute
from dit.progress import Bar
from dit.ranks.group import World
from dit.sample.generate import image_grid
from dit.train.engines.base import Engine
from dit.train.engines.budget import Budget
from dit.train.held_out import held_out_hook
from dit.train.hooks import Hook, SampleGrid
from dit.train.plan import Parts
from dit.train.task import LatentTask


def make_parts(cfg: Experiment, manifest: Manifest, world: World) -> Parts:
    """Make model, task and hooks for these data on this rank.

    ConfigError where coupling or micro-batch do not fit them, or the device cannot compute what is asked for; DataError
    where their codec cannot be opened.
    """
    cfg.check_device(manifest, world)
    norm, task = cfg.norm(manifest), cfg.task(manifest, world)
    hooks, draws = _hooks(cfg, manifest, norm, task, world), bool(cfg.sample.every or cfg.evaluate.every)

    def build() -> DiT:
        module = cfg.model.build(manifest.input_size, manifest.channels, len(manifest.classes))
        if cfg.train.fp8 is not None:
            cfg.train.fp8.convert(module)
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
        hooks=hooks,
        leaf_modules=tuple({type(b) for b in blocks}),
        memory=lambda stage, frozen: cfg.memory(manifest, world, stage, frozen),
        budget=_budget(cfg, manifest, world),
        about=_about(cfg, manifest) | _compilation(cfg) | costs_of(hooks),
        on_host=_on_host(cfg.objective.coupling),
        compiled_task=replace(task, compiled=True) if cfg.train.compile else None,
        doubts=codec_doubts(cfg.codec, manifest.codec, cfg.data.name, reads=not draws),
    )


def _on_host(coupling: Coupling) -> str:
    """What of the loss the host decides, in words; "" for nothing."""
    return (
        f"objective.coupling = {COUPLINGS.name_of(coupling)} is solved on the CPU" if coupling.on_host else ""
    )


def _budget(cfg: Experiment, manifest: Manifest, world: World) -> Budget | None:
    """What a rank may fill, where train.memory_gb says it."""
    if cfg.train.memory_gb is None:
        return None

    def memory(stage: int, frozen: int, recompute: Recompute) -> Memory:
        return cfg.memory(manifest, world, stage, frozen, recompute)

    return Budget(int(1e9 * cfg.train.memory_gb), cfg.model.blocks, memory)


def _about(cfg: Experiment, manifest: Manifest) -> dict[str, str]:
    """What the start prints of model, objective and codec."""
    cost, dims = (
        cfg.cost(manifest),
        cfg.model.dims(manifest.input_size, manifest.channels, len(manifest.classes)),
    )
    size = f"{cfg.model.size} " if cfg.model.size else ""
    codec = "none" if cfg.codec is None else CODECS.name_of(cfg.codec)
    place = getattr(cfg.codec, "path", None)
    parametrization = cfg.model.parametrization
    scaled = parametrization.about(dims)
    return {
        "model": f"{MODELS.name_of(cfg.model)} {size}(width {dims.width}, depth {dims.depth}, {dims.heads} heads), "
        f"patch {dims.patch}, {dims.tokens} tokens",
        **({PARAMETRIZATIONS.name_of(parametrization): scaled} if scaled is not None else {}),
        "forward": f"{cost.multiply_adds / 1e9:.3f} G multiply-adds an image = {cost.forward_flops / 1e9:.3f} GFLOP",
        "objective": named(cfg.objective),
        **_shift(cfg, manifest),
        **_arithmetic(cfg),
        "codec": f"{codec}{f' in {public(str(place))}' if place else ''} (the data's: {manifest.codec['name']}), "
        f"latents normalised by {cfg.latents.norm}",
    }


def _arithmetic(cfg: Experiment) -> dict[str, str]:
    """What is computed otherwise than usually, and what again, where anything is."""
    model, again = cfg.model, cfg.model.recompute
    said = {
        "kernels": KERNELS.name_of(model.kernels) if model.kernels != Auto() else "",
        "attention": model.attention if model.attention != "auto" else "",
        "residual stream": model.residual if model.residual != "float32" else "",
        "float8": FP8.name_of(cfg.train.fp8) if cfg.train.fp8 is not None else "",
        "computed again:": again.words(model.blocks) if again.count(model.blocks) else "",
    }
    told = ", ".join(f"{name} {text}" for name, text in said.items() if text)
    return {"arithmetic": told} if told else {}


def _compilation(cfg: Experiment) -> dict[str, str]:
    """Where compiled code is kept from here on, where there is any."""
    if not cfg.train.compile:
        return {}
    return {
        "compile": f"blocks, integers of the draws, the loss around the network; kept in {keep_on_disk()}"
    }


def _shift(cfg: Experiment, manifest: Manifest) -> dict[str, str]:
    """The number behind the word, where times are shifted by the latents' dimension."""
    if cfg.objective.times.shift != "dimension":
        return {}
    dimension = math.prod((manifest.channels, *manifest.input_size))
    return {
        "shift": f"{shift_of('dimension', dimension):.4g} of the times, for {dimension} numbers in a latent"
    }


def _hooks(
    cfg: Experiment, manifest: Manifest, norm: LatentNorm, task: LatentTask, world: World
) -> list[Hook]:
    hooks = held_out_hook(cfg, manifest, task, world)
    if cfg.sample.every:
        draw = _grid(cfg.sample.count, Drawer.of(cfg, cfg.sample, manifest, norm, world))
        hooks.append(SampleGrid(cfg.sample.every, draw, cfg.folder / "samples"))
    return hooks + figures_hook(cfg, manifest, norm, world)


def _grid(count: int, drawer: Drawer) -> Callable[[Engine], np.ndarray]:
    """What draws the pictures during training, a column a class."""
    index = torch.arange(count)

    def draw(engine: Engine) -> np.ndarray:
        with Bar[None](
            unit="evaluation", desc="pictures", hidden=not engine.world.is_main, leave=False, delay=2
        ) as bar:
            sampler = drawer.sampler(engine, ShownTally(bar=bar))
            bar.expect(sampler.nfe)
            images = sampler.images(index, drawer.labels(index))
        return image_grid(images, columns=min(10, len(drawer.classes)))

    return draw
