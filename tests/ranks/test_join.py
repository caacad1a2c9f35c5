"""Ranks that meet in a set time; who is named when some do not come. Real processes, real stores."""

from __future__ import annotations

import os
import time

import pytest

from dit.ranks import group, join
from dit.ranks.join import JoinError, ranks_text
from tests.rank_processes import Job, RanksFailed, Server


def slurm(rank: int, size: int, port: int, node: str, seconds: float) -> dict[str, str]:
    """What srun and launch/multinode.sh set."""
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(size),
        "SLURM_LOCALID": "0",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "42",
        "SLURMD_NODENAME": node,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DIT_NODES": "n0 n1 n2 n3",
        "DIT_JOIN_SECONDS": str(seconds),
    }


def come(envs: list[dict[str, str]]) -> list[str]:
    """What a process of `start_apart` does: join as srun's variables say, and see who is there."""
    mine = envs[int(os.environ["RANK"])]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    os.environ.update(mine)
    with group.session():
        return sorted(group.gather_objects(group.node_name()))


def start(ranks: Server, *envs: dict[str, str]) -> Job:
    return ranks.start_apart(len(envs), come, list(envs))


def errors(job: Job) -> list[str]:
    """What each process says, all of which fail to join."""
    with pytest.raises(RanksFailed) as failed:
        job.wait()
    assert {kind for kind, _ in failed.value.errors.values()} == {"JoinError"}
    assert len(failed.value.errors) == len(job.pipes)
    return [text for _, text in failed.value.errors.values()]


def test_all_come(ranks: Server) -> None:
    port = group.free_port()
    job = start(ranks, *(slurm(rank, 3, port, f"n{rank % 2}", 60) for rank in range(3)))
    assert job.wait() == [["n0", "n0", "n1"]] * 3


def test_those_who_do_not_come_are_named_on_every_rank_that_came(ranks: Server) -> None:
    """4 of 8 ranks, on 2 of 4 nodes."""
    port = group.free_port()
    where = {5: "n2", 4: "n2", 1: "n0", 0: "n0"}
    job = start(ranks, *(slurm(rank, 8, port, node, 3) for rank, node in where.items()))
    for text in errors(job):
        assert f"ranks 2-3, 6-7 of 8 did not come to 127.0.0.1:{port} within 3 s. " in text
        assert "Nobody came from n1, n3. Came: n0 (ranks 0-1); n2 (ranks 4-5)." in text
    assert [job.output(i) for i in range(4)] == [""] * 4  # none of torch's call stacks


def test_rank_0_that_is_not_there_is_named_with_its_address(ranks: Server) -> None:
    port = group.free_port()
    job = start(ranks, slurm(3, 4, port, "n3", 1))
    (text,) = errors(job)
    assert f"rank 3 on n3 cannot reach rank 0 at 127.0.0.1:{port} within 1 s (Connection refused)" in text
    assert job.output() == ""


def test_a_name_that_nobody_knows_is_told_as_such(ranks: Server) -> None:
    env = slurm(1, 2, group.free_port(), "n1", 1) | {"MASTER_ADDR": "no-such-node.invalid"}
    assert "cannot reach rank 0 at no-such-node.invalid:" in errors(start(ranks, env))[0]


def test_an_address_that_is_none_is_refused(ranks: Server) -> None:
    env = slurm(1, 2, 1, "n1", 1) | {"MASTER_PORT": "http"}
    assert "MASTER_ADDR and MASTER_PORT must name" in errors(start(ranks, env))[0]


def test_two_jobs_on_one_port(ranks: Server) -> None:
    """Each rank of the second job says so, and the first is not disturbed."""
    port = group.free_port()
    with start(ranks, slurm(0, 2, port, "n0", 60)) as first:
        other = {"SLURM_JOB_ID": "43"}
        visitor = start(ranks, slurm(1, 2, port, "n1", 1) | other)
        (text,) = errors(visitor)
        assert f"rank 1 on n1 reached 127.0.0.1:{port}, and then heard nothing of rank 0 of this job" in text
        (text,) = errors(start(ranks, slurm(0, 2, port, "n0", 1) | other))
        assert f"rank 0 on n0 cannot serve at 127.0.0.1:{port}" in text
        assert "address already in use" in text
        last = start(ranks, slurm(1, 2, port, "n1", 60))
        assert first.wait() == last.wait() == [["n0", "n1"]]


def test_ranks_that_meet_and_cannot_connect_to_each_other(ranks: Server) -> None:
    port, wrong = group.free_port(), {"GLOO_SOCKET_IFNAME": "no-such-interface"}
    job = start(ranks, slurm(0, 2, port, "n0", 3), slurm(1, 2, port, "n1", 3) | wrong)
    first, second = errors(job)
    assert "all 2 ranks are there, but rank 0 on n0 cannot connect to the others" in first
    assert "all 2 ranks are there, but rank 1 on n1 cannot connect to the others" in second
    assert "no-such-interface" in second


def test_rank_0_that_dies_while_others_wait(ranks: Server) -> None:
    port = group.free_port()
    host, visitor = (start(ranks, slurm(rank, 3, port, f"n{rank}", (60, 4)[rank])) for rank in (0, 1))
    time.sleep(1)
    host.kill()
    (text,) = errors(visitor)
    assert "heard nothing of rank 0 of this job" in text or "cannot reach rank 0" in text


def test_torchrun_that_is_gone_when_a_rank_comes(ranks: Server) -> None:
    """Its store went with it: the rank does not wait for as long as a collective may take."""
    env = slurm(1, 2, group.free_port(), "n1", 1) | {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }
    (text,) = errors(start(ranks, env))
    assert "rank 1 on n1 cannot connect to the others" in text
    assert "DIT_JOIN_SECONDS=N waits longer" in text


@pytest.mark.parametrize("text", ["0", "-3", "soon", "nan", "inf"])
def test_what_is_no_number_of_seconds_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(join.SECONDS, text)
    with pytest.raises(JoinError, match=f"DIT_JOIN_SECONDS={text}"):
        join.patience()


def test_patience_is_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(join.SECONDS, raising=False)
    assert join.patience() == 120
    monkeypatch.setenv(join.SECONDS, "2.5")
    assert join.patience() == 2.5


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([1, 0], "ranks 0-1"), ([7, 0, 2, 1], "ranks 0-2, 7"), ([2, 4], "ranks 2, 4")],
)
def test_ranks_text(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text
