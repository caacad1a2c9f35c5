"""Scaling-law experiments: `python tools/scaling.py plan SPEC`, then run, status and collect."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import run as run_tool
from dit.files import expand
from dit.scaling.arrays import submit
from dit.scaling.collecting import collect as collect_figures
from dit.scaling.collecting import warn_of_missing, write_table
from dit.scaling.planned import as_table, opened, spec_of
from dit.scaling.running import Orders, run_plan
from dit.scaling.status import status as status_table

Where = Annotated[
    str, "spec, a YAML file as in configs/scaling, or the folder of an experiment that is planned"
]
Out = Annotated[str | None, "folder of the experiment, in place of the spec's `out`"]


def plan(
    spec: Annotated[str, "a YAML file, see configs/scaling"],
    *,
    out: Out = None,
) -> None:
    """Print what a spec comes to: runs, their sizes, samples, FLOPs and hours, and what cannot be run and why.

    Writes OUT/plan.json, OUT/plan.csv and OUT/plan/RUN.yaml, a whole config for each run, which tools/train.py takes.
    Planned again, an experiment may grow; runs that have begun stay what they are.
    """
    folder, planned = opened(spec, out, replan=True)
    of = spec_of(planned)
    print(as_table(planned, folder, str(of.device), of.ranks))


def run(
    spec: Where,
    *,
    out: Out = None,
    jobs: Annotated[int, "runs at a time, each a process (or `ranks` of them)"] = 1,
    only: Annotated[tuple[str, ...], "names of runs, comma-separated; none = all"] = (),
    slurm: Annotated[str | None, "submit job arrays instead, with these options of sbatch"] = None,
) -> None:
    """Run what is not complete: here, one run after the other, or as two SLURM job arrays.

    Trunks come before their branches. The same command again goes on: complete runs are left alone, others resume.
    A run that fails says why, its output is in OUT/logs, and the others go on; the exit status is 1 then. Ctrl-C and
    TERM have the runs save first.
    """
    folder, planned = opened(spec, out, replan=True)
    if slurm is not None:
        submit(folder, planned, slurm, only)
    else:
        run_plan(folder, planned, Orders(jobs, only, spec_of(planned).ranks))


def status(spec: Where, *, out: Out = None) -> None:
    """Print how far each run is, what it waits for or why it failed, and how long is left at the measured rate."""
    folder, planned = opened(spec, out)
    print(status_table(folder, planned, spec_of(planned).device.speed))


def collect(
    spec: Where,
    *,
    out: Out = None,
    metric: Annotated[
        str, "held_out_loss, or a figure in RUN/evaluations.jsonl, such as frechet"
    ] = "held_out_loss",
    protocol: Annotated[str | None, "hash of the figures' protocol, where there are several"] = None,
    partial: Annotated[bool, "take the newest figure of runs that are not complete too"] = False,
    table: Annotated[str | None, "CSV file to write; none = OUT/runs.csv"] = None,
) -> None:
    """Write the runs' figures as one CSV, which `fit` reads: params, samples, tokens, FLOPs, loss, seed.

    Losses are of EMA weights at the last step, on held-out samples, times and noise that are the same for every run.
    Figures of unlike protocols are refused, and runs that are missing named.
    """
    folder, planned = opened(spec, out)
    found = collect_figures(folder, planned, metric, protocol, partial)
    warn_of_missing(found)
    file = folder / "runs.csv" if table is None else Path(expand(table))
    write_table(found, file)
    print(f"{len(found.rows)} runs of {len(planned.runs)}, {metric}, protocol {found.protocol}: {file}")


TOOL = Tool(
    {
        "plan": plan,
        "run": run,
        "status": status,
        "collect": collect,
    },
)

if __name__ == "__main__":
    run_tool(TOOL)
