"""Whether a run fits on so many devices, how quick it would be there and what it would cost: an estimate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dit.bench.plan import communication, compute
from dit.bench.plan.compute import Work
from dit.bench.plan.devices import DeviceFacts, device_facts
from dit.bench.plan.job import Asked, Job, job_of
from dit.bench.plan.measured import Curve, Point, curve_for
from dit.config import ConfigError
from dit.experiments.diffusion import Experiment
from dit.model.cost import Memory
from dit.model.recompute import NOTHING, Recompute
from dit.ranks.group import World
from dit.train.engines.budget import Budget, fit
from dit.train.engines.local import check_alone
from dit.train.engines.zero_config import USABLE, Device, choose
from dit.train.settings import TrainConfig

LOADER = 200_000 * 8192  # bytes/s of samples that a rank reads ahead; one CPU was measured at 216 to 489
DISK = 1e9  # bytes/s that a rank writes where it waits for that


@dataclass(frozen=True)
class Way:
    """One way to take a step: its parts in seconds, and the bytes that a rank needs."""

    micro: int
    accumulation: int
    stage: int
    memory: int
    recompute: Recompute = NOTHING
    passes: float = 0.0
    update: float = 0.0
    sent: float = 0.0  # what is not hidden behind the passes
    waiting: float = 0.0  # for launches, or for data
    saving: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.passes + self.update + self.sent + self.waiting + self.saving


@dataclass(frozen=True)
class Estimate:
    """What is expected of a job on `ranks` devices. rate: images/s of all; limit: why; used: devices that are."""

    job: Job
    device: DeviceFacts
    ranks: int
    curve: Curve
    way: Way | None
    reason: str = ""
    memory: int | None = None
    rate: float = 0.0
    limit: str = ""
    used: int = 0

    @property
    def mfu(self) -> float:
        """Share of the peak of all devices."""
        return self.rate * self.job.cost.training_flops / (self.ranks * self.device.peak)

    @property
    def hours(self) -> float:
        """Until the job's samples are done."""
        return self.job.samples / self.rate / 3600

    @property
    def assumptions(self) -> dict[str, str]:
        """What all of it rests on, by name."""
        shares = ", ".join(f"stage {stage} {share:.0%}" for stage, share in communication.OVERLAP.items())
        return {
            "efficiency": self.curve.words,
            **self.device.words(self.job.precision),
            **compute.words(self.job),
            "overlap": f"communication behind the passes: {shares}; rings, or trees where they are quicker",
            "data": f"{self.job.data}; {LOADER / 1e9:.2g} GB/s of samples a rank, read ahead",
            "memory": f"the trainer's model, for eager execution; {USABLE:.0%} of the device's",
            "saving": f"a checkpoint every {self.job.checkpoint.every} steps, copied at "
            f"{self.device.host / 1e9:.3g} GB/s while training waits",
            "other work": "logging, held-out losses and pictures are not counted, nor are failures",
        }


def plan(cfg: Experiment, asked: Asked, points: Sequence[Point]) -> dict[str, Any]:
    """Plan a configuration, as JSON values. ConfigError for a device that is unknown, or what cannot be trained."""
    job = job_of(cfg, asked)
    facts = device_facts(asked.device, job.precision)
    return as_json(estimate(job, facts, asked.gpus, curve_for(points, facts, job)), asked.price)


def estimate(job: Job, device: DeviceFacts, ranks: int, curve: Curve | None = None) -> Estimate:
    """Plan the job. More devices are never slower together, and never quicker each, than fewer.

    Where all would be slower, for what they send each other, the job is planned on fewer and the others idle. Memory
    that more ranks free would allow larger micro-batches; that gain is not counted on.
    """
    found = on_all(job, device, ranks, curve or Curve())
    if found.way is None:
        return found
    counts = [n for n in _divisors(job.batch) if n < ranks]
    best, each = found, float("inf")
    for one in (*(on_all(job, device, n, found.curve) for n in counts), found):
        if one.way is not None:
            each = min(each, one.rate / one.ranks)
            lowered = replace(one, rate=each * one.ranks)
            if best is found or lowered.rate > best.rate:
                best = lowered
    return replace(best, ranks=ranks, used=best.ranks, limit=_limit(found, best))


def _limit(found: Estimate, best: Estimate) -> str:
    """Why an estimate is not what all devices give by themselves, in words."""
    if best.ranks < found.ranks:
        return (
            f"{best.ranks} of the {found.ranks} devices are used: all of them would give {found.rate:,.4g} images/s, "
            "for what they send each other"
        )
    if best.rate < found.rate:
        return "no quicker a device than fewer of them: what larger micro-batches would gain is not counted"
    return ""


def on_all(job: Job, device: DeviceFacts, ranks: int, curve: Curve) -> Estimate:
    """Plan for this number of ranks, without a look at how fewer would do."""
    found = Estimate(job, device, ranks, curve, None)
    if job.batch < ranks:
        reason = (
            f"a global batch of {job.batch} samples is smaller than {ranks} devices: each needs at least one"
        )
        return replace(found, reason=reason)
    try:
        local = TrainConfig(global_batch=job.batch).local_batch(World(size=ranks))
        job.zero.check(World(size=ranks))
        if job.is_local:
            check_alone(World(size=ranks))
    except ConfigError as error:
        return replace(found, reason=str(error))
    sizes = [n for n in _divisors(local) if n <= (job.cap or local) and n % job.group == 0]
    if not sizes:
        reason = (
            f"no micro-batch divides a rank's share of {local} samples and is a multiple of "
            f"{job.group}, the group of objective.coupling or objective.auxiliary"
        )
        return replace(found, reason=reason)
    most = int(USABLE * device.memory)
    usable = Device(min(job.budget or most, most), device.on_host, ranks)
    ways = [_way(found, micro, local, usable) for micro in sizes]
    fitting = [way for way, _ in ways if way.memory <= usable.usable]
    if not fitting:
        way, why = ways[0]
        return replace(found, memory=way.memory, reason=f"it does not fit: {why}")
    best = min(fitting, key=lambda way: (way.seconds, -way.micro))
    return replace(found, way=best, memory=best.memory, rate=job.batch / best.seconds)


def _way(found: Estimate, micro: int, local: int, usable: Device) -> tuple[Way, str]:
    """A step in micro-batches of this size, as the trainer would take it; and what that needs, in words."""
    job, ranks, accumulation = found.job, found.ranks, local // micro
    recompute = job.cost.recompute

    def memory(stage: int, way: Recompute = recompute) -> Memory:
        return job.memory(micro, stage, ranks, accumulation, way)

    if job.budget is not None:
        zero = replace(job.zero, stage=0) if job.is_plain or job.is_local else job.zero
        budget = Budget(usable.usable, len(job.cost.blocks), lambda stage, _, way: memory(stage, way))
        fitted = fit(zero, budget, 0, usable)
        recompute, stage, why, needed = fitted.recompute, fitted.choice.stage, fitted.why, fitted.needed
    elif job.is_plain or job.is_local:
        stage, why, needed = 0, "", memory(0).total
    else:
        choice = choose(job.zero, memory, usable)
        stage, why = choice.stage, choice.why
        needed = job.zero.needs(memory(stage), stage, usable)
    gib = f"stage {stage} needs {needed / 2**30:.1f} GiB of {usable.usable / 2**30:.1f}"
    way = Way(micro, accumulation, stage, needed, recompute)
    return _timed(found, way), f"with micro-batches of {micro}: {why or gib}"


def _timed(found: Estimate, way: Way) -> Way:
    """Put in how long the parts take."""
    job, device, ranks = found.job, found.device, found.ranks
    share = 1 / ranks if way.stage else 1.0
    work = Work(way.micro, way.accumulation, way.stage, share)
    factor = found.curve.factor(way.stage, way.micro * job.cost.training_flops)
    passes = factor * way.accumulation * compute.pass_seconds(job, way.micro, device, way.recompute)
    update = factor * compute.update_seconds(job, work, device)
    trained = job.cost.parameters.trainable - job.frozen
    sent = communication.traffic(
        trained, job.cost.dims.depth, way.stage, job.precision, job.zero.communication
    )
    wire = communication.step_seconds(way.stage, sent, way.accumulation, ranks, device)
    wire = max(0.0, wire - communication.OVERLAP[way.stage] * passes)
    busy = passes + update + wire
    reading = way.micro * way.accumulation * job.sample_bytes / LOADER
    waiting = max(0.0, compute.launch_seconds(job, work, device) - busy, reading - busy)
    held = 4 * (3 + job.averages) * job.cost.parameters.trainable * share
    rate = device.host if job.checkpoint.background else DISK
    saving = held / rate / job.checkpoint.every
    return replace(way, passes=passes, update=update, sent=wire, waiting=waiting, saving=saving)


def _divisors(number: int) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0)


def as_json(found: Estimate, price: float | None = None) -> dict[str, Any]:
    """Give an estimate as JSON values. price: of a device's hour."""
    way, fits = found.way, found.way is not None
    made: dict[str, Any] = {
        "fits": fits,
        "stage": way.stage if way else None,
        "micro_batch": way.micro if way else None,
        "images_per_s": found.rate if fits else None,
        "mfu": found.mfu if fits else None,
        "memory_bytes": found.memory,
        "gpu_hours": found.hours * found.ranks if fits else None,
        "communication_share": way.sent / way.seconds if way else None,
        "assumptions": found.assumptions,
        "is_estimate": True,
        "reason": found.reason or None,
        "note": found.limit or None,
        "device": found.device.name,
        "gpus": found.ranks,
        "gpus_used": found.used,
        "peak_flops": found.device.peak,
        "device_memory_bytes": found.device.memory,
        "global_batch": found.job.batch,
        "samples": found.job.samples,
        "parameters": found.job.cost.parameters.trainable,
        "training_flops": found.job.cost.training_flops,
        "recompute": way.recompute.words(len(found.job.cost.blocks)) if way else None,
    }
    if way is None:
        return made
    parts = ("passes", "update", "sent", "waiting", "saving")
    return {
        **made,
        "accumulation": way.accumulation,
        "step_ms": 1e3 * found.job.batch / found.rate,
        "parts_ms": {name: 1e3 * getattr(way, name) for name in parts},
        "hours": found.hours,
        "cost": found.hours * found.ranks * price if price is not None else None,
    }
