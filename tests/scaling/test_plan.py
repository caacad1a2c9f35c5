"""Plans: what a run is, what it costs, which branch from which, and what is left out."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dit.config import ConfigError
from dit.data import DataError
from dit.model.dit import DiTConfig
from dit.scaling.plan import Plan
from dit.scaling.planning import make_plan
from tests.datasets import SAMPLES, Digits
from tests.model.test_cost import counted_flops
from tests.scaling.experiments import spec

TOKENS = 16  # of 8x8 latents in patches of 2


def planned(digits: Digits, **keys: Any) -> Plan:
    return make_plan(spec(digits, Path("out"), **keys))


def test_n_is_what_the_network_has_in_blocks_and_output(digits: Digits) -> None:
    for run in planned(digits).runs:
        with torch.device("meta"):
            network = DiTConfig(width=run.width, depth=run.depth, heads=run.heads).build(8, 4, 10)
        whole = {name: p.numel() for name, p in network.named_parameters()}
        parts = [network.blocks, network.output]
        assert run.params == sum(p.numel() for part in parts for p in part.parameters())
        assert run.params_total == sum(whole.values())
        assert run.params < run.params_total


def test_samples_tokens_and_flops_follow_from_the_steps(digits: Digits) -> None:
    plan = planned(digits, samples_per_param=[], budgets=[4e8, 1.6e9])
    for run in plan.runs:
        a_step = run.flops / run.steps
        assert abs(run.flops - run.budget) <= a_step / 2
        assert run.samples == run.steps * run.batch
        assert run.tokens == run.samples * TOKENS
        assert run.epochs == run.samples / SAMPLES
        assert run.hours == pytest.approx(run.own_flops / 1e9 / 3600)
        model = DiTConfig(width=run.width, depth=run.depth, heads=run.heads)
        assert run.flops == run.samples * 3 * counted_flops(model, 8, 4, 1)  # by torch's own counter
    by_ratio = planned(digits, samples_per_param=[0.5])
    assert all(abs(run.samples - 0.5 * run.params) <= run.batch / 2 for run in by_ratio.runs)


def test_the_longest_run_of_a_family_is_the_trunk_of_the_others(digits: Digits) -> None:
    plan = planned(digits, samples_per_param=[0.02, 0.08, 0.04], decay=0.3)
    assert [run.kind for run in plan.runs] == ["trunk", "branch", "branch"] * 2
    for run in plan.runs:
        if run.trunk is None:
            assert run.own_flops == run.flops
            continue
        trunk = plan[run.trunk]
        assert (trunk.kind, trunk.size, trunk.seed, trunk.batch) == ("trunk", run.size, run.seed, run.batch)
        assert trunk.budget == 0.08
        assert run.branch_step == math.floor(0.7 * run.steps)
        assert run.own_flops == pytest.approx(run.flops * (run.steps - run.branch_step) / run.steps)
    assert plan.flops == sum(run.own_flops for run in plan.runs) < plan.separate_flops


def test_without_branching_every_run_is_separate(digits: Digits) -> None:
    apart, together = planned(digits, branching=False), planned(digits)
    assert {run.kind for run in apart.runs} == {"separate"}
    assert apart.flops == apart.separate_flops == together.separate_flops


def test_more_seeds_make_families_of_their_own(digits: Digits) -> None:
    plan = planned(digits, more_seeds=[{"seeds": [1], "budgets": [0.02]}, {"seeds": [2], "sizes": ["w16d1"]}])
    kinds = {run.name: run.kind for run in plan.runs if run.seed}
    assert kinds == {
        "w16d1-r0.02-s1": "separate",
        "w32d1-r0.02-s1": "separate",
        "w16d1-r0.04-s2": "trunk",
        "w16d1-r0.02-s2": "branch",
    }


def test_the_batch_is_rounded_and_the_rate_as_printed(digits: Digits) -> None:
    batch = {"name": "power", "at": 16, "params": 5664, "exponent": 0.6667}
    plan = planned(digits, batch=batch, batch_multiple=4)
    assert {run.size: run.batch for run in plan.runs} == {"w16d1": 16, "w32d1": 40}
    assert all(run.lr == float(f"{run.lr:.4g}") for run in plan.runs)
    assert len({run.lr for run in plan.runs}) == 2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"min_steps": 30}, r"27 steps of 16 samples, fewer than min_steps = 30"),
        ({"max_epochs": 4}, r"5\.4 epochs, more than max_epochs = 4"),
        ({"window": [0.0, 0.03]}, r"0\.0395 samples a parameter, outside the window of \[0.0, 0.03\]"),
        ({"training": {"optim": {"warmup": 12}}}, "decay would begin at step 5, and the warm-up takes 12"),
        ({"ranks": 3}, "a batch of 16 cannot be shared by 3 ranks"),
        ({"device": {"memory": 1e-4}}, "GiB a rank, and device.memory is 0.0001"),
        ({"training": {"train": {"global_batch": 400}}, "samples_per_param": [4, 8]}, "more than the 160 samples"),
        ({"samples_per_param": [0.04, 0.0401]}, "14 steps, as w16d1-r0.0401-s0 has"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_left_out_and_says_why(
    digits: Digits, keys: dict[str, Any], words: str
) -> None:
    try:
        whys = "\n".join(one.why for one in planned(digits, **keys).left_out)
    except ConfigError as error:  # all of them
        whys = str(error)
    assert re.search(words, whys), whys


def test_a_plan_without_any_run_is_refused(digits: Digits) -> None:
    with pytest.raises(
        ConfigError, match=r"no point of the experiment can be run:\n  w16d1-r0.04-s0: 14 steps"
    ):
        planned(digits, min_steps=10_000)


def test_numbers_beyond_counting_are_named(digits: Digits) -> None:
    with pytest.raises(
        ConfigError, match=r"1e\+300 samples over N are .* samples for w16d1, more than can be"
    ):
        planned(digits, samples_per_param=[1e300])
    with pytest.raises(ConfigError, match=r"batch: the rule gives 1e\+300 samples at N ="):
        planned(digits, batch={"name": "fixed", "value": 1e300})


def test_a_plan_needs_held_out_data(digits: Digits) -> None:
    with pytest.raises(ConfigError, match=r"training.data.val is not set"):
        planned(digits, training={"data": {"val": None}})


def test_data_that_are_not_there_may_be_described(digits: Digits, tmp_path: Path) -> None:
    said = {"input_size": 8, "channels": 4, "classes": 10, "samples": SAMPLES}
    absent = {"data": {"path": str(tmp_path / "none")}}
    assert planned(digits, training=absent, data=said).runs == planned(digits).runs
    with pytest.raises(DataError, match="`data` of the spec says what they will be"):
        planned(digits, training=absent)
    with pytest.raises(ConfigError, match=r"in the spec, .* in "):
        planned(digits, data={**said, "channels": 3})


def test_a_plan_goes_through_json(digits: Digits) -> None:
    plan = planned(digits)
    assert Plan.from_json(plan.as_json()) == plan
