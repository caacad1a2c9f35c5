"""Running a plan on a SLURM cluster: two job arrays, of trunks and of the branches that wait for them."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dit.files import write_atomically
from dit.progress import say
from dit.scaling.configs import config_file, run_folder
from dit.scaling.plan import Plan, PlannedRun
from dit.scaling.planned import ScalingError
from dit.scaling.running import chosen
from dit.scaling.starting import ROOT, no_runner
from dit.scaling.states import RunState

TRUNKS, BRANCHES = "sweep-trunks.txt", "sweep-branches.txt"


def sweep_file(out: Path, name: str, runs: Sequence[PlannedRun]) -> Path:
    """Write the runs as launch/sweep.sh takes them, a line each."""
    lines = [
        f"{shlex.quote(str(config_file(out, run.name)))} --run_dir={shlex.quote(str(run_folder(out, run.name)))}\n"
        for run in runs
    ]
    write_atomically(out / name, "".join(lines).encode())
    return out / name


def submit(out: Path, plan: Plan, options: str, only: Sequence[str] = ()) -> list[str]:
    """Submit what is not complete as job arrays, and give their numbers: trunks, then branches.

    options: of sbatch, as one text. The second array waits until every element of the first has ended: a branch whose
    trunk failed then says so, and the others go on. With DRY_RUN=1 launch/sweep.sh prints, and nothing is submitted.
    Raises ScalingError where sbatch refuses.
    """
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise ScalingError(f"--slurm={options}: {error}; expected options of sbatch, as in a shell") from None
    states = {run.name: RunState(out, run) for run in chosen(out, plan, only)}
    left = [s.run for s in states.values() if not s.is_complete and not s.is_running]
    first = [run for run in left if run.trunk is None]
    names = {run.name for run in first}
    then = [run for run in left if run.trunk in names or (run.trunk and states[run.name].can_begin)]
    for run in left:
        if run not in first and run not in then:
            say(f"{run.name} is left out: {run.trunk} runs now, and has not saved step {run.branch_step} yet")
    if not first and not then:
        say("there is nothing to submit: every run is complete, or running")
        return []
    jobs: list[str] = []
    with no_runner(out, [run.name for run in (*first, *then)]):
        for name, part in ((TRUNKS, first), (BRANCHES, then)):
            if part:
                waits = [f"--dependency=afterany:{jobs[-1]}"] if jobs and jobs[-1] else []
                file = sweep_file(out, name, part)
                jobs.append(_sweep([*words, *waits], file))
                say(f"{len(part)} runs of {file} are job array {jobs[-1] or '(dry run)'}")
    return jobs


def _sweep(options: Sequence[str], file: Path) -> str:
    """Hand a file to launch/sweep.sh: the array's number, "" for a dry run."""
    command = [str(ROOT / "launch" / "sweep.sh"), "--parsable", *options, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ScalingError(
            f"{shlex.join(command)} ended with status {done.returncode}: {done.stderr.strip()}"
        )
    if os.environ.get("DRY_RUN", "0") != "0":
        say(done.stdout.rstrip())
        return ""
    return done.stdout.strip().split(";")[0]
