"""Faults in the numbers: skipped on all ranks and named, and when a loss is judged to have leapt (I4)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit.config import ConfigError, from_dict
from dit.flow.loss import Loss
from dit.train.faults import Faults, FaultsConfig
from dit.train.loop import Loop
from dit.train.task import guarded
from tests.datasets import Digits, altered
from tests.rank_processes import Server
from tests.train.conftest import Poisoned
from tests.train.runs import ENGINES, Values, built, column, engine_of, go, values

# --- a sample whose loss is too large ----------------------------------------------------------------------


def loss_of(*per_sample: float) -> Loss:
    found = torch.tensor(per_sample, requires_grad=True)
    return Loss(found.mean(), found, None, {})


def test_a_loss_above_the_bound_has_no_gradient_and_others_have_theirs() -> None:
    for per_sample, bound, finite in (
        ((1.0, 2.0), 2.0, True),
        ((1.0, 2.5), 2.0, False),
        ((9.0, 9.0), None, True),
    ):
        loss = loss_of(*per_sample)
        guarded(loss, bound).backward()
        gradient = loss.per_sample.grad
        assert gradient is not None
        assert bool(torch.isfinite(gradient).all()) is finite
        if finite:
            assert gradient.tolist() == [0.5, 0.5]


def test_a_sample_above_it_skips_the_update_on_all_ranks_and_is_named(
    digits: Digits, ranks: Server, poisoned: Poisoned, tmp_path: Path
) -> None:
    def enlarge(samples: np.ndarray, ids: np.ndarray) -> None:
        samples[ids == poisoned.id, :, 0] *= 30

    folder = altered(digits.moments, tmp_path / "data", enlarge)
    given = values(
        digits, tmp_path / "run", data={"path": str(folder)}, train={"steps": 4}, faults={"max_loss": 100}
    )
    ranks.run(2, go, given)
    assert column(tmp_path / "run", "skipped") == [0, 0, 1, 1]
    assert column(tmp_path / "run", "loss")[2] > 10  # as it was, for whoever looks
    dumps = [json.loads(p.read_text()) for p in sorted((tmp_path / "run/nonfinite").iterdir())]
    assert [d["ids_with_bad_loss"] for d in dumps] == [[], [poisoned.id]]


# --- a gradient on one rank --------------------------------------------------------------------------------


def steps_with_a_bad_gradient(runs: list[Values], bad: float) -> list[list[tuple[bool, int]]]:
    """In step 1 of 3 one element of one gradient of rank 1 is bad: was the update applied, how many were skipped."""
    found = []
    for given in runs:
        run = built(given)
        step, seen = 0, []
        rank = run.world.rank

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            if (rank, step) == (1, 1):  # noqa: B023 (of this run)
                gradient = gradient.clone()
                gradient.view(-1)[3] = bad
            return gradient

        parameter = dict(run.engine.module.named_parameters())["blocks.0.attention.qkv.weight"]
        parameter.register_hook(spoil)
        for step in range(3):
            before = run.engine.updates
            Loop(run).train_step(run.feed.stream.batch(step))
            seen.append((run.engine.updates > before, run.engine.skipped))
        found.append(seen)
    return found


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_bad_on_one_rank_skips_the_update_on_all(
    digits: Digits, ranks: Server, tmp_path: Path, bad: float
) -> None:
    runs = [values(digits, tmp_path / str(engine), **engine_of(engine)) for engine in ENGINES]
    found = ranks.run(2, steps_with_a_bad_gradient, runs, bad)
    assert found == [[[(True, 0), (False, 1), (True, 1)]] * len(ENGINES)] * 2


# --- spikes ------------------------------------------------------------------------------------------------


def watched(tmp_path: Path, **cfg: Any) -> Faults:
    return Faults(from_dict(FaultsConfig, cfg), 20, tmp_path, 0)


def test_a_spike_is_judged_by_the_median_of_enough_losses(tmp_path: Path) -> None:
    faults = watched(tmp_path, spike=2, window=3)
    for step, loss in enumerate([1.0, 9.0, 1.0], 1):  # none is judged before there are three
        assert faults.watch_loss(loss, step) is None
    assert faults.watch_loss(1.9, 4) is None  # median 1
    fault = faults.watch_loss(4.0, 5)  # of 9, 1, 1.9
    assert faults.spikes == (fault is not None) == 1
    assert fault is not None
    assert not fault.is_fatal
    assert faults.watch_loss(2.0, 6) is None  # of 1, 1.9, 4


def test_what_was_skipped_is_not_judged(tmp_path: Path) -> None:
    faults = watched(tmp_path, spike=2, window=3)
    ids = torch.arange(2)
    for step in range(1, 4):
        faults.watch_update(True, step, ids, [loss_of(1.0, 1.0)])
        assert faults.watch_loss(1.0, step) is None
    faults.watch_update(False, 4, ids, [loss_of(1.0, 1e9)])
    assert faults.watch_loss(5e8, 4) is None
    assert faults.recent == [1.0, 1.0, 1.0]


def test_an_interval_that_a_restart_cut_in_two_is_one(tmp_path: Path) -> None:
    """What was good ends where the interval begins, and what was skipped in its first half counts."""
    ids = torch.arange(2)
    for skipped in (False, True):
        faults = watched(tmp_path, spike=2, window=3)
        for step in (10, 20, 30):
            faults.watch_loss(1.0, step)
        for step in range(31, 36):
            faults.watch_update(not (skipped and step == 33), step, ids, [loss_of(1.0, math.nan)])
        again = watched(tmp_path, spike=2, window=3)
        again.load(json.loads(json.dumps(faults.state())))
        for step in range(36, 41):
            again.watch_update(True, step, ids, [loss_of(1.0, 1.0)])
        fault = again.watch_loss(9.0, 40)
        assert (fault is None) is skipped
        assert fault is None or fault.good == 30


def test_what_it_remembers_comes_back(tmp_path: Path) -> None:
    faults = watched(tmp_path, spike=2, window=3, returns=2)
    for step, loss in enumerate([1.0, 2.0, 1.0, 7.0], 1):
        faults.watch_loss(loss, step)
    faults.leave_out(3, 8, 1)
    again = watched(tmp_path, spike=2, window=3, returns=2)
    again.load(json.loads(json.dumps(faults.state())))
    assert again.state() == faults.state()
    assert again.counts() == {"spikes": 1, "returned": 1}
    assert again.may_return
    again.load({})
    assert again.state() == watched(tmp_path).state()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_loss": 0}, "faults.max_loss must be above 0 or null, got 0"),
        ({"spike": 1}, "faults.spike must be above 1 or null, got 1"),
        ({"window": 2}, "faults.window must be at least 3"),
        ({"returns": -1}, "faults.returns at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_dict(FaultsConfig, wrong)
