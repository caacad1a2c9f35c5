"""Ablations: named changes of one config at equal FLOPs, each with a learning rate of its own, and verdicts."""

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
from dit.commandline.cli import run
from dit.scaling.ablation.running import Way, as_plan, run_ablation
from dit.scaling.ablation.spec import load_ablation
from dit.scaling.ablation.study import FILES, Ablation
from dit.scaling.running import Orders


def main(
    spec: Annotated[str, "a YAML file, see configs/ablations"],
    *,
    out: Annotated[str | None, "folder of the ablation, in place of the spec's `out`"] = None,
    jobs: Annotated[int, "runs at a time, each a process; 0 = none: the tables of what is complete"] = 1,
    only: Annotated[tuple[str, ...], "names of changes that are run, comma-separated; none = all"] = (),
    slurm: Annotated[str | None, "submit a job array instead, with these options of sbatch"] = None,
    tuned: Annotated[
        bool, "choose rates among the runs that are complete, and run no other for that"
    ] = False,
    dry_run: Annotated[bool, "print costs, steps and the number of runs, and write nothing"] = False,
) -> None:
    """Train every change to the same FLOPs at its best learning rate, and say which are better than the baselines.

    Writes OUT/ablation.md, .csv, .png and .json. Each run is one of tools/train.py, in OUT/runs. The same command again
    goes on, also with more changes, rates or seeds: what is complete is not run again. A run that fails is named. With
    --slurm, once for the rates, once for the runs that are reported, and once for the tables.
    """
    ablation = Ablation(load_ablation(spec, out))
    if dry_run:
        print(as_plan(ablation))
        return
    print(run_ablation(ablation, Way(Orders(jobs) if jobs else None, slurm, tuple(only), tuned)))
    print(*(f"{ablation.out / name}" for name in FILES), sep="\n")


TOOL = Tool(main)

if __name__ == "__main__":
    run(TOOL)
