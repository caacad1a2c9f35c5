"""Faults in the numbers, each injected: skipped on all ranks and named, or gone back behind (I4)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit.config import ConfigError, from_dict, merge
from dit.flow.objective import Loss
from dit.ranks import group
from dit.train import recovery
from dit.train.faults import Fault, Faults, FaultsConfig, TrainingError
from dit.train.loop import Loop
from dit.train.stop import StopRequest
from dit.train.task import guarded
from tests.datasets import Digits, altered
from tests.rank_processes import RanksFailed, Server
from tests.train.conftest import Poisoned
from tests.train.runs import STEPS, Values, at_step, built, column, differing, forked, go, state, values

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
    runs = [values(digits, tmp_path / str(stage), zero={"stage": stage}) for stage in (0, 1, 2, 3)]
    found = ranks.run(2, steps_with_a_bad_gradient, runs, bad)
    assert found == [[[(True, 0), (False, 1), (True, 1)]] * 4] * 2


# --- the optimizer's state ---------------------------------------------------------------------------------


def spoilt_at(given: Values, step: int) -> None:
    """Train; when `step` steps are done a NaN gets into rank 1's optimizer state."""
    run = built(given)
    run.resume()
    loop = Loop(run)
    train_step = loop.train_step

    def step_and_spoil(batch: Any) -> Any:
        fault = train_step(batch)
        if run.step == step and run.world.rank == run.world.size - 1:
            run.engine.fragments()[0].state["exp_avg"][0] = math.nan
        return fault

    loop.train_step = step_and_spoil  # type: ignore[method-assign]
    loop.train(StopRequest())


def skipping_from(given: Values, checkpoint_step: int, first_step: int) -> None:
    """Go on from a checkpoint with a later step."""
    run = built(given)
    assert run.resume()
    assert run.step == checkpoint_step
    run.step = first_step
    Loop(run).train(StopRequest())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_weights_that_are_spoilt_are_never_saved_and_the_run_goes_back(
    digits: Digits, ranks: Server, sharded: Callable[[int], Path], hooked: dict, tmp_path: Path, stage: int
) -> None:
    """NaN in the optimizer at 11 spoils the weights in step 12; the next are skipped; the last checkpoint is of 10."""
    every = {"checkpoint": {"every": 5, "keep": 0}, "zero": {"stage": stage}}
    given = values(digits, tmp_path / "run", **every, train={"max_skipped": 4}, faults={"returns": 1})
    ranks.run(2, spoilt_at, given, 11)
    run = tmp_path / "run"
    assert column(run, "step") == [*range(1, 11), *range(16, 21)]
    assert column(run, "batch_hash")[10:] == column(sharded(2), "batch_hash")[15:]
    assert column(run, "returned") == [0] * 10 + [1] * 5
    assert column(run, "samples")[-1] == (STEPS - 5) * 32
    assert column(run, "skipped")[-1] == 0
    # as a run that goes on from that checkpoint behind those steps
    expected = forked(sharded(stage), 10, tmp_path / "expected")
    ranks.run(2, skipping_from, values(digits, expected, **every), 10, 15)
    assert column(run, "loss")[-5:] == column(expected, "loss")[-5:]
    assert differing(state(at_step(run, STEPS)), state(at_step(expected, STEPS))) == []


def spoilt_before_saving(given: Values, step: int) -> None:
    """Train; a NaN gets into a moment of rank 1 right before the checkpoint of `step`, where no loss shows it yet."""
    run = built(given)
    run.resume()
    save = run.save

    def spoil_and_save() -> Fault | None:
        if run.step == step and run.world.rank == 1 and not run.faults.returned:
            run.engine.fragments()[-1].state["exp_avg"][-1] = math.nan
        return save()

    run.save = spoil_and_save  # type: ignore[method-assign]
    Loop(run).train(StopRequest())


def test_numbers_that_no_loss_shows_yet_are_not_saved_either(
    digits: Digits, ranks: Server, sharded: Callable[[int], Path], tmp_path: Path
) -> None:
    every = {"checkpoint": {"every": 5, "keep": 0}, "zero": {"stage": 2}}
    given = values(digits, tmp_path / "run", **every)
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, spoilt_before_saving, given, 10)
    text = failed.value.errors[0][1]
    assert (
        "after step 10 numbers in the weights, their averages or the optimizer's state are not finite" in text
    )
    assert "(rank 1: exp_avg)" in text
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    ranks.run(2, spoilt_before_saving, merge(given, {"faults": {"returns": 1}}), 10)
    assert column(tmp_path / "run", "step") == [*range(1, 6), *range(11, 21)]
    assert column(tmp_path / "run", "batch_hash")[5:] == column(sharded(2), "batch_hash")[10:]


def test_without_leave_to_go_back_it_stops_and_the_same_command_goes_on(
    digits: Digits, ranks: Server, sharded: Callable[[int], Path], tmp_path: Path
) -> None:
    given = values(digits, tmp_path, zero={"stage": 2}, checkpoint={"every": 5, "keep": 0})
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, spoilt_at, given, 13)
    assert {kind for kind, _ in failed.value.errors.values()} == {"TrainingError"}
    assert re.search(
        r"after step 15 numbers in .* are not finite \(rank 1: model, exp_avg", failed.value.errors[0][1]
    )
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]
    ranks.run(2, go, given)
    assert column(tmp_path, "loss") == column(sharded(2), "loss")
    assert differing(state(at_step(tmp_path, STEPS)), state(at_step(sharded(2), STEPS))) == []


def test_where_there_is_nothing_to_go_back_to_it_stops(digits: Digits, tmp_path: Path) -> None:
    def spoil(samples: np.ndarray, ids: np.ndarray) -> None:
        samples[:] = np.nan

    folder = altered(digits.moments, tmp_path / "data", spoil)
    given = values(digits, tmp_path / "run", engine="local", data={"path": str(folder)})
    with pytest.raises(TrainingError, match="2 updates in a row were skipped"):
        go(merge(given, {"train": {"max_skipped": 2}, "faults": {"returns": 3}}))


# --- spikes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spiky(digits: Digits, poisoned: Poisoned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sample of step 2 in each epoch of 5 is far too large, though its loss is finite."""

    def enlarge(samples: np.ndarray, ids: np.ndarray) -> None:
        samples[ids == poisoned.id, :, 0] *= 30

    return altered(digits.moments, tmp_path_factory.mktemp("spiky") / "data", enlarge)


def spiky_run(digits: Digits, spiky: Path, run_dir: Path, **faults: object) -> Values:
    guard = {"faults": {"spike": 4, "window": 4, **faults}, "checkpoint": {"every": 2, "keep": 0}}
    return values(digits, run_dir, data={"path": str(spiky)}, train={"steps": 12}, **guard)


def where(run: Path) -> int:
    """The step of the second epoch whose loss leapt (counted from 1)."""
    losses = column(run, "loss")
    return 1 + 5 + int(np.argmax(losses[5:10]))


def test_a_spike_is_counted_named_and_trained_on_by_default(
    digits: Digits, spiky: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(spiky_run(digits, spiky, tmp_path, returns=0) | {"engine": "local"})
    step = where(tmp_path)
    spikes = column(tmp_path, "spikes")
    assert spikes[step - 2 : step] == [0, 1]
    assert (
        f"the loss leapt to {column(tmp_path, 'loss')[step - 1]:.4g} at step {step}"
        in capsys.readouterr().out
    )
    dumped = json.loads((tmp_path / "spikes" / f"step-{step:08d}-rank-00000.json").read_text())
    assert [len(ids) for ids in dumped["ids_by_step"].values()] == [32]
    assert column(tmp_path, "step") == list(range(1, 13))


def test_a_run_goes_back_behind_a_spike(digits: Digits, ranks: Server, spiky: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    ranks.run(2, go, spiky_run(digits, spiky, told, returns=0))
    step = where(told)
    run = tmp_path / "run"
    ranks.run(2, go, spiky_run(digits, spiky, run, returns=1))
    before = 2 * ((step - 1) // 2)  # the checkpoint
    assert column(run, "step") == [*range(1, before + 1), *range(step + 1, 13)]
    assert column(run, "loss")[:before] == column(told, "loss")[:before]
    assert column(run, "returned")[-1] == 1
    meta = json.loads((at_step(run, 12) / "meta.json").read_text())
    assert meta["faults"]["left_out"] == [[before + 1, step]]
    expected = column(told, "batch_hash")
    assert column(run, "batch_hash") == expected[:before] + expected[step:]


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


def test_a_way_back_that_is_broken_hides_no_spike(
    digits: Digits, spiky: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With every earlier checkpoint broken it goes on as if it might not go back, and says why."""
    given = spiky_run(digits, spiky, tmp_path, returns=1) | {"engine": "local"}
    with group.session():
        run = built(given)
        complete = run.complete

        def complete_and_break_all() -> None:
            complete()
            for path in (tmp_path / "checkpoints").iterdir():
                (path / "COMPLETE").write_text("")

        run.complete = complete_and_break_all  # type: ignore[method-assign]
        Loop(run).train(StopRequest())
    said = capsys.readouterr().out
    assert "there is no way back behind step" in said
    assert "the loss leapt to" in said
    assert column(tmp_path, "step") == list(range(1, 13))


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


# --- ranks that come apart ---------------------------------------------------------------------------------


def come_apart(given: Values) -> None:
    """A number in rank 1's copy of the weights is not what it was."""
    run = built(given)
    if group.World.from_env().rank == 1:
        with torch.no_grad():
            dict(run.engine.module.named_parameters())["output.proj.bias"].add_(0.1)
    recovery.save(run)


@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_whose_weights_have_come_apart_are_named(
    digits: Digits, ranks: Server, tmp_path: Path, stage: int
) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, come_apart, values(digits, tmp_path, zero={"stage": stage}))
    for kind, text in failed.value.errors.values():
        assert kind == TrainingError.__name__
        assert "the model weights of rank 1 compute a probe loss of" in text
    assert not (tmp_path / "checkpoints").exists()
