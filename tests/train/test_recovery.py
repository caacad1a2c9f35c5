"""Going back behind faults in the numbers: weights that are spoilt, spikes, ranks that come apart (I4)."""

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

from dit.config import merge
from dit.ranks import group
from dit.train import recovery
from dit.train.faults import Fault, TrainingError
from dit.train.loop import Loop
from dit.train.stop import StopRequest
from tests.datasets import Digits, altered
from tests.rank_processes import RanksFailed, Server
from tests.train.conftest import Poisoned
from tests.train.runs import (
    STEPS,
    Engine,
    Values,
    at_step,
    built,
    column,
    differing,
    engine_of,
    forked,
    go,
    state,
    values,
)

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


@pytest.mark.parametrize("engine", [0, 2, 3, "plain"])
def test_weights_that_are_spoilt_are_never_saved_and_the_run_goes_back(
    digits: Digits,
    ranks: Server,
    sharded: Callable[[Engine], Path],
    hooked: dict,
    tmp_path: Path,
    engine: Engine,
) -> None:
    """NaN in the optimizer at 11 spoils the weights in step 12; the next are skipped; the last checkpoint is of 10."""
    every = {"checkpoint": {"every": 5, "keep": 0}, **engine_of(engine)}
    given = values(digits, tmp_path / "run", **every, train={"max_skipped": 4}, faults={"returns": 1})
    ranks.run(2, spoilt_at, given, 11)
    run = tmp_path / "run"
    assert column(run, "step") == [*range(1, 11), *range(16, 21)]
    assert column(run, "batch_hash")[10:] == column(sharded(2), "batch_hash")[15:]
    assert column(run, "returned") == [0] * 10 + [1] * 5
    assert column(run, "samples")[-1] == (STEPS - 5) * 32
    assert column(run, "skipped")[-1] == 0
    # as a run that goes on from that checkpoint behind those steps
    expected = forked(sharded(engine), 10, tmp_path / "expected")
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


# --- ranks that come apart ---------------------------------------------------------------------------------


def come_apart(given: Values) -> None:
    """A number in rank 1's copy of the weights is not what it was."""
    run = built(given)
    if group.World.from_env().rank == 1:
        with torch.no_grad():
            dict(run.engine.module.named_parameters())["output.proj.bias"].add_(0.1)
    recovery.save(run)


@pytest.mark.parametrize("engine", [0, 2, "plain"])
def test_ranks_whose_weights_have_come_apart_are_named(
    digits: Digits, ranks: Server, tmp_path: Path, engine: Engine
) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, come_apart, values(digits, tmp_path, **engine_of(engine)))
    for kind, text in failed.value.errors.values():
        assert kind == TrainingError.__name__
        assert "the model weights of rank 1 compute a probe loss of" in text
    assert not (tmp_path / "checkpoints").exists()
