"""A trace of the training step that `dit/bench/speed/step.py` times: the real engine, draws, clipping, average."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dit.bench.speed.steppers import OurStep, Setting, StepBench
from dit.bench.trace.classes import AVERAGE, DRAWS, METRICS, OPTIMIZER, STEP
from dit.bench.trace.timeline import Breakdown, breakdown
from dit.config import ConfigError, config, from_dict
from dit.files import write_atomically
from dit.ranks import group
from dit.rng import Draws
from dit.train.engines.zero_config import Stage

FILE = "trace.json.gz"
# The profiler's library writes to stderr where there is no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@config
class TraceBench:
    """Sizes of the step, and how many are traced."""

    size: str = "S"  # of the model: S, B, L, XL; nano, micro, tiny
    patch: int = 2  # latent pixels of a patch, on a side
    batch: int = 8  # samples a step
    micro_batch: int | None = None  # samples a forward pass; null = the batch
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward pass
    compile: bool = False  # the blocks, with torch.compile
    stage: Stage | None = 0  # of ZeRO; null = without DeepSpeed
    steps: int = 3  # training steps that are traced
    warmup: int = 3  # training steps before, which are not

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 1:
            raise ConfigError(f"steps and warmup must be at least 1, got {self.steps} and {self.warmup}")
        self.bench()

    def bench(self) -> StepBench:
        """Say the same for the step's bench, which checks it."""
        names = ("patch", "batch", "micro_batch", "precision", "compile")
        return from_dict(StepBench, {"size": [self.size], **{name: getattr(self, name) for name in names}})


@contextlib.contextmanager
def marked(*places: tuple[Any, str, str]) -> Iterator[None]:
    """Mark, as a context, calls in the trace: of (an object or a class, a method's name, what to call it)."""
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    try:
        for owner, name, mark in places:
            setattr(owner, name, _marking(getattr(owner, name), mark))
        yield
    finally:
        for owner, name, own in before:
            if own is None:
                delattr(owner, name)  # of the instance: the class's is seen again
            else:
                setattr(owner, name, own)


def _marking(function: Callable[..., Any], mark: str) -> Callable[..., Any]:
    def call(*args: Any, **given: Any) -> Any:
        with record_function(mark):
            return function(*args, **given)

    return call


def run(cfg: TraceBench, out: Path | None) -> dict[str, Any]:
    """Trace some steps; their parts as JSON values. out: a folder that gets the trace, for Perfetto or Chrome."""
    with group.session() as world:
        setting = Setting(cfg.bench(), cfg.size, world)
        stepper = OurStep(setting, cfg.micro_batch or cfg.batch, cfg.stage)
        _timed(stepper, cfg.warmup)
        plain = _timed(stepper, cfg.steps)
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / FILE
            _trace(stepper, cfg.steps, path)
            raw = path.read_bytes()
        about = stepper.about
        stepper.close()
    if out is not None and world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / FILE, raw)
    found = breakdown(json.loads(gzip.decompress(raw))["traceEvents"])
    return {"engine": about, "untraced_step_ms": plain, **as_json(found)}


def _timed(stepper: OurStep, steps: int) -> float:
    """Milliseconds of the median step, each waited for."""
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        stepper.step()
        _wait(stepper)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def _trace(stepper: OurStep, steps: int, path: Path) -> None:
    activities = [ProfilerActivity.CPU]
    if stepper.engine.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    draws = [(Draws, name, DRAWS) for name in ("uniform", "normal", "integers", "bits", "fingerprint")]
    places = [
        (stepper.engine, "step", OPTIMIZER),
        (stepper.ema, "update", AVERAGE),
        (stepper.meters, "add_step", METRICS),
    ]
    with marked(*places, *draws), profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                stepper.step()
        _wait(stepper)
    profiler.export_chrome_trace(str(path))


def _wait(stepper: OurStep) -> None:
    if stepper.engine.device.type == "cuda":
        torch.cuda.synchronize(stepper.engine.device)


def as_json(found: Breakdown) -> dict[str, Any]:
    """Give the parts as JSON values; of each the five names that take the most."""
    return {
        "on": "device" if found.is_device else "cpu",
        "steps": found.steps,
        "step_ms": found.step,
        "parts_ms": found.parts,
        "shares": {part: ms / found.step for part, ms in found.parts.items()},
        "communication_ms": found.sent,
        "most": {part: dict(list(names.items())[:5]) for part, names in found.names.items()},
    }
