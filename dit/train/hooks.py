"""What happens between steps now and then: held-out loss and sample grids, both with the EMA weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dit.config import ConfigError
from dit.data import DataError
from dit.data.codecs.codec import check_same_codec
from dit.data.loading.mixture import Mixture
from dit.data.loading.stream import Stream
from dit.data.shards.manifest import Manifest
from dit.data.sources.classes import in_order
from dit.errors import Notice, shown
from dit.evals.protocol import protocol_hash
from dit.evals.valloss import held_out_loss
from dit.progress import Bar, say
from dit.ranks.group import World
from dit.rng import Draws
from dit.sample.finite import NotFiniteError
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.meters import RunLog
from dit.train.settings import RunConfig
from dit.train.task import Samples, Task, batch_samples

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
    protocol: str  # hash of what has to be the same for two of these figures to be compared

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        used = ema.for_use()
        with ema.swapped_in(), torch.no_grad():
            values = self.evaluate(engine)
        log.held_out(step, {**values, **used.row, "protocol": self.protocol})
        if engine.world.is_main:
            say(f"step {step}: held-out loss {values['loss']:.4f} of {used}")


@dataclass
class SampleGrid:
    """A grid of images from the same noise each time: watch them sharpen.

    Where one is not finite there is no picture of that step, a Notice says so, and the run goes on.
    """

    every: int
    draw: Callable[[Engine], np.ndarray]  # -> (H, W, 3) uint8
    folder: Path

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        used = ema.for_use()
        try:
            with ema.swapped_in(), torch.no_grad():
                grid = self.draw(engine)
        except NotFiniteError as error:  # after all that ranks do together
            if engine.world.is_main:
                warnings.warn(f"no picture of step {step}: {error}. The run goes on", Notice, stacklevel=2)
            return
        log.image(step, "samples", grid, str(used))
        if engine.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            file, about = self.folder / f"step-{step:08d}.png", PngInfo()
            about.add_text("Title", f"step {step}, {used}")
            Image.fromarray(grid).save(file, pnginfo=about)
            say(f"step {step}: pictures of {used} in {file}")


def _check_alike(manifest: Manifest, held_out: Manifest, cfg: RunConfig) -> None:
    """Refuse held-out data of other latents, or of other classes; these may come in another order."""
    for name in ("image_size", "array", "channels", "input_size"):
        ours, theirs = getattr(manifest, name), getattr(held_out, name)
        if ours != theirs:
            raise DataError(
                f"{cfg.data.val} (held out) and {cfg.data.name} differ in {name}: {shown(theirs)} against "
                f"{shown(ours)}; encode both at the same size, with the same options"
            )
    ours, theirs = manifest.classes, held_out.classes
    if sorted(ours) != sorted(theirs) or (ours != theirs and len(set(ours)) < len(ours)):
        lines = (
            [f"{cfg.data.name} alone has {_some(set(ours) - set(theirs))}"] if set(ours) - set(theirs) else []
        )
        lines += (
            [f"{cfg.data.val} alone has {_some(set(theirs) - set(ours))}"] if set(theirs) - set(ours) else []
        )
        what = f"{len(theirs)} against {len(ours)}: " + ("; ".join(lines) or "one name stands for several")
        raise DataError(
            f"{cfg.data.val} (held out) and {cfg.data.name} differ in classes, {what}; "
            "encode both with the same classes, or hold a share out with tools/encode.py IMAGES OUT --holdout=0.1"
        )


def _some(names: set[str], most: int = 5) -> str:
    """The first of these, in order."""
    chosen = in_order(names)
    more = f" and {len(chosen) - most} more" if len(chosen) > most else ""
    return ", ".join(map(repr, chosen[:most])) + more


@dataclass(frozen=True)
class HeldOut:
    """The held-out data of a run, a rank's share of them, the same on any number of ranks.

    batches: gives each micro-batch, drawn for the device; `count` of them, if that is known. protocol: what decides
    which samples and draws these are.
    """

    manifest: Manifest
    batches: Callable[[Task, torch.device], Iterator[Samples]]
    protocol: dict[str, Any]
    count: int | None = None

    def shown(self, task: Task, engine: Engine, desc: str) -> Iterable[Samples]:
        """The micro-batches, with a bar on rank 0 where they take long."""
        hidden, batches = not engine.world.is_main, self.batches(task, engine.device)
        return Bar(batches, total=self.count, unit="batch", desc=desc, hidden=hidden, leave=False, delay=2)


def open_held_out(cfg: RunConfig, manifest: Manifest, task: Task, world: World) -> HeldOut | None:
    """data.val, if val.every asks for it. DataError where its codec is another one."""
    if not cfg.val.every or cfg.data.val is None:
        return None
    held_out = Manifest.load(cfg.data.val)
    check_same_codec(manifest.codec, held_out.codec, cfg.data.name, cfg.data.val)
    _check_alike(manifest, held_out, cfg)
    # of the global batch and the data alone, so that the figure is the same on any number of ranks
    fitting = [d for d in range(1, cfg.train.global_batch + 1) if cfg.train.global_batch % d == 0]
    batch = max((d for d in fitting if d <= held_out.samples and d % task.group == 0), default=0)
    if not batch or batch % (world.size * task.group):
        raise ConfigError(
            f"{cfg.data.val} has {held_out.samples} samples, taken {batch} at a time: {world.size} ranks x groups of "
            f"{task.group} do not divide that; use more held-out data, fewer ranks, or val.every: 0"
        )
    stream = Stream(Mixture.of(held_out, manifest.classes), VAL_SEED, batch, world.rank, world.size)
    steps, micro = min(cfg.val.batches, stream.steps_per_epoch), cfg.train.micro(world)

    def batches(task: Task, device: torch.device) -> Iterator[Samples]:
        for stored in stream.iterate(0, steps):
            draws = Draws(VAL_SEED, stored.step, stored.slots, batch)
            samples, _ = batch_samples(stored, task, draws, device)
            yield from samples.micro_batches(micro)

    protocol = {"data": held_out.digest, "batch": batch, "batches": steps, "seed": VAL_SEED}
    return HeldOut(held_out, batches, protocol, steps * -(-batch // world.size // micro))


def held_out_hook(cfg: RunConfig, manifest: Manifest, task: Task, world: World) -> list[Hook]:
    """The held-out loss on data.val, if val.every asks for it. DataError where its codec is another one."""
    held_out = open_held_out(cfg, manifest, task, world)
    if held_out is None:
        return []

    def evaluate(engine: Engine) -> dict[str, float]:
        return held_out_loss(
            task.loss(engine, part) for part in held_out.shown(task, engine, "held-out loss")
        )

    return [HeldOutLoss(cfg.val.every, evaluate, protocol_hash({**held_out.protocol, "task": repr(task)}))]
