"""What a run will cost, before it runs: a start's checks, then its figures, and its speed where that is cheap."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dit.ranks import group
from dit.ranks.group import World
from dit.train.ema import Ema
from dit.train.engines.local import LocalEngine
from dit.train.optim import freeze
from dit.train.plan import MakeParts, Plan, device_peak, stored_shape
from dit.train.preflight import checks
from dit.train.settings import RunConfig
from dit.train.summary import rows, table
from dit.train.task import synthetic_samples

PATIENCE = 10.0  # seconds that a step for measuring may take
SLOW = 0.05  # share of the peak that is counted on when it is decided whether a step takes longer
PASSES = 3  # timed, of each kind, after one that is not


def dry_run(cfg: RunConfig, make_parts: MakeParts) -> None:
    """Print what the run is and costs; refuses what training would, in the same words. Collective."""
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    with group.session() as world:
        plan = Plan(cfg, make_parts, world)
        with contextlib.closing(plan):
            checks.check(plan)
            found = table(report(plan))
        if world.is_main:
            print(found)


def report(plan: Plan) -> dict[str, str]:
    """The summary's rows and those of the cost, by name."""
    train, world = plan.cfg.train, plan.world
    flops, images = plan.parts.flops_per_image, train.steps * train.global_batch
    memory, stage = plan.memory(plan.sharding.stage), plan.sharding.stage
    need = plan.sharding.zero.needs(memory, stage, plan.device) / 2**30
    activations = (
        f"activations {memory.activations / 2**30:.2f}" if memory.activations else "activations not counted"
    )
    peak = device_peak(world.device) * world.size
    about = rows(plan)
    return {
        **about,
        "training": f"{flops / 1e9:.3f} GFLOP an image, {flops * images:.3g} in all",
        "memory": f"{need:.2f} GiB a rank, of it {activations}",
        "peak": f"{peak / 1e12:.2f} TFLOP/s over {world.size} device(s)",
        "hours": _hours(plan, peak),
    }


def _hours(plan: Plan, peak: float) -> str:
    """How long the steps take, and what that rests on."""
    train, flops = plan.cfg.train, plan.parts.flops_per_image
    images = train.steps * train.global_batch
    half, fifth = (flops * images / (peak * share) / 3600 for share in (0.5, 0.2))
    stated = f"{half:.3g} at 50% MFU, {fifth:.3g} at 20%"
    speed = measured(plan, peak)
    if isinstance(speed, str):
        return f"{stated} (stated shares of the peak: {speed})"
    seconds = train.steps * speed.step
    rate = train.global_batch / speed.step
    alone = "" if plan.world.size == 1 else f", on one of {plan.world.size} ranks, communication not counted"
    eager = ", not compiled" if getattr(train, "compile", False) else ""
    mfu = flops * rate / peak
    return (
        f"{seconds / 3600:.3g} ({_duration(seconds)}) at {rate:.3g} images/s ({mfu:.0%} MFU), measured here: median of "
        f"{PASSES} passes and updates of {speed.samples} samples, {train.precision}{eager}{alone}; data, held-out "
        f"loss, pictures and checkpoints not counted; {stated}"
    )


@dataclass(frozen=True)
class Speed:
    """Seconds of a step of the whole batch: each micro-batch forward and backward, then update and averages."""

    step: float
    samples: int  # of a micro-batch


def measured(plan: Plan, peak: float) -> Speed | str:
    """The speed of this rank's own model on its own device, with made-up data; or why that is not measured.

    On one rank, in plain torch: what ranks tell each other is not in it. Collective where there are several.
    """
    train, world = plan.cfg.train, plan.world
    samples = train.micro(world)
    guess = plan.parts.flops_per_image * samples / (peak / world.size * SLOW)
    why = None
    if guess > PATIENCE:
        why = f"a pass of {samples} samples may take {guess:.0f} s here"
    elif plan.cfg.zero.needs(plan.memory(0), 0, replace(plan.device, ranks=1)) > plan.device.usable:
        why = "the model does not fit in one device here"
    found = group.together(lambda: 0.0 if why else _time(plan, samples))
    slowest = max(group.gather_objects(found))
    return why or Speed(slowest, samples)


def _time(plan: Plan, samples: int) -> float:
    """Seconds of a step on this rank."""
    cfg, world = plan.cfg, plan.world
    module = plan.network()
    freeze(module, cfg.train.freeze)
    alone = World(local_rank=world.local_rank)
    engine = LocalEngine(module, cfg.optim, alone, precision=cfg.train.precision)
    ema, task = Ema(engine, cfg.ema), plan.parts.task.uncoupled()
    made = synthetic_samples(stored_shape(plan.manifest), len(plan.manifest.classes), world.device, samples)

    def forward_and_backward() -> None:
        engine.backward(task.loss(engine, made).mean)

    def update() -> None:
        engine.step(0.0)  # weights stay: gradients of made-up data lead nowhere
        ema.update()

    forward_and_backward()
    update()
    each, accumulated = _seconds(forward_and_backward, world.device), cfg.train.local_batch(world) // samples
    return each * accumulated + _seconds(update, world.device, before=forward_and_backward)


def _seconds(
    action: Callable[[], None], device: torch.device, before: Callable[[], None] | None = None
) -> float:
    """The median of PASSES times. before: what each needs, which is not timed."""
    taken = []
    for _ in range(PASSES):
        if before is not None:
            before()
        _wait(device)
        begun = time.perf_counter()
        action()
        _wait(device)
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[PASSES // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _duration(seconds: float) -> str:
    """As "45 s", "26 min", "3.4 h", "5.2 days"."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
