"""An ablation's runs: equal FLOPs, two rounds, and the whole of it on a few steps."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dit.config import ConfigError
from dit.configfile import load
from dit.errors import Notice
from dit.experiments.diffusion import Experiment
from dit.scaling.ablation.running import Way, as_plan, run_ablation
from dit.scaling.ablation.spec import load_ablation
from dit.scaling.ablation.study import FILES, Ablation, Rate, Variant
from dit.scaling.arrays import TRUNKS
from dit.scaling.configs import config_file
from dit.scaling.planned import ScalingError
from dit.scaling.running import Orders, Start
from tests.commands import Forked
from tests.datasets import Digits
from tests.scaling.ablation.ablations import ablation_values, spec_of
from tests.scaling.ablation.test_spec import saved


def test_runs_of_a_budget_take_equal_flops_auxiliary_passes_counted(digits: Digits, tmp_path: Path) -> None:
    ablation = Ablation(spec_of(digits, tmp_path, budgets=[1e10]))
    plain, guided = Variant("plain", 1e10), Variant("guided", 1e10)
    assert ablation.cost(guided).training_flops * 3 == ablation.cost(plain).training_flops * 4
    assert ablation.steps(guided) == pytest.approx(ablation.steps(plain) * 3 / 4, abs=1)
    for run in ablation.tuning().runs:
        step = run.flops / run.steps
        assert abs(run.flops - 1e10) <= step / 2
    with pytest.raises(ConfigError, match=r"1e\+06 FLOPs are 0 steps of plain"):
        Ablation(spec_of(digits, tmp_path, budgets=[1e6])).tuning()


def test_rates_are_chosen_on_one_seed_and_reported_on_others(digits: Digits, tmp_path: Path) -> None:
    ablation = Ablation(spec_of(digits, tmp_path / "out", budgets=[1e9, 2e9]))
    tuning = ablation.tuning()
    assert len({run.name for run in tuning.runs}) == len(tuning.runs) == 4 * 2 * 2
    assert {run.seed for run in tuning.runs} == {0}
    assert len(ablation.tuning(["rms"]).runs) == 4
    rates = {v: Rate(4e-3) for v in ablation.variants}
    report = ablation.report(rates, ["plain", "both"])
    assert len(report.runs) == 2 * 2 * 2
    assert {(run.seed, run.lr) for run in report.runs} == {(1, 4e-3), (2, 4e-3)}
    for run in report.runs:
        variant = Variant(run.size, run.budget)
        written = load(Experiment, str(config_file(ablation.out, run.name)), {})
        assert written.train.steps == run.steps
        assert written.val.every == run.steps
        assert (written.sample.every, written.evaluate.every) == (0, 0)
        assert written.objective == ablation.configs[variant.change].objective


def test_figures_of_images_are_of_the_reported_seeds_alone(digits: Digits, tmp_path: Path) -> None:
    training = {"evaluate": {"reference": "digits:test", "image_size": 16}}
    ablation = Ablation(spec_of(digits, tmp_path, training=training))
    variant = ablation.variants[0]
    assert ablation.config(variant, 1e-3, 0).evaluate.every == 0
    assert ablation.config(variant, 1e-3, 1).evaluate.every == ablation.steps(variant)


def test_one_rate_needs_no_round_of_its_own(digits: Digits, tmp_path: Path) -> None:
    ablation = Ablation(spec_of(digits, tmp_path, lrs=[1e-3]))
    assert not ablation.tuning().runs
    assert {rate.lr for rate in ablation.rates().values()} == {1e-3}


def test_what_is_planned_is_told(digits: Digits, tmp_path: Path) -> None:
    told = as_plan(Ablation(spec_of(digits, tmp_path / "out")))
    assert "16 runs: for each line 2 to choose the rate and 2 that are reported; 3.2e+10 FLOPs" in told
    assert not (tmp_path / "out").exists()


def test_a_change_that_there_is_none_of_is_named(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no change rsm; did you mean rms"):
        run_ablation(Ablation(spec_of(digits, tmp_path)), Way(None, changes=("rsm",)))


def test_unlike_evaluations_are_told_before_anything_is_run(digits: Digits, tmp_path: Path) -> None:
    """Heun's method takes its last step to clean data, where a straight path ends and a discrete one does not."""
    changes = {"eps": {"objective": {"path": "ddpm", "prediction": "eps"}}}
    drawn = {"reference": "digits:test", "solver": "heun", "num_steps": 4}
    heun = Ablation(spec_of(digits, tmp_path, changes=changes, training={"evaluate": drawn}))
    with pytest.warns(Notice, match="8 with plain, .*7 with eps"):
        as_plan(heun)
    drawn["solver"] = "unipc"
    unipc = Ablation(spec_of(digits, tmp_path, changes=changes, training={"evaluate": drawn}))
    assert {unipc.evaluations(name) for name in unipc.configs} == {4}
    as_plan(unipc)  # a Notice would be an error here


def test_a_cluster_gets_one_round_after_the_other(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRY_RUN", "1")  # launch/sweep.sh prints
    ablation = Ablation(spec_of(digits, tmp_path / "out"))
    said = run_ablation(ablation, Way(None, slurm="--time=1", changes=("rms",)))
    assert said.startswith("2 runs of rates to go: give the same command")
    lines = (ablation.out / TRUNKS).read_text().splitlines()
    for lr, line in zip((1e-3, 4e-3), lines, strict=True):
        assert f"{Variant('rms', 2e9).run(lr, 0)}.yaml" in line


def forked(start: Start) -> Forked:
    return Forked("train.py", start.config)


def ended(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/held_out.jsonl")}


SMALL: dict[str, Any] = {
    "changes": {
        "plain": {},
        "swiglu": {"model": {"block": {"mlp": "swiglu"}}},
        "eps": {"objective": {"path": "ddpm", "prediction": "eps"}},
    },
    "baselines": ["plain"],
    "lrs": [1e-3, 4e-3],
    "budgets": [4e8],
}


@pytest.mark.slow
def test_an_ablation_is_run_goes_on_and_is_told(digits: Digits, tmp_path: Path) -> None:
    values = {**ablation_values(digits, tmp_path / "out"), **SMALL}
    values["training"]["evaluate"] = {
        "reference": "digits:test", "image_size": 16, "num_samples": 40, "solver": "euler", "num_steps": 2,
        "metrics": "frechet", "features": {"name": "pixels", "components": 4},
    }  # fmt: skip
    ablation = Ablation(load_ablation(saved(tmp_path, values)))
    way = Way(Orders(starter=forked))
    said = run_ablation(ablation, way)
    ends = ended(ablation.out)
    assert len(ends) == 3 * 2 + 3 * 2
    assert "| plain (baseline) |" in said
    assert "Against plain" in said
    with (ablation.out / FILES[1]).open() as lines:
        rows = list(csv.DictReader(lines))
    figures = {(row["figure"], row["change"], row["seed"]) for row in rows}
    for figure in ("held_out_loss", "velocity_error", "velocity_error_q4", "frechet (pixels)"):
        assert {(figure, name, seed) for name in SMALL["changes"] for seed in ("1", "2")} <= figures
    compared = json.loads((ablation.out / FILES[3]).read_text())["compared"]
    of = {(row["figure"], row["change"]): row["verdict"] for row in compared}
    assert ("held_out_loss", "swiglu") in of
    assert ("held_out_loss", "eps") not in of  # another loss
    assert {("velocity_error", "eps"), ("frechet (pixels)", "eps")} <= set(of)
    assert (ablation.out / FILES[0]).is_file()

    # again: nothing is run, or measured; then with one seed more
    evaluations = {path: path.read_bytes() for path in ablation.out.glob("runs/*/evaluations.jsonl")}
    assert run_ablation(ablation, way) == said
    assert ended(ablation.out) == ends
    assert {path: path.read_bytes() for path in evaluations} == evaluations
    more = Ablation(replace(ablation.spec, seeds=(1, 2, 3)))
    run_ablation(more, way)
    assert {name: end for name, end in ended(more.out).items() if name in ends} == ends
    assert len(ended(more.out)) == len(ends) + 3

    # a change is not given another meaning where it has been run
    values["changes"]["swiglu"] = {"model": {"block": {"norm": "rms"}}}
    with pytest.raises(ScalingError, match=r"model\.block"):
        run_ablation(Ablation(load_ablation(saved(tmp_path, values))), Way(None))


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_told(digits: Digits, tmp_path: Path) -> None:
    values = {**ablation_values(digits, tmp_path / "out"), **SMALL, "lrs": [1e-3], "seeds": [1, 2]}
    ablation = Ablation(load_ablation(saved(tmp_path, values)))
    bad = Variant("eps", 4e8).run(1e-3, 2)

    def starter(start: Start) -> Forked:
        return Forked("train.py", "nothing.yaml") if start.run.name == bad else forked(start)

    said = run_ablation(ablation, Way(Orders(starter=starter)))
    assert f"Missing, and no part of any mean: {bad} (not begun)" in said
    assert "| eps |" in said
