"""Branches are the runs that were planned so from their start, to the bit; what would not be is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import tools.train
from dit.config import ConfigError, merge
from dit.errors import UserError
from dit.evals import record
from dit.experiments.parts import make_parts
from dit.ranks.group import World
from dit.train import branch
from dit.train.checkpoints import checkpoint, linking
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.meters import SPEEDS
from dit.train.plan import Plan
from tests.commands import call
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import (
    Values,
    at_step,
    column,
    differing,
    experiment,
    flip_bit,
    go,
    go_until,
    metrics,
    state,
    values,
)

LONG, SHORT, AT = 12, 10, 6  # train.steps of trunk and branch; (1 - 0.4) * 10
LAYOUTS: dict[str, tuple[int, Values]] = {
    "one rank": (1, {"engine": "local"}),
    "two ranks": (2, {"zero": {"stage": 2}, "train": {"micro_batch": None}}),
}


def planned(digits: Digits, run_dir: Path, steps: int, **sections: Any) -> Values:
    """A run of that many steps, of which the last 40% decay. Rows of the log lie across the branch's step."""
    base = values(
        digits,
        run_dir,
        optim={"warmup": 2},
        train={"steps": steps, "log_every": 4},
        ema={"power": [0.05, 0.1], "snapshot_every": 3},
        checkpoint={"every": 100},
        data={"val": str(digits.moments_val)},
        val={"every": 3, "batches": 1},
    )
    base["optim"]["schedule"] = {"name": "wsd", "decay": 0.4, "shape": "sqrt"}
    return merge(base, sections)


@pytest.fixture(scope="module")
def trunks(digits: Digits, ranks: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Layout -> a trunk on it, with a checkpoint where SHORT steps begin to decay, and one within its own decay."""

    @cache
    def run(layout: str) -> Path:
        folder = tmp_path_factory.mktemp("trunk") / "run"
        size, sections = LAYOUTS[layout]
        given = planned(digits, folder, LONG, checkpoint={"at": [AT, LONG - 2], "keep": 1})
        ranks.run(size, go, merge(given, sections))
        return folder

    return run


@pytest.fixture
def trunk(trunks: Callable[[str], Path]) -> Path:
    return trunks("one rank")


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """A log without what tells how fast the machine was."""
    lines = (folder / name).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEEDS} for line in lines]


def logged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: rows(folder, name) for name in ("metrics.jsonl", "held_out.jsonl")}


def inode(folder: Path, step: int) -> int:
    return os.stat(at_step(folder, step) / "rank-00000.safetensors").st_ino


# --- the proof ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_branch_is_the_run_that_was_planned_so_from_its_start(
    digits: Digits, ranks: Server, trunks: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    """Weights, averages, moments, snapshots, logs; killed before it saves, and resumed with the trunk gone by then."""
    size, sections = LAYOUTS[layout]
    whole, folder = tmp_path / "whole", tmp_path / "branch"
    source = Path(shutil.copytree(trunks(layout), tmp_path / "trunk"))
    ranks.run(size, go, merge(planned(digits, whole, SHORT), sections))
    given = merge(planned(digits, folder, SHORT, init={"branch": str(at_step(source, AT))}), sections)
    with ranks.start(size, go_until, given, SHORT - 1, tmp_path / "never") as job:
        log = folder / "metrics.jsonl"
        while not log.is_file() or log.read_text().count("\n") != 2:  # of steps 4 and 8
            assert all(process.is_alive() for process in job.processes), job.output()
            time.sleep(0.02)
        job.kill()
    assert [path.name for path in (folder / "checkpoints").glob("step-????????")] == [
        at_step(folder, AT).name
    ]
    assert inode(folder, AT) == inode(source, AT)
    shutil.rmtree(source)
    ranks.run(size, go, given)
    assert differing(state(at_step(whole, SHORT)), state(at_step(folder, SHORT))) == []
    assert logged(folder) == logged(whole)
    for step in (3, 6, 9):
        one, other = (f / "snapshots" / f"step-{step:08d}" for f in (whole, folder))
        assert differing(state(one), state(other)) == []
    starts = rows(folder, "history.jsonl")
    assert (starts[0]["branch"]["from"], starts[0]["branch"]["step"]) == (str(at_step(source, AT)), AT)
    assert ["branch" in start for start in starts] == [True, False, False]


def test_saving_at_more_steps_changes_nothing_and_they_stay(
    digits: Digits, trunk: Path, tmp_path: Path
) -> None:
    go(planned(digits, tmp_path, LONG, engine="local"))
    assert differing(state(at_step(tmp_path, LONG)), state(at_step(trunk, LONG))) == []
    assert logged(tmp_path) == logged(trunk)
    assert [p.name for p in sorted((trunk / "checkpoints").iterdir())] == [
        at_step(trunk, step).name for step in (AT, LONG - 2, LONG)
    ]


# --- how it begins -----------------------------------------------------------------------------------------


def begun(given: Values) -> Path:
    """A branch before its first start has done anything but begin it."""
    cfg = experiment(given)
    plan = Plan(cfg, make_parts, World())
    assert plan.branch is not None
    branch.begin(plan.cfg, plan.branch)
    return cfg.folder


def test_a_run_directory_is_branched_where_it_is_last_what_the_run_would_have_been(
    digits: Digits, trunk: Path, tmp_path: Path
) -> None:
    """Not at its newest step, nor within its decay."""
    folder = begun(planned(digits, tmp_path / "run", SHORT, init={"branch": str(trunk)}, engine="local"))
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [at_step(folder, AT).name]


@pytest.mark.parametrize("flag", ["--dry_run", "--preflight"])
def test_what_only_looks_begins_none(
    digits: Digits, trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    config = tmp_path / "config.yaml"
    given = planned(digits, tmp_path / "run", SHORT, init={"branch": str(trunk)}, engine="local")
    config.write_text(yaml.safe_dump(given))
    assert call(tools.train.main, config, flag) == 0, capsys.readouterr().err
    assert str(at_step(trunk, AT)) in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_logs_go_as_far_as_the_step_and_figures_with_them(
    digits: Digits, trunk: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(trunk, tmp_path / "trunk"))
    row = {"figures": {"frechet": 1.0}, "hash": "00", "by": record.TRAINING}
    measured = [{"step": step, **row} for step in (3, AT, LONG)]
    (source / record.FILE).write_text("".join(json.dumps(row) + "\n" for row in measured))
    assert [row["step"] for row in record.read(source)] == [3, AT, LONG]
    given = planned(digits, tmp_path / "run", SHORT, init={"branch": str(source)}, engine="local")
    folder = begun(given)
    assert column(folder, "step") == [4]
    assert [row["step"] for row in rows(folder, "held_out.jsonl")] == [3, 6]
    assert [row["step"] for row in record.read(folder)] == [3, AT]
    assert len(metrics(source)) == LONG // 4
    assert list((folder / "tensorboard").iterdir())


def test_killed_while_it_begins_the_same_command_goes_on(digits: Digits, trunk: Path, tmp_path: Path) -> None:
    given = planned(digits, tmp_path / "run", SHORT, init={"branch": str(trunk)}, engine="local")
    folder = begun(given)
    before = at_step(folder, AT)
    (before / "COMPLETE").unlink()
    before.rename(before.with_suffix(".partial"))  # as a kill right before the last rename leaves it
    (folder / "metrics.jsonl").write_bytes((trunk / "metrics.jsonl").read_bytes())
    assert begun(given) == folder
    assert column(folder, "step") == [4]
    assert len(rows(folder, "history.jsonl")) == 1
    assert inode(folder, AT) == inode(trunk, AT)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [before.name]


def test_what_becomes_of_the_trunk_does_not_touch_it(digits: Digits, trunk: Path, tmp_path: Path) -> None:
    """It is pruned, and writes at the same step again: then both have a file of their own."""
    source = Path(shutil.copytree(trunk, tmp_path / "trunk"))
    given = planned(digits, tmp_path / "run", SHORT, init={"branch": str(source)}, engine="local")
    folder = begun(given)
    held = state(at_step(folder, AT))
    for step in (AT, LONG - 2, LONG):
        shutil.rmtree(at_step(source, step))
    again = planned(digits, source, LONG, engine="local", checkpoint={"at": [AT]}, seed=0)
    go(again)
    assert inode(source, AT) != inode(folder, AT)
    assert differing(held, state(at_step(folder, AT))) == []


def test_files_are_copied_where_there_are_no_hard_links(trunk: Path, tmp_path: Path) -> None:
    """/dev/shm is another file system."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    folder = shm / f"dit-branch-{os.getpid()}"
    try:
        found = linking.take_over(checkpoint.read(at_step(trunk, AT)), folder)
        assert checkpoint.read(found).step == AT
        assert (found / "meta.json").stat().st_nlink == 1
        assert linking.take_over(checkpoint.read(at_step(trunk, AT)), folder) == found
    finally:
        shutil.rmtree(folder)


def test_of_a_checkpoint_that_is_gone_meanwhile_nothing_is_left(trunk: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(at_step(trunk, AT), tmp_path / at_step(trunk, AT).name))
    found = checkpoint.read(source)
    shutil.rmtree(source)
    with pytest.raises(CheckpointError, match=r"could not take .* over .*checkpoint.at"):
        linking.take_over(found, tmp_path / "checkpoints")
    assert not checkpoint.exists(tmp_path / "checkpoints")


# --- what is refused ---------------------------------------------------------------------------------------


def refused(given: Values) -> str:
    with pytest.raises(UserError) as error:
        go(given)
    return str(error.value)


NOT_PLANNED_SO: dict[str, tuple[int, Values, int, str]] = {
    # name -> (checkpoint, changes, train.steps, words)
    "another seed": (AT, {"seed": 1}, SHORT, "holds a run with another config:\n  seed: 0 there, 1 now"),
    "another decay": (
        AT,
        {"optim": {"schedule": {"decay": 0.2}}},
        SHORT,
        "optim.schedule.decay: 0.4 there, 0.2 now",
    ),
    "a step beyond the end": (
        AT,
        {},
        5,
        "step-00000006 is of step 6, and train.steps = 5 ends before it",
    ),
    "a branch that had to decay before": (
        AT,
        {},
        8,
        "the learning rate of update 6 is 0.001, and was 0.002 with train.steps = 12",
    ),
    "a trunk that has decayed": (
        LONG - 2,
        {},
        40,
        "the learning rate of update 9 is 0.002, and was 0.00110557 with train.steps = 12",
    ),
    "weights of another run": (AT, {"init": {"from": "elsewhere"}}, SHORT, "are two ways to begin"),
}


@pytest.mark.parametrize("name", NOT_PLANNED_SO)
def test_what_no_run_would_have_come_to_is_refused(
    digits: Digits, trunk: Path, tmp_path: Path, name: str
) -> None:
    step, changes, steps, words = NOT_PLANNED_SO[name]
    given = planned(
        digits, tmp_path / "run", steps, init={"branch": str(at_step(trunk, step))}, engine="local"
    )
    assert words in refused(merge(given, changes))
    assert not (tmp_path / "run").exists()


def test_a_cosine_has_no_branches_of_another_length(digits: Digits, reference: Path, tmp_path: Path) -> None:
    """Of `reference`, which decays along a cosine from its 5th update on: the 6th is the first that differs."""
    given = values(
        digits, tmp_path / "run", engine="local", train={"steps": 40}, init={"branch": str(reference)}
    )
    found = refused(given)
    assert "none of the 2 checkpoint(s)" in found
    assert "the learning rate of update 6 is" in found


def test_a_rate_that_the_log_knows_otherwise_is_refused(digits: Digits, trunk: Path, tmp_path: Path) -> None:
    """A trunk that had another train.steps for a while, which its checkpoint does not tell."""
    source = Path(shutil.copytree(trunk, tmp_path / "trunk"))
    found = metrics(source)
    found[0]["lr"] *= 0.99
    (source / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    given = planned(
        digits, tmp_path / "run", SHORT, init={"branch": str(at_step(source, AT))}, engine="local"
    )
    assert "the learning rate at step 4 is 0.002" in refused(given)


def lacking(folder: Path) -> str:
    return str(folder.parent / "gone")


def partial(folder: Path) -> str:
    at_step(folder, AT).rename(at_step(folder, AT).with_suffix(".partial"))
    return str(at_step(folder, AT))


def exported(folder: Path) -> str:
    return str(at_step(folder, AT) / "rank-00000.safetensors")


def damaged(folder: Path) -> str:
    flip_bit(at_step(folder, AT) / "rank-00000.safetensors")
    return str(at_step(folder, AT))


def empty(folder: Path) -> str:
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    return str(folder)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lacking, "gone is missing"),
        (partial, "is being written"),
        (exported, "init.from takes weights alone"),
        (damaged, "does not match its checksum"),
        (empty, "no checkpoint here yet"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(
    digits: Digits, trunk: Path, tmp_path: Path, broken: Callable[[Path], str], words: str
) -> None:
    source = broken(Path(shutil.copytree(trunk, tmp_path / "trunk")))
    given = planned(digits, tmp_path / "run", SHORT, init={"branch": source}, engine="local")
    assert words in refused(given)
    assert not checkpoint.exists(tmp_path / "run" / "checkpoints")


def test_a_run_is_not_taken_for_a_branch_that_it_is_not(digits: Digits, trunk: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(trunk, tmp_path / "trunk"))
    of = {"branch": str(at_step(trunk, LONG - 2))}
    own = planned(digits, source, LONG, init=of, engine="local")
    assert "holds a run that did not begin as a branch" in refused(own)
    given = planned(digits, tmp_path / "run", SHORT, init={"branch": str(trunk)}, engine="local")
    begun(given)
    assert "is another" in refused(merge(given, {"init": of}))
    plan = Plan(experiment(merge(given, {"init": {"branch": str(tmp_path / "gone")}})), make_parts, World())
    assert "goes on as the branch of" in branch.check(plan.cfg, plan.identity, plan.branch)


def test_steps_that_are_never_saved_are_refused(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.at = \[11\] lies beyond train.steps = 10"):
        experiment(planned(digits, tmp_path, 10, checkpoint={"at": [3, 11]}))
    with pytest.raises(ConfigError, match=r"within the warm-up of optim.warmup = 7"):
        experiment(planned(digits, tmp_path, 10, optim={"warmup": 7}))
