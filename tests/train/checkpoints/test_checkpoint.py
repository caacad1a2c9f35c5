"""Checkpoints: whole or not there, named when broken, the same bits at any topology, killed or out of space."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dit.ranks import group
from dit.ranks.group import World
from dit.train.checkpoints import checkpoint, retention
from dit.train.checkpoints.checkpoint import CheckpointError, Reader, State
from dit.train.checkpoints.saver import save
from dit.train.ema import Ema, EmaConfig
from dit.train.engines.local import LocalEngine
from dit.train.optim import OptimConfig
from dit.train.settings import CheckpointConfig
from tests.datasets import Digits
from tests.rank_processes import RanksFailed, Server
from tests.train.on_ranks import resave
from tests.train.runs import (
    ENGINES,
    Engine,
    at_step,
    differing,
    engine_of,
    flip_bit,
    rewrite_tensors,
    sign,
    state,
)


class Small:
    """A model with a buffer, an engine and an average, every number of which is `value` or made from it."""

    def __init__(self, value: float = 0.0, width: int = 3):
        self.module = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.engine = LocalEngine(self.module, OptimConfig(), World())
        self.ema = Ema(self.engine, EmaConfig(decay=0.5))
        self.fill(value)

    def fill(self, value: float) -> None:
        for fragment, average in zip(self.engine.fragments(), self.ema.pieces, strict=True):
            fragment.weight.fill_(value)
            average.fill_(value + 0.25)
            fragment.state["exp_avg"].fill_(value + 0.5)
            fragment.state["exp_avg_sq"].fill_(value + 0.75)
        self.module[1].running_mean.fill_(value + 0.125)

    def save(self, folder: Path, step: int) -> Path:
        meta = {"note": f"of step {step}"}
        return save(folder, step, self.state(), meta, group.World.from_env())

    def state(self) -> State:
        return State(self.engine.fragments(), self.ema.averages, self.module)

    def load(self, found: checkpoint.Checkpoint) -> None:
        checkpoint.load_into(found, self.state())


def holds(folder: Path, value: float) -> bool:
    """Whether a checkpoint holds what Small(value) saves."""
    offsets = {"model": 0, "ema": 0.25, "exp_avg": 0.5, "exp_avg_sq": 0.75}
    found = state(folder)
    kinds = {name.split("/")[0] for name in found}
    exact = all(
        torch.equal(t, torch.full_like(t, value + offsets[name.split("/")[0]]))
        for name, t in found.items()
        if not name.startswith("buffer/")
    )
    mean = found["buffer/1.running_mean"]
    return exact and kinds == {*offsets, "buffer"} and torch.equal(mean, torch.full_like(mean, value + 0.125))


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 10, 20 and 30."""
    small = Small()
    for step in (10, 20, 30):
        small.fill(step)
        small.save(tmp_path, step)
    return tmp_path


# --- writing and reading -----------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    folder = Small(3).save(tmp_path, 7)
    assert folder == tmp_path / "step-00000007"
    found = checkpoint.read(folder)
    assert (found.step, found.meta["note"]) == (7, "of step 7")
    other = Small(0)
    other.load(found)
    again = other.save(tmp_path, 8)
    assert holds(folder, 3)
    assert differing(state(folder), state(again)) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000007", "step-00000008"]


def test_random_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    small, other = Small(), Small()
    generator = torch.Generator().manual_seed(0)
    for fragment, average in zip(small.engine.fragments(), small.ema.pieces, strict=True):
        for tensor in (fragment.weight, average, *fragment.state.values()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    other.load(checkpoint.read(small.save(tmp_path, 1)))
    for a, b in zip(small.engine.fragments(), other.engine.fragments(), strict=True):
        assert torch.equal(a.weight, b.weight)
        assert all(torch.equal(a.state[k], b.state[k]) for k in a.state)
    assert all(torch.equal(a, b) for a, b in zip(small.ema.pieces, other.ema.pieces, strict=True))


def test_weights_load_into_a_plain_module(tmp_path: Path) -> None:
    reader = Reader(checkpoint.read(Small(3).save(tmp_path, 1)))
    for kind, value in {"model": 3.0, "ema": 3.25}.items():
        module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        module.load_state_dict(reader.state_dict(kind))
        assert float(module[0].weight.detach().min()) == value
        assert float(module[1].running_mean[0]) == 3.125
    with pytest.raises(CheckpointError, match="holds the weights model, ema; got 'emma'"):
        reader.state_dict("emma")


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    Small(1).save(tmp_path, 5)
    assert holds(Small(2).save(tmp_path, 5), 2)


def test_what_a_kill_left_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    done = Small(1).save(tmp_path, 5)
    done.rename(tmp_path / "step-00000006.partial")  # killed just before the last rename
    assert checkpoint.latest(tmp_path) is None
    assert not checkpoint.exists(tmp_path)
    (tmp_path / "step-00000006.partial" / "more").write_text("left over")
    folder = Small(2).save(tmp_path, 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006"]
    assert not (folder / "more").exists()


def test_parameters_of_another_shape_or_name_are_refused(tmp_path: Path) -> None:
    found = checkpoint.read(Small(1).save(tmp_path, 5))
    with pytest.raises(CheckpointError, match=r"parameter 0.weight is \(3, 3\) there and \(4, 4\)"):
        Small(width=4).load(found)
    other = LocalEngine(nn.Linear(3, 3), OptimConfig(), World())
    with pytest.raises(CheckpointError, match="parameter weight is nothing there"):
        checkpoint.load_into(found, State(other.fragments(), Ema(other, EmaConfig()).averages, other.module))


@pytest.mark.parametrize("kind", ["ema", "exp_avg", "model"])
def test_a_kind_that_is_not_in_it_is_an_error_and_not_zeros(tmp_path: Path, kind: str) -> None:
    folder = Small(1).save(tmp_path, 5)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{kind}/0.bias"]

    rewrite_tensors(folder, drop)
    with pytest.raises(CheckpointError, match=f"rank-00000.safetensors: lacks {kind}/0.bias"):
        Small().load(checkpoint.read(folder))


def test_elements_that_no_rank_holds_are_an_error(tmp_path: Path) -> None:
    folder = Small(1).save(tmp_path, 5)

    def forget(meta: dict) -> None:
        shape, _, _ = meta["files"][0]["fragments"]["0.weight"]
        meta["files"][0]["fragments"]["0.weight"] = [shape, 0, 4]

    sign(folder, forget)
    with pytest.raises(CheckpointError, match=r"model/0.weight lacks elements 4\.\.9"):
        Small().load(checkpoint.read(folder))


# --- broken ones -------------------------------------------------------------------------------------------

BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (lambda p: flip_bit(p / "rank-00000.safetensors"), "rank-00000.safetensors"),
    "cut short": (lambda p: os.truncate(p / "rank-00000.safetensors", 100), "rank-00000.safetensors"),
    "missing file": (lambda p: (p / "rank-00000.safetensors").unlink(), "rank-00000.safetensors"),
    "missing COMPLETE": (lambda p: (p / "COMPLETE").unlink(), "COMPLETE"),
    "empty COMPLETE": (lambda p: (p / "COMPLETE").write_text(""), "COMPLETE"),
    "altered meta": (lambda p: flip_bit(p / "meta.json", 30), "meta.json"),
    "meta that is no text": (lambda p: (p / "meta.json").write_bytes(b"\xff\xfe{"), "meta.json"),
    "missing meta": (lambda p: (p / "meta.json").unlink(), "meta.json"),
    "emptied": (lambda p: [f.unlink() for f in p.iterdir()] and None, "step-00000030"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_one_is_named_and_passed_over(three: Path, how: str) -> None:
    spoil, named = BREAKS[how]
    spoil(at_step_in(three, 30))
    said: list[str] = []
    found = checkpoint.latest(three, said.append)
    assert found is not None
    assert found.step == 20
    assert len(said) == 1
    assert said[0].startswith("passing over a broken checkpoint: ")
    assert "step-00000030" in said[0]
    assert named in said[0]
    with pytest.raises(CheckpointError, match=r"step-00000030|no checkpoint here"):
        checkpoint.resolve(at_step_in(three, 30))


def at_step_in(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def test_several_broken_ones_are_all_named(three: Path) -> None:
    flip_bit(at_step_in(three, 30) / "rank-00000.safetensors")
    (at_step_in(three, 20) / "COMPLETE").unlink()
    said: list[str] = []
    found = checkpoint.latest(three, said.append)
    assert found is not None
    assert found.step == 10
    assert [s.split("step-")[1][:8] for s in said] == ["00000030", "00000020"]


def test_nothing_but_broken_ones_is_an_error_and_nothing_at_all_is_not(three: Path, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        flip_bit(at_step_in(three, step) / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint here is usable.*Move them away") as error:
        checkpoint.latest(three)
    assert all(f"step-{step:08d}" in str(error.value) for step in (10, 20, 30))
    assert checkpoint.latest(tmp_path / "empty") is None


def test_resolve_takes_a_run_directory_or_a_checkpoint(three: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(three, run / "checkpoints", ignore=shutil.ignore_patterns("run"))
    assert checkpoint.resolve(run).step == 30
    assert checkpoint.resolve(str(run / "checkpoints" / "step-00000010")).step == 10
    for nowhere in (tmp_path / "nowhere", run / "checkpoints" / "step-00000099"):
        with pytest.raises(CheckpointError, match="is missing; expected a run directory, a checkpoint"):
            checkpoint.resolve(nowhere)


@pytest.mark.parametrize(("keep", "left"), [(0, [10, 20, 30]), (1, [30]), (2, [20, 30]), (9, [10, 20, 30])])
def test_prune_keeps_the_newest(three: Path, keep: int, left: list[int]) -> None:
    retention.prune(three, CheckpointConfig(keep=keep), step=30)
    assert sorted(p.name for p in three.iterdir()) == [f"step-{s:08d}" for s in left]


@pytest.mark.parametrize(
    ("keep", "keep_every", "at", "left"),
    [
        (1, 20, (), [20, 30]),
        (1, 10, (), [10, 20, 30]),
        (2, 40, (), [20, 30]),
        (0, 20, (), [10, 20, 30]),
        (1, 0, (10,), [10, 30]),
        (1, 20, (10, 50), [10, 20, 30]),
    ],
)
def test_multiples_of_keep_every_and_named_steps_stay(
    three: Path, keep: int, keep_every: int, at: tuple[int, ...], left: list[int]
) -> None:
    retention.prune(three, CheckpointConfig(every=10, keep=keep, keep_every=keep_every, at=at), 30)
    assert [p.name for p in sorted(three.iterdir())] == [f"step-{step:08d}" for step in left]


def test_copies_that_somebody_made_are_neither_checkpoints_nor_pruned(three: Path) -> None:
    for name in ("step-00000030.best", "step-00000099-copy", "best"):
        shutil.copytree(at_step_in(three, 30), three / name)
    retention.prune(three, CheckpointConfig(keep=1), step=30)
    assert sorted(p.name for p in three.iterdir()) == [
        "best",
        "step-00000030",
        "step-00000030.best",
        "step-00000099-copy",
    ]
    shutil.rmtree(at_step_in(three, 30))
    assert checkpoint.latest(three) is None


def test_prune_never_counts_a_broken_one_that_was_passed_over(three: Path) -> None:
    """Resumed at 20 because 30 is broken, saved at 25: with keep=1 it is 25 that must stay."""
    flip_bit(at_step_in(three, 30) / "rank-00000.safetensors")
    Small(25).save(three, 25)
    retention.prune(three, CheckpointConfig(keep=1), step=25)
    found = checkpoint.latest(three)
    assert found is not None
    assert found.step == 25
    assert holds(found.path, 25)


def test_broken_ones_do_not_count_among_those_that_are_kept(three: Path) -> None:
    """With keep=2 and the newest but one broken, the two newest good ones stay."""
    (at_step_in(three, 20) / "COMPLETE").unlink()
    Small(40).save(three, 40)
    retention.prune(three, CheckpointConfig(keep=2), step=40)
    assert sorted(p.name for p in three.iterdir()) == [f"step-{s:08d}" for s in (20, 30, 40)]
    Small(50).save(three, 50)
    retention.prune(three, CheckpointConfig(keep=2), step=50)
    assert checkpoint.latest(three, pytest.fail, up_to=40) is not None
    assert sorted(p.name for p in three.iterdir()) == [f"step-{s:08d}" for s in (20, 40, 50)]


# --- killed ------------------------------------------------------------------------------------------------


def save_forever(folder: Path, first: int) -> None:
    small = Small(width=64)
    for step in itertools.count(first):
        small.fill(step)
        small.save(folder, step)


def test_killed_anywhere_there_is_always_a_good_one(ranks: Server, tmp_path: Path) -> None:
    """While it saves on and on, what has a final name is whole the moment it appears; and so it is after a kill."""
    seen: set[Path] = set()
    for attempt in range(4):
        before = len(seen)
        with ranks.start(1, save_forever, tmp_path, before + 1) as job:
            end, enough = time.monotonic() + 60, before + 15 + attempt
            while len(seen) < enough:
                assert time.monotonic() < end, job.output()
                for path in complete(tmp_path) - seen:
                    assert holds(path, checkpoint.read(path).step)
                    seen.add(path)
            time.sleep(0.0037 * attempt)
        seen |= complete(tmp_path)
        found = checkpoint.latest(tmp_path, report=pytest.fail)
        assert found is not None
        assert found.step == len(seen) > before
        assert holds(found.path, found.step)


def complete(folder: Path) -> set[Path]:
    return {p for p in folder.glob("step-*") if p.suffix != ".partial"}


# --- out of space ------------------------------------------------------------------------------------------


def save_where_rank_1_cannot(folder: Path) -> None:
    """Two ranks save step 1; then rank 1 may write files of 1 kB at most."""
    small = Small(1, width=64)
    small.save(folder, 1)
    group.barrier()
    if World.from_env().rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    small.fill(2)
    small.save(folder, 2)


def test_a_rank_that_cannot_write_fails_all_and_harms_nothing(ranks: Server, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, save_where_rank_1_cannot, tmp_path)
    assert {kind for kind, _ in failed.value.errors.values()} == {"CheckpointError"}
    assert len(failed.value.errors) == 2
    for _, text in failed.value.errors.values():
        assert f"could not save {tmp_path / 'step-00000002'}" in text
        assert "File too large" in text
        assert "Earlier checkpoints are untouched" in text
    assert f"rank 1 on {group.node_name()} failed" in failed.value.errors[0][1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]
    assert holds(tmp_path / "step-00000001", 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_one_good(small_disk: Path) -> None:
    small = Small(1, width=128)  # 4 x 66 kB a checkpoint
    small.save(small_disk, 1)
    small.fill(2)
    with pytest.raises(CheckpointError, match=r"step-00000002.*No space left on device.*free space"):
        small.save(small_disk, 2)
    assert sorted(p.name for p in small_disk.iterdir()) == ["step-00000001"]
    assert holds(small_disk / "step-00000001", 1)
    shutil.rmtree(small_disk / "step-00000001")  # free space, and start again
    assert holds(small.save(small_disk, 2), 2)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not save .*file/step-00000001"):
        Small().save(tmp_path / "file", 1)


# --- topologies --------------------------------------------------------------------------------------------

TRUE = [
    "resumed",
    "fragments are the weights",
    "average differs from weights",
    "model has the average inside",
    "average computes something else",
    "fragments restored",
    "weights restored",
    "average restored",
    "probe restored",
]


def test_any_topology_loads_what_any_other_saved_and_saves_the_same_bits(
    digits: Digits, ranks: Server, sharded: Callable[[Engine], Path], tmp_path: Path
) -> None:
    """From 2 ranks at stage 2, resaved by each of them in turn. On the way: the average swapped in and out."""
    original = tmp_path / "0"
    shutil.copytree(sharded(2), original)
    config = json.loads((at_step(original, 20) / "meta.json").read_text())["config"]
    folders = itertools.count()
    here = str(next(folders))

    def links(*choices: dict) -> list:
        nonlocal here
        made = []
        for choice in choices:
            given = {**config, "run_dir": str(tmp_path / here), "train": {**config["train"]}, **choice}
            here = str(next(folders))
            made.append((given, str(tmp_path / here)))
        return made

    stages = [engine_of(chosen) for chosen in (0, 1, 2, 3)]
    several, alone, again = (
        links(*stages, {"engine": "plain", "zero": {"stage": "auto"}}),
        links(stages[3], {"engine": "local"}, *stages[:3]),
        links(stages[3]),
    )
    for chain, size in ((several, 2), (alone, 1), (again, 2)):
        micro = 8 if size == 2 else 16
        for given, _ in chain:
            given["train"]["micro_batch"] = micro
        for found in ranks.run(size, resave, chain):
            for link, seen in zip(chain, found, strict=True):
                assert (seen["step"], seen["updates"]) == (20, 20)
                assert [name for name in TRUE if not seen[name]] == [], link
    before = state(at_step(original, 20))
    for number in range(1, 12):
        assert differing(before, state(at_step(tmp_path / str(number), 20))) == [], number


def test_files_hold_each_element_once(sharded: Callable[[Engine], Path]) -> None:
    """Stages 1 to 3 spread over both ranks' files; what shards nothing is in one, not twice."""
    for engine in ENGINES:
        found = checkpoint.read(at_step(sharded(engine), 20))
        entries = found.meta["files"]
        listed = [sum(numel for _, _, numel in entry["fragments"].values()) for entry in entries]
        shapes = {name: shape for entry in entries for name, (shape, _, _) in entry["fragments"].items()}
        stored = [sum(t.numel() for t in load_file(found.path / entry["file"]).values()) for entry in entries]
        assert sum(listed) == sum(torch.Size(shape).numel() for shape in shapes.values())
        assert stored == [len(found.kinds) * numel for numel in listed]
        assert (min(listed) == 0) == (engine in (0, "plain"))
        assert found.meta["world_size"] == 2
