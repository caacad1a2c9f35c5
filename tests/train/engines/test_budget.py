"""The work done again that a budget of bytes asks for, and a run that keeps to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit.config import ConfigError
from dit.experiments.parts import make_parts
from dit.model.cost import Memory, cost
from dit.model.dit import DiTConfig
from dit.model.recompute import NOTHING, Recompute, ways
from dit.ranks import group
from dit.ranks.world import World
from dit.train.dry_run import report
from dit.train.engines.budget import Budget, fit
from dit.train.engines.zero_config import Device, ZeroConfig
from dit.train.plan import Plan
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import Values, experiment, values
from tests.train.short_runs import short_runs

COST = cost(DiTConfig(size="S"), 32, 4, 1000)


def reckoned(stage: int, frozen: int, way: Recompute) -> Memory:
    return COST.memory(64, zero_stage=stage, world_size=8, frozen=frozen, recompute=way)


def test_the_least_work_is_done_again_that_fits() -> None:
    device, work = Device(0, False, 8), []
    most = ZeroConfig(stage=0).needs(reckoned(0, 0, NOTHING), 0, device)
    for share in (1.0, 0.9, 0.7, 0.5, 0.4, 0.3, 0.25):
        found = fit(ZeroConfig(stage=0), Budget(int(share * most), 12, reckoned), 0, device)
        needed = ZeroConfig(stage=0).needs(reckoned(0, 0, found.recompute), 0, device)
        assert found.needed == needed <= share * most
        assert f"{needed / 1e9:.3g} GB of {int(share * most) / 1e9:.3g} predicted" in found.why
        work.append(found.recompute.work(12))
    assert work == sorted(work)
    assert work[0] == 0.0 < work[2] < work[-1]
    none = fit(ZeroConfig(stage=0), Budget(int(0.01 * most), 12, reckoned), 0, device)
    assert "which is MORE" in none.why
    needs = [ZeroConfig(stage=0).needs(reckoned(0, 0, way), 0, device) for way in ways(12)]
    assert none.needed == min(needs)


def test_a_stage_that_shares_more_comes_before_work_done_again() -> None:
    device = Device(0, False, 8)
    less = ZeroConfig(stage=1).needs(reckoned(1, 0, NOTHING), 1, device)
    found = fit(ZeroConfig(), Budget(less, 12, reckoned), 0, device)
    assert (found.choice.stage, found.recompute) == (1, NOTHING)


def given(digits: Digits, folder: Path, gigabytes: float | None) -> Values:
    """A run on the local engine whose activations take 3 MB of 10."""
    model = {"size": None, "width": 64, "depth": 4, "heads": 2, "patch": 1}
    train = {"memory_gb": gigabytes, "micro_batch": 4}
    return values(digits, folder, engine="local", model=model, train=train)


def test_a_run_keeps_to_its_budget_and_trains_as_without(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    with group.session() as world:
        whole = Plan(experiment(given(digits, tmp_path / "a", 10.0)), make_parts, world)
        assert whole.fitted is not None
        assert whole.fitted.recompute == NOTHING
        budget = 0.8 * whole.fitted.needed / 1e9
        plan = Plan(experiment(given(digits, tmp_path / "b", budget)), make_parts, world)
        assert plan.fitted is not None
        assert plan.fitted.recompute.count(4) > 0
        assert plan.build().recompute == plan.fitted.recompute
        assert plan.memory(0).total <= 1e9 * budget
        assert report(plan)["recompute"] == plan.fitted.why
        whole.close()
        plan.close()
    runs = [given(digits, tmp_path / "c", None), given(digits, tmp_path / "d", budget)]
    [[free, tight]] = ranks.run(1, short_runs, runs, 2)
    assert tight.losses == free.losses
    for name, state in free.states.items():
        assert torch.equal(tight.states[name], state), name


def test_two_ways_to_say_it_are_refused(digits: Digits, tmp_path: Path) -> None:
    both = given(digits, tmp_path, 1.0)
    both["model"]["checkpoint_blocks"] = 2
    with pytest.raises(ConfigError, match="leave one of them out"):
        experiment(both)
    with pytest.raises(ConfigError, match="memory_gb"):
        experiment(given(digits, tmp_path, 0.0))


def test_the_plain_engine_shards_nothing_for_it_and_keeps_its_gradients(
    digits: Digits, tmp_path: Path
) -> None:
    """On two ranks they lie in buckets that stay, whatever part of the pass it is."""
    given_ = {**given(digits, tmp_path, 0.009), "engine": "plain"}
    plan = Plan(experiment(given_), make_parts, World(size=2))
    assert plan.fitted is not None
    assert "at stage 0" in plan.fitted.why
    assert plan.sharding.stage == 0
    assert plan.memory(0).gradients_stay
