"""Held-out data in training: a fixed grid of samples and draws, dealt to whatever ranks there are.

Sample i of the grid, its time and its noise depend on the data and the task alone: not on ranks, micro-batch, global
batch or stage, nor on the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch

from dit.config import ConfigError
from dit.data import DataError
from dit.data.codecs.codec import check_same_codec
from dit.data.loading.mixture import Mixture
from dit.data.loading.stream import Batch, Stream
from dit.data.shards.manifest import Manifest
from dit.data.sources.classes import in_order
from dit.errors import shown
from dit.evals.protocol import protocol_hash
from dit.evals.valloss import held_out_loss
from dit.progress import Bar, say
from dit.ranks.group import World
from dit.rng import Draws
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.hooks import Hook
from dit.train.meters import RunLog
from dit.train.settings import RunConfig
from dit.train.task import Samples, Task, batch_samples

SEED = 2**31 - 1  # the same draws in every run
LANES = 8  # blocks that a batch is mixed of, at least where data are sorted by class
GRID = 64  # samples that are read and drawn together; more where a task's groups are larger
T = TypeVar("T")


@dataclass
class HeldOutLoss:
    """Loss on held-out data at fixed draws, so that its curve has no noise of its own."""

    every: int
    evaluate: Callable[[Engine], dict[str, float]]
    protocol: str  # hash of what has to be the same for two of these figures to be compared
    name: ClassVar[str] = "held-out loss"

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        used = ema.for_use()
        with ema.swapped_in(), torch.no_grad():
            values = self.evaluate(engine)
        log.held_out(step, {**values, **used.row, "protocol": self.protocol})
        if engine.world.is_main:
            say(f"step {step}: held-out loss {values['loss']:.4f} of {used}")


@dataclass(frozen=True)
class HeldOut:
    """The held-out data of a run: `steps` batches of `grid` samples, which ranks take in turn.

    micro: samples of a forward pass at most.
    """

    manifest: Manifest
    classes: tuple[str, ...]
    world: World
    grid: int
    steps: int
    micro: int

    @property
    def samples(self) -> int:
        """How many there are in all."""
        return self.grid * self.steps

    @property
    def protocol(self) -> dict[str, Any]:
        """What decides which samples and draws these are."""
        return {"data": self.manifest.digest, "grid": self.grid, "samples": self.samples, "seed": SEED}

    @cached_property
    def _stream(self) -> Stream:
        # few lanes: a rank reads its batches alone, whole blocks of each lane
        mixture = Mixture.of(self.manifest, self.classes)
        return Stream(mixture, SEED, self.grid, lanes=LANES, window=1)

    def each(self, task: Task, engine: Engine, desc: str, of: Callable[[Samples], T]) -> Iterator[T]:
        """What `of` makes of each micro-batch of this rank's share; a bar on rank 0 where it takes long.

        Every rank calls `of` as often as the others, as the layers of a sharded model need it: one that has no batch
        left in the last round takes another's again, and what becomes of that is not given.
        """
        rank, size = self.world.rank, self.world.size
        rounds = -(-self.steps // size)
        total, hidden = rounds * -(-self.grid // self.micro), not self.world.is_main
        with Bar[None](total=total, unit="batch", desc=desc, hidden=hidden, leave=False, delay=2) as bar:
            mine = [turn * size + rank for turn in range(rounds)]
            for step, stored in zip(mine, self._ahead([step % self.steps for step in mine]), strict=True):
                for part in self._drawn(stored, task, engine.device):
                    found = of(part)
                    if step < self.steps:
                        yield found
                    bar.update()
        self._stream.forget()

    def _ahead(self, steps: Sequence[int]) -> Iterator[Batch]:
        """The stored samples of batches of the grid, the next one being read while one is worked on."""
        with ThreadPoolExecutor(1, "dit-held-out") as reading:
            waiting = [reading.submit(self._stream.batch, step) for step in steps[:1]]
            for number in range(len(steps)):
                now = waiting.pop()
                waiting = [
                    reading.submit(self._stream.batch, step) for step in steps[number + 1 : number + 2]
                ]
                yield now.result()

    def micro_batches(self, task: Task, step: int, device: torch.device) -> Iterator[Samples]:
        """The samples of one batch of the grid, drawn for the device, in micro-batches."""
        yield from self._drawn(self._stream.batch(step), task, device)

    def _drawn(self, stored: Batch, task: Task, device: torch.device) -> Iterator[Samples]:
        samples, _ = batch_samples(stored, task, Draws(SEED, stored.step, stored.slots, self.grid), device)
        yield from samples.micro_batches(self.micro)


def open_held_out(cfg: RunConfig, manifest: Manifest, task: Task, world: World) -> HeldOut | None:
    """data.val, if val.every asks for it. DataError where its codec is another one."""
    if not cfg.val.every or cfg.data.val is None:
        return None
    held_out = Manifest.load(cfg.data.val)
    check_same_codec(manifest.codec, held_out.codec, cfg.data.name, cfg.data.val)
    _check_alike(manifest, held_out, cfg)
    wanted = cfg.val.samples if cfg.val.batches is None else cfg.val.batches * cfg.train.global_batch
    count = min(wanted, held_out.samples)
    grid = task.group * (min(max(GRID, task.group), count) // task.group)
    if not grid:
        raise ConfigError(
            f"{count} samples of {cfg.data.val} are fewer than the {task.group} that the objective takes together "
            "(group of coupling or auxiliary): hold more data out, or set val.samples higher or val.every: 0"
        )
    micro = next(
        m for m in range(min(grid, cfg.train.micro(world)), 0, -1) if grid % m == 0 and m % task.group == 0
    )
    return HeldOut(held_out, manifest.classes, world, grid, count // grid, micro)


def held_out_hook(cfg: RunConfig, manifest: Manifest, task: Task, world: World) -> list[Hook]:
    """The held-out loss on data.val, if val.every asks for it. DataError where its codec is another one."""
    held_out = open_held_out(cfg, manifest, task, world)
    if held_out is None:
        return []

    def evaluate(engine: Engine) -> dict[str, float]:
        return held_out_loss(
            held_out.each(task, engine, "held-out loss", lambda part: task.loss(engine, part))
        )

    return [HeldOutLoss(cfg.val.every, evaluate, protocol_hash({**held_out.protocol, "task": repr(task)}))]


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
