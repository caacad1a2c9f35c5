"""The plain engine: on two ranks the bits of DeepSpeed's stage 0, and an update whose verdict stays on the device."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dit.ranks.group import World
from dit.train.engines.plain import PlainEngine
from dit.train.optim import OptimConfig
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import STEPS, Engine, at_step, column, differing, engine_of, state, values
from tests.train.short_runs import short_runs


def test_two_ranks_compute_the_bits_of_stage_0(sharded: Callable[[Engine], Path]) -> None:
    """The same operations in the same order: sums of two do not depend on how gradients are cut."""
    plain, deepspeed = sharded("plain"), sharded(0)
    for name in ("loss", "grad_norm", "lr", "batch_hash", "updates"):
        assert column(plain, name) == column(deepspeed, name), name
    for step in (STEPS // 2, STEPS):
        assert differing(state(at_step(plain, step)), state(at_step(deepspeed, step))) == []


def test_in_bf16_too(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    runs = [
        values(digits, tmp_path / str(engine), train={"precision": "bf16"}, **engine_of(engine))
        for engine in ("plain", 0)
    ]
    for plain, deepspeed in ranks.run(2, short_runs, runs, 4):
        assert (plain.losses, plain.norms) == (deepspeed.losses, deepspeed.norms)
        assert differing(plain.states, deepspeed.states) == []


def network() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(67, 33), nn.GELU(), nn.Linear(33, 5))
    module[2].weight.lr_factor = 0.5  # a group of its own
    return module


def steps(clip: float | None, launch: bool) -> tuple[list[float], list[Tensor], tuple[int, int]]:
    """Norms, weights with moments, and counts after steps of which the third has a gradient of NaN."""
    engine = PlainEngine(network(), OptimConfig(clip=clip, weight_decay=0.1), World(), accumulation=2)
    engine.fragments()
    norms = []
    for step in range(6):
        for half in (1.0, -0.5):
            x = torch.linspace(-1, half * (step + 1), 4 * 67).reshape(4, 67)
            engine.backward(engine(x).square().mean() * (math.nan if step == 2 else 1.0))
        lr = 1e-2 / (step + 1)
        if launch:
            factors = [group["lr_factor"] for group in engine.optimizer.param_groups]
            rates = [torch.tensor(lr * factor, dtype=torch.float64) for factor in factors]
            applied = engine.conclude(engine.launch_step(rates))
        else:
            applied = engine.step(lr)
        assert applied is (step != 2)
        norms.append(engine.grad_norm())
    states = [t.clone() for f in engine.fragments() for t in (f.weight, *f.state.values())]
    return norms, states, (engine.updates, engine.skipped)


@pytest.mark.parametrize("clip", [None, 0.05, 1e9])
def test_an_update_whose_verdict_stays_on_the_device_is_the_same_update(clip: float | None) -> None:
    norms, states, counts = steps(clip, launch=False)
    found = steps(clip, launch=True)
    assert math.isnan(norms[2])
    assert math.isnan(found[0][2])
    assert [n for n in found[0] if n == n] == [n for n in norms if n == n]
    assert found[2] == counts == (5, 1)
    assert all(torch.equal(a, b) for a, b in zip(found[1], states, strict=True))


def differing_ranks() -> list[tuple[bool, float]]:
    """Whether weights and buffers that were each rank's own are rank 0's, as soon as there is an engine."""
    world = World.from_env()
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for tensor in (*module.parameters(), *module.buffers()):
        with torch.no_grad():
            tensor.fill_(world.rank + 1)
    engine = PlainEngine(module, OptimConfig(), world)
    return [(bool((t == 1).all()), float(engine.stage)) for t in (*module.parameters(), *module.buffers())]


def test_all_ranks_begin_with_rank_0s_weights(ranks: Server) -> None:
    for found in ranks.run(2, differing_ranks):
        assert found == [(True, 0.0)] * 7


def left_behind() -> int:
    engine = PlainEngine(network(), OptimConfig(), World.from_env(), accumulation=1)
    for _ in range(2):
        engine.backward(engine(torch.ones(4, 67)).square().mean())
        assert engine.step(1e-2)
    parameters = [weakref.ref(p) for p in engine.module.parameters()]
    engine.close()
    del engine
    gc.collect()
    return sum(p() is not None for p in parameters)


def test_a_closed_engine_gives_its_memory_back(ranks: Server) -> None:
    assert ranks.run(2, left_behind) == [0, 0]
