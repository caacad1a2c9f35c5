"""Peak bytes of a training step beside what `dit/model/cost.py` predicts (P7): stages, ranks, recomputation, offload.

The step is the one that `dit/bench/speed/step.py` times: engine, draws, clipping, average. On a CPU the ranks are
processes with gloo; on a GPU there is one, this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch

from dit.bench.speed.allocated import peak_bytes
from dit.bench.speed.gloo import on_ranks
from dit.bench.speed.steppers import CHANNELS, CLASSES, SIDE, OurStep, Setting, StepBench
from dit.config import ConfigError, config, from_dict
from dit.model.cost import cost
from dit.model.recompute import Recompute
from dit.ranks import group
from dit.ranks.group import World
from dit.train.engines.zero_config import Device, Offload, Stage, ZeroConfig

WITHIN = 0.1  # of what is measured, that the prediction may be off (P7)
Way = Literal["none", "products", "half", "all"]


@config
class MemoryBench:
    """Sizes. recompute: none, products (all blocks keep those), half of the blocks, all. steps: that are measured."""

    size: tuple[str, ...] = ("tiny",)  # of the models: S, B, L, XL; nano, micro, tiny
    patch: int = 4  # latent pixels of a patch, on a side
    batch: int = 8  # samples a step and rank
    accumulation: int = 1  # micro-batches a step
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward pass
    stages: tuple[Stage, ...] = (0, 1, 2, 3)  # of ZeRO, an engine each
    recompute: tuple[Way, ...] = ("none", "products", "half", "all")  # which blocks, and what they keep
    offload: Offload = "none"  # of ZeRO, to the host's memory
    ranks: tuple[int, ...] = (1, 2)  # gloo processes, where the device is the CPU
    steps: int = 1  # training steps that are measured, after one that is not

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.accumulation, *self.ranks) < 1:
            raise ConfigError("steps, batch, accumulation and ranks are at least 1")
        if self.batch % self.accumulation:
            raise ConfigError(
                f"a batch of {self.batch} cannot be shared by {self.accumulation} micro-batches"
            )
        self.bench()

    def bench(self) -> StepBench:
        """Say the same for the step's bench, which checks it."""
        names = ("size", "patch", "batch", "precision", "stages")
        return from_dict(StepBench, {name: getattr(self, name) for name in names})

    def cases(self) -> Iterator[tuple[str, Stage, Way]]:
        """Yield what is measured on each number of ranks."""
        for size in self.size:
            for stage in ZeroConfig(offload=self.offload).possible:
                if stage in self.stages:
                    yield from ((size, stage, way) for way in self.recompute)


def run(
    cfg: MemoryBench,
    progress: Callable[[], object] = lambda: None,
    row_done: Callable[[dict[str, Any]], object] = lambda row: None,
) -> list[dict[str, Any]]:
    """Measure, a row a case as JSON values. progress: called once for each number of ranks; row_done: on a GPU with
    each row as it is measured."""
    if torch.cuda.is_available():
        with group.session() as world:
            return _rows(world, cfg, row_done)
    found: list[dict[str, Any]] = []
    for size in cfg.ranks:
        found += on_ranks(size, _rows, cfg)
        progress()
    return found


def _rows(
    world: World, cfg: MemoryBench, done: Callable[[dict[str, Any]], object] = lambda row: None
) -> list[dict[str, Any]]:
    found = []
    for case in cfg.cases():
        found.append(_row(cfg, world, *case))
        done(found[-1])
    return found


def _row(cfg: MemoryBench, world: World, size: str, stage: Stage, way: Way) -> dict[str, Any]:
    setting = Setting(cfg.bench(), size, world)
    setting.offload = cfg.offload
    total = setting.model.blocks
    again = {"none": Recompute(), "products": Recompute(None, "products"), "half": Recompute(total // 2)}.get(
        way, Recompute(None)
    )
    setting.model = replace(
        setting.model, checkpoint_blocks=again.count(total) or False, checkpoint_keep=again.keep
    )
    made: list[OurStep] = []

    def build() -> OurStep:
        made.append(OurStep(setting, cfg.batch // cfg.accumulation, stage))
        made[0].step()  # what is made at the first step is there then
        return made[0]

    def work(stepper: OurStep) -> None:
        for _ in range(cfg.steps):
            stepper.step()

    peak = max(group.gather_objects(peak_bytes(setting.device, build, work)))
    seconds = min(_seconds(made[0]) for _ in range(2))
    made[0].close()
    predicted = predict(cfg, setting, stage, world)
    return {
        "size": size,
        "ranks": world.size,
        "stage": stage,
        "recompute": way,
        "measured_bytes": peak,
        **predicted,
        "ratio": predicted["predicted_bytes"] / peak,
        "cpu_seconds" if world.device.type == "cpu" else "seconds": seconds,
    }


def _seconds(stepper: OurStep) -> float:
    """CPU seconds of a step, or on a GPU seconds."""
    device = stepper.engine.device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    begun = clock()
    stepper.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begun


def predict(cfg: MemoryBench, setting: Setting, stage: Stage, world: World) -> dict[str, Any]:
    """What the trainer reckons for this step, in all and by part."""
    memory = cost(setting.model, SIDE, CHANNELS, CLASSES).memory(
        cfg.batch // cfg.accumulation,
        zero_stage=stage,
        world_size=world.size,
        precision=cfg.precision,
        accumulation=cfg.accumulation,
    )
    zero = ZeroConfig(stage=stage, offload=cfg.offload)
    device = Device(0, world.device.type != "cuda", world.size)
    parts = {name: size for name, size in vars(memory).items() if isinstance(size, int)}
    return {"predicted_bytes": zero.needs(memory, stage, device), "parts": parts}


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Write the table: MB measured and predicted, a case each line."""
    yield (
        f"{'':6s} {'ranks':>5s} {'stage':>5s} {'recompute':>9s} {'measured':>9s} {'predicted':>9s} {'ratio':>6s} "
        f"{'s a step':>9s}"
    )
    for row in rows:
        seconds = row.get("cpu_seconds", row.get("seconds"))
        verdict = "" if abs(row["ratio"] - 1) <= WITHIN else "  OFF"
        yield (
            f"{row['size']:6s} {row['ranks']:5d} {row['stage']:5d} {row['recompute']:>9s} "
            f"{row['measured_bytes'] / 1e6:9.1f} {row['predicted_bytes'] / 1e6:9.1f} {row['ratio']:6.3f} "
            f"{seconds:9.3f}{verdict}"
        )
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    yield f"furthest off: {worst['ratio']:.3f} (within {1 - WITHIN:g} to {1 + WITHIN:g} is what P7 asks)"
