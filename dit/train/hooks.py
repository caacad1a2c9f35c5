"""What happens between steps now and then: held-out loss and sample grids, both with the EMA weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from dit.config import ConfigError
from dit.data.codec import check_same_codec
from dit.data.manifest import Manifest
from dit.data.stream import Stream
from dit.dist import World
from dit.evals.valloss import held_out_loss
from dit.flow.objective import Loss
from dit.rng import Draws
from dit.train.ema import Ema
from dit.train.fragments import Engine
from dit.train.meters import RunLog
from dit.train.settings import RunConfig
from dit.train.task import Task, batch_samples

VAL_SEED = 2**31 - 1  # the same draws in every run


class Hook(Protocol):
    """Something to do every `every` steps; collective, so that sharded models may be run in it."""

    every: int

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        """step: steps done."""


@dataclass
class HeldOutLoss:
    """Loss on held-out data at fixed draws, so that its curve has no noise of its own."""

    every: int
    evaluate: Callable[[Engine], dict[str, float]]

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        with ema.swapped_in(), torch.no_grad():
            values = self.evaluate(engine)
        log.curve(step, {f"held_out/{name}": value for name, value in values.items()})


@dataclass
class SampleGrid:
    """A grid of images from the same noise each time: watch them sharpen."""

    every: int
    draw: Callable[[Engine], np.ndarray]  # -> (H, W, 3) uint8
    folder: Path

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        with ema.swapped_in(), torch.no_grad():
            grid = self.draw(engine)
        if engine.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grid).save(self.folder / f"step-{step:08d}.png")
        log.image(step, "samples", grid)


def held_out_hook(cfg: RunConfig, manifest: Manifest, task: Task, world: World) -> list[Hook]:
    """The held-out loss on data.val, if val.every asks for it. DataError where its codec is another one."""
    if not cfg.val.every or cfg.data.val is None:
        return []
    held_out = Manifest.load(cfg.data.val)
    check_same_codec(manifest.codec, held_out.codec, cfg.data.path, cfg.data.val)
    unit = world.size * task.group
    batch = min(cfg.train.global_batch, held_out.samples // unit * unit)
    if not batch:
        raise ConfigError(
            f"{cfg.data.val} has {held_out.samples} samples; {world.size} ranks x groups of {task.group} need {unit}"
        )
    stream = Stream(held_out, VAL_SEED, batch, world.rank, world.size)
    steps, micro = min(cfg.val.batches, stream.steps_per_epoch), cfg.train.micro(world)

    def losses(engine: Engine) -> Iterator[Loss]:
        for stored in stream.iterate(0, steps):
            draws = Draws(VAL_SEED, stored.step, stored.slots, batch)
            samples, _ = batch_samples(stored, task, draws, engine.device)
            for part in samples.micro_batches(micro):
                yield task.loss(engine, part)

    return [HeldOutLoss(cfg.val.every, lambda engine: held_out_loss(losses(engine)))]
