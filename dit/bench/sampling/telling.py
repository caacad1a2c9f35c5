"""The benchmarks of sampling as commands: measured, printed as a table, written to a sheet."""

from __future__ import annotations

from dit.bench.sampling import images, solvers
from dit.bench.sheet import REPEATS, Sheet
from dit.config import to_dict
from dit.progress import Bar


def sample(device: str | None, threads: int, options: images.SampleBench, json_file: str | None) -> None:
    """Measure how quickly images are drawn."""
    sheet = Sheet.begin_on(device, threads, json_file, **to_dict(options))
    with Bar[None](total=images.turns(options), unit="turn") as bar:
        found = images.run(options, bar.update)
    print(*images.lines(found, options, options.repeats >= REPEATS), sep="\n")
    sheet.conclude(found)


def errors(cfg: solvers.SolversBench, json_file: str | None) -> None:
    """Measure how exact the solvers are; UserError where one is not of its order."""
    sheet = Sheet.begin(json_file, **to_dict(cfg))
    found = solvers.run(cfg)
    print(*solvers.lines(found, cfg), sep="\n")
    sheet.conclude(found)
