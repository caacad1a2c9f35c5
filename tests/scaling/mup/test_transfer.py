"""The study of rates over widths: which runs it has, that it goes on, and what it writes."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dit.config import ConfigError, from_dict, to_dict
from dit.configfile import load
from dit.experiments.diffusion import Experiment
from dit.model.parametrization import MuP, Standard
from dit.outputs import OutputError
from dit.scaling.configs import config_file
from dit.scaling.mup.transfer import FILES, Grid, Study, run_study
from dit.scaling.running import Orders, Start
from tests.commands import Forked
from tests.datasets import Digits
from tests.train.runs import values

GRID = Grid(widths=(32, 64), lrs=(1e-3, 4e-3, 1.6e-2), seeds=(0,))


def configured(digits: Digits, **sections: Any) -> Experiment:
    given = values(
        digits,
        Path("unused"),
        model={"size": None, "width": 32, "depth": 1, "heads": 1},
        data={"val": str(digits.moments_val)},
        val={"samples": 32},
        engine="local",
        train={"steps": 2, "micro_batch": None},
    )
    return from_dict(Experiment, {**given, "sample": {"every": 1}, **sections})


def forked(start: Start) -> Forked:
    return Forked("train.py", start.config)


def test_at_the_base_width_runs_are_shared_and_elsewhere_each_parametrization_has_its_own(
    digits: Digits,
) -> None:
    study = Study(configured(digits), GRID, Path("study"))
    names = [cell.name for cell in study.cells]
    assert len(names) == len(set(names)) == 3 + 2 * 3
    assert study.cell("mup", 32, 1e-3, 0) == study.cell("standard", 32, 1e-3, 0)
    wide = {kind: study.config(study.cell(kind, 64, 4e-3, 0)) for kind in ("standard", "mup")}
    assert wide["mup"].model == replace(wide["standard"].model, parametrization=MuP(base_width=32))
    assert (wide["mup"].model.width, wide["mup"].model.heads) == (64, 2)
    base = study.config(study.cell("mup", 32, 4e-3, 0))
    assert base.model.parametrization == Standard()
    assert (base.optim.lr, base.seed, base.val.every, base.sample.every) == (4e-3, 0, 2, 0)


def test_a_base_width_beside_the_grid_shares_nothing(digits: Digits) -> None:
    study = Study(configured(digits), replace(GRID, base_width=48), Path("study"))
    assert len(study.cells) == 2 * 2 * 3
    assert study.config(study.cell("mup", 32, 1e-3, 0)).model.parametrization == MuP(base_width=48)


def test_the_plan_is_whole_configurations_and_other_ones_are_refused(digits: Digits, tmp_path: Path) -> None:
    study = Study(configured(digits), GRID, tmp_path / "study")
    plan = study.plan()
    for cell, run in zip(study.cells, plan.runs, strict=True):
        assert load(Experiment, str(config_file(study.out, run.name)), {}) == study.config(cell)
        assert run.flops == 2 * 32 * study.config(cell).cost(study.cfg.data.open().manifest).training_flops
    more = replace(study, grid=replace(GRID, seeds=(0, 1), widths=(32, 64, 96)))
    assert len(more.plan().runs) > len(plan.runs)
    longer = from_dict(Experiment, {**to_dict(study.cfg), "train": {**to_dict(study.cfg.train), "steps": 3}})
    with pytest.raises(OutputError, match=r"config\.train\.steps"):
        replace(study, cfg=longer).plan()


def test_rates_are_compared_by_held_out_losses_alone(digits: Digits, tmp_path: Path) -> None:
    cfg = configured(digits)
    study = Study(replace(cfg, data=replace(cfg.data, val=None)), GRID, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.val"):
        study.plan()


@pytest.mark.parametrize(("given", "complaint"), [
    ({"widths": (64,)}, "two or more widths"),
    ({"lrs": (1e-3, 2e-3)}, "three or more lrs"),
    ({"lrs": (1e-3, 2e-3, 4e-3, 4e-3)}, "lrs must be there, each once"),
    ({"lrs": (0.0, 1e-3, 2e-3)}, "lrs"),
    ({"seeds": ()}, "seeds"),
])  # fmt: skip
def test_what_is_no_grid_is_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Grid(**given)


@pytest.mark.slow
def test_a_study_is_run_goes_on_and_is_told(digits: Digits, tmp_path: Path) -> None:
    """Nine runs of two steps; then with one more rate, of which there are three."""
    study = Study(configured(digits), GRID, tmp_path / "study")
    said = run_study(study, Orders(starter=forked))
    assert "mup, width 64" in said
    assert "Verdict: not decided" in said  # after two steps the highest rate is the best
    ends = {path.parent.name: path.stat().st_mtime_ns for path in study.out.glob("runs/*/held_out.jsonl")}
    assert len(ends) == 9
    more = replace(study, grid=replace(GRID, lrs=(*GRID.lrs, 0.064)))
    run_study(more, Orders(starter=forked))
    after = {path.parent.name: path.stat().st_mtime_ns for path in study.out.glob("runs/*/held_out.jsonl")}
    assert {name: after[name] for name in ends} == ends
    assert len(after) == 12
    with (study.out / FILES[1]).open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * 2 * 4
    assert all(float(row["loss"]) > 0 for row in rows)
    shared = {row["loss"] for row in rows if (row["width"], row["lr"]) == ("32", "0.001")}
    assert len(shared) == 1
    record = json.loads((study.out / FILES[3]).read_text())
    assert record["verdict"][-1].startswith("Verdict:")
