"""What a start looks at before it trains: on real ranks, each of which may be a node with file systems of its own."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tools.train
from dit.config import ConfigError
from dit.data import DataError
from dit.data.shards.manifest import Manifest
from dit.errors import Notice
from dit.experiments.diffusion import Experiment
from dit.experiments.parts import make_parts
from dit.ranks import group
from dit.ranks.group import World
from dit.train.plan import Plan
from dit.train.preflight import checks
from dit.train.preflight.checks import CHECKS, PreflightError, several_on_one
from dit.train.preflight.fits import held_at_most, space
from dit.train.preflight.nodes import Site, open_site
from dit.train.settings import CheckpointConfig
from tests.commands import call
from tests.datasets import Digits
from tests.rank_processes import RanksFailed, Server
from tests.train.runs import Values, at_step, experiment, flip_bit, go, values

CLONE_NEWNS = 0x20000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
Mounts = dict[int, Sequence[Sequence[str]]]  # rank -> the arguments of each mount


def own_node(mounts: Sequence[Sequence[str]]) -> None:
    """From here on this process is on a node with its rank's name, where these file systems are mounted."""
    os.environ["SLURMD_NODENAME"] = f"n{World.from_env().rank // 2}"
    if mounts:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        for words in [["--make-rprivate", "/"], *mounts]:
            subprocess.run(["mount", *words], check=True)
    checks.NFS_PATIENCE = 1.0


def planned(given: Values) -> Plan:
    return Plan(experiment(given), make_parts, World.from_env())


def check(given: Values, mounts: Mounts) -> float:
    """All checks, on nodes of two ranks each; seconds."""
    world = World.from_env()
    own_node(mounts.get(world.rank - world.rank % 2, ()))
    began = time.monotonic()
    checks.check(planned(given))
    return time.monotonic() - began


def refused(ranks: Server, given: Values, mounts: Mounts, size: int = 4) -> str:
    """What every rank says, which is the same."""
    with pytest.raises(RanksFailed) as failed:
        ranks.run(size, check, given, mounts)
    assert len(failed.value.errors) == size
    assert len(set(failed.value.errors.values())) == 1, failed.value.errors
    kind, text = failed.value.errors[0]
    assert kind == "PreflightError"
    return text


# --- nodes -------------------------------------------------------------------------------------------------


def test_nothing_is_wrong_and_nothing_is_left(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    seconds = ranks.run(4, check, values(digits, tmp_path / "deep/down/run"), {})
    assert max(seconds) < 60
    assert list(tmp_path.iterdir()) == []


@needs_root
def test_a_node_that_sees_another_folder_is_named(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    hidden = {2: [["-t", "tmpfs", "tmpfs", str(tmp_path)]]}
    text = refused(ranks, values(digits, tmp_path / "run"), hidden)
    assert text.startswith(f"on n1 (ranks 2-3): a file that n0 wrote into {tmp_path} is not seen; run_dir=")
    assert list(tmp_path.iterdir()) == []


@needs_root
def test_nodes_that_cannot_write_are_named(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    closed = [["-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path / "run")]]
    text = refused(ranks, values(digits, tmp_path / "run"), {0: closed, 4: closed}, size=8)
    assert text.startswith(
        f"on n0 (ranks 0-1), n2 (ranks 4-5): cannot write into {tmp_path}/run (Read-only file"
    )
    assert list((tmp_path / "run").iterdir()) == []


@needs_root
def test_a_node_without_the_folder_is_named(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    (tmp_path / "shared/runs").mkdir(parents=True)
    hidden = {2: [["-t", "tmpfs", "tmpfs", str(tmp_path / "shared")]]}
    text = refused(ranks, values(digits, tmp_path / "shared/runs/a"), hidden)
    assert text.startswith(
        f"on n1 (ranks 2-3): cannot write into {tmp_path}/shared/runs (No such file or directory)"
    )


@needs_root
def test_a_node_without_the_data_is_named(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    hidden = {2: [["-t", "tmpfs", "tmpfs", str(digits.moments)]]}
    text = refused(ranks, values(digits, tmp_path / "run"), hidden)
    assert text.startswith("on n1 (ranks 2-3): ")
    assert f"{digits.moments}: no manifest.json" in text


@needs_root
def test_a_node_with_the_manifest_and_no_shards_is_named(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    (tmp_path / "half").mkdir()
    shutil.copy(digits.moments / "manifest.json", tmp_path / "half")
    hidden = {2: [["--bind", str(tmp_path / "half"), str(digits.moments)]]}
    text = refused(ranks, values(digits, tmp_path / "run"), hidden)
    shard = Manifest.load(digits.moments).shards[0].name
    assert text.startswith("on n1 (ranks 2-3): ")
    assert shard in text


@needs_root
def test_a_node_with_other_data_is_named(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    other = {2: [["--bind", str(digits.moments_val), str(digits.moments)]]}
    text = refused(ranks, values(digits, tmp_path / "run"), other)
    here, there = (Manifest.load(folder).digest[:12] for folder in (digits.moments, digits.moments_val))
    assert (
        f"is another data set on n1 (ranks 2-3) (manifest {there}) than on n0 (ranks 0-1) (manifest {here})"
        in text
    )


def test_what_every_node_lacks_is_said_once(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    text = refused(ranks, values(digits, tmp_path / "run", data={"path": "/no/such/data"}), {})
    assert text.startswith("on every node: /no/such/data: no manifest.json")
    assert text.count("/no/such/data: no manifest.json") == 1


def with_another_numpy(given: Values, folder: str) -> None:
    if World.from_env().rank >= 2:
        sys.path.insert(0, folder)
    check(given, {})


def test_a_node_with_another_version_is_named(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    installed = tmp_path / "numpy-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    with pytest.raises(RanksFailed) as failed:
        ranks.run(4, with_another_numpy, values(digits, tmp_path / "run"), str(tmp_path))
    assert len(failed.value.errors) == 4
    for kind, text in failed.value.errors.values():
        assert kind == "PreflightError"
        assert text.startswith("numpy is 0.1 on n1 (ranks 2-3) and ")
        assert "on n0 (ranks 0-1). Install the same" in text


# --- the network -------------------------------------------------------------------------------------------


def add_up(given: Values, rank_1: dict[str, Any]) -> str:
    """The all-reduce alone, to which rank 1 comes late or as somebody else."""
    world = World.from_env()
    os.environ |= {"SLURMD_NODENAME": f"n{world.rank}", "DIT_JOIN_SECONDS": "2"}
    mine = rank_1 if world.rank == 1 else {}
    with open_site(planned(given)) as site:
        time.sleep(mine.get("late", 0.0))
        return checks.all_reduce(replace(site, world=mine.get("world", world)))


def test_the_all_reduce_tells_its_time(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    for text in ranks.run(2, add_up, values(digits, tmp_path), {}):
        assert text.startswith("gloo, 2 rank(s): 2 MiB in ")


def test_sums_that_are_wrong_are_found(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    """Rank 1 takes itself for another one and adds another number."""
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, add_up, values(digits, tmp_path), {"world": World(4, 2, 0)})
    assert (
        "on every node: 262144 of 262144 sums of an all-reduce over gloo are wrong"
        in failed.value.errors[0][1]
    )


def test_an_all_reduce_that_does_not_end_is_told_by_every_rank(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, add_up, values(digits, tmp_path), {"late": 6.0})
    assert {kind for kind, _ in failed.value.errors.values()} == {"PreflightError"}
    for _, text in failed.value.errors.values():
        assert text.startswith("on every node: the first all-reduce over gloo failed or took longer than 2 s")


def test_ranks_on_one_gpu_are_named() -> None:
    nodes = ["n0", "n0", "n0", "n1", "n1", "n1"]
    h100 = "NVIDIA H100", 2
    found = [(uuid, *h100) for uuid in ("a", "b", "a", "c", "d", "e")]
    assert several_on_one(found, nodes) == ["ranks 0, 2 on n0, where ranks see 2 GPU(s)"]
    assert several_on_one([(uuid, *h100) for uuid in "abcdef"], nodes) == []
    assert several_on_one([("", "CPU", 0)] * 6, nodes) == []


# --- one node: the errors themselves --------------------------------------------------------------------------


def test_on_one_node_an_error_is_itself(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest"):
        go(values(digits, tmp_path / "run", engine="local", data={"path": "/no/such/data"}))
    with pytest.raises(ConfigError, match="does not divide"):
        go(values(digits, tmp_path / "run", engine="local", train={"micro_batch": 5}))
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, go, values(digits, tmp_path / "run", data={"path": "/no/such/data"}))
    (first, text), (second, other) = failed.value.errors[0], failed.value.errors[1]
    assert (first, second) == ("DataError", "PeerError")
    assert other == f"rank 0 on {group.node_name()} failed: {text}"
    assert not (tmp_path / "run").exists()


def test_blocks_that_the_run_may_leave_out_do_not_stop_it(digits: Digits, tmp_path: Path) -> None:
    shutil.copytree(digits.moments, tmp_path / "data")
    block = Manifest.load(tmp_path / "data").blocks[0]
    assert block.shard == 0
    flip_bit(tmp_path / "data" / Manifest.load(tmp_path / "data").shards[0].name, block.offset + 2000)
    data = {"path": str(tmp_path / "data")}
    with group.session():
        with pytest.raises(DataError, match="block"):
            checks.check(planned(values(digits, tmp_path / "run", data=data)))
        data["max_quarantined"] = 1
        checks.check(planned(values(digits, tmp_path / "run", data=data)))


# --- disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@needs_root
def test_room_for_checkpoints(digits: Digits, small_disk: Path, recwarn: pytest.WarningsRecorder) -> None:
    saving = {"every": 5, "keep": 2}
    cfg = experiment(values(digits, small_disk / "run", checkpoint=saving, train={"steps": 100}))
    assert "3 to come" in space(cfg, 10_000, 10_000)  # 3 x 160 kB
    assert not recwarn.list
    with pytest.warns(
        Notice, match=r"1.00 MiB free in .*disk, a checkpoint takes 0.46 MiB: 2 fit, 3 are to come"
    ):
        space(cfg, 30_000, 30_000)
    with pytest.raises(
        PreflightError, match=r"1.00 MiB free in .*disk, a checkpoint takes 1.07 MiB: free space"
    ):
        space(cfg, 70_000, 70_000)
    for step in (5, 10):  # a run that goes on needs one more
        at_step(small_disk / "run", step).mkdir(parents=True)
    assert "1 to come" in space(cfg, 50_000, 50_000)


@needs_root
def test_a_run_without_room_does_not_start(digits: Digits, small_disk: Path) -> None:
    with pytest.raises(PreflightError, match="free space, or choose another run_dir"):
        go(values(digits, small_disk / "run", engine="local"))
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("saving", "steps", "count"),
    [
        ({"every": 10, "keep": 3}, 1000, 4),
        ({"every": 10, "keep": 0}, 1005, 101),
        ({"every": 10, "keep": 3, "keep_every": 100}, 1000, 14),
        ({"every": 500, "keep": 3}, 1000, 2),
        ({"every": 500, "keep": 3, "at": (7, 500, 1000)}, 1000, 3),
        ({"every": 10, "keep": 3, "at": (7, 20, 1000)}, 1000, 6),
        ({"every": 10, "keep": 3, "keep_every": 100, "at": (7, 200)}, 1000, 15),
    ],
)
def test_checkpoints_at_a_time(saving: dict[str, Any], steps: int, count: int) -> None:
    assert held_at_most(CheckpointConfig(**saving), steps) == count


# --- tools/train.py --preflight ----------------------------------------------------------------------------


@pytest.fixture
def config(digits: Digits, tmp_path: Path) -> Path:
    import yaml

    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump(values(digits, tmp_path / "run")))
    return path


def test_preflight_alone(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tools.train.main, config, "--preflight", config=Experiment) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CHECKS)
    assert "batch       32 = 1 ranks x 8 x 4 accumulated" in lines
    assert not (tmp_path / "run").exists()


def test_preflight_alone_shows_all_that_is_wrong(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (config, "--preflight", "--data.path=nowhere", "--train.micro_batch=5")
    assert call(tools.train.main, *words, config=Experiment) == 1
    said = capsys.readouterr()
    failed = [line.split()[0] for line in said.out.splitlines() if "FAILED: " in line]
    assert failed == ["batch", "data"]
    assert "order       not looked at, see data" in said.out
    assert said.err.startswith("error: 2 check(s) failed. batch: train.micro_batch = 5 does not divide")
    assert "nowhere: no manifest.json" in said.err
    assert not (tmp_path / "run").exists()


def test_a_site_names_its_nodes() -> None:
    site = Site(None, World(2, 4, 0), None, ("a", "b", "a", "b"))  # type: ignore[arg-type]
    assert not site.leads
    assert replace(site, world=World(1, 4, 0)).leads
    assert site.named("b") == "b (ranks 1, 3)"
