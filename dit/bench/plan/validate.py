"""Estimates beside measurements: every file of the step's bench, and a short training here on 1, 2 and 4 ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dit.bench.plan.compute import Work, step_seconds
from dit.bench.plan.devices import CPU, DeviceFacts, core, together
from dit.bench.plan.job import Job
from dit.bench.plan.measured import Curve, Point, curve_for, held_out
from dit.bench.plan.planner import on_all
from dit.bench.speed import zero as zero_bench
from dit.bench.speed.step import product_rate
from dit.bench.speed.zero import CHANNELS, CLASSES, SIDE, ZeroBench
from dit.model.cost import cost
from dit.model.dit import DiTConfig
from dit.train.engines.zero_config import STAGES, Stage, ZeroConfig

HERE = ZeroBench(width=128, depth=6, heads=2, batch=16, steps=2, repeats=3, ranks=(1, 2, 4))


def of_files(points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """Compare every step that was measured with its estimate from all others alone."""
    known = {True: "other files and sizes", False: "nothing: the roofline"}
    for point, seconds, others in held_out(points):
        yield _row(f"{point.device}: {point.name}", seconds, point.seconds, known[others])


def of_this_machine(
    points: Sequence[Point], cfg: ZeroBench = HERE, progress: Callable[[], object] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Train here for some steps at every ZeRO stage on gloo ranks, and compare the CPU time of each with its estimate.

    CPU time, of rank 0, is what other work on the machine lengthens least; waiting for others is not in it.
    One rank is estimated from the files; several from the one rank's measured step at the same stage, so that what
    sharing and sending cost is compared.
    """
    measured = zero_bench.run(cfg, progress)
    here = core(product_rate(torch.device(CPU), "fp32"))
    for stage in STAGES:
        curve: Curve | None = None
        for ranks in cfg.ranks:
            job, seconds = _job(cfg, stage, ranks), _seconds(measured, ranks, stage)
            known = curve or curve_for(points, here, job)
            found = on_all(job, together(here, ranks), ranks, known)
            name = f"here: stage {stage} on {ranks} rank(s)"
            words = "one rank here" if curve else "files" if known.points else "nothing: the roofline"
            yield _row(name, job.batch / found.rate, seconds, words)
            curve = curve or Curve((_point(job, stage, ranks, seconds, here),))


def _job(cfg: ZeroBench, stage: Stage, ranks: int) -> Job:
    model = cost(DiTConfig(width=cfg.width, depth=cfg.depth, heads=cfg.heads), SIDE, CHANNELS, CLASSES)
    micro = cfg.batch // (ranks * cfg.accumulation)
    return Job(model, cfg.batch, averages=0, zero=ZeroConfig(stage=stage), cap=micro)


def _seconds(measured: dict[str, Any], ranks: int, stage: int) -> float:
    return float(measured[str(ranks)][f"stage {stage}"]["cpu_seconds"]["median"])


def _point(job: Job, stage: int, ranks: int, seconds: float, device: DeviceFacts) -> Point:
    """The step on the fewest ranks, from which those on more are estimated."""
    micro = job.cap or job.batch
    work = Work(micro, job.batch // (micro * ranks), stage, 1 / ranks if stage else 1.0)
    roofline = step_seconds(job, work, together(device, ranks))
    name = f"stage {stage} on {ranks} rank(s)"
    return Point("this machine", name, CPU, job, stage, micro * job.cost.training_flops, seconds, roofline)


def _row(name: str, estimated: float, measured: float, known: str) -> dict[str, Any]:
    return {
        "name": name,
        "estimated_ms": 1e3 * estimated,
        "measured_ms": 1e3 * measured,
        "error": estimated / measured - 1,
        "known": known,
    }
