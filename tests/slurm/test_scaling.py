"""A whole scaling experiment as job arrays: killed in the middle and started again, it ends as an undisturbed one."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from dit.scaling.arrays import submit
from dit.scaling.collecting import collect, write_table
from dit.scaling.laws.fitting import Order, fit_file
from dit.scaling.plan import Plan, PlannedRun
from dit.scaling.planned import plan_into
from dit.scaling.running import Orders, run_plan
from dit.scaling.states import RunState, last_step, states_of
from tests.datasets import Digits
from tests.scaling.experiments import SIZES, ForkedRun, spec
from tests.slurm.cluster import Cluster, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

OPTIONS = "--ntasks=1 --time=10"
KEYS = {
    "ladder": {"sizes": [*SIZES, {"width": 24, "depth": 1, "heads": 2}]},
    "samples_per_param": [0.1, 0.6],  # trunks of 212, 453 and 805 steps
    "training": {"checkpoint": {"every": 1000}},
}


@pytest.fixture
def client(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, to which this process's commands go."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)  # where the arrays' own files go
    cluster.wait_idle()
    return cluster


def results(out: Path, plan: Plan) -> tuple[bytes, str]:
    """The table, and what is fitted to it."""
    write_table(collect(out, plan), out / "runs.csv")
    fitted = fit_file(Order(out / "runs.csv", bootstrap=100)).as_json()
    return (out / "runs.csv").read_bytes(), json.dumps(fitted)


def test_arrays_that_are_killed_and_started_again_give_the_same_fit(
    client: Cluster, digits: Digits, tmp_path: Path
) -> None:
    quiet, out = tmp_path / "quiet", tmp_path / "out"
    plan = plan_into(spec(digits, quiet, **KEYS))
    run_plan(quiet, plan, Orders(starter=ForkedRun))

    plan = plan_into(spec(digits, out, **KEYS))
    trunks, branches = submit(out, plan, OPTIONS)
    longest = max((run for run in plan.runs if run.trunk is None), key=lambda run: run.steps)
    element = f"{trunks}_{1 + [run for run in plan.runs if run.trunk is None].index(longest)}"
    reaches(out, longest, 20)
    client.signal(element, signal.SIGUSR1)  # it saves, and queues again by itself
    client.wait(element, "RUNNING", "COMPLETED", restarts=1)
    assert client.job(f"{branches}_1")["JobState"] == "PENDING"  # a requeued trunk is not an ended one
    client.call("scancel", "--signal=KILL", trunks)
    client.call("scancel", trunks, branches)
    client.wait(element, "CANCELLED", "FAILED")
    client.wait_idle()
    assert not any(state.is_complete for state in states_of(out, plan) if state.run == longest)

    again = submit(out, plan, OPTIONS)
    assert len(again) == 2
    for array, name in zip(again, ("sweep-trunks.txt", "sweep-branches.txt"), strict=True):
        for i in range(len((out / name).read_text().splitlines())):
            client.wait(f"{array}_{i + 1}", "COMPLETED")
    assert all(state.is_complete for state in states_of(out, plan))
    assert results(out, plan) == results(quiet, plan)
    assert submit(out, plan, OPTIONS) == []


def reaches(out: Path, run: PlannedRun, step: int) -> None:
    folder = RunState(out, run).folder
    until(lambda: last_step(folder) >= step, 120, lambda: "\n".join(map(str, sorted(out.rglob("*")))))
