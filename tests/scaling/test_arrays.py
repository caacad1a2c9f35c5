"""Job arrays: the files of runs, and what sbatch would be told (DRY_RUN=1); a real SLURM runs them in tests/slurm."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from dit.scaling.arrays import submit
from dit.scaling.planned import ScalingError, plan_into
from dit.scaling.states import RunState
from tests.datasets import Digits
from tests.scaling.conftest import Done
from tests.scaling.experiments import spec


@pytest.fixture(autouse=True)
def _only_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRY_RUN", "1")


def test_trunks_and_branches_are_two_arrays(
    digits: Digits, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two words"
    plan = plan_into(spec(digits, out))
    assert submit(out, plan, "--nodes=1 --comment='a b'") == ["", ""]
    for kind, name in (("trunk", "sweep-trunks.txt"), ("branch", "sweep-branches.txt")):
        lines = [shlex.split(line) for line in (out / name).read_text().splitlines()]
        runs = [run.name for run in plan.runs if run.kind == kind]
        assert lines == [[f"{out}/plan/{run}.yaml", f"--run_dir={out}/runs/{run}"] for run in runs]
    said = capfd.readouterr().out
    assert said.count("sbatch --array=1-2") == 2
    assert "--comment=a\\ b" in said


def test_what_is_complete_is_not_submitted(
    done: Done, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit(done.out, done.plan, "") == []
    assert "nothing to submit" in capfd.readouterr().out
    out = tmp_path / "out"
    shutil.copytree(done.out, out)
    branch = done.plan.runs[1]
    shutil.rmtree(RunState(out, branch).folder)
    assert submit(out, done.plan, "") == [""]  # its trunk is there
    assert not (out / "sweep-trunks.txt").exists()
    assert branch.name in (out / "sweep-branches.txt").read_text()


def test_options_that_the_shell_would_not_read_are_refused(done: Done) -> None:
    with pytest.raises(ScalingError, match="No closing quotation; expected options of sbatch"):
        submit(done.out, done.plan, "--comment='a")


def test_what_the_launcher_refuses_is_passed_on(digits: Digits, tmp_path: Path) -> None:
    plan = plan_into(spec(digits, tmp_path))
    with pytest.raises(ScalingError, match="the array is FILE's runs"):
        submit(tmp_path, plan, "--array=1-3")
