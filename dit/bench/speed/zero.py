"""Engines on several ranks: bytes that each rank sends a step (P3), and the step's time.

DeepSpeed's ZeRO stages and torch's DistributedDataParallel beside our plain engine. Every contender trains the same
model on the same global batch with the same AdamW and clipping, in fp32; all of them live in the same processes and
take turns there. Nothing is read and no average is kept: what differs is the engine. docs/guarantees.md says what P3
bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dit.bench.speed.collectives import CollectiveCounter, formula
from dit.bench.speed.gloo import on_ranks
from dit.bench.speed.turns import Contender, MedianRange, ratio, take_turns
from dit.config import ConfigError, config
from dit.model.dit import DiT, DiTConfig
from dit.ranks import group
from dit.ranks.group import World
from dit.train.engines.local import LocalEngine
from dit.train.engines.plain import PlainEngine
from dit.train.engines.zero_config import STAGES, ZeroConfig
from dit.train.engines.zero_engine import DeepSpeedEngine
from dit.train.optim import OptimConfig

DDP, PLAIN = "DDP", "plain"
STAGE_OF = {DDP: 0, PLAIN: 0, **{f"stage {stage}": stage for stage in STAGES}}  # whose formula holds
WITHIN = 0.1  # of the formula, at most, that bytes may differ from it
CHANNELS, SIDE, CLASSES, LR = 4, 16, 10, 1e-4


@config
class ZeroBench:
    """Sizes. batch: global. accumulation: micro-batches a rank and step. steps: a turn. ranks: of each figure."""

    width: int = 192  # channels of the DiT's tokens
    depth: int = 12  # blocks of the DiT
    heads: int = 3  # of the attention; divides width
    batch: int = 32  # samples a step, over all ranks
    accumulation: int = 1  # micro-batches a rank and step
    steps: int = 4  # training steps a turn
    repeats: int = 5  # turns of each contender
    ranks: tuple[int, ...] = (2, 4)  # gloo processes, for each figure

    def __post_init__(self) -> None:
        if min(self.steps, self.repeats, self.accumulation, *self.ranks) < 1:
            raise ConfigError("steps, repeats, accumulation and ranks are at least 1")
        for size in self.ranks:
            if self.batch % (size * self.accumulation):
                raise ConfigError(
                    f"a batch of {self.batch} cannot be shared by {size} ranks x {self.accumulation} micro-batches"
                )


def run(cfg: ZeroBench, progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Measure {contender: figures} for each number of ranks, as JSON values. progress: called once for each."""
    found = {}
    for size in cfg.ranks:
        found[str(size)] = on_ranks(size, _on_rank, cfg)
        progress()
    return found


def _on_rank(world: World, cfg: ZeroBench) -> dict[str, dict[str, Any]]:
    """The figures of every engine on these ranks."""
    steps = _engines(cfg, world)
    contenders = [Contender(name, _turn(step, cfg.steps)) for name, step in steps.items()]
    times = take_turns(contenders, cfg.repeats)
    seconds = {name: [1 / rate for rate in figures.rate] for name, figures in times.items()}
    psi = 4 * sum(p.numel() for p in _model(cfg).parameters())
    figures = {}
    for name, step in steps.items():
        with CollectiveCounter() as counter:
            step()
        sent, expected = counter.sent(), formula(STAGE_OF[name], psi, world.size, cfg.accumulation)
        figures[name] = {
            "sent_bytes": sent,
            "formula_bytes": expected,
            "is_within": abs(sent - expected) <= WITHIN * expected,  # of one rank both are 0
            "step_seconds": vars(MedianRange.of(seconds[name])),
            "cpu_seconds": vars(MedianRange.of([us / 1e6 for us in times[name].cpu])),
            "of_ddp": vars(ratio(seconds[name], seconds[DDP])),
            "of_plain": vars(ratio(seconds[name], seconds[PLAIN])),
            "cpu_of_plain": vars(ratio(times[name].cpu, times[PLAIN].cpu)),
        }
    return figures


def _turn(step: Callable[[], None], steps: int) -> Callable[[int], int]:
    def turn(number: int) -> int:
        for _ in range(steps):
            step()
        group.barrier()
        return steps

    return turn


def _model(cfg: ZeroBench) -> DiT:
    torch.manual_seed(0)
    return DiTConfig(width=cfg.width, depth=cfg.depth, heads=cfg.heads).build(SIDE, CHANNELS, CLASSES)


def _engines(cfg: ZeroBench, world: World) -> dict[str, Callable[[], None]]:
    """A training step of each contender."""
    samples = _samples(cfg.batch // world.size, world)
    plain = PlainEngine(_model(cfg), OptimConfig(lr=LR), world, accumulation=cfg.accumulation)
    found = {DDP: _ddp(cfg, world, samples), PLAIN: _step(plain, samples, cfg.accumulation)}
    for stage in STAGES:
        module = _model(cfg)
        engine = DeepSpeedEngine(
            module,
            OptimConfig(lr=LR),
            world,
            zero=ZeroConfig(stage=stage),
            global_batch=cfg.batch,
            accumulation=cfg.accumulation,
            leaf_modules=tuple({type(block) for block in module.blocks}),
        )
        found[f"stage {stage}"] = _step(engine, samples, cfg.accumulation)
    return found


def _step(engine: Any, samples: tuple[Tensor, ...], accumulation: int) -> Callable[[], None]:
    def step() -> None:
        for micro in zip(*(part.chunk(accumulation) for part in samples), strict=True):
            engine.backward(_loss(engine, micro))
        engine.step(LR)

    return step


def _ddp(cfg: ZeroBench, world: World, samples: tuple[Tensor, ...]) -> Callable[[], None]:
    """Torch's own: gradients are communicated in the last micro-batch's backward pass alone."""
    alone = replace(world, size=1)  # the optimizer's part of a step is that of one process
    engine = LocalEngine(_model(cfg), OptimConfig(lr=LR), alone, accumulation=cfg.accumulation)
    wrapped = DistributedDataParallel(engine.module)

    def step() -> None:
        *first, last = zip(*(part.chunk(cfg.accumulation) for part in samples), strict=True)
        with wrapped.no_sync():
            for micro in first:
                engine.backward(_loss(wrapped, micro))
        engine.backward(_loss(wrapped, last))
        engine.step(LR)

    return step


def _samples(count: int, world: World) -> tuple[Tensor, ...]:
    """x (B, C, H, W), t (B,), label (B,), target (B, C, H, W) of this rank."""
    generator = torch.Generator().manual_seed(world.rank)
    x, target = torch.randn(2, count, CHANNELS, SIDE, SIDE, generator=generator)
    return x, torch.rand(count, generator=generator), torch.arange(count) % CLASSES, target


def _loss(model: Any, samples: tuple[Tensor, ...]) -> Tensor:
    x, t, label, target = samples
    out: Tensor = model(x, t, {"label": label, "drop": torch.zeros_like(label, dtype=torch.bool)})
    return (out - target).square().mean()
