"""Clipping, AdamW and averages in one pass: what they are each by itself, at every stage, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dit.config import ConfigError, from_dict, merge
from dit.experiments.diffusion import Experiment
from dit.ranks.group import World
from dit.train.ema import Ema, EmaConfig
from dit.train.engines.local import LocalEngine
from dit.train.engines.one_pass import GuardedOnePass
from dit.train.optim import OptimConfig
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import Values, at_step, differing, forked, go, state, values
from tests.train.short_runs import Short, short_runs

STEPS = 4
EMA = {"decay": 0.9, "also": [0.99], "power": [0.1], "every": 2}


def given(digits: Digits, run_dir: Path, one_pass: bool, **sections: Any) -> Values:
    """A run that clips, decays and keeps several averages, some of its parameters frozen."""
    frozen = {"train": {"freeze": ["blocks.0.mlp.*"]}}
    made = values(digits, run_dir, ema=EMA, **merge(frozen, sections))
    return {**made, "optim": {**made["optim"], "clip": 0.1, "one_pass": one_pass}}


def check(found: Short, expected: Short) -> None:
    """Every number of weights, moments and averages to 1e-6."""
    assert found.applied == expected.applied
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)
    assert found.states.keys() == expected.states.keys()
    for name, tensor in expected.states.items():
        torch.testing.assert_close(found.states[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    for name, weight in found.weights.items():
        assert torch.equal(weight, found.states[f"model/{name}"]), name


def pairs(digits: Digits, folder: Path, choices: list[dict[str, Any]]) -> list[Values]:
    return [
        given(digits, folder / f"{i}-{one_pass}", one_pass, **choice)
        for i, choice in enumerate(choices)
        for one_pass in (False, True)
    ]


@pytest.mark.slow
def test_alone_it_is_each_by_itself(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    [found] = ranks.run(1, short_runs, pairs(digits, tmp_path, [{"engine": "local"}]), STEPS)
    plain, together = found
    check(together, plain)
    moved = (plain.states["ema/output.proj.weight"] - plain.states["model/output.proj.weight"]).abs().max()
    assert float(moved) > 1e-4  # or nothing is compared


@pytest.mark.slow
def test_at_every_stage_it_is_each_by_itself(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    """Offloaded too, where all of it lies on the host."""
    zeros: list[dict[str, Any]] = [{"stage": stage} for stage in (0, 1, 2, 3)]
    zeros += [{"stage": stage, "offload": "optimizer"} for stage in (1, 3)]
    choices = [{"zero": zero} for zero in zeros]
    for found in ranks.run(2, short_runs, pairs(digits, tmp_path, choices), STEPS):
        for plain, together in zip(found[::2], found[1::2], strict=True):
            check(together, plain)


def held(engine: LocalEngine, ema: Ema) -> list[torch.Tensor]:
    """Weights, moments and averages, as they are now."""
    found = [t for f in engine.fragments() for t in (f.weight, *f.state.values())]
    return [t.clone() for t in (*found, *ema.pieces)]


@pytest.mark.slow
def test_a_few_updates_are_the_same_and_a_gradient_that_is_not_finite_leaves_every_bit() -> None:
    torch.manual_seed(0)
    runs = []
    for one_pass in (False, True):
        module = nn.Linear(5, 3)
        nn.init.constant_(module.weight, 0.25)
        nn.init.constant_(module.bias, -0.5)
        optim = OptimConfig(one_pass=one_pass, clip=1.0, weight_decay=0.3)
        engine = LocalEngine(module, optim, World())
        runs.append((module, engine, Ema(engine, EmaConfig(decay=0.5))))
    assert isinstance(runs[1][1].optimizer, GuardedOnePass)
    assert runs[1][1].about == "plain torch: GuardedOnePass in one pass"
    for step in range(6):
        x, is_bad = torch.randn(2, 5), step == 3
        for module, engine, ema in runs:
            before = held(engine, ema)
            engine.backward(module(x).square().sum() * (float("nan") if is_bad else 10.0 ** (step - 3)))
            applied = engine.step(0.05)
            assert applied is not is_bad
            if applied:
                ema.update()
            assert all(torch.equal(a, b) == is_bad for a, b in zip(held(engine, ema), before, strict=True))
        plain, together = (held(engine, ema) for _, engine, ema in runs)
        for a, b in zip(together, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all((engine.updates, engine.skipped) == (5, 1) for _, engine, _ in runs)


@pytest.mark.slow
def test_a_run_goes_on_with_it_without_it_and_to_the_bit(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    """It may be turned on and off in a run: checkpoints are the same."""
    whole = tmp_path / "whole"
    ranks.run(1, go, given(digits, whole, True, engine="local"))
    cut, without = (forked(whole, 10, tmp_path / name) for name in ("cut", "without"))
    ranks.run(1, go, given(digits, cut, True, engine="local"))
    ranks.run(1, go, given(digits, without, False, engine="local"))
    expected, there = state(at_step(whole, 20)), state(at_step(without, 20))
    assert differing(expected, state(at_step(cut, 20))) == []
    assert expected.keys() == there.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_it_is_adamws_alone(digits: Digits, tmp_path: Path) -> None:
    made = given(digits, tmp_path, True)
    with pytest.raises(ConfigError, match=r"optim.one_pass is not there for optim.name muon"):
        from_dict(Experiment, {**made, "optim": {**made["optim"], "name": "muon"}})
