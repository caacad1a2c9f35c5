"""Ranks that die, stop, stall or fail alone: who is named, how soon, and that nothing else is taken for that."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dit.data import DataError
from dit.errors import Stopped
from dit.ranks import group
from dit.ranks.group import PeerError, World
from dit.ranks.watch import Watch
from dit.train.loop import Loop
from dit.train.stop import StopRequest
from tests.datasets import Digits
from tests.rank_processes import Job, RanksFailed, Server
from tests.train.runs import built, column, go, values

LIMIT = 3.0  # seconds
STEPS = 6


def act(what: str, step: int) -> None:
    """What one rank does at step 3."""
    if step != 3:
        return
    if what == "raise":
        raise DataError("shard-7.tar is altered")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "stop":
        raise Stopped
    if what == "sleep":
        time.sleep(60)
    if what in ("SIGSTOP", "SIGKILL"):
        os.kill(os.getpid(), signal.Signals[what])


def watched(
    folder: str, who: int | None, what: str, phase: str = "data", pause: tuple[str, float] = ("", 0)
) -> int:
    """Six steps with a collective in each, in which rank `who` does `what`; pause: all ranks sleep in that phase."""
    world = World.from_env()
    watch = Watch(world, LIMIT, Path(folder))
    with watch:
        for step in range(STEPS):
            for name in ("hook", "data", "step"):
                watch.at(name, step)
                if name == phase and who in (world.rank, -1):
                    act(what, step)
                if name == pause[0] and step == 2:
                    time.sleep(pause[1])
            group.all_sum(torch.ones(1))
    return step


def ended(job: Job, rank: int, within: float) -> str:
    """What a rank said until it ended, in at most so many seconds, with status 1."""
    process = job.processes[rank]
    process.join(within)
    assert not process.is_alive(), job.output(rank)
    assert process.exitcode == 1, job.output(rank)
    return job.output(rank)


def until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_stopped_is_named_by_the_others(ranks: Server, tmp_path: Path, who: int) -> None:
    with ranks.start(3, watched, str(tmp_path), who, "SIGSTOP") as job:
        until(lambda: is_stopped(job.processes[who].pid))
        asked = time.monotonic()
        said = [ended(job, rank, 10 * LIMIT) for rank in range(3) if rank != who]
        assert time.monotonic() - asked < 10 * LIMIT
        pid = job.processes[who].pid
        assert f"rank {who} on {socket.gethostname()} (process {pid}) has not been heard of for" in said[0]
        assert re.search(r", last .* after step \d: stopped, or the node or its network is down", said[0])
        other = 2 if who == 0 else 0
        stacks = (tmp_path / "hang" / f"rank-{other:05d}.txt").read_text()
        assert f"rank {who} on" in stacks.splitlines()[0]
        assert "all_sum" in stacks
        os.kill(pid, signal.SIGCONT)
        kind, text, _ = pickle.loads(job.pipes[who].recv_bytes())  # when it wakes it ends too, and says why
        assert kind == PeerError.__name__
        assert text.startswith(f"rank {who} on")
        assert "has not been heard of for" in text


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_killed_is_named_at_once(ranks: Server, tmp_path: Path, who: int) -> None:
    with ranks.start(3, watched, str(tmp_path), who, "SIGKILL", "step") as job:
        started = time.monotonic()
        with pytest.raises(RanksFailed) as failed:
            job.wait(60)
        assert time.monotonic() - started < 60
        errors = failed.value.errors
        assert errors.pop(who)[0] == "Died"
        assert len(errors) == 2
        for kind, text in errors.values():
            assert kind == PeerError.__name__, job.output()
            name = f"rank {who} on {socket.gethostname()} (process {job.processes[who].pid})"
            assert text.startswith(f"{name} ended without a word, last heard of "), text


def test_a_rank_that_waits_for_data_is_named_with_its_stack(ranks: Server, tmp_path: Path) -> None:
    with ranks.start(3, watched, str(tmp_path), 1, "sleep") as job:
        said = [ended(job, rank, 30) for rank in range(3)]
    name = f"rank 1 on {socket.gethostname()} (process {job.processes[1].pid})"
    named = f"{name} has been waiting for data after step 3 for"
    assert named in said[0]
    assert named in said[1]
    assert said[2] == ""  # two of a thousand ranks are enough
    assert "and 2 others cannot go on without" in said[0]
    assert "train.hang_timeout = 3" in said[0]
    assert "in act" in (tmp_path / "hang" / "rank-00001.txt").read_text()
    assert "all_sum" in (tmp_path / "hang" / "rank-00002.txt").read_text()


def test_where_all_wait_at_one_place_that_is_said(ranks: Server, tmp_path: Path) -> None:
    with ranks.start(2, watched, str(tmp_path), -1, "sleep", "step") as job:
        said = ended(job, 0, 30)
    assert "all 2 ranks have been in the training step after step 3 for" in said


@pytest.mark.parametrize("who", [0, 2])
def test_a_rank_that_fails_alone_is_named_with_its_error(ranks: Server, tmp_path: Path, who: int) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.start(3, watched, str(tmp_path), who, "raise").wait(60)
    errors = failed.value.errors
    assert errors.pop(who) == ("DataError", "shard-7.tar is altered")
    assert len(errors) == 2
    for kind, text in errors.values():
        assert kind == PeerError.__name__
        assert text.startswith(f"rank {who} on {socket.gethostname()} (process ")
        assert text.endswith("failed waiting for data after step 3: DataError: shard-7.tar is altered")


def test_so_is_one_that_is_interrupted(ranks: Server, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.start(2, watched, str(tmp_path), 1, "interrupt").wait(60)
    assert failed.value.errors[1][0] == "KeyboardInterrupt"
    assert failed.value.errors[0][0] == PeerError.__name__
    assert failed.value.errors[0][1].endswith("failed waiting for data after step 3: interrupted")


def stuck_beside_a_failure(folder: str) -> None:
    """Rank 1 fails; rank 0 is in something that no broken connection ends, as over NCCL."""
    with Watch(World.from_env(), LIMIT, Path(folder)):
        if World.from_env().rank == 1:
            raise DataError("shard-7.tar is altered")
        time.sleep(60)


def test_one_that_does_not_notice_is_ended(ranks: Server, tmp_path: Path) -> None:
    with ranks.start(2, stuck_beside_a_failure, str(tmp_path)) as job:
        said = ended(job, 0, 30)
    assert "error (rank 0): rank 1 on" in said
    assert "DataError: shard-7.tar is altered" in said
    assert "stuck_beside_a_failure" in (tmp_path / "hang" / "rank-00000.txt").read_text()


def test_only_steps_and_their_data_have_a_limit(ranks: Server, tmp_path: Path) -> None:
    """Of all pauses below the limit none is a hang, and in a hook one beyond it is none either; three jobs at once."""
    seconds = {"hook": 1.5 * LIMIT, "data": 0.5 * LIMIT, "step": 0.5 * LIMIT}
    jobs = {p: ranks.start(2, watched, str(tmp_path / p), None, "", "", (p, s)) for p, s in seconds.items()}
    for pause, job in jobs.items():
        assert job.wait(60) == [STEPS - 1] * 2, pause
        assert not (tmp_path / pause / "hang").exists(), pause


def test_leaving_in_good_order_is_no_death(ranks: Server, tmp_path: Path) -> None:
    job = ranks.start(2, watched, str(tmp_path), -1, "stop")
    with pytest.raises(RanksFailed) as failed:
        job.wait(60)
    assert {kind for kind, _ in failed.value.errors.values()} == {Stopped.__name__}
    assert [job.output(rank) for rank in (0, 1)] == ["", ""]


def leaves_later(folder: str, seconds: float) -> tuple[float, float]:
    """Rank 1 leaves so many seconds after rank 0; when this rank began to leave and when it had left, by one clock."""
    rank = World.from_env().rank
    with Watch(World.from_env(), LIMIT, Path(folder)) as watch:
        watch.at("save", 9)
        time.sleep(seconds * rank)
        begun = time.monotonic()
    left = time.monotonic()
    group.barrier()
    return begun, left


def test_rank_0_waits_for_the_last_to_leave_but_not_for_ever(ranks: Server, tmp_path: Path) -> None:
    soon, late = (ranks.start(2, leaves_later, str(tmp_path), seconds) for seconds in (1.0, 6.0))
    (_, main), (other, _) = soon.wait()
    assert main > other
    (begun, main), (other, _) = late.wait()
    assert begun + 2 < main < other


def suspended_together(folder: str) -> int:
    """All ranks of a job are stopped for longer than the limit, as a scheduler does that lends their nodes."""
    (Path(folder) / f"pid-{os.getpid()}").touch()
    return watched(folder, None, "", "", ("hook", LIMIT + 2))


def test_a_job_that_was_suspended_as_a_whole_goes_on(ranks: Server, tmp_path: Path) -> None:
    """Whichever rank wakes first, here of two jobs at once: the others were not late."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    jobs = [ranks.start(2, suspended_together, str(folder)) for folder in folders]
    until(lambda: len(list(tmp_path.glob("*/pid-*"))) == 4)
    time.sleep(0.5)
    in_turn = [[jobs[first].processes[rank].pid for first, rank in ((0, r), (1, 1 - r))] for r in (0, 1)]
    for pid in in_turn[1] + in_turn[0]:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(LIMIT)
    for pids in in_turn:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.2)
    for job, folder in zip(jobs, folders, strict=True):
        assert job.wait(60) == [STEPS - 1] * 2
        assert not (folder / "hang").exists()


def with_strangers(folder: str) -> int:
    """Others find the port: one says nothing, one talks HTTP, one pretends to be rank 1."""
    world = World.from_env()
    watch = Watch(world, LIMIT, Path(folder))
    with watch, contextlib.ExitStack() as stack:
        if world.is_main:
            port = watch._thread._server.getsockname()[1]  # type: ignore[union-attr]
            me = json.dumps({"token": "?", **asdict(watch._post.peer()), "rank": 1}).encode() + b"\n"
            for words in (b"", b"GET / HTTP/1.1\r\n\r\n", me):
                stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                stranger.sendall(words)
                if words == me:
                    stranger.shutdown(socket.SHUT_WR)
        for step in range(STEPS):
            watch.at("step", step)
            group.all_sum(torch.ones(1))
            time.sleep(0.2)
        assert watch._thread is not None
        assert watch._thread.is_alive()
        assert watch._thread.verdict is None
    return step


def test_strangers_at_the_port_are_sent_away(ranks: Server, tmp_path: Path) -> None:
    assert ranks.run(2, with_strangers, str(tmp_path)) == [STEPS - 1] * 2


def test_without_a_limit_a_failure_is_named_still(ranks: Server, tmp_path: Path) -> None:
    found = ranks.run(2, unlimited, str(tmp_path))
    assert found[0].endswith("DataError: gone")
    assert found[1] == "gone"


def unlimited(folder: str) -> str:
    try:
        with Watch(World.from_env(), None, Path(folder)):
            if World.from_env().rank == 1:
                raise DataError("gone")
            group.all_sum(torch.ones(1))
    except (PeerError, DataError) as error:
        return str(error)
    except RuntimeError:
        raise AssertionError("the broken connection was not explained") from None
    return ""


# --- in the loop -------------------------------------------------------------------------------------------


def troubled(given: dict[str, Any], what: str) -> None:
    """A run in which the data of rank 1 do not come, or cannot be read, at step 3."""
    run = built(given)
    iterate = run.feed.stream.iterate

    def with_trouble(*args: Any) -> Any:
        for step, batch in enumerate(iterate(*args)):
            if run.world.rank == 1:
                act(what, step)
            yield batch

    run.feed.stream.iterate = with_trouble  # type: ignore[method-assign]
    Loop(run).train(StopRequest())


def test_a_run_whose_data_do_not_come_ends_with_the_rank_named(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    given = values(digits, tmp_path, train={"hang_timeout": LIMIT, "steps": 8})
    with ranks.start(2, troubled, given, "sleep") as job:
        said = ended(job, 0, 60)
        assert "error (rank 1): rank 1 on" in ended(job, 1, 5)
    assert "has been waiting for data after step 3 for" in said
    assert "with_trouble" in (tmp_path / "hang" / "rank-00001.txt").read_text()
    assert "train_step" in (tmp_path / "hang" / "rank-00000.txt").read_text()


def test_a_run_with_a_reader_that_fails_on_one_rank_says_so_on_all(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    given = values(digits, tmp_path, train={"steps": 8})
    with pytest.raises(RanksFailed) as failed:
        ranks.start(2, troubled, given, "raise").wait(60)
    assert failed.value.errors[1] == ("DataError", "shard-7.tar is altered")
    kind, text = failed.value.errors[0]
    assert kind == PeerError.__name__
    assert text.endswith("DataError: shard-7.tar is altered")


def test_the_limit_leaves_no_trace_in_a_run(digits: Digits, tmp_path: Path) -> None:
    """One process, whose limit changes between its starts."""
    go(values(digits, tmp_path, engine="local", train={"steps": 2, "hang_timeout": 5}))
    go(values(digits, tmp_path, engine="local", train={"steps": 3, "hang_timeout": None}))
    assert column(tmp_path, "step") == [1, 2, 3]
    assert not (tmp_path / "hang").exists()
