"""Measures the share of a training step that the loop takes beside forward pass, backward pass and update.

A real run trains on random latents that it reads from shards: data wait, draws, loss, averages, metrics, logging and
hooks are its own. Its engine's three calls are timed, on a GPU by the GPU's clock; what is left of the time from one
turn to the next is the loop's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dit.bench.speed.bounds import bound_line
from dit.bench.speed.loader import CLASSES, SHAPE, write_blocks
from dit.bench.speed.turns import MedianRange
from dit.config import ConfigError, config, from_dict
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.flow.objective import Objective
from dit.model.cost import cost
from dit.model.dit import DiT, DiTConfig
from dit.ranks import group
from dit.ranks.group import World
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.engines.zero_config import Stage
from dit.train.faults import Fault
from dit.train.hooks import Hook
from dit.train.loop import Loop
from dit.train.meters import DeviceTimer, HostTimer, RunLog
from dit.train.plan import Parts, Plan
from dit.train.run import Run
from dit.train.settings import RunConfig
from dit.train.start import build
from dit.train.stop import StopRequest
from dit.train.task import LatentTask

SAMPLES = 4096
BOUNDS = {"cpu": 0.05, "cuda": 0.02}  # of the share
PASSES, WAIT, AVERAGE, METRICS, LOG = "passes and update", "data wait", "average (EMA)", "metrics", "log"
REST = "the rest: draws, loss around the network, loop"


@config
class OverheadBench:
    """Sizes of the step, and how many are timed. A turn is `steps` steps, of which every `log_every`-th is logged."""

    size: str = "S"  # of the model: S, B, L, XL; nano, micro, tiny
    patch: int = 8  # latent pixels of a patch, on a side
    batch: int = 32  # samples a step
    micro_batch: int | None = None  # samples a forward pass; null = the batch
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward pass
    compile: bool = False  # blocks, draws and loss, with torch.compile
    stage: Stage | None = 0  # of ZeRO; null = without DeepSpeed
    steps: int = 20  # training steps of a turn
    repeats: int = 5  # turns that count; one before them does not
    log_every: int = 10  # steps between lines of the log

    def __post_init__(self) -> None:
        if min(self.steps, self.repeats, self.log_every, self.batch) < 1 or self.batch > SAMPLES:
            raise ConfigError(
                f"steps, repeats, log_every and batch are at least 1, and batch at most {SAMPLES}; got {self.steps}, "
                f"{self.repeats}, {self.log_every} and {self.batch}"
            )
        from_dict(DiTConfig, {"size": self.size, "patch": self.patch})

    @property
    def device_bound(self) -> float:
        """The share that is promised at most, where this runs."""
        return BOUNDS["cuda" if torch.cuda.is_available() else "cpu"]

    def run_config(self, data: Path, run_dir: Path) -> RunConfig:
        """The run that is timed."""
        train: dict[str, Any] = {"steps": (1 + self.repeats) * self.steps, "log_every": self.log_every}
        train |= {"global_batch": self.batch, "micro_batch": self.micro_batch, "precision": self.precision}
        return from_dict(
            RunConfig,
            {
                "data": {"path": str(data)},
                "run_dir": str(run_dir),
                "train": train,
                "ema": {"warmup": True},
                "checkpoint": {"every": 2 * train["steps"]},  # but for the last step, which no turn counts
                "engine": "local" if self.stage is None else "deepspeed",
                "zero": {"stage": self.stage or 0},
            },
        )

    def parts(self, hooks: list[Hook], manifest: Manifest) -> Parts:
        """What is trained: a DiT on latents of unit variance."""
        model = from_dict(DiTConfig, {"size": self.size, "patch": self.patch})
        norm = LatentNorm(mean=(0.0,) * SHAPE[0], std=(1.0,) * SHAPE[0])
        task = LatentTask(Objective(), norm, label_drop=0.1, has_unit_variance=True)

        def built() -> DiT:
            module = model.build(manifest.input_size, SHAPE[0], CLASSES)
            if self.compile:
                module.compile_blocks()
            return module

        with torch.device("meta"):
            blocks = model.build(manifest.input_size, SHAPE[0], CLASSES).blocks
        return Parts(
            build=built,
            task=task,
            flops_per_image=cost(model, manifest.input_size, SHAPE[0], CLASSES).training_flops,
            hooks=hooks,
            leaf_modules=tuple({type(block) for block in blocks}),
            compiled_task=replace(task, compiled=True) if self.compile else None,
        )


class _TimedEngine:
    """An engine whose three calls are timed."""

    def __init__(self, engine: Engine, timer: HostTimer | DeviceTimer):
        self._engine, self._timer = engine, timer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *inputs: Any, **given: Any) -> Any:
        with self._timer.timing():
            return self._engine(*inputs, **given)

    def backward(self, loss: Tensor) -> None:
        with self._timer.timing():
            self._engine.backward(loss)

    def step(self, lr: float) -> bool:
        with self._timer.timing():
            return self._engine.step(lr)


class _TimedLoop(Loop):
    """The loop, whose logging is timed."""

    def __init__(self, run: Run, timer: HostTimer | DeviceTimer):
        super().__init__(run)
        self._timer = timer

    def _log(self, bar: Any) -> Fault | None:
        with self._timer.timing():
            return super()._log(bar)


@dataclass
class _Turns:
    """A hook that ends a turn every so many steps. turns: milliseconds a step, by part, of each but the first."""

    every: int
    device: torch.device
    progress: Callable[[], object]
    name: ClassVar[str] = "turns"
    timers: dict[str, HostTimer | DeviceTimer] = field(default_factory=dict)
    turns: list[dict[str, float]] = field(default_factory=list)
    waited: Callable[[], float] = lambda: 0.0  # seconds for data since the last call
    _begun: float | None = None

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        spent = {name: timer.take() for name, timer in self.timers.items()} | {WAIT: self.waited()}
        if self._begun is not None:
            total = now - self._begun
            spent[REST] = total - sum(spent.values())
            self.turns.append({name: 1e3 * s / self.every for name, s in {**spent, "step": total}.items()})
        self._begun = time.perf_counter()
        self.progress()


def run(cfg: OverheadBench, folder: Path, progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Train in `folder`, and measure {"engine", "ms": of a step by part, "loop / step"}: medians and ranges of turns.

    On a GPU the parts beside the engine's calls are the host's time, which may pass while the GPU works: they need not
    add up to the loop's share, which is of the time in which the GPU does none of the engine's work.
    """
    data = folder / "data"
    data.mkdir(parents=True)
    rows = np.random.default_rng(0).standard_normal((SAMPLES, *SHAPE), np.float32)
    write_blocks(data, rows.astype(np.float16))
    with group.session() as world:
        turns = _Turns(cfg.steps, world.device, progress)
        about = _train(cfg, data, folder / "run", world, turns)
    ms = {name: [turn[name] for turn in turns.turns] for name in turns.turns[0]}
    shares = [1 - inside / step for inside, step in zip(ms[PASSES], ms["step"], strict=True)]
    return {
        "engine": about,
        "ms": {name: vars(MedianRange.of(values)) for name, values in ms.items()},
        "loop / step": vars(MedianRange.of(shares)),
    }


def _train(cfg: OverheadBench, data: Path, run_dir: Path, world: World, turns: _Turns) -> str:
    """Train all turns; says which engine ran."""
    plan = Plan(cfg.run_config(data, run_dir), lambda _, manifest, __: cfg.parts([turns], manifest), world)
    run = build(plan)
    passes = DeviceTimer() if world.device.type == "cuda" else HostTimer()
    turns.timers = {PASSES: passes, AVERAGE: HostTimer(), METRICS: HostTimer(), LOG: HostTimer()}
    run = replace(run, engine=_TimedEngine(run.engine, passes))
    _time(run.ema, "update", turns.timers[AVERAGE])
    _time(run.meters, "add_step", turns.timers[METRICS])
    waiting = HostTimer()
    _time(run.feed, "next", waiting)
    turns.waited = waiting.take
    _TimedLoop(run, turns.timers[LOG]).train(StopRequest())
    about: str = run.engine.about
    run.engine.close()
    return about


def _time(owner: Any, name: str, timer: HostTimer | DeviceTimer) -> None:
    """Have calls of a method of this object timed."""
    method = getattr(owner, name)

    def timed(*given: Any) -> Any:
        with timer.timing():
            return method(*given)

    setattr(owner, name, timed)


def turns(cfg: OverheadBench) -> int:
    """Say how often `run` calls `progress`."""
    return 1 + cfg.repeats


def lines(found: dict[str, Any], bound: float, enough: bool) -> Iterator[str]:
    """Write what `run` gives. bound: on the loop's share. enough: whether enough was measured to judge it."""
    yield found["engine"]
    for name, ms in found["ms"].items():
        yield f"{name:48s} {MedianRange(**ms)} ms a step"
    yield bound_line("loop / step", found["loop / step"], bound, enough, most=True)
