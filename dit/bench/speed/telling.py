"""The benchmarks of speed as commands: measured behind a bar, printed as a table, written to a sheet."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from dit.bench.sheet import REPEATS, Sheet
from dit.bench.speed import draws as draws_bench
from dit.bench.speed import loader as loader_bench
from dit.bench.speed import loader_table, zero_table
from dit.bench.speed import saving as saving_bench
from dit.bench.speed import step as step_bench
from dit.bench.speed import zero as zero_bench
from dit.bench.speed.bounds import bound_line
from dit.bench.speed.steppers import StepBench
from dit.bench.speed.turns import MedianRange
from dit.config import to_dict
from dit.files import expand
from dit.progress import Bar, say

SAMPLES = 100_000  # of the loader, for which its bounds are stated


def loader(cfg: loader_bench.LoaderBench, folder: str | None, json_file: str | None) -> None:
    """Measure reading, in a folder that keeps the data or a temporary one."""
    torch.set_num_threads(1)
    sheet = Sheet.begin(json_file, **to_dict(cfg))
    with (
        tempfile.TemporaryDirectory() as temporary,
        Bar[None](total=loader_bench.turns(cfg), unit="turn") as bar,
    ):
        figures = loader_bench.run(Path(expand(folder or temporary)), cfg, bar.update)
    enough = cfg.repeats >= REPEATS and cfg.samples >= SAMPLES
    print(*loader_table.lines(figures, enough), sep="\n")
    if not enough:
        print(
            f"too few to judge the bounds: {cfg.repeats} turns of {cfg.samples:,} samples; take at least "
            f"--repeats={REPEATS} --samples={SAMPLES}"
        )
    sheet.conclude(figures)


def checkpoint(cfg: saving_bench.SavingBench, folder: str | None, json_file: str | None) -> None:
    """Measure saving and loading, in a temporary folder of `folder`."""
    sheet = Sheet.begin(json_file, **to_dict(cfg))
    with (
        tempfile.TemporaryDirectory(dir=folder and expand(folder)) as place,
        Bar[None](total=saving_bench.turns(cfg), unit="turn") as bar,
    ):
        found = saving_bench.run(Path(place), cfg, bar.update)
    print(f"{found['bytes'] / 2**20:.0f} MiB, seconds")
    for name, seconds in found["seconds"].items():
        print(f"{name:28s} {MedianRange(**seconds)}")
    enough = cfg.repeats >= REPEATS
    print(bound_line("save / plain write", found["save / plain write"], 1.5, enough, most=True))
    print(bound_line("stall / save", found["stall / save"], 0.2, enough, most=True))
    sheet.conclude(found)


def draws(cfg: draws_bench.DrawsBench, json_file: str | None) -> None:
    """Measure the random numbers of a step."""
    sheet = Sheet.begin(json_file, **to_dict(cfg))
    with Bar[None](total=draws_bench.turns(cfg), unit="turn") as bar:
        found = draws_bench.run(cfg, bar.update)
    for name, ms in found["ms"].items():
        print(f"{name:28s} {MedianRange(**ms)} ms a step")
    bound = 0.01 if torch.cuda.is_available() else 0.03
    print(bound_line("draws / step", found["draws / step"], bound, cfg.repeats >= REPEATS, most=True))
    sheet.conclude(found)


def step(device: str | None, threads: int, options: StepBench, json_file: str | None) -> None:
    """Measure whole training steps; the table and the figures are written as they come."""
    sheet = Sheet.begin_on(device, threads, json_file, **to_dict(options))
    print(json.dumps(sheet.how), flush=True)
    with Bar[None](total=step_bench.turns(options), unit="turn") as bar:
        step_bench.run(options, step_bench.Report(say, sheet.write, bar.update))


def zero(cfg: zero_bench.ZeroBench, json_file: str | None) -> None:
    """Measure the stages of ZeRO on several ranks of this machine."""
    sheet = Sheet.begin(json_file, **to_dict(cfg))
    with Bar[None](total=len(cfg.ranks), unit="size") as bar:
        figures = zero_bench.run(cfg, bar.update)
    print(*zero_table.lines(figures), sep="\n")
    sheet.conclude(figures)
