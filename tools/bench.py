"""Benchmarks: speed, as ratios of contenders that take turns in one run, and what a run survives (kills, elastic)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

import torch

from dit.bench.plan import planner
from dit.bench.plan import table as plan_table
from dit.bench.plan import validate as validation
from dit.bench.plan.job import Asked
from dit.bench.plan.measured import read_points
from dit.bench.speed import draws as draws_bench
from dit.bench.speed import loader as loader_bench
from dit.bench.speed import loader_table, zero_table
from dit.bench.speed import saving as saving_bench
from dit.bench.speed import step as step_bench
from dit.bench.speed import zero as zero_bench
from dit.bench.speed.bounds import bound_line
from dit.bench.speed.steppers import StepBench
from dit.bench.speed.turns import MedianRange, protocol
from dit.bench.survival import elastic as elastic_bench
from dit.bench.survival import kills as kills_bench
from dit.bench.trace import record as trace_bench
from dit.bench.trace import table as trace_table
from dit.bench.trace.record import TraceBench
from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.commandline.flags import options_as_flags
from dit.config import to_dict
from dit.configfile import load
from dit.errors import UserError
from dit.experiments.diffusion import Experiment
from dit.files import expand
from dit.outputs import claim, claim_report, write_record
from dit.progress import Bar, say

FIGURES = Path(__file__).resolve().parents[1] / "benchmarks"
SHOWN = 20  # of the problems that a benchmark finds
ENOUGH = {"repeats": 5, "samples": 100_000}  # for which the bounds are stated


@options_as_flags
def loader(
    *,
    cfg: loader_bench.LoaderBench,
    folder: Annotated[
        str | None, "where the data lie, 2 GB; kept for the next time; a temporary one if not given"
    ] = None,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """Samples a second of one process: our shards, a memory map's fancy indexing, plain webdataset.

    Also CPU time a sample, the first batch of a fresh start and of a resume, the first epoch (which checks), several
    ranks on one node, memory. Warm page cache: run it with more free memory than the data take.
    """
    torch.set_num_threads(1)
    how = _begin(json_file, **to_dict(cfg))
    with (
        tempfile.TemporaryDirectory() as temporary,
        Bar[None](total=loader_bench.turns(cfg), unit="turn") as bar,
    ):
        figures = loader_bench.run(Path(expand(folder or temporary)), cfg, bar.update)
    enough = cfg.repeats >= ENOUGH["repeats"] and cfg.samples >= ENOUGH["samples"]
    print(*loader_table.lines(figures, enough), sep="\n")
    if not enough:
        print(
            f"too few to judge the bounds: {cfg.repeats} turns of {cfg.samples:,} samples; take at least "
            f"--repeats={ENOUGH['repeats']} --samples={ENOUGH['samples']}"
        )
    print(json.dumps(how))
    if json_file:
        _write_json(json_file, how, figures)


@options_as_flags
def checkpoint(
    *,
    cfg: saving_bench.SavingBench,
    folder: Annotated[str | None, "the disk to write to; a temporary folder if not given"] = None,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """Seconds to save and load a checkpoint beside a plain write of as many bytes; how long training stands still."""
    how = _begin(json_file, **to_dict(cfg))
    with (
        tempfile.TemporaryDirectory(dir=folder and expand(folder)) as place,
        Bar[None](total=saving_bench.turns(cfg), unit="turn") as bar,
    ):
        found = saving_bench.run(Path(place), cfg, bar.update)
    enough = cfg.repeats >= ENOUGH["repeats"]
    print(f"{found['bytes'] / 2**20:.0f} MiB, seconds")
    for name, seconds in found["seconds"].items():
        print(f"{name:28s} {MedianRange(**seconds)}")
    print(bound_line("save / plain write", found["save / plain write"], 1.5, enough, most=True))
    print(bound_line("stall / save", found["stall / save"], 0.2, enough, most=True))
    _conclude(how, found, json_file)


@options_as_flags
def draws(
    *,
    cfg: draws_bench.DrawsBench,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """The random numbers of a training step (posterior, eps, t, label drop, fingerprint) as a share of the step."""
    how = _begin(json_file, **to_dict(cfg))
    with Bar[None](total=draws_bench.turns(cfg), unit="turn") as bar:
        found = draws_bench.run(cfg, bar.update)
    for name, ms in found["ms"].items():
        print(f"{name:28s} {MedianRange(**ms)} ms a step")
    bound = 0.01 if torch.cuda.is_available() else 0.03
    enough = cfg.repeats >= ENOUGH["repeats"]
    print(bound_line("draws / step", found["draws / step"], bound, enough, most=True))
    _conclude(how, found, json_file)


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
    how = _begin_on(device, threads, json_file, **to_dict(options))
    print(json.dumps(how), flush=True)
    with Bar[None](total=step_bench.turns(options), unit="turn") as bar:
        step_bench.run(options, step_bench.Report(say, partial(_write_json, json_file, how), bar.update))


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
    how = _begin_on(device, 1, json_file, **to_dict(options))
    folder = Path(expand(out)) if out else None
    claim([folder / trace_bench.FILE] if folder else [], overwrite=overwrite)
    found = trace_bench.run(options, folder)
    print(*trace_table.lines(found), sep="\n")
    _conclude(how, found, json_file)


@options_as_flags
def zero(
    *,
    cfg: zero_bench.ZeroBench,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """ZeRO stages 0-3 against torch's DistributedDataParallel, on 2 and 4 gloo ranks of this machine's CPU, in fp32.

    Bytes that each rank sends a step, by the ring's formula for the collectives that were seen, beside those of the
    ZeRO paper; seconds a step, and their ratio to DDP's in the same turn.
    """
    how = _begin(json_file, **to_dict(cfg))
    with Bar[None](total=len(cfg.ranks), unit="size") as bar:
        figures = zero_bench.run(cfg, bar.update)
    print(*zero_table.lines(figures), sep="\n")
    _conclude(how, figures, json_file)


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
    cfg, how = (
        load(Experiment, config, overrides),
        _begin(json_file, config=config, **to_dict(asked), **overrides),
    )
    points = read_points(FIGURES, asked.measured)
    found = planner.plan(cfg, asked, points)
    print(*plan_table.lines(found), sep="\n", flush=True)
    if validate:
        with Bar[None](total=len(validation.HERE.ranks), unit="size") as bar:
            rows = [*validation.of_files(points), *validation.of_this_machine(points, progress=bar.update)]
        print(*plan_table.validation_lines(rows), sep="\n")
        found["validation"] = rows
    if json_file:
        write_record(Path(expand(json_file)), {"protocol": how, **found})


@options_as_flags
def kills(
    *,
    cfg: kills_bench.SurvivalBench,
    folder: Annotated[
        str | None, "where it works; the same command goes on there; a temporary one if not given"
    ] = None,
    json_file: Annotated[str | None, "write the figures and every kill here too"] = None,
) -> None:
    """SIGKILLs at random moments of a real run, of one rank or all: the run at the end is the undisturbed one's.

    Weights, average and optimizer bit for bit, every step logged once with the same batch_hash and loss, and after
    every kill a checkpoint that can be loaded. 8 to 12 s a kill; exit status 1 where anything differs.
    """
    how = _begin(json_file, **to_dict(cfg))
    with tempfile.TemporaryDirectory() as temporary, Bar[None](total=cfg.kills, unit="kill") as bar:
        found = kills_bench.Bench(Path(expand(folder or temporary)), cfg).run(bar.update)
    print(kills_bench.table(found))
    _conclude(how, found, json_file)


@options_as_flags
def elastic(
    *,
    cfg: elastic_bench.ElasticBench,
    folder: Annotated[
        str | None, "where it works; the same command goes on there; a temporary one if not given"
    ] = None,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """One run over several numbers of ranks and ZeRO stages, in fp32: its losses beside an unbroken run's on one rank.

    The same batch_hash at every step and losses within 1e-5 relative, or exit status 1.
    """
    how = _begin(json_file, **to_dict(cfg))
    with tempfile.TemporaryDirectory() as temporary, Bar[None](total=1 + len(cfg.ranks), unit="start") as bar:
        found = elastic_bench.run(Path(expand(folder or temporary)), cfg, bar.update)
    print(elastic_bench.table(found))
    _conclude(how, found, json_file)


def _begin(json_file: str | None, **asked: Any) -> dict[str, Any]:
    """How it will be measured; OutputError where the figures could not be written, before they are taken."""
    for file in [Path(expand(json_file))] if json_file else []:
        claim_report(file)
        file.parent.mkdir(parents=True, exist_ok=True)
    return protocol(**asked)


def _begin_on(device: str | None, threads: int, json_file: str | None, **asked: Any) -> dict[str, Any]:
    """The same, on a CPU (with so many threads) or a GPU; UserError where there is none."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; take --device=cpu")
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    return _begin(json_file, **asked, threads=torch.get_num_threads())


def _write_json(json_file: str | None, how: dict[str, Any], figures: dict[str, Any]) -> None:
    if json_file:
        write_record(Path(expand(json_file)), {"protocol": how, "figures": figures})


def _conclude(how: dict[str, Any], found: dict[str, Any], json_file: str | None) -> None:
    """Print how it was measured, write the figures, and fail where they are not what was promised."""
    print(json.dumps(how))
    _write_json(json_file, how, found)
    if problems := found.get("problems", []):
        more = [f"and {len(problems) - SHOWN} more; --json_file has them all"] * (len(problems) > SHOWN)
        rows = [*problems[:SHOWN], *more]
        raise UserError("this is not as promised:\n" + "\n".join(f"  {row}" for row in rows))


COMMANDS = {
    "loader": loader,
    "checkpoint": checkpoint,
    "draws": draws,
    "step": step,
    "zero": zero,
    "plan": plan,
    "trace": trace,
}
TOOL = Tool({**COMMANDS, "kills": kills, "elastic": elastic})

if __name__ == "__main__":
    run(TOOL)
