"""Benchmarks: speed, as ratios of contenders that take turns in one run, and what a run survives (kills, elastic)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.bench.gpu import telling as gpu_telling
from dit.bench.plan import telling as plan_telling
from dit.bench.plan.job import Asked
from dit.bench.sampling import telling as sampling
from dit.bench.sampling.images import SampleBench
from dit.bench.sampling.solvers import SolversBench
from dit.bench.speed import telling as speed
from dit.bench.speed.draws import DrawsBench
from dit.bench.speed.loader import LoaderBench
from dit.bench.speed.saving import SavingBench
from dit.bench.speed.steppers import StepBench
from dit.bench.speed.zero import ZeroBench
from dit.bench.survival import telling as survival
from dit.bench.survival.elastic import ElasticBench
from dit.bench.survival.kills import SurvivalBench
from dit.bench.trace import telling as trace_telling
from dit.bench.trace.record import TraceBench
from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.commandline.flags import options_as_flags


@options_as_flags
def loader(
    *,
    cfg: LoaderBench,
    folder: Annotated[
        str | None, "where the data lie, 2 GB; kept for the next time; a temporary one if not given"
    ] = None,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """Samples a second of one process: our shards, a memory map's fancy indexing, plain webdataset.

    Also CPU time a sample, the first batch of a fresh start and of a resume, the first epoch (which checks), several
    ranks on one node, memory. Warm page cache: run it with more free memory than the data take.
    """
    speed.loader(cfg, folder, json_file)


@options_as_flags
def checkpoint(
    *,
    cfg: SavingBench,
    folder: Annotated[str | None, "the disk to write to; a temporary folder if not given"] = None,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """Seconds to save and load a checkpoint beside a plain write of as many bytes; how long training stands still."""
    speed.checkpoint(cfg, folder, json_file)


@options_as_flags
def draws(
    *,
    cfg: DrawsBench,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """The random numbers of a training step (posterior, eps, t, label drop, fingerprint) as a share of the step."""
    speed.draws(cfg, json_file)


@options_as_flags
def step(
    *,
    device: Annotated[Literal["cpu", "cuda"] | None, "where; cuda if there is one"] = None,
    threads: Annotated[int, "torch CPU threads, where the device is the CPU"] = 1,
    options: StepBench,
    json_file: Annotated[str | None, "write the figures here too, all that are known after each row"] = None,
) -> None:
    """Our whole training step at each ZeRO stage beside a plain DiT's loop, in one process; its share of the machine.

    The plain loop: timm's attention, an unfused modulation and AdamW, an average parameter by parameter, no clipping.
    `x plain` is its time over ours. The table and the figures are written as they come, so that a time limit loses
    nothing. On a GPU: --size=XL,S --batch=256 --precision=bf16 --compile --steps=10 --stages=0,2.
    """
    speed.step(device, threads, options, json_file)


@options_as_flags
def trace(
    *,
    device: Annotated[Literal["cpu", "cuda"] | None, "where; cuda if there is one"] = None,
    options: TraceBench,
    out: Annotated[
        str | None, "a folder for trace.json.gz, which ui.perfetto.dev and chrome://tracing show"
    ] = None,
    overwrite: Annotated[bool, "replace a trace that is there"] = False,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """Where a training step's time goes: matrix products, attention, elementwise, optimizer, average, sent, idle.

    The step that `step` times, under torch's profiler. The parts add up to the step: on a CPU the innermost operation
    of the training thread, on a GPU the kernel that runs, communication only where nothing hides it.
    """
    trace_telling.trace(device, options, out, overwrite, json_file)


@options_as_flags
def sample(
    *,
    device: Annotated[Literal["cpu", "cuda"] | None, "where; cuda if there is one"] = None,
    threads: Annotated[int, "torch CPU threads, where the device is the CPU"] = 1,
    options: SampleBench,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """Images a second of our sampler beside the same network in a plain loop; what guidance costs, and in an interval.

    Latents are drawn, not decoded. A cost is the time of guided sampling over that of sampling without guidance, in the
    same turn. On a GPU: --size=XL --batch=64 --precision=bf16 --compile.
    """
    sampling.sample(device, threads, options, json_file)


@options_as_flags
def solvers(
    *,
    cfg: SolversBench,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """How far each solver ends from the exact solution, by evaluations of a Gaussian mixture's exact velocity, float64.

    All solvers of the registry that take no noise and the steps that they are told. The order is measured by halving
    the step; exit status 1 where one is not as theory says.
    """
    sampling.errors(cfg, json_file)


def gpu(
    *,
    out: Annotated[str, "folder of gpu.json, gpu.md and the trace; what is there is gone on with"],
    seconds: Annotated[
        float, "in all: an item begins only where its estimate fits into what is left"
    ] = 540.0,
    only: Annotated[
        str | None, "items by name, comma-separated, also where they were measured before"
    ] = None,
    toy: Annotated[bool, "every item at toy size, on any machine: whether it runs"] = False,
    device: Annotated[Literal["cpu", "cuda"] | None, "where; cuda if there is one"] = None,
) -> None:
    """Measure everything that only a GPU can tell, in order of worth; each result is written at once.

    The training step of all sizes (P1), tests that need a GPU, a plain DiT beside ours (P2), sampling, a trace, and
    more: dit/bench/gpu/items.py. Each item is a process of its own; one that fails is recorded and stops no other, and
    what is not reached is listed. The same command goes on with what is missing.
    """
    gpu_telling.gpu(out, seconds, only, toy, device)


@options_as_flags
def zero(
    *,
    cfg: ZeroBench,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """ZeRO stages 0-3 against torch's DistributedDataParallel, on 2 and 4 gloo ranks of this machine's CPU, in fp32.

    Bytes that each rank sends a step, by the ring's formula for the collectives that were seen, beside those of the
    ZeRO paper; seconds a step, and their ratio to DDP's in the same turn.
    """
    speed.zero(cfg, json_file)


@options_as_flags
def plan(
    config: Annotated[str, "a YAML file, see configs/"],
    *,
    asked: Asked,
    validate: Annotated[
        bool, "compare estimates with all files, and with a short training here (minutes)"
    ] = False,
    json_file: Annotated[str | None, "write the plan here too"] = None,
    **overrides: str,
) -> None:
    """Estimate whether a run fits on devices that are not here, at which stage, how quick it is and what it costs.

    Keys of the configuration can be set as in training (--model.size=XL). The data need not be there: where they are,
    their manifest says the shape. An estimate: a roofline, corrected by what was measured on that device, rings and
    trees for what is sent; all that it assumes is printed.
    """
    plan_telling.plan(config, asked, validate, json_file, overrides)


@options_as_flags
def kills(
    *,
    cfg: SurvivalBench,
    folder: Annotated[
        str | None, "where it works; the same command goes on there; a temporary one if not given"
    ] = None,
    json_file: Annotated[str | None, "write the figures and every kill here too"] = None,
) -> None:
    """SIGKILLs at random moments of a real run, of one rank or all: the run at the end is the undisturbed one's.

    Weights, average and optimizer bit for bit, every step logged once with the same batch_hash and loss, and after
    every kill a checkpoint that can be loaded. 8 to 12 s a kill; exit status 1 where anything differs.
    """
    survival.kills(cfg, folder, json_file)


@options_as_flags
def elastic(
    *,
    cfg: ElasticBench,
    folder: Annotated[
        str | None, "where it works; the same command goes on there; a temporary one if not given"
    ] = None,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """One run over several numbers of ranks and ZeRO stages, in fp32: its losses beside an unbroken run's on one rank.

    The same batch_hash at every step and losses within 1e-5 relative, or exit status 1.
    """
    survival.elastic(cfg, folder, json_file)


COMMANDS = {
    "loader": loader,
    "checkpoint": checkpoint,
    "draws": draws,
    "step": step,
    "sample": sample,
    "solvers": solvers,
    "gpu": gpu,
    "zero": zero,
    "plan": plan,
    "trace": trace,
}
TOOL = Tool({**COMMANDS, "kills": kills, "elastic": elastic})

if __name__ == "__main__":
    run(TOOL)
