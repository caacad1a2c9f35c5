"""The commands of tools/scaling.py that plan, run and tell, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.commands import call
from tests.datasets import Digits
from tests.scaling.conftest import Done
from tests.scaling.experiments import spec_values
from tools.scaling import TOOL


def tool(*words: object) -> int:
    return call(TOOL, *words)  # type: ignore[arg-type]


@pytest.fixture
def file(digits: Digits, tmp_path: Path) -> Path:
    place = tmp_path / "spec.yaml"
    place.write_text(yaml.safe_dump(spec_values(digits, tmp_path / "out")))
    return place


def test_plan_and_status_of_a_spec(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool("status", file) == 1
    assert "plan it first" in capsys.readouterr().err
    assert tool("plan", file) == 0
    said = capsys.readouterr().out
    assert "4 runs" in said
    assert "w16d1-r0.04-s0" in said
    assert (tmp_path / "out" / "plan.csv").is_file()
    assert tool("status", file) == tool("status", tmp_path / "out") == 0
    assert "0 of 4 runs complete" in capsys.readouterr().out
    assert tool("plan", file, f"--out={tmp_path / 'there'}") == 0
    assert (tmp_path / "there" / "plan.json").is_file()


def test_run_and_collect_of_an_experiment_that_is_complete(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool("run", done.out) == 0
    assert "complete already: 4 runs" in capsys.readouterr().out
    assert tool("collect", done.out, f"--table={tmp_path / 'a.csv'}") == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 5
    assert "4 of 4 runs, held_out_loss, protocol " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--jobs=0"], "jobs must be at least 1"),
        (["run", "--only=w1"], "there is no run w1"),
        (["collect", "--metric=fid"], "has no fid of any run"),
        (["run", "--slurm=--x='"], "expected options of sbatch"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_1(
    done: Done, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(words[0], done.out, *words[1:]) == 1
    found = capsys.readouterr().err
    assert said in found
    assert "Traceback" not in found
