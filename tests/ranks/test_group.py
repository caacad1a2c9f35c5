"""Who a process is, and what processes do together, on real gloo ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as td

import dit
from dit.errors import Stopped, UserError
from dit.ranks import group
from dit.ranks.group import World
from dit.version import code_version
from tests.rank_processes import RanksFailed, Server

ROOT = Path(__file__).parents[2]
NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT",
    "SLURM_STEP_TASKS_PER_NODE", "LOCAL_WORLD_SIZE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


# --- World -------------------------------------------------------------------------------------------------


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert World.from_env() == World(0, 1, 0)
    assert World.from_env().is_main


def test_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert World.from_env() == World(5, 8, 1)
    assert not World.from_env().is_main


SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}


def test_slurms_variables_count_inside_a_step_that_was_given_an_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**SLURM, "MASTER_ADDR": "node1"}.items():
        monkeypatch.setenv(name, value)
    assert World.from_env() == World(5, 8, 1)
    monkeypatch.delenv("SLURM_STEP_ID")  # the batch script itself, which is one process
    assert World.from_env() == World()


def test_torchrun_inside_a_slurm_step_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in {**SLURM, "MASTER_ADDR": "node1", **torchrun}.items():
        monkeypatch.setenv(name, value)
    assert World.from_env() == World(0, 2, 0)


def test_half_a_launch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE, LOCAL_RANK not set beside RANK"):
        World.from_env()


def test_cores_are_shared_by_the_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    here, whole = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    assert group.cores() == here
    for name, value in {"RANK": "0", "WORLD_SIZE": str(2 * here), "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert group.cores() == max(1, here // 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # started by hand
    assert group.cores() == 1
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", f"1(x3),{whole}")
    assert group.cores() == 1
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x4)")
    assert group.cores() == here


def test_job_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "slurm" not in group.job_name()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert group.job_name().startswith("slurm job 42 (restart 0) on ")


def test_code_version_names_the_package() -> None:
    assert code_version().startswith(dit.__version__)


# --- one process -------------------------------------------------------------------------------------------


def test_a_session_of_one_leaves_nothing_behind() -> None:
    before, excepthook = dict(os.environ), sys.excepthook
    with group.session() as world:
        assert world == World()
        assert td.get_world_size() == 1
        with group.session() as inner:  # joins the one there is
            assert inner == world
        assert td.is_initialized()
    assert not td.is_initialized()
    assert dict(os.environ) == before
    assert sys.excepthook is excepthook


def test_a_session_is_left_after_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), group.session():
        raise ZeroDivisionError
    assert not td.is_initialized()


def test_alone_everything_is_itself() -> None:
    assert group.gather_objects(3) == [3]
    assert group.on_main(lambda: "x") == "x"
    assert group.together(lambda: 7) == 7
    assert group.all_sum(torch.tensor(2)) == 2
    group.barrier()
    with pytest.raises(KeyError):
        group.together(lambda: {}["missing"])


# --- several -----------------------------------------------------------------------------------------------


def _collectives() -> dict[str, object]:
    world = World.from_env()
    big = torch.tensor([2**63 - 1, 1 + world.rank])  # wraps, as batch_hash wants
    return {
        "world": (world.rank, world.size, world.local_rank),
        "sum": group.all_sum(big).tolist(),
        "gathered": group.gather_objects({"rank": world.rank}),
        "same": group.on_main(lambda: f"from {world.rank}"),
        "together": group.together(lambda: world.rank * 10),
    }


def test_ranks_act_together(ranks: Server) -> None:
    found = ranks.run(2, _collectives)
    for rank, values in enumerate(found):
        assert values["world"] == (rank, 2, rank)
        assert values["sum"] == [-2, 3]
        assert values["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert values["same"] == "from 0"
        assert values["together"] == rank * 10


def _fail_on_rank_1() -> None:
    def action() -> None:
        if World.from_env().rank == 1:
            raise OSError("the disk is full")

    group.together(action)


def test_a_failure_on_one_rank_is_raised_on_all(ranks: Server) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, _fail_on_rank_1)
    assert failed.value.errors == {
        0: ("PeerError", f"rank 1 on {group.node_name()} failed: the disk is full"),
        1: ("OSError", "the disk is full"),
    }


def _stop_on_rank(stops: int, fails: int | None, act: Callable[[Callable[[], None]], None]) -> None:
    def action() -> None:
        if World.from_env().rank == stops:
            raise Stopped
        if World.from_env().rank == fails:
            raise OSError("the disk is full")

    act(action)


@pytest.mark.parametrize(("stops", "act"), [(0, group.together), (1, group.together), (0, group.on_main)])
def test_a_stop_on_one_rank_is_every_ranks(ranks: Server, stops: int, act: Callable[..., None]) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, _stop_on_rank, stops, None, act)
    assert failed.value.errors == {0: ("Stopped", ""), 1: ("Stopped", "")}


def test_a_failure_matters_more_than_a_stop(ranks: Server) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, _stop_on_rank, 0, 1, group.together)
    assert failed.value.errors == {
        0: ("PeerError", f"rank 1 on {group.node_name()} failed: the disk is full"),
        1: ("OSError", "the disk is full"),
    }


def test_torchrun_starts_a_session(tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from dit.ranks import group\n"
        "with group.session() as world:\n"
        "    names = group.gather_objects(f'{world.rank} of {world.size}')\n"
        "    print(names) if world.is_main else None\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "['0 of 2', '1 of 2']" in done.stdout
