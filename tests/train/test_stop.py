"""Runs that are asked to end: saved at a step that all ranks agree on, and the same run when they go on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from dit import dist
from dit.dist import SIGNALS
from dit.errors import Stopped
from dit.train.stop import rank_flags, stop_request
from tests.datasets import Digits
from tests.ranks import RanksFailed, Server
from tests.train.runs import STEPS, at_step, column, differing, go, state, values


@pytest.mark.parametrize("number", SIGNALS)
def test_one_rank_alone_hears_it_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_request() as stop, rank_flags(dist.World()) as flags:
        assert flags.exchange(stop.heard is not None) == (False,)
        os.kill(os.getpid(), number)
        assert flags.exchange(stop.heard is not None) == (True,)
        assert stop.heard == number
    assert signal.getsignal(number) == before


def test_once_stopped_no_signal_ends_it_otherwise() -> None:
    """A launcher may tell the ranks that are still leaving to end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(Stopped), stop_request():
            raise Stopped
        os.kill(os.getpid(), signal.SIGTERM)  # nothing happens
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heard_by(one: int, at: int) -> list[list[int]]:
    """What is agreed on this rank in eight steps, where rank `one` gets a signal before step `at`, and its rank."""
    with dist.session() as world, stop_request() as stop, rank_flags(world) as flags:
        said = []
        for step in range(8):
            if (world.rank, step) == (one, at):
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01 * world.rank)  # ranks are not in step
            said.append(list(flags.exchange(stop.heard is not None, world.rank)))
        return said


def test_all_ranks_hear_of_it_at_the_same_step(ranks: Server) -> None:
    found = ranks.run(3, heard_by, 2, 3)
    assert found == [[[0, 0]] + [[0, 2]] * 3 + [[1, 2]] * 4] * 3  # a step after rank 2 did


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    digits: Digits, ranks: Server, sharded, hooked: dict, tmp_path: Path
) -> None:
    given = values(digits, tmp_path, zero={"stage": 2}, checkpoint={"every": 100, "keep": 0}, **hooked)
    job = ranks.start(2, go, given)
    end = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").is_file() or len(column(tmp_path, "step")) < 5:
        assert time.monotonic() < end, job.output()
        time.sleep(0.003)
    os.kill(job.processes[1].pid, signal.SIGTERM)
    with pytest.raises(RanksFailed) as failed:
        job.wait()
    assert {kind for kind, _ in failed.value.errors.values()} == {Stopped.__name__}
    assert sorted(failed.value.errors) == [0, 1]
    (saved,) = (tmp_path / "checkpoints").iterdir()  # the only one
    assert 5 <= int(saved.name.removeprefix("step-")) < STEPS
    assert "is saved, and the same command goes on" in job.output()
    ranks.run(2, go, given)
    assert column(tmp_path, "batch_hash") == column(sharded(2), "batch_hash")
    assert column(tmp_path, "loss") == column(sharded(2), "loss")
    assert differing(state(at_step(tmp_path, STEPS)), state(at_step(sharded(2), STEPS))) == []
