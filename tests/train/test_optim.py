"""Learning-rate schedules by exact values, parameter groups, AdamW's arguments."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

from dit.config import ConfigError, from_dict
from dit.train.optim import (
    SCHEDULES,
    ConstantRate,
    CosineDecay,
    GuardedAdamW,
    OptimConfig,
    WarmupStableDecay,
    adamw_arguments,
    freeze,
    parameter_groups,
    set_lr,
)


def rates(cfg: OptimConfig, total: int) -> list[float]:
    return [cfg.lr_at(updates, total) for updates in range(total)]


@pytest.mark.parametrize(
    ("cfg", "total", "expected"),
    [
        (OptimConfig(lr=8.0), 3, [8, 8, 8]),
        (OptimConfig(lr=8.0, warmup=4), 6, [2, 4, 6, 8, 8, 8]),
        (
            OptimConfig(lr=8.0, schedule=CosineDecay()),
            4,
            [8, 4 + 2 * math.sqrt(2) * 1, 4, 4 - 2 * math.sqrt(2)],
        ),
        (OptimConfig(lr=8.0, schedule=CosineDecay(final=0.5)), 2, [8, 6]),
        (OptimConfig(lr=8.0, warmup=2, schedule=CosineDecay(final=0.25)), 6, [4, 8, 8, None, 5, None]),
        (OptimConfig(lr=8.0, warmup=9), 3, [8 / 9, 16 / 9, 24 / 9]),
        (OptimConfig(lr=8.0, warmup=2, schedule=WarmupStableDecay(decay=0.5)), 8, [4, 8, 8, 8, 8, 6, 4, 2]),
        (OptimConfig(lr=8.0, schedule=WarmupStableDecay(decay=0.5, final=0.5)), 4, [8, 8, 8, 6]),
        (
            OptimConfig(lr=8.0, schedule=WarmupStableDecay(decay=1, shape="sqrt")),
            4,
            [8, 4, 8 - 8 * math.sqrt(0.5), 8 - 8 * math.sqrt(0.75)],
        ),
        (
            OptimConfig(lr=8.0, schedule=WarmupStableDecay(decay=1, shape="cosine")),
            4,
            [8, 4 + 2 * math.sqrt(2), 4, 4 - 2 * math.sqrt(2)],
        ),
    ],
)
def test_exact_values(cfg: OptimConfig, total: int, expected: list[float | None]) -> None:
    for found, value in zip(rates(cfg, total), expected, strict=True):
        assert value is None or found == pytest.approx(value, rel=1e-12)


def test_beyond_the_planned_end_the_rate_stays_at_its_final_value() -> None:
    cfg = OptimConfig(lr=2.0, schedule=CosineDecay(final=0.1))
    assert cfg.lr_at(100, 100) == pytest.approx(0.2)
    assert cfg.lr_at(1000, 100) == pytest.approx(0.2)


@pytest.mark.parametrize("decay", [1e-9, 0.05, 0.1, 0.2, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("final", [0.0, 0.1, 1 / 3])
def test_until_its_decay_the_rate_of_wsd_is_that_of_every_longer_run(decay: float, final: float) -> None:
    """Not nearly so: the same number, so that a branch is the run that is planned from its start."""
    schedule = WarmupStableDecay(decay=decay, final=final)
    cfg = OptimConfig(lr=0.3, warmup=1, schedule=schedule)
    for total in range(2, 60):
        stable = schedule.stable(total)
        assert total * (1 - decay) - 1 < stable <= total * (1 - decay) + 1e-9
        assert stable < total
        for longer in (total, total + 1, 7 * total):
            assert all(cfg.lr_at(n, longer) == 0.3 for n in range(stable + 1))
        assert cfg.lr_at(stable + 1, total) < 0.3
        assert cfg.lr_at(total, total) == cfg.lr_at(9 * total, total) == pytest.approx(0.3 * final)


def test_the_share_is_the_decimal_number_that_was_written() -> None:
    """(1 - 0.9) * 10 is 0.9999999999999998 by floating point."""
    assert WarmupStableDecay(decay=0.9).stable(10) == 1
    assert WarmupStableDecay(decay=0.3).stable(10) == 7
    assert WarmupStableDecay(decay=0.2).stable(1_000_000) == 800_000


def test_a_decay_within_the_warm_up_is_refused() -> None:
    schedule = WarmupStableDecay(decay=0.5)
    schedule.check(warmup=5, total=10)
    with pytest.raises(
        ConfigError, match=r"decay = 0.5 of train.steps = 10 begins after 5 .* optim.warmup = 6"
    ):
        schedule.check(warmup=6, total=10)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_schedule_starts_at_1_and_stays_in_range(name: str) -> None:
    schedule = SCHEDULES[name]()
    factors = [schedule.factor(i, 0, 50) for i in range(60)]
    assert factors[0] == 1.0
    assert all(0 <= f <= 1 for f in factors)
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0},
        {"lr": -1},
        {"lr": "nan"},
        {"lr": "inf"},
        {"clip": 0},
        {"clip": -1},
        {"clip": "nan"},
        {"warmup": -1},
        {"betas": [0.9, 10]},
        {"betas": [-0.1, 0.9]},
        {"betas": [1, 0.9]},
        {"eps": -1e-8},
        {"eps": "inf"},
        {"weight_decay": -0.1},
        {"weight_decay": "inf"},
        {"schedule": {"name": "cosine", "final": -0.1}},
        {"schedule": {"name": "cosine", "final": "inf"}},
        {"schedule": "cosin"},
        {"schedule": {"name": "wsd", "decay": 0}},
        {"schedule": {"name": "wsd", "decay": 1.1}},
        {"schedule": {"name": "wsd", "decay": "nan"}},
        {"schedule": {"name": "wsd", "final": 2}},
        {"schedule": {"name": "wsd", "shape": "square"}},
    ],
)
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError):
        from_dict(OptimConfig, bad)


def test_no_clipping_is_null() -> None:
    assert from_dict(OptimConfig, {"clip": None}).clip is None
    assert from_dict(OptimConfig, {"schedule": "constant"}).schedule == ConstantRate()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.table = nn.Embedding(5, 2)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def test_matrices_decay_and_vectors_and_frozen_ones_do_not() -> None:
    net = Net()
    decayed, plain = parameter_groups(net, 0.1)
    assert (decayed["name"], decayed["weight_decay"]) == ("decayed", 0.1)
    assert (plain["name"], plain["weight_decay"]) == ("plain", 0.0)
    names = {id(p): n for n, p in net.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"linear.weight", "table.weight"}
    assert {names[id(p)] for p in plain["params"]} == {"linear.bias", "norm.weight", "norm.bias"}


def test_without_decay_there_is_one_group() -> None:
    (only,) = parameter_groups(Net(), 0.0)
    assert len(only["params"]) == 5
    assert only["weight_decay"] == 0.0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parameters_with_a_factor_train_at_that_times_the_rate(weight_decay: float) -> None:
    net = Net()
    for p in net.table.parameters():
        p.lr_factor = 0.25  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(parameter_groups(net, weight_decay), lr=1.0)
    set_lr(optimizer, 0.8)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == (0.2 if name == "table.weight" else 0.8)
            assert decays[id(p)] == (weight_decay if p.ndim > 1 else 0.0)


def test_decay_and_eps_have_factors_of_their_own_and_vectors_do_not_decay() -> None:
    net = Net()
    for p in net.linear.parameters():
        p.decay_factor, p.eps_factor = 4.0, 0.5  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(parameter_groups(net, 0.1, eps=1e-4), eps=1e-4)
    found = {
        id(p): (g["weight_decay"], g["eps"], g["lr_factor"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    assert found[id(net.linear.weight)] == (0.4, 5e-5, 1.0)
    assert found[id(net.linear.bias)] == (0.0, 5e-5, 1.0)
    assert found[id(net.table.weight)] == (0.1, 1e-4, 1.0)
    assert len(optimizer.param_groups) == 4


def test_the_shape_that_counts_is_the_whole_parameters() -> None:
    """ZeRO-3 leaves empty one-dimensional tensors and keeps the shape aside."""
    net = Net()
    for p in net.parameters():
        p.ds_shape = p.shape  # type: ignore[attr-defined]
        p.data = torch.empty(0)
    decayed, _ = parameter_groups(net, 0.1)
    assert len(decayed["params"]) == 2


def test_adamw_takes_what_the_config_says() -> None:
    arguments = adamw_arguments(OptimConfig(lr=3.0, betas=(0.5, 0.6), eps=1e-3))
    assert arguments == {"lr": 3.0, "betas": (0.5, 0.6), "eps": 1e-3, "fused": True}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_guarded_step_is_torchs_adamw_after_torchs_clipping(clip: float | None) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    settings = adamw_arguments(OptimConfig(lr=0.1))
    guarded = GuardedAdamW(parameter_groups(ours, 0.1), clip, **settings)
    plain = torch.optim.AdamW(parameter_groups(theirs, 0.1), **settings)
    for _ in range(3):
        x = torch.randn(5, 3)
        for net, optimizer in ((ours, guarded), (theirs, plain)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
        guarded.step()
        plain.step()
        assert guarded._global_grad_norm == pytest.approx(float(norm))
        assert not guarded.overflow
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("clip", [1e-7, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("share", [0.5, 0.998, 0.9985, 0.9999, 1.0, 1.001, 2.0])
def test_gradients_are_clipped_as_torch_does_at_any_size(clip: float, share: float) -> None:
    """Also where torch's 1e-6 counts beside the norm, and where the factor is left out because it is 1."""
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    for net in (ours, theirs):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, share * clip / math.sqrt(8))
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
    GuardedAdamW(parameter_groups(ours, 0.1), clip, **adamw_arguments(OptimConfig(lr=0.1))).step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# --- frozen parameters -------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(
        OrderedDict(blocks=nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), output=nn.Linear(2, 1))
    )


def test_patterns_choose_what_is_frozen() -> None:
    module = network()
    assert freeze(module, ("blocks.0.*", "*.bias")) == 3 * 2 + 3 + 2 + 1
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"blocks.1.weight", "output.weight"}
    assert sum(len(group["params"]) for group in parameter_groups(module, 0.1)) == 2
    assert freeze(network(), ()) == 0


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("block.0.*", r"no parameter fits 'block.0.\*'; did you mean blocks.0.\*\?"),
        ("output.wieght", r"did you mean output.weight\?"),
        ("zzz", r"valid here: blocks.\*, output.\*"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused(pattern: str, says: str) -> None:
    module = network()
    with pytest.raises(ConfigError, match=says):
        freeze(module, ("blocks.1.*", pattern))
    assert all(p.requires_grad for p in module.parameters())


def test_something_has_to_be_trained() -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(network(), ("*",))
