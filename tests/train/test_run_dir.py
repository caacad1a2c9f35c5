"""Claiming a run directory: identity keys are fixed, operational ones are taken and recorded."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from dit.config import ConfigError, from_dict, keys_of, merge, to_dict
from dit.configfile import load
from dit.errors import Notice
from dit.experiments.autoencoder import AutoencoderExperiment
from dit.experiments.classifier import ClassifierExperiment
from dit.experiments.diffusion import Experiment
from dit.outputs import OutputError
from dit.ranks.group import World
from dit.train import run_dir
from dit.train.run_dir import begun_with, claim, differences, is_operational, locked, settled, stage_of
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import column, go, values

BASE = {"data": {"path": "there"}, "model": {"size": "nano"}, "train": {"steps": 10, "global_batch": 8}}


def experiment(run_dir: Path, **changes: object) -> Experiment:
    return from_dict(Experiment, merge({**BASE, "run_dir": str(run_dir)}, changes))


def history(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]


def test_a_new_one_gets_its_config_in_full(tmp_path: Path) -> None:
    cfg = experiment(tmp_path / "a" / "run")
    assert claim(cfg, World()) == tmp_path / "a" / "run"
    assert load(Experiment, tmp_path / "a" / "run" / "config.yaml") == cfg
    (start,) = history(tmp_path / "a" / "run")
    assert start["changes"] == {}
    assert start["ranks"] == 1
    assert set(start) == {"time", "code", "ranks", "on", "changes"}


OPERATIONAL_CHANGES = {
    "train": {
        "steps": 20,
        "micro_batch": 4,
        "log_every": 1,
        "max_skipped": 2,
        "threads": 1,
        "hang_timeout": 9,
    },
    "zero": {"stage": 3},
    "checkpoint": {"every": 5, "keep": 1},
    "engine": "local",
    "data": {"path": "elsewhere", "prefetch": 1, "val": "beside"},
    "val": {"every": 3},
    "sample": {"every": 7, "cfg_scale": 2.0},
    "codec": {"name": "vae", "path": "moved"},
    "model": {"checkpoint_blocks": True, "attention": "math", "kernels": "triton"},
}


def test_operational_changes_are_taken_and_recorded(tmp_path: Path) -> None:
    claim(experiment(tmp_path), World())
    changed = experiment(tmp_path, **OPERATIONAL_CHANGES)
    claim(changed, World(0, 4, 0))
    assert load(Experiment, tmp_path / "config.yaml") == changed
    first, second = history(tmp_path)
    assert (first["ranks"], second["ranks"]) == (1, 4)
    assert second["changes"]["train.steps"] == [10, 20]
    assert second["changes"]["zero.stage"] == ["auto", 3]
    assert second["changes"]["data.path"] == ["there", "elsewhere"]
    assert second["changes"]["engine"] == ["deepspeed", "local"]
    assert "train.global_batch" not in second["changes"]


def test_auxiliary_terms_are_the_same_run_in_whichever_form_they_are_given(tmp_path: Path) -> None:
    """A mapping is how runs before there were several terms have it written; one more term is another run."""
    plain = {"path": "ddpm", "prediction": "eps", "auxiliary": "learned_range"}
    cfg = experiment(tmp_path, model={"learn_sigma": True}, objective=plain)
    before = to_dict(cfg)
    assert before["objective"]["auxiliary"] == {"name": "learned_range", "weight": 1.0}
    for form in (["learned_range"], {"name": "learned_range"}, [{"name": "learned_range", "weight": "1"}]):
        again = experiment(tmp_path, model={"learn_sigma": True}, objective={**plain, "auxiliary": form})
        assert differences(before, again, "here") == {}
        assert to_dict(again) == before
    both = {**plain, "auxiliary": ["learned_range", "direction"]}
    more = experiment(tmp_path, model={"learn_sigma": True}, objective=both)
    with pytest.raises(ConfigError, match=r"objective\.auxiliary"):
        differences(before, more, "here")
    assert differences(to_dict(more), more, "here") == {}
    older = to_dict(experiment(tmp_path))
    del older["objective"]["auxiliary"]
    assert differences(older, experiment(tmp_path, objective={"auxiliary": []}), "here") == {}


@pytest.mark.parametrize(
    ("config", "lines", "stage"),
    [
        (None, [], None),
        ("seed: 0\n", [], 2),  # from before a stage was chosen
        ("zero:\n  stage: 3\n", [], 3),
        ("zero:\n  stage: auto\n", [], None),
        ("zero:\n  stage: 3\n", ['{"stage": 0}', '{"ranks": 1}'], 0),  # the last start was the local engine's
        ("zero:\n  stage: auto\n", ['{"stage": 1}', '{"stage": 0, "changes": {', '{"stage": 2, "ra'], 1),
    ],
)
def test_the_stage_that_a_run_has_had(
    tmp_path: Path, config: str | None, lines: list[str], stage: int | None
) -> None:
    if config is not None:
        (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    if lines:
        (tmp_path / "history.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert stage_of(tmp_path, begun_with(tmp_path), 2) == stage


@pytest.mark.parametrize(
    ("begun", "is_warmed"), [("of old", False), (False, False), (True, True), (None, True)]
)
def test_what_a_command_leaves_open_stays_as_the_run_began_however_often_it_goes_on(
    tmp_path: Path, begun: bool | str | None, is_warmed: bool
) -> None:
    first = experiment(tmp_path, ema={"warmup": None if begun == "of old" else begun})
    claim(settled(first, begun_with(tmp_path)), World())
    if begun == "of old":
        whole = (tmp_path / "config.yaml").read_text(encoding="utf-8")
        older = whole.replace("  decay: 0.9999\n  warmup: true\n", "  decay: 0.9999\n")
        assert older != whole
        (tmp_path / "config.yaml").write_text(older, encoding="utf-8")
    for _ in range(3):
        again = settled(experiment(tmp_path), begun_with(tmp_path))
        assert again.ema.warmup is is_warmed
        claim(again, World())


@pytest.mark.parametrize(
    ("key", "changes", "shown"),
    [
        ("seed", {"seed": 1}, "seed: 0 there, 1 now"),
        ("train.global_batch", {"train": {"global_batch": 16}}, "train.global_batch: 8 there, 16 now"),
        ("train.precision", {"train": {"precision": "bf16"}}, "train.precision: 'fp32' there, 'bf16' now"),
        ("train.label_drop", {"train": {"label_drop": 0.2}}, "train.label_drop: 0.1 there, 0.2 now"),
        ("optim.lr", {"optim": {"lr": 1e-3}}, "optim.lr: 0.0001 there, 0.001 now"),
        ("ema.decay", {"ema": {"decay": 0.5}}, "ema.decay: 0.9999 there, 0.5 now"),
        ("data.lanes", {"data": {"lanes": 4}}, "data.lanes: 64 there, 4 now"),
        ("model.size", {"model": {"size": "S"}}, "model.size: 'nano' there, 'S' now"),
        (
            "objective.path.name",
            {"objective": {"path": "vp"}},
            "objective.path.name: 'linear' there, 'vp' now",
        ),
        ("latents.norm", {"latents": {"norm": "codec"}}, "latents.norm: 'dataset' there, 'codec' now"),
        ("init.from", {"init": {"from": "x"}}, "init.from: null there, 'x' now"),
    ],
)
def test_an_identity_change_is_refused_and_shown(tmp_path: Path, key: str, changes: dict, shown: str) -> None:
    claim(experiment(tmp_path), World())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError) as error:
        claim(experiment(tmp_path, **changes, zero={"stage": 1}), World())
    text = str(error.value)
    assert f"{tmp_path} holds a run with another config" in text
    assert f"  {shown}\n" in text
    assert "zero.stage" not in text  # what may change is not to blame
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert not is_operational(key)


def test_every_identity_key_that_differs_is_listed(tmp_path: Path) -> None:
    claim(experiment(tmp_path), World())
    with pytest.raises(ConfigError) as error:
        claim(experiment(tmp_path, seed=1, optim={"lr": 1.0}), World())
    assert "seed" in str(error.value)
    assert "optim.lr" in str(error.value)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    cfg = experiment(tmp_path / "run")
    with locked(tmp_path / "run", World(1, 2, 1)):
        assert not (tmp_path / "run").exists()
    assert claim(cfg, World(0, 2, 0)) == tmp_path / "run"


def test_a_run_directory_in_use_is_refused_with_who_uses_it_and_free_again_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with locked(run, World()):
        (run / "metrics.jsonl").write_text("")
        before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()}
        says = rf"run is in use by another process .*process {os.getpid()}, since 20\d\d-.*Nothing of it was touched"
        with pytest.raises(ConfigError, match=says), locked(run, World(), patience=0.3):
            pytest.fail("two at a time")
        assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()} == before
    said = capsys.readouterr().out
    assert said.count("waiting up to 0 s for its end") == 1
    assert f"process {os.getpid()}, since" in said
    with locked(run, World(), patience=0.0):
        assert (run / ".lock").is_file()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_it_is_said_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("dit.files.fcntl.flock", refuse)
    said = pytest.warns(
        Notice, match=r"run lies on a file system without file locks.*give a run_dir on another"
    )
    with said, locked(tmp_path / "run", World()):
        assert (tmp_path / "run" / ".lock").is_file()
    assert not (tmp_path / "run").exists()


def test_a_directory_made_for_nothing_is_gone_again(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "new"

    def fail() -> None:
        with locked(run, World()):
            assert (run / ".lock").is_file()
            raise ConfigError("the data are not there")

    with pytest.raises(ConfigError, match="not there"):
        fail()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()  # of somebody else
    with locked(run, World()):
        pass
    assert list((tmp_path / "runs").iterdir()) == []
    with locked(run, World()):
        (run / "config.yaml").write_text("")
    assert sorted(p.name for p in run.iterdir()) == [".lock", "config.yaml"]


def test_a_data_set_is_not_made_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    refused = pytest.raises(OutputError, match="is a data set, and a run directory is to be written")
    with refused, locked(tmp_path, World()):
        pytest.fail("it is held")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_lock_that_its_holder_removes_is_not_taken_for_one(tmp_path: Path) -> None:
    """Who waited for a directory that goes again holds the one that a third then finds."""
    run, held = tmp_path / "run", threading.Event()

    def wait_and_hold() -> None:
        with locked(run, World(), patience=30):
            held.set()
            done.wait(30)

    done, waiting = threading.Event(), threading.Thread(target=wait_and_hold)
    with locked(run, World()):
        waiting.start()
        assert not held.wait(0.5)
    assert held.wait(30)
    with pytest.raises(ConfigError, match="in use"), locked(run, World(), patience=0.0):
        pytest.fail("two at a time")
    done.set()
    waiting.join()
    assert not run.exists()


def hold(folder: Path) -> None:
    """Hold a run directory until this process is killed."""
    with locked(folder, World()):
        (folder / "held").touch()
        time.sleep(100)


def test_a_start_beside_a_running_job_changes_nothing_of_it_and_goes_on_when_that_dies(
    digits: Digits,
    ranks: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process holds the directory of a run; the start that comes has other operational keys."""
    run = tmp_path / "run"
    go(values(digits, run, engine="local", train={"steps": 1}))
    other = values(digits, run, engine="local", train={"steps": 2})
    with ranks.start_apart(1, hold, run) as job:
        end = time.monotonic() + 60
        while not (run / "held").exists():
            assert time.monotonic() < end, job.output()
            time.sleep(0.01)
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        in_use = rf"in use by another process .*process {job.processes[0].pid}, since 20\d\d-"
        with monkeypatch.context() as impatient:
            impatient.setattr(run_dir, "PATIENCE", 0.0)
            with pytest.raises(ConfigError, match=in_use):
                go(other)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
        threading.Timer(1.0, job.kill).start()
        go(other)  # waits until that is dead
    assert f"process {job.processes[0].pid}, since 20" in capsys.readouterr().out
    assert column(run, "step") == [1, 2]


def test_keys_that_came_later_count_as_having_had_their_defaults(tmp_path: Path) -> None:
    cfg = experiment(tmp_path / "run")
    before = to_dict(cfg)
    del before["optim"]["eps"]
    assert differences(before, cfg, "there") == {}
    before["optim"]["betas"] = [0.5, 0.5]
    before["gone"] = 3
    with pytest.raises(ConfigError, match=r"gone: 3 there, null now(.|\n)*optim.betas"):
        differences(before, cfg, "there")


def test_what_is_operational_is_a_key_of_the_schema() -> None:
    """A renamed key must not stay in the list."""
    from dit.train.settings import OPERATIONAL

    keys = {*keys_of(Experiment), *keys_of(ClassifierExperiment), *keys_of(AutoencoderExperiment)}
    assert {k for k in OPERATIONAL if k not in keys} <= {
        "model.checkpoint_blocks",
        "model.attention",
        "model.checkpoint_keep",
    }  # inside a registry's member
    assert is_operational("zero.stage")
    assert is_operational("codec.path")
    assert not is_operational("zeros")
    assert not is_operational("model.size")
    assert not is_operational("train")
