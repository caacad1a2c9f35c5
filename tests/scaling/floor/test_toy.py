"""A small ladder on toy data: losses above the floor, a table that `fit` takes, and going on after a stop."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import tools.scaling
from dit.config import ConfigError
from dit.evals import plane
from dit.outputs import OutputError
from dit.scaling.floor import toy
from dit.scaling.floor.toy import ToyLadder, predictions, run_toy
from dit.scaling.laws.fitting import Order, fit_file
from dit.scaling.laws.law import Law
from dit.scaling.laws.table import Runs
from tests.commands import call

SMALL = ("--widths=4,6,8,12", "--steps=2,4,8,16", "--seeds=0")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(toy, "EVALUATED", 2**12)
    monkeypatch.setattr(toy, "FLOOR_SAMPLES", 2**11)


def test_a_ladder_goes_on_and_its_table_is_fitted(quick, tmp_path, capsys, monkeypatch) -> None:
    words = (f"--out={tmp_path}", *SMALL)
    trained, fit = [], plane.fit

    def counted(pairs, budget, progress):
        trained.append(budget)
        return fit(pairs, budget, progress)

    def interrupted(runs):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy.plane, "fit", counted)
    with monkeypatch.context() as at_the_end:
        at_the_end.setattr(toy, "predictions", interrupted)
        assert call(tools.scaling.toy, *words) == 130
    assert (tmp_path / "runs.csv").is_file()
    assert call(tools.scaling.toy, *words) == 0
    assert len(trained) == 16
    first = (tmp_path / "runs.csv").read_bytes()
    found = json.loads((tmp_path / "toy.json").read_text())
    assert found["best"] > found["floor"]["loss"]
    assert "| fit |" in capsys.readouterr().out
    (tmp_path / "runs" / "w6-n8-s0.json").unlink()  # as if it had been stopped there
    (tmp_path / "toy.json").unlink()
    (tmp_path / "runs.csv").unlink()
    assert call(tools.scaling.toy, *words) == 0
    assert len(trained) == 17
    assert (tmp_path / "runs.csv").read_bytes() == first
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["loss"]) > found["floor"]["loss"] for row in rows)
    record = fit_file(Order(tmp_path / "runs.csv", floor="exact", bootstrap=100))
    assert pytest.approx(found["floor"]["loss"]) == record.law.E
    assert call(tools.scaling.toy, f"--out={tmp_path}", *SMALL[:2], "--seeds=1") == 1
    assert "is of another result" in capsys.readouterr().err


def test_predictions_of_a_law_are_exact(tmp_path) -> None:
    """On losses of a law whose E is the floor both laws find the largest rung, and the exact one that E."""
    law, rows = Law(2.0, 5.0, 30.0, 0.5, 0.6), []
    for params in (100, 200, 400, 800, 1600):
        for tokens in (1e4, 4e4, 1.6e5, 6.4e5, 2.56e6):
            rows.append({
                "run": f"{params}-{tokens}", "params": params, "tokens": tokens, "flops": 6 * params * tokens,
                "loss": law.loss(params, tokens), "floor": 2.0,
            })  # fmt: skip
    with (tmp_path / "runs.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = predictions(Runs.read(tmp_path / "runs.csv"))
    assert [row["runs"] for row in found] == [16, 9]
    assert [row["beyond"] for row in found] == pytest.approx([8, 64])
    for row in found:
        for kind in toy.KINDS:
            assert abs(row[kind]["excess_error"]) < 1e-3
        assert row["exact"]["E"] == 2.0
        assert row["measured"] == pytest.approx(law.loss(1600, 2.56e6))


@pytest.mark.parametrize("name", toy.PROBLEMS)
def test_problems_and_floors_have_the_same_names(name) -> None:
    assert name in toy.PLANE
    assert len(toy.PROBLEMS) == len(toy.PLANE)


def test_what_cannot_be_a_ladder_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="problem 'spiral'"):
        ToyLadder("spiral")
    with pytest.raises(ConfigError, match="widths"):
        ToyLadder(widths=(4, 4, 8))
    with pytest.raises(ConfigError, match="steps"):
        ToyLadder(steps=(0, 4, 8))
    (tmp_path / "runs.csv").write_text("mine")
    with pytest.raises(OutputError):
        run_toy(ToyLadder(), tmp_path)
    assert np.array_equal([p.name for p in tmp_path.iterdir()], ["runs.csv"])
