"""Checkpoints written beside the training: as the state was, whole or not at all, and never waited for in vain."""

from __future__ import annotations

import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dit.ranks.group import World
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.checkpoints.saver import ALL, BUSY, FAILED, IDLE, WRITTEN, Saver
from dit.train.settings import CheckpointConfig
from dit.train.stop import rank_flags
from tests.rank_processes import RanksFailed, Server
from tests.train.checkpoints.test_checkpoint import Small, holds, small_disk

__all__ = ["small_disk"]  # a fixture


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Saver]:
    made = Saver(tmp_path / "checkpoints", ALL, World.from_env())
    yield made
    made.close()


def held_up(saver: Saver) -> threading.Event:
    """Its thread does nothing until this is set."""
    gate = threading.Event()
    saver._threads.submit(gate.wait)
    return gate


def until(saver: Saver, progress: int) -> None:
    end = time.monotonic() + 30
    while saver.progress() != progress:
        assert time.monotonic() < end
        time.sleep(0.002)


def test_it_is_the_state_as_it_was_and_appears_when_it_is_whole(saver: Saver) -> None:
    small, gate = Small(1), held_up(saver)
    assert saver.progress() == IDLE
    saver.begin(5, small.state(), {})
    small.fill(2)  # training goes on
    assert saver.progress() == BUSY
    assert [p.name for p in saver.folder.iterdir()] == ["step-00000005.partial"]
    gate.set()
    until(saver, WRITTEN)
    saver.advance(BUSY)  # what the ranks compared before this one began
    saver.advance(BUSY)  # another rank is not ready
    assert saver.progress() == WRITTEN
    assert checkpoint.latest(saver.folder) is None
    saver.advance(WRITTEN)
    until(saver, IDLE)
    assert holds(saver.folder / "step-00000005", 1)
    saver.advance(WRITTEN)  # what was compared before that is news no more
    saver.wait()
    assert holds(saver.folder / "step-00000005", 1)


def test_the_next_one_waits_for_the_one_before(saver: Saver) -> None:
    small = Small()
    for step in (1, 2, 3):
        small.fill(step)
        saver.begin(step, small.state(), {})
    assert holds(saver.folder / "step-00000002", 2)
    saver.wait()
    assert holds(saver.folder / "step-00000003", 3)
    assert all(holds(saver.folder / f"step-{step:08d}", step) for step in (1, 2, 3))


def test_only_when_it_is_whole_an_old_one_goes(tmp_path: Path) -> None:
    saver, small = Saver(tmp_path, CheckpointConfig(keep=1), World.from_env()), Small()
    saver.begin(1, small.state(), {})
    saver.wait()
    gate = held_up(saver)
    saver.begin(2, small.state(), {})
    assert checkpoint.exists(tmp_path)
    gate.set()
    saver.wait()
    saver.close()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def save_two_and_leave(folder: Path) -> None:
    small, saver = Small(1), Saver(folder, ALL, World.from_env())
    saver.begin(1, small.state(), {})
    saver.wait()
    saver.begin(2, small.state(), {})
    saver.close()


@pytest.mark.parametrize(("size", "step"), [(1, 2), (2, 1)])
def test_an_error_leaves_what_was_there_and_one_rank_alone_ends_what_it_began(
    ranks: Server, tmp_path: Path, size: int, step: int
) -> None:
    ranks.run(size, save_two_and_leave, tmp_path)
    found = checkpoint.latest(tmp_path, report=pytest.fail)
    assert found is not None
    assert found.step == step


def test_one_of_the_same_step_is_replaced_whole(saver: Saver) -> None:
    """A run that went on from an earlier checkpoint comes to the step of a broken one."""
    small = Small(1)
    for value in (1, 2):
        small.fill(value)
        saver.begin(7, small.state(), {})
        saver.wait()
    assert [p.name for p in saver.folder.iterdir()] == ["step-00000007"]
    assert holds(saver.folder / "step-00000007", 2)
    (saver.folder / "step-00000007").rename(saver.folder / "step-00000007.old.partial")  # killed in between
    saver.begin(8, small.state(), {})
    saver.wait()
    assert [p.name for p in saver.folder.iterdir()] == ["step-00000008"]


def full_on_one(folder: Path) -> None:
    """Rank 1 has no memory for the copy: its state has a tensor that cannot be had twice."""
    small, saver = Small(1), Saver(folder, ALL, World.from_env())
    state = small.state()
    if World.from_env().rank == 1:
        state.averages["ema"][0] = torch.empty(1).expand(2**50)
    saver.begin(1, state, {})


def test_a_rank_that_has_no_memory_for_the_copy_stops_all(ranks: Server, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, full_on_one, tmp_path)
    assert {kind for kind, _ in failed.value.errors.values()} == {"CheckpointError"}
    assert len(failed.value.errors) == 2


def test_a_disk_that_is_full_is_told_at_the_next_step(small_disk: Path) -> None:
    saver = Saver(small_disk, ALL, World.from_env())
    small = Small(1, width=128)  # 4 x 66 kB, on a disk of 400 kB
    saver.begin(1, small.state(), {})
    saver.wait()
    saver.begin(2, small.state(), {})
    until(saver, FAILED)
    saver.advance(BUSY)
    with pytest.raises(
        CheckpointError, match=r"step-00000002.*No space left on device.*free space and start"
    ):
        saver.advance(FAILED)
    assert saver.progress() == IDLE
    assert [p.name for p in small_disk.iterdir()] == ["step-00000001"]
    shutil.rmtree(small_disk / "step-00000001")
    saver.begin(3, small.state(), {})
    saver.wait()
    saver.close()
    assert holds(small_disk / "step-00000003", 1)


def test_what_cannot_be_finished_is_told_too(saver: Saver) -> None:
    """Somebody has removed what was written."""
    saver.begin(4, Small(1).state(), {})
    until(saver, WRITTEN)
    shutil.rmtree(saver.folder / "step-00000004.partial")
    with pytest.raises(CheckpointError, match=r"could not save .*step-00000004.*mend the directory"):
        saver.wait()
    saver.begin(5, Small(1).state(), {})
    saver.wait()
    assert holds(saver.folder / "step-00000005", 1)


def test_something_else_that_has_its_name_is_kept_aside(saver: Saver) -> None:
    saver.folder.mkdir()
    (saver.folder / "step-00000004").write_text("a file")
    saver.begin(4, Small(1).state(), {})
    saver.wait()
    assert holds(saver.folder / "step-00000004", 1)
    assert (saver.folder / "step-00000004.old.partial").read_text() == "a file"


def step_and_save(folder: Path) -> int:
    """Two ranks save step 1, and then step 2 where rank 1 may write files of 1 kB at most; the steps that went by."""
    world = World.from_env()
    small, saver = Small(1, width=64), Saver(folder, ALL, World.from_env())
    saver.begin(1, small.state(), {})
    saver.wait()
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    saver.begin(2, small.state(), {})
    with rank_flags(world) as flags:
        for _ in range(3000):
            saver.advance(*flags.exchange(saver.progress()))
            time.sleep(0.002)
    return 3000


def test_a_rank_that_cannot_write_stops_all_at_the_same_step(ranks: Server, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, step_and_save, tmp_path)
    assert {kind for kind, _ in failed.value.errors.values()} == {"CheckpointError"}
    assert len(failed.value.errors) == 2
    assert "rank 1 on " in failed.value.errors[0][1]
    assert all("File too large" in text for _, text in failed.value.errors.values())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert holds(tmp_path / "step-00000001", 1)
