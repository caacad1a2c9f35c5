"""Runs that are asked to end: saved at a step that all ranks agree on, and the same run when they go on."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dit.errors import Interrupted, InterruptTold, Stopped
from dit.experiments.parts import make_parts
from dit.ranks import group
from dit.ranks.group import SIGNALS
from dit.train.checkpoints import checkpoint
from dit.train.loop import Loop
from dit.train.start import train
from dit.train.stop import GO_ON, INTERRUPTED, LEAVE, SAME, STOPPED, rank_flags, stop_request
from tests.datasets import Digits
from tests.rank_processes import RanksFailed, Server
from tests.surroundings import signals_kept
from tests.train.runs import (
    STEPS,
    Engine,
    Values,
    at_step,
    built,
    column,
    differing,
    engine_of,
    experiment,
    forked,
    go,
    go_until,
    state,
    values,
)


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGINT])
def test_one_rank_alone_hears_it_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    urgency = INTERRUPTED if number == signal.SIGINT else STOPPED
    with stop_request() as stop, rank_flags(group.World()) as flags, stop.is_heard_after_steps(str):
        assert flags.exchange(stop.urgency) == (GO_ON,)
        os.kill(os.getpid(), number)
        assert flags.exchange(stop.urgency) == (urgency,)
        assert stop.heard == number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_signals_that_come_together_are_one_and_ctrl_c_is_what_counts(first: signal.Signals) -> None:
    """A terminal's goes to the ranks and to their launchers, which pass it on, as it came or as SIGTERM."""
    with stop_request() as stop, stop.is_heard_after_steps(str):
        for number in (first, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.urgency == INTERRUPTED


def test_before_the_first_step_ctrl_c_ends_it_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_request():
        os.kill(os.getpid(), signal.SIGINT)


def test_nothing_hears_of_signals_afterwards() -> None:
    """Of an interrupted run too: the number of the socket may be another file's by then."""
    with stop_request():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        for thread in threading.enumerate():
            if thread.name == "backstop":
                thread.join()
    assert signal.set_wakeup_fd(-1) == -1


def test_where_the_process_is_somebody_elses_nothing_ends_it() -> None:
    """A second Ctrl-C raises in it, as in any Python; no thread waits to end the process."""
    with stop_request(may_exit=False) as stop:
        assert signal.set_wakeup_fd(-1) == -1
        assert not [thread for thread in threading.enumerate() if thread.name == "backstop"]
        with stop.is_heard_after_steps(str):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.urgency == INTERRUPTED


def interrupted_twice(between: float) -> list[str]:
    """What a second Ctrl-C does so many seconds after the first."""
    seen = []
    with stop_request() as stop, stop.is_heard_after_steps(str):
        try:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                seen.append("heard")
                time.sleep(between)
        except KeyboardInterrupt:
            seen.append("ended")
    return seen


def test_a_second_ctrl_c_ends_it_at_once_and_one_that_comes_with_the_first_does_not(ranks: Server) -> None:
    soon, late = (ranks.start_apart(1, interrupted_twice, between) for between in (0.1, SAME + 0.1))
    assert soon.wait() == [["heard", "heard"]]
    assert late.wait() == [["heard", "ended"]]


def test_once_stopped_no_signal_ends_it_otherwise() -> None:
    """A launcher may tell the ranks that are still leaving to end."""
    with signals_kept():
        with pytest.raises(Stopped), stop_request():
            raise Stopped
        os.kill(os.getpid(), signal.SIGTERM)  # nothing happens


def heard_by(one: int, at: int) -> list[list[int]]:
    """What is agreed on this rank in eight steps, where rank `one` gets a signal before step `at`, and its rank."""
    with group.session() as world, stop_request() as stop, rank_flags(world) as flags:
        said = []
        for step in range(8):
            if (world.rank, step) == (one, at):
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01 * world.rank)  # ranks are not in step
            said.append(list(flags.exchange(stop.urgency, world.rank)))
        return said


def test_all_ranks_hear_of_it_at_the_same_step(ranks: Server) -> None:
    found = ranks.run(3, heard_by, 2, 3)
    assert found == [[[0, 0]] + [[0, 2]] * 3 + [[1, 2]] * 4] * 3  # a step after rank 2 did


@pytest.mark.parametrize(
    ("number", "ends", "words", "engine"),
    [
        (signal.SIGTERM, Stopped, "stopped by a signal: step", 2),
        (signal.SIGINT, Interrupted, "interrupted: step", "plain"),
    ],
)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    digits: Digits,
    ranks: Server,
    sharded,
    hooked: dict,
    tmp_path: Path,
    number: int,
    ends: type,
    words: str,
    engine: Engine,
) -> None:
    given = values(digits, tmp_path, **engine_of(engine), checkpoint={"every": 100, "keep": 0}, **hooked)
    job = ranks.start(2, go_until, given, STEPS - 3, tmp_path / "released")
    end = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").is_file() or len(column(tmp_path, "step")) < 5:
        assert time.monotonic() < end, job.output()
        time.sleep(0.003)
    os.kill(job.processes[1].pid, number)
    (tmp_path / "released").touch()
    with pytest.raises(RanksFailed) as failed:
        job.wait()
    assert {kind for kind, _ in failed.value.errors.values()} == {ends.__name__}
    assert sorted(failed.value.errors) == [0, 1]
    (saved,) = (tmp_path / "checkpoints").iterdir()  # the only one
    assert 5 <= int(saved.name.removeprefix("step-")) < STEPS
    last = job.output().splitlines()[-1]
    assert last == f"{words} {int(saved.name.removeprefix('step-'))} is saved, and the same command goes on"
    ranks.run(2, go, given)
    quiet = sharded(engine)
    assert (tmp_path / "held_out.jsonl").read_text() == (quiet / "held_out.jsonl").read_text()
    assert column(tmp_path, "batch_hash") == column(quiet, "batch_hash")
    assert column(tmp_path, "loss") == column(quiet, "loss")
    assert differing(state(at_step(tmp_path, STEPS)), state(at_step(quiet, STEPS))) == []


def stopped_at(given: Values, step: int) -> None:
    """Train, and get a signal on every rank when `step` steps are nearly done."""
    run = built(given)
    run.resume()
    loop = Loop(run)
    train_step = loop.train_step

    def step_and_hear(batch: Any) -> Any:
        if run.step == step - 1 - (run.world.size > 1):  # with several ranks it is agreed on one step later
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(batch)

    loop.train_step = step_and_hear  # type: ignore[method-assign]
    with stop_request() as stop:
        loop.train(stop)


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_due_at_the_step_of_a_stop_is_not_lost(
    digits: Digits, ranks: Server, hooked: dict, tmp_path: Path, size: int
) -> None:
    """A snapshot, a held-out loss and a grid at step 10: the first is taken, the others are the next start's."""
    ema = {"decay": 0.9, "power": [0.05, 0.1], "snapshot_every": 5}
    sections = {**hooked, "ema": ema, "zero": {"stage": 2}, "checkpoint": {"every": 100, "keep": 0}}
    quiet, run = tmp_path / "quiet", tmp_path / "run"
    ranks.run(size, go, values(digits, quiet, **sections))
    given = values(digits, run, **sections)
    with pytest.raises(RanksFailed):
        ranks.run(size, stopped_at, given, 10)
    assert [p.name for p in sorted((run / "snapshots").iterdir())] == ["step-00000005", "step-00000010"]
    assert not (run / "held_out.jsonl").exists()
    shutil.rmtree(run / "snapshots" / "step-00000010")  # as if it had been killed before that was whole
    ranks.run(size, go, given)
    assert (run / "held_out.jsonl").read_text() == (quiet / "held_out.jsonl").read_text()
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["step-00000010.png", "step-00000020.png"]
    for step in (5, 10, 15, 20):
        ours, theirs = (checkpoint.read(f / "snapshots" / f"step-{step:08d}") for f in (run, quiet))
        assert [e["sha256"] for e in ours.meta["files"]] == [e["sha256"] for e in theirs.meta["files"]]


def started_with_a_signal(given: Values) -> None:
    """Train; rank 1 gets a signal when its data are opened, before there is a model."""
    cfg = experiment(given)

    def signalled(*arguments: Any) -> Any:
        if group.World.from_env().rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_parts(*arguments)

    train(cfg, signalled)


def test_a_signal_that_comes_while_a_run_starts_is_heard(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    """It saves after the first step on which the ranks agree, and goes on when it is started again."""
    given = values(digits, tmp_path, zero={"stage": 2}, checkpoint={"every": 100, "keep": 0})
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, started_with_a_signal, given)
    assert {kind for kind, _ in failed.value.errors.values()} == {Stopped.__name__}
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert 1 <= int(saved.name.removeprefix("step-")) <= 2
    ranks.run(2, go, given)
    assert column(tmp_path, "step") == list(range(1, STEPS + 1))


def interrupted_at_the_start(given: Values) -> None:
    """Train; Ctrl-C comes while the parts of the run are made."""

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return make_parts(*arguments)

    train(experiment(given), signalled)


def test_ctrl_c_while_a_run_starts_says_what_there_is(
    digits: Digits, ranks: Server, reference: Path, tmp_path: Path
) -> None:
    new, old = tmp_path / "new", forked(reference, 10, tmp_path / "old")
    before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    for run in (new, old):
        job = ranks.start(1, interrupted_at_the_start, values(digits, run, engine="local"))
        with pytest.raises(RanksFailed) as failed:
            job.wait()
        assert failed.value.errors[0][0] == InterruptTold.__name__
        assert "interrupted while starting, before any step: " in job.output()
        there = "there is no checkpoint yet" if run == new else "the newest checkpoint is step-00000010"
        assert there in job.output()
    assert not new.exists()
    assert {p: p.read_bytes() for p in old.rglob("*") if p.is_file() and p.name != ".lock"} == {
        p: content for p, content in before.items() if p.name != ".lock"
    }


def slow_to_save(given: Values) -> None:
    """Train; saving takes a minute."""
    run = built(given)
    run.save = lambda: time.sleep(60)  # type: ignore[method-assign]
    with stop_request() as stop:
        Loop(run).train(stop)


def test_a_second_ctrl_c_does_not_wait_for_what_the_first_asks_for(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    given = values(digits, tmp_path, engine="local", train={"steps": 10**6}, checkpoint={"every": 10**6})
    job = ranks.start(1, slow_to_save, given)
    end = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").is_file():
        assert time.monotonic() < end, job.output()
        time.sleep(0.01)
    os.kill(job.processes[0].pid, signal.SIGINT)
    time.sleep(SAME + 0.2)
    os.kill(job.processes[0].pid, signal.SIGINT)
    with pytest.raises(RanksFailed) as failed:
        job.wait(30)
    assert failed.value.errors[0][0] == InterruptTold.__name__
    assert "Ctrl-C: the run ends after this step, once it is saved" in job.output()
    assert ", which is not saved: there is no checkpoint yet" in job.output().splitlines()[-1]


def stuck(folder: Path) -> None:
    """Wait for another rank that never comes: no signal's handler runs while it does."""
    with stop_request() as stop, stop.is_heard_after_steps(lambda: "there is no checkpoint yet"):
        if group.World.from_env().rank == 1:
            time.sleep(100)
        (folder / "stuck").touch()
        group.all_sum(torch.ones(1))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_rank_that_hangs(ranks: Server, tmp_path: Path) -> None:
    with ranks.start(2, stuck, tmp_path) as job:
        end = time.monotonic() + 60
        while not (tmp_path / "stuck").exists():
            assert time.monotonic() < end, job.output()
            time.sleep(0.01)
        time.sleep(0.5)  # until it is in the call
        os.kill(job.processes[0].pid, signal.SIGINT)
        time.sleep(SAME + 0.2)
        assert job.processes[0].is_alive()
        os.kill(job.processes[0].pid, signal.SIGINT)
        job.processes[0].join(LEAVE + 10)
        assert job.processes[0].exitcode == 130
        assert "ended at once: there is no checkpoint yet" in job.output()
