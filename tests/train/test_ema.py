"""The sharded average: equal to an unsharded fp32 one, frozen on skipped updates, swapped in and out (I3, I4)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dit.config import ConfigError, from_dict
from dit.errors import Notice
from dit.ranks.group import World
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import CheckpointError, Reader
from dit.train.checkpoints.export import of_width
from dit.train.ema import Average, Ema, EmaConfig, percent
from dit.train.engines.local import LocalEngine
from dit.train.optim import OptimConfig
from dit.train.posthoc import power_of
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.conftest import Poisoned
from tests.train.on_ranks import steps_beside_reference
from tests.train.runs import ENGINES, at_step, differing, engine_of, forked, go, state, values
from tests.train.runs import STEPS as STEPS_OF_A_RUN

STEPS = 5


def test_at_every_stage_it_is_an_unsharded_average_and_stands_still_on_skipped_updates(
    digits: Digits, ranks: Server, poisoned: Poisoned, tmp_path: Path
) -> None:
    """NaN in one rank's data: the update is skipped on both ranks, and weights and average keep every bit."""
    runs = [
        values(
            digits,
            tmp_path / str(engine),
            data={"path": str(poisoned.folder)},
            **engine_of(engine),
            ema={"warmup": engine != 1},
        )
        for engine in ENGINES
    ]
    for found in ranks.run(2, steps_beside_reference, runs, STEPS):
        for engine, steps in zip(ENGINES, found, strict=True):
            for step, seen in enumerate(steps):
                applied = step != poisoned.step
                assert seen["applied"] is applied, (engine, step)
                assert seen["weights changed"] is applied, (engine, step)
                assert seen["average changed"] is applied, (engine, step)
                assert seen["average is the reference"], (engine, step)
                assert seen["skipped"] == int(step >= poisoned.step)
                assert seen["in a row"] == int(not applied)
                assert np.isfinite(seen["grad_norm"]) == applied


def test_alone_it_is_an_average_too(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    (found,) = ranks.run(1, steps_beside_reference, [values(digits, tmp_path, engine="local")], 3)
    assert all(step["average is the reference"] and step["average changed"] for step in found[0])


def test_closed_form() -> None:
    """Of weights 1, 2, 3 after a start at 0: the sum of (1 - d) d^(n - i) w_i."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    ema = Ema(LocalEngine(module, OptimConfig(), World()), EmaConfig(decay=0.5))
    for value in (1.0, 2.0, 3.0):
        module.weight.data.fill_(value)
        ema.update()
    assert float(ema.pieces[0]) == 0.5 * 3 + 0.25 * 2 + 0.125 * 1
    with ema.swapped_in():
        assert module.weight.item() == 2.125
    assert module.weight.item() == 3.0
    assert float(ema.pieces[0]) == 2.125


def single(cfg: EmaConfig, start: float) -> Ema:
    """Averages of one number."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, start)
    return Ema(LocalEngine(module, OptimConfig(), World()), cfg)


def update(ema: Ema, value: float) -> None:
    """An update that was applied, after which the weight is this."""
    ema.engine.module.weight.data.fill_(value)
    ema.engine.updates += 1  # type: ignore[misc]
    ema.update()


def test_warmed_up_the_decays_are_those_of_the_formula() -> None:
    """At update n: (1 + n) / (10 + n), and no more than the decay; of weights 1, 2, ... after a start at 0."""
    cfg = EmaConfig(decay=0.9, also=(0.25,), warmup=True)
    ema, expected = single(cfg, 0.0), {"ema": 0.0, "ema_0.25": 0.0}
    for n in range(1, 120):
        update(ema, float(n))
        for name, most in (("ema", 0.9), ("ema_0.25", 0.25)):
            decay = min(most, (1 + n) / (10 + n))
            expected[name] = decay * expected[name] + (1 - decay) * n
            assert float(ema.averages[name][0]) == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("warmup", [True, False, None])
@pytest.mark.parametrize("decay", [0.0, 0.05, 0.5, 0.9, 0.998, 0.9999])
def test_the_share_of_the_first_weights_is_what_is_left_of_them(warmup: bool | None, decay: float) -> None:
    """First weights of 1 and then 0: the average is the share itself."""
    cfg = EmaConfig(decay=decay, also=(0.7,), power=(0.1,), warmup=warmup)
    ema = single(cfg, 1.0)
    for name in ema.averages:
        assert cfg.start_share(name, 0) == 1.0
    for n in range(1, 400):
        update(ema, 0.0)
        for name, (average,) in ema.averages.items():
            assert cfg.start_share(name, n) == pytest.approx(float(average), rel=1e-4, abs=1e-30), (name, n)


# --- every few updates -------------------------------------------------------------------------------------

KINDS = {"decay": 0.9, "also": (0.0, 0.999), "power": (0.05, 0.2)}


@pytest.mark.parametrize("every", [2, 7, 40])
@pytest.mark.parametrize("warmup", [False, True])
def test_of_weights_that_stand_still_in_between_it_is_the_average_of_every_update(
    every: int, warmup: bool
) -> None:
    """Of every kind, once it is due; before that it stands."""
    often, seldom = (single(EmaConfig(**KINDS, warmup=warmup, every=n), 1.0) for n in (1, every))
    for n in range(1, 10 * every):
        value = float((-1) ** (-(-n // every)) * -(-n // every))  # changes when an averaging has just been
        before = {name: float(piece[0]) for name, piece in seldom.averages.items()}
        update(often, value)
        update(seldom, value)
        for name, (piece,) in seldom.averages.items():
            if n % every:
                assert float(piece) == before[name]
            else:
                assert float(piece) == pytest.approx(float(often.averages[name][0]), rel=1e-5), (name, n)


@pytest.mark.parametrize("every", [1, 4, 10])
def test_of_weights_that_drift_it_lags_by_the_closed_form(every: int) -> None:
    """Of weights n after n updates: n - D * every / (1 - D) right after an averaging, D = decay^every."""
    decay = 0.9
    ema = single(EmaConfig(decay=decay, every=every), 0.0)
    for n in range(1, 401):
        update(ema, float(n))
    kept = decay**every
    assert float(ema.pieces[0]) == pytest.approx(400 - every * kept / (1 - kept), rel=1e-6)


def test_a_power_average_of_every_few_updates_weighs_those_by_its_profile() -> None:
    """After n = k * every: the sum over j of ((j/k)^(g+1) - ((j-1)/k)^(g+1)) w_(j * every)."""
    every, k = 5, 12
    ema, weights = single(EmaConfig(power=(0.1,), every=every), -9.0), np.cos(np.arange(1, 5 * 12 + 1))
    for weight in weights:
        update(ema, float(weight))
    shares = np.diff((np.arange(k + 1) / k) ** (power_of(0.1) + 1))
    assert float(ema.averages["power_0.1"][0]) == pytest.approx(
        shares @ weights[every - 1 :: every], rel=1e-5
    )


@pytest.mark.parametrize("warmup", [True, False])
def test_the_share_of_the_first_weights_follows_what_was_averaged(warmup: bool) -> None:
    cfg = EmaConfig(decay=0.9, also=(0.0, 0.5), power=(0.1,), warmup=warmup, every=6)
    ema = single(cfg, 1.0)
    for n in range(1, 100):
        update(ema, 0.0)
        for name, (average,) in ema.averages.items():
            assert cfg.start_share(name, n) == pytest.approx(float(average), rel=1e-4, abs=1e-12), (name, n)
    assert "every 6 updates" in str(ema.main)


def test_every_update_is_as_it_was_to_the_bit() -> None:
    """The shares of ema.every: 1 are the numbers of before the key was there."""
    cfg = EmaConfig(decay=0.9999, also=(0.3,), power=(0.1,), warmup=True)
    for n in (1, 2, 77, 10**6):
        most, power = 9 / (10 + n), power_of(0.1)
        assert cfg.shares(n) == {
            "ema": max(1 - 0.9999, most),
            "ema_0.3": max(1 - 0.3, most),
            "power_0.1": -math.expm1((power + 1) * math.log1p(-1 / n)) if n > 1 else 1.0,
        }


def test_a_run_goes_on_in_the_middle_of_an_interval(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    """Saved after 10 of 20 updates, averaged every 4: to the bit alone, and to rounding at another stage."""
    sections = {"ema": {"decay": 0.9, "power": [0.1], "every": 4}, "engine": "local"}
    ranks.run(1, go, values(digits, tmp_path / "whole", **sections))
    cut = forked(tmp_path / "whole", 10, tmp_path / "cut")
    away = forked(tmp_path / "whole", 10, tmp_path / "away")
    ranks.run(1, go, values(digits, cut, **sections))
    sections["engine"] = "deepspeed"
    ranks.run(2, go, values(digits, away, zero={"stage": 3}, **sections))
    whole, there = state(at_step(tmp_path / "whole", 20)), state(at_step(away, 20))
    assert differing(whole, state(at_step(cut, 20))) == []
    for name in whole:
        torch.testing.assert_close(there[name], whole[name], rtol=1e-3, atol=1e-5, msg=name)
    middle = state(at_step(tmp_path / "whole", 10))
    assert not torch.equal(middle["ema/output.proj.weight"], whole["ema/output.proj.weight"])
    with pytest.raises(Exception, match=r"ema\.every: 4 there, 5 now"):
        ranks.run(1, go, values(digits, cut, **{**sections, "ema": {**sections["ema"], "every": 5}}))


def test_what_digits_held_and_hold_now() -> None:
    """The default after a short run, and the quickstart's decay."""
    off, on = EmaConfig(), EmaConfig(warmup=True)
    assert off.start_share("ema", 600) == pytest.approx(0.9418, abs=1e-4)
    assert EmaConfig(decay=0.998).start_share("ema", 600) == pytest.approx(0.3008, abs=1e-4)
    assert on.start_share("ema", 600) < 1e-15
    assert str(Average.of(EmaConfig(decay=0.998), "ema", 600)) == (
        "ema (decay 0.998; 30% of the first weights left)"
    )
    assert str(Average.of(on, "model", 600)) == "model weights"
    with pytest.raises(KeyError):
        on.start_share("ema_0.5", 3)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0%"),
        (1e-9, "under 0.1%"),
        (1e-3, "0.1%"),
        (0.3008, "30%"),
        (0.994, "99%"),
        (0.996, "100%"),
        (1, "100%"),
    ],
)
def test_shares_in_few_digits(share: float, text: str) -> None:
    assert percent(share) == text


def test_it_is_warned_of_once_where_it_is_used(recwarn: pytest.WarningsRecorder) -> None:
    ema = single(EmaConfig(decay=0.9), 1.0)
    for _ in range(3):
        update(ema, 0.0)
        assert ema.for_use().start_share == pytest.approx(0.9**ema.engine.updates)
    (told,) = recwarn.list
    assert told.category is Notice
    assert "ema (decay 0.9; 90% of the first weights left) is not of trained weights alone" in str(
        told.message
    )
    recwarn.clear()
    for _ in range(50):
        update(ema, 0.0)
    assert 0 < (ema.for_use().start_share or 0) < 0.01
    assert not recwarn.list


def test_weights_from_elsewhere_hold_nothing_that_is_known(several: Path) -> None:
    meta = checkpoint.read(at_step(several, 3)).meta
    assert Average.of_checkpoint(meta, "ema_0.99").start_share == pytest.approx(2 / 11 * 3 / 12 * 4 / 13)
    assert Average.of_checkpoint(meta, "power_0.1").start_share == 0.0
    assert Average.of_checkpoint({**meta, "width": 0.15}, "ema").start_share == 0.0
    assert Average.of_checkpoint({**meta, "updates": 0}, "ema").start_share is None  # converted
    old = {**meta, "config": {**meta["config"], "ema": {"decay": 0.9}}}  # from before warming up
    assert Average.of_checkpoint(old, "ema").start_share == pytest.approx(0.9**3)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"ema.decay and ema.also must be in \[0, 1\)"):
        from_dict(EmaConfig, {"decay": decay})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"also": [0.9, 1.0]}, r"must be in \[0, 1\), got 1.0"),
        ({"also": [0.9, 0.9]}, "ema.also has a value twice"),
        ({"power": [0.3]}, r"a width is above 0 and below 0.289, got 0.3"),
        ({"snapshot_every": 10, "power": [0.1]}, r"at least two widths: set ema.power: \[0.05, 0.1\]"),
        ({"snapshot_every": -1}, "ema.snapshot_every must be at least 0"),
        ({"every": 0}, "ema.every must be at least 1"),
    ],
)
def test_averages_that_mean_nothing_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_dict(EmaConfig, wrong)


# --- several, and those made afterwards --------------------------------------------------------------------

SEVERAL = {"decay": 0.9, "also": [0.5, 0.99], "power": [0.05, 0.1], "snapshot_every": 2}


@pytest.fixture(scope="module")
def several(digits: Digits, ranks: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks at stage 2, all checkpoints kept, killed by nobody."""
    run_dir = tmp_path_factory.mktemp("several")
    sections = {"ema": SEVERAL, "checkpoint": {"every": 1, "keep": 0}, "zero": {"stage": 2}}
    ranks.run(2, go, values(digits, run_dir, **sections))
    return run_dir


def saved(run_dir: Path, kind: str) -> list[torch.Tensor]:
    """A parameter as it is in the checkpoint of each step."""
    readers = [Reader(checkpoint.read(at_step(run_dir, step))) for step in range(1, STEPS_OF_A_RUN + 1)]
    return [reader.whole(kind, "blocks.0.attention.qkv.weight").double() for reader in readers]


def test_every_decay_is_an_average_of_its_own(several: Path) -> None:
    """From each checkpoint's weights and the average one step before; every decay is warmed up."""
    weights = saved(several, "model")
    for kind, most in {"ema": 0.9, "ema_0.5": 0.5, "ema_0.99": 0.99}.items():
        averages = saved(several, kind)
        for i, (before, now, weight) in enumerate(zip(averages, averages[1:], weights[1:], strict=False)):
            decay = min(most, (i + 3) / (i + 12))  # of update i + 2
            assert torch.allclose(now, decay * before + (1 - decay) * weight, atol=1e-8)


def test_power_averages_weigh_all_steps_by_their_profile(several: Path) -> None:
    """After n updates: the sum over i of ((i/n)^(g+1) - ((i-1)/n)^(g+1)) w_i."""
    weights = torch.stack(saved(several, "model"))
    for width in (0.05, 0.1):
        average = saved(several, f"power_{width}")
        for n in (1, 2, 7, STEPS_OF_A_RUN):
            shares = np.diff((np.arange(n + 1) / n) ** (power_of(width) + 1))
            expected = torch.einsum("n,nij->ij", torch.from_numpy(shares), weights[:n])
            assert torch.allclose(average[n - 1], expected, atol=1e-7), (width, n)


def test_any_width_is_made_of_the_snapshots(several: Path) -> None:
    weights = torch.stack(saved(several, "model"))
    for width, most in ((0.07, 0.03), (0.1, 1e-5), (0.15, 0.03)):
        made, off = of_width(several, width)
        n = STEPS_OF_A_RUN
        shares = np.diff((np.arange(n + 1) / n) ** (power_of(width) + 1))
        expected = torch.einsum("n,nij->ij", torch.from_numpy(shares), weights)
        spread = float((weights[-1] - expected).norm())
        found = made.tensors["blocks.0.attention.qkv.weight"].double()
        assert off < most
        assert float((found - expected).norm()) < 3 * most * spread, width
        assert (made.kind, made.meta["step"], made.meta["width"]) == ("ema", n, width)


def test_they_come_back_with_a_checkpoint(digits: Digits, several: Path, tmp_path: Path) -> None:
    run = forked(several, 10, tmp_path / "run")
    sections = {"ema": SEVERAL, "checkpoint": {"every": 1, "keep": 0}, "engine": "local"}
    go(values(digits, run, **sections))
    a, b = state(at_step(run, STEPS_OF_A_RUN)), state(at_step(several, STEPS_OF_A_RUN))
    assert {name.split("/")[0] for name in a} >= {"ema_0.5", "ema_0.99", "power_0.05", "power_0.1"}
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    assert len(list((run / "snapshots").iterdir())) == STEPS_OF_A_RUN // 2


def test_without_snapshots_there_is_nothing_to_make_them_of(reference: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no averages to make others of; train with --ema.power"):
        of_width(reference, 0.1)
    with pytest.raises(ConfigError, match=r"the width must be above 0 and below 0.289, got 0.5"):
        of_width(reference, 0.5)
