"""A plan on disk: its configs are those of whole runs, and an experiment may grow and not change."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from dit.config import ConfigError
from dit.configfile import load
from dit.errors import Notice
from dit.experiments.diffusion import Experiment
from dit.outputs import OutputError
from dit.scaling.collecting import collect
from dit.scaling.plan import Plan
from dit.scaling.planned import ScalingError, as_table, opened, plan_into, read_plan, spec_of
from dit.scaling.running import Orders, run_plan
from dit.train.optim import WarmupStableDecay
from tests.datasets import Digits
from tests.scaling.conftest import Done
from tests.scaling.experiments import SIZES, ForkedRun, spec


@pytest.fixture
def begun(done: Done, tmp_path: Path) -> Path:
    """A copy of the experiment that was run, elsewhere: what its runs say of their folder is of the first place."""
    shutil.copytree(done.out, tmp_path / "out")
    return tmp_path / "out"


def written(digits: Digits, out: Path, **keys: Any) -> Plan:
    return plan_into(spec(digits, out, **keys))


def test_each_run_has_a_whole_config(digits: Digits, tmp_path: Path) -> None:
    plan = written(digits, tmp_path, decay=0.25)
    for run in plan.runs:
        cfg = load(Experiment, tmp_path / "plan" / f"{run.name}.yaml")
        assert (cfg.train.steps, cfg.train.global_batch, cfg.seed) == (run.steps, run.batch, run.seed)
        assert (cfg.model.width, cfg.model.depth, cfg.model.heads) == (run.width, run.depth, run.heads)
        assert cfg.optim.lr == run.lr
        assert cfg.folder == tmp_path / "runs" / run.name
        schedule = cfg.optim.schedule
        assert isinstance(schedule, WarmupStableDecay)
        if run.trunk is None:
            parted = [branch.branch_step for branch in plan.branches(run.name)]
            assert cfg.init.branch is None
            assert list(cfg.checkpoint.at) == [
                *parted,
                schedule.stable(run.steps),
            ]  # its own, for longer runs
        else:
            saved = f"runs/{run.trunk}/checkpoints/step-{run.branch_step:08d}"
            assert cfg.init.branch == str(tmp_path / saved)
            assert schedule.stable(run.steps) == run.branch_step  # the last step at the trunk's own rate


def test_the_held_out_loss_is_taken_at_the_end_in_any_case(digits: Digits, tmp_path: Path) -> None:
    for every, wanted in ((0, None), (3, 3)):
        plan = written(digits, tmp_path, training={"val": {"every": every}})
        for run in plan.runs:
            cfg = load(Experiment, tmp_path / "plan" / f"{run.name}.yaml")
            assert cfg.val.every == (wanted or run.steps)


def test_a_plan_is_read_as_it_was_written(digits: Digits, tmp_path: Path) -> None:
    wanted = spec(digits, tmp_path)
    plan = plan_into(wanted)
    assert read_plan(tmp_path) == plan
    assert spec_of(plan) == wanted
    lines = (tmp_path / "plan.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["name", *(run.name for run in plan.runs)]
    assert opened(str(tmp_path)) == (tmp_path, plan)


def test_the_table_says_what_it_counts(digits: Digits, tmp_path: Path) -> None:
    plan = written(digits, tmp_path, min_steps=12)
    said = as_table(plan, tmp_path, "a CPU", 1)
    assert "w16d1-r0.02-s0: 7 steps of 16 samples" in said
    assert "2 per multiply-add" in said
    assert "blocks and the output layer" in said
    assert "branching saves" in said
    whole = as_table(written(digits, tmp_path, branching=False), tmp_path, "a CPU", 1)
    assert "branching saves" not in whole


def test_before_anything_has_begun_all_may_change(digits: Digits, tmp_path: Path) -> None:
    written(digits, tmp_path)
    plan = written(digits, tmp_path, samples_per_param=[0.08], training={"optim": {"warmup": 0}})
    assert {file.stem for file in (tmp_path / "plan").glob("*.yaml")} == {run.name for run in plan.runs}


# --- once runs have begun --------------------------------------------------------------------------------------


def test_an_experiment_may_grow(digits: Digits, begun: Path) -> None:
    larger = [*SIZES, {"width": 48, "depth": 1, "heads": 4}]
    more = {"ladder": {"sizes": larger}, "more_seeds": [{"seeds": [1], "sizes": ["w16d1"]}]}
    before = read_plan(begun)
    plan = written(digits, begun, **more)
    assert [plan[run.name] for run in before.runs] == list(before.runs)
    assert len(plan.runs) == len(before.runs) + 4


LONGER = {"samples_per_param": [0.02, 0.04, 0.08]}


def test_longer_runs_branch_from_the_trunk_there_is(digits: Digits, begun: Path) -> None:
    """Where its decay began."""
    plan = written(digits, begun, **LONGER)
    run, trunk = plan["w16d1-r0.08-s0"], plan["w16d1-r0.04-s0"]
    assert (trunk.kind, run.kind, run.trunk, run.branch_step) == ("trunk", "branch", trunk.name, 11)
    assert (trunk.steps, run.steps) == (14, 28)
    assert run.own_flops == pytest.approx(run.flops * (28 - 11) / 28)


@pytest.mark.slow  # two more runs
def test_longer_runs_are_those_from_their_start(digits: Digits, begun: Path, tmp_path: Path) -> None:
    """To the last digit."""
    plans = {begun: written(digits, begun, **LONGER)}
    plans[tmp_path / "apart"] = written(digits, tmp_path / "apart", branching=False, **LONGER)
    found = []
    for out, plan in plans.items():
        run_plan(out, plan, Orders(only=["w16d1-r0.08-s0"], starter=ForkedRun))
        found.append({row["run"]: row["loss"] for row in collect(out, plan).rows}["w16d1-r0.08-s0"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lr": {"at": 3e-3}}, r"w16d1-r0.04-s0:\n  optim.lr: 0.002 there, 0.003 now"),
        ({"training": {"train": {"global_batch": 8}}}, r"train.global_batch: 16 there, 8 now"),
        ({"decay": 0.5}, r"optim.schedule.decay: 0.2 there, 0.5 now"),
        ({"training": {"val": {"samples": 16}}}, r"w16d1-r0.02-s0:\n  val.samples: 32 there, 16 now"),
        ({"samples_per_param": [0.04]}, r"w16d1-r0.02-s0 has begun, and is not planned any more"),
        ({"samples_per_param": [0.02, 0.03, 0.04]}, r"step 8, which that has passed \(step 14\) without keeping a"),
    ],
)  # fmt: skip
def test_runs_that_have_begun_do_not_change(
    digits: Digits, begun: Path, keys: dict[str, Any], words: str
) -> None:
    before = {
        file: file.read_bytes() for file in [*begun.glob("plan*"), *begun.glob("plan/*")] if file.is_file()
    }
    with pytest.raises(ScalingError, match=words):
        written(digits, begun, **keys)
    assert {file: file.read_bytes() for file in before} == before


def test_data_may_be_moved_and_not_replaced(digits: Digits, begun: Path, tmp_path: Path) -> None:
    """Neither those that are trained on nor those that the loss is of."""
    for key, there, other in (
        ("path", digits.moments, digits.moments_val),
        ("val", digits.moments_val, digits.moments),
    ):
        shutil.copytree(there, tmp_path / key)
        written(digits, begun, training={"data": {key: str(tmp_path / key)}})
        before = (begun / "plan.json").read_bytes()
        with pytest.raises(ScalingError, match=r"trained on other data|data.val: .* there"):
            written(digits, begun, training={"data": {key: str(other)}})
        assert (begun / "plan.json").read_bytes() == before


def test_data_that_were_replaced_in_place_are_noticed(digits: Digits, begun: Path, tmp_path: Path) -> None:
    """By whoever goes on with the folder, too; where they are gone it is planned without them."""
    place = tmp_path / "data"
    shutil.copytree(digits.moments, place)
    keys: dict[str, Any] = {"training": {"data": {"path": str(place)}}}
    written(digits, begun, **keys)
    assert opened(str(begun), replan=True)[0] == begun
    shutil.rmtree(place)
    shutil.copytree(digits.moments_val, place)
    for again in (lambda: written(digits, begun, **keys), lambda: opened(str(begun), replan=True)):
        with pytest.raises(
            ScalingError, match=r"w16d1-r0.04-s0, .*: trained on other data than .*/data has now"
        ):
            again()
    assert opened(str(begun))[0] == begun  # to look at
    shutil.rmtree(place)
    assert opened(str(begun), replan=True)[0] == begun


def test_keys_of_training_that_the_plan_decides_are_named(digits: Digits, tmp_path: Path) -> None:
    training = {"optim": {"lr": 0.5, "schedule": "cosine"}, "model": {"size": "nano"}, "val": {"every": 0}}
    with pytest.warns(Notice) as said:
        plan = written(digits, tmp_path, training={**training, "seed": 0})  # as all runs have it
    (text,) = [str(one.message) for one in said]
    assert text.startswith(
        "`training` of the spec sets optim.lr, optim.schedule, model.size, which the plan decides"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what has an effect, or is the base's, is not named
        plan_into(spec(digits, tmp_path, lr=None, training={"optim": {"lr": 0.5}}))
    assert plan.runs


def test_held_out_batches_of_several_sizes_are_refused(digits: Digits, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"training": {"val": {"batches": 2, "samples": 32}}}
    written(digits, tmp_path, **keys)  # batches of one size
    with pytest.raises(ConfigError, match=r"val.batches = 2: batches are of several sizes here"):
        written(
            digits, tmp_path, batch={"name": "power", "at": 16, "params": 5664, "exponent": 0.6667}, **keys
        )


def test_keys_that_change_nothing_of_a_result_may_change(digits: Digits, begun: Path) -> None:
    plan = written(digits, begun, training={"train": {"micro_batch": 4, "hang_timeout": None}})
    cfg = load(Experiment, begun / "plan" / f"{plan.runs[0].name}.yaml")
    assert cfg.train.micro_batch == 4


# --- what is no experiment -------------------------------------------------------------------------------------


def test_other_folders_are_left_alone(digits: Digits, done: Done, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a run directory, and a folder of a scaling experiment"):
        written(digits, done.out / "runs" / done.plan.runs[0].name)
    with pytest.raises(OutputError, match="is a data set"):
        written(digits, digits.moments)
    with pytest.raises(ScalingError, match=r"has no plan.json: plan it first"):
        opened(str(tmp_path))
    (tmp_path / "plan.json").write_text(json.dumps({"runs": [{"name": "x"}]}))
    with pytest.raises(ScalingError, match="is damaged, or of another version"):
        opened(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"spec": 1, "runs": [{"name": 1}]}'])
def test_a_damaged_plan_is_made_anew(digits: Digits, begun: Path, text: str) -> None:
    """As its own message says; what has begun still holds, trunks too."""
    longer = {"samples_per_param": [0.02, 0.04, 0.08]}
    (begun / "plan.json").write_text(text)
    with pytest.warns(Notice, match=r"plan.json is damaged.*\): plan it again; it is made anew"):
        plan = written(digits, begun, **longer)
    assert read_plan(begun) == plan
    assert plan["w16d1-r0.08-s0"].trunk == "w16d1-r0.04-s0"
    (begun / "plan.json").write_text(text)
    with (
        pytest.warns(Notice, match="made anew"),
        pytest.raises(ScalingError, match=r"w16d1-r0.02-s0 has begun, and is not planned any more"),
    ):
        written(digits, begun, samples_per_param=[0.04])


def test_a_lost_plan_leaves_trunks_what_they_are(digits: Digits, begun: Path) -> None:
    (begun / "plan.json").unlink()
    plan = written(digits, begun, samples_per_param=[0.02, 0.04, 0.08])
    assert plan["w16d1-r0.08-s0"].trunk == "w16d1-r0.04-s0"


def test_a_folder_needs_no_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave --out out"):
        opened(str(tmp_path), out="x")
