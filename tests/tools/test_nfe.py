"""tools/nfe.py: budgets become steps, figures are real distances, and nothing is drawn twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tools.nfe
from dit.config import ConfigError, from_dict
from dit.evals.budgets import most_steps
from dit.experiments.trained import Trained
from dit.sample.generate import SamplerSpec
from dit.sample.solve import SOLVERS
from tests.commands import call
from tests.datasets import Digits
from tests.train.runs import go, values

CPU = torch.device("cpu")
FEW = (
    "--reference=digits:test",
    "--floor=digits:train",
    "--num_samples=8",
    "--components=4",
    "--batch_size=8",
)


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    go(values(digits, folder, engine="local", train={"steps": 2}, checkpoint={"every": 2}))
    return folder


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "dopri5"])
@pytest.mark.parametrize("budget", [1, 2, 7])
def test_a_budget_is_used_up_and_never_passed(run: Path, name: str, budget: int) -> None:
    sampler = Trained.load(str(run), "ema", CPU).sampler(
        from_dict(SamplerSpec, {"solver": name}), {}, CPU, "fp32"
    )
    found = most_steps(sampler, budget)
    if found is None:
        assert (SOLVERS[name]().nfe(1) or 0) > budget
        return
    found.latents(torch.arange(1), torch.tensor([0]))
    assert found.tally.per_image()["nfe"] == found.nfe
    assert (found.nfe or 0) <= budget
    more = from_dict(SamplerSpec, {"solver": name, "num_steps": found.spec.num_steps + 1})
    beyond = Trained.load(str(run), "ema", CPU).sampler(more, {}, CPU, "fp32")
    assert (beyond.nfe or 0) > budget


def test_a_solver_that_chooses_its_steps_has_no_budget(run: Path) -> None:
    sampler = Trained.load(str(run), "ema", CPU).sampler(
        from_dict(SamplerSpec, {"solver": "dopri5"}), {}, CPU, "fp32"
    )
    with pytest.raises(ConfigError, match="chooses its own steps"):
        most_steps(sampler, 8)


def test_names_of_runs() -> None:
    assert tools.nfe.named("flow=runs/a,runs/b") == {"flow": "runs/a", "runs/b": "runs/b"}
    with pytest.raises(ConfigError, match="two runs have one name"):
        tools.nfe.named("a=x,a=y")


def test_the_table_its_picture_and_going_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures" / "nfe"
    words = (f"flow={run}", f"--out={out}", *FEW, "--solvers=euler,heun")
    assert call(tools.nfe.main, *words, "--nfe=1,3") == 0
    held = json.loads(out.with_name("nfe.json").read_text())
    rows = {(r["solver"], r.get("budget")): r for r in held["rows"]}
    assert set(rows) == {("real images", None), ("euler", 1), ("euler", 3), ("heun", 3)}
    assert rows["heun", 3]["num_steps"] == 1  # of two evaluations each
    assert all(np.isfinite(r["frechet"]) and r["frechet"] > 0 for r in held["rows"])
    assert rows["real images", None]["frechet"] < min(rows["euler", 3]["frechet"], rows["heun", 3]["frechet"])
    table = out.with_name("nfe.md").read_text()
    best = min(rows["euler", 3]["frechet"], rows["heun", 3]["frechet"])
    assert f"**{best:.2f}**" in table
    assert held["hash"] in table
    assert table in capsys.readouterr().out
    with Image.open(out.with_name("nfe.png")) as picture:
        assert min(picture.size) > 300

    changed = {**held, "rows": [{**row, "frechet": 123.0} for row in held["rows"]]}
    out.with_name("nfe.json").write_text(json.dumps(changed))
    assert call(tools.nfe.main, *words, "--nfe=1,3,4") == 0
    again = json.loads(out.with_name("nfe.json").read_text())["rows"]
    assert [r["frechet"] for r in again[: len(held["rows"])]] == [123.0] * len(held["rows"])  # not drawn anew
    assert {(r["solver"], r["budget"]) for r in again[len(held["rows"]) :]} == {("euler", 4), ("heun", 4)}

    assert call(tools.nfe.main, *words, "--nfe=1", "--cfg_scale=2") == 1
    assert "protocol.cfg_scale: 1.0 there, 2.0 now" in capsys.readouterr().err
    assert call(tools.nfe.main, *words, "--nfe=1", "--weights=model") == 1
    assert "protocol.weights: 'ema' there, 'model' now" in capsys.readouterr().err
    assert call(tools.nfe.main, *words, "--nfe=1,x") == 1
    assert "whole numbers above 0" in capsys.readouterr().err
    out.with_name("nfe.json").write_text("{")
    assert call(tools.nfe.main, *words, "--nfe=1") == 1
    assert "is not JSON" in capsys.readouterr().err
    assert call(tools.nfe.main, *words, "--nfe=1", "--weights=model", "--overwrite") == 0
    rows = json.loads(out.with_name("nfe.json").read_text())
    assert rows["protocol"]["weights"] == "model"
    assert "flow: weights: model of step 2" in capsys.readouterr().out
    assert not any(r["frechet"] == 123.0 for r in rows["rows"])


def test_a_table_without_its_figures_is_not_replaced(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "nfe.md").write_text("mine")
    assert call(tools.nfe.main, run, f"--out={tmp_path / 'nfe'}", *FEW) == 1
    assert "nfe.md is there already, and nothing says how it was made" in capsys.readouterr().err
    assert (tmp_path / "nfe.md").read_text() == "mine"


def test_images_that_are_none_have_no_figure(run: Path, tmp_path: Path, capsys) -> None:
    words = (f"flow={run}", f"--out={tmp_path / 'nfe'}", *FEW, "--solvers=euler", "--cfg_scale=1e38")
    assert call(tools.nfe.main, *words, "--nfe=1,2") == 1
    said = capsys.readouterr().err
    assert "flow, euler in 2 evaluations: no figure. image 0 (class 0)" in said
    assert "lower cfg_scale" in said
    assert "holds no figure of drawn images" in said
    (row,) = json.loads((tmp_path / "nfe.json").read_text())["rows"]
    assert row["solver"] == "real images"
