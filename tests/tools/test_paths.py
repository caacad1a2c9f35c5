"""~ and variables in every path that a tool takes: filled in when it is used, recorded as it was typed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import tools.convert
import tools.encode
import tools.evaluate
import tools.likelihood
import tools.sample
import tools.shards
import tools.train
from dit.data.shards.manifest import Manifest
from dit.data.sources.images import open_source
from dit.experiments.diffusion import Experiment
from dit.train.checkpoints.checkpoint import resolve
from tests.commands import call
from tests.data.foreign.foreign_shards import write_shards
from tests.datasets import Digits
from tests.train.runs import values

DRAW = ("--num_samples=2", "--num_steps=1", "--classes=0,1")


def settings(digits: Digits, run_dir: str, **sections: object) -> dict[str, object]:
    """A run of 2 steps whose paths are all as people type them."""
    given = values(digits, Path(run_dir), engine="local", train={"steps": 2}, checkpoint={"every": 2})
    given |= {"data": {"path": "$DIT_DATA/moments", "val": "~/val", "lanes": 8}, "run_dir": run_dir}
    given |= {"codec": {"name": "vae", "path": "${DIT_DATA}/vae"}, "val": {"every": 2, "batches": 1}}
    return {**given, **sections}


@pytest.fixture(scope="module")
def home(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with data, held-out data, a codec and pictures."""
    folder = tmp_path_factory.mktemp("home")
    for source, name in (
        (digits.moments, "data/moments"),
        (digits.moments_val, "val"),
        (digits.vae, "data/vae"),
    ):
        shutil.copytree(source, folder / name)
    pictures = open_source("digits:test")
    for label in (0, 1):
        (folder / "pictures" / f"n{label}").mkdir(parents=True)
        for i in range(3):
            pictures.open(i).save(folder / "pictures" / f"n{label}" / f"{i}.png")
    names = sorted(str(p.relative_to(folder / "pictures")) for p in folder.glob("pictures/*/*.png"))
    (folder / "labels.csv").write_text("".join(f"{name} c{i % 2}\n" for i, name in enumerate(names)))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Work in an empty folder, which must stay empty: nothing may be made in a folder called ~."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DIT_DATA", str(home / "data"))
    monkeypatch.delenv("DIT_UNSET", raising=False)
    yield
    assert list(place.iterdir()) == []


@pytest.fixture
def train(digits: Digits, home: Path, tmp_path: Path) -> Callable[..., int]:
    def train(run_dir: str, *words: str, **sections: object) -> int:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings(digits, run_dir, **sections)), encoding="utf-8")
        return call(tools.train.main, path, *words, config=Experiment)

    return train


@pytest.fixture
def run(train: Callable[..., int], home: Path) -> str:
    if not (home / "runs" / "a").exists():
        assert train("~/runs/a") == 0
    return "~/runs/a"


def test_a_run_lies_where_it_is_meant_and_records_what_was_typed(
    run: str, train: Callable[..., int], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = yaml.safe_load((home / "runs/a/config.yaml").read_text(encoding="utf-8"))
    assert (held["run_dir"], held["data"]["path"], held["data"]["val"]) == (
        "~/runs/a",
        "$DIT_DATA/moments",
        "~/val",
    )
    assert held["codec"]["path"] == "${DIT_DATA}/vae"
    assert resolve(run).meta["config"]["data"]["path"] == "$DIT_DATA/moments"
    capsys.readouterr()
    assert train(str(home / "runs/a")) == 0  # another spelling, the same run
    assert "has done its 2 steps" in capsys.readouterr().out
    assert train("~/runs/b", init={"from": "$HOME/runs/a"}) == 0
    assert yaml.safe_load((home / "runs/b/config.yaml").read_text())["init"]["from"] == "$HOME/runs/a"
    assert resolve("$HOME/runs/b").step == 2


@pytest.mark.parametrize(
    "word",
    [
        "--run_dir=$DIT_UNSET/x",
        "--data.path=$DIT_UNSET/x",
        "--data.val=${DIT_UNSET}/x",
        "--codec.path=$DIT_UNSET",
        "--init.from=$DIT_UNSET/a",
        "--sample.guidance={name: autoguidance, checkpoint: $DIT_UNSET/a, scale: 2}",
        "--data.cache.folder=$DIT_UNSET/blocks",
    ],
)
def test_a_variable_that_is_not_set_is_named(
    train: Callable[..., int], home: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert train("~/runs/unset", word, sample={"every": 1, "count": 2, "num_steps": 1}) == 1
    assert "the environment variable DIT_UNSET is not set" in capsys.readouterr().err


def test_samples_pairs_and_guidance(run: str, home: Path) -> None:
    guidance = "--guidance={name: autoguidance, checkpoint: $HOME/runs/a, scale: 2}"
    words = (*DRAW, guidance, "--codec.path=~/data/vae")
    assert call(tools.sample.main, run, *words, "--out=~/drawn", "--save_pairs=$DIT_DATA/pairs") == 0
    spec = json.loads((home / "drawn" / "spec.json").read_text())
    assert list(spec["guidance_checkpoints"]) == ["$HOME/runs/a"]
    assert Manifest.load("$DIT_DATA/pairs").samples == 2
    assert call(tools.sample.main, run, *DRAW, "--out=$DIT_UNSET/drawn") == 1


def test_likelihood_sweep_and_export(run: str, home: Path) -> None:
    words = ("--count=2", "--num_steps=1", "--out=~/figures/like.json")
    assert call(tools.likelihood.main, run, "$DIT_DATA/moments", *words) == 0
    assert (home / "figures" / "like.json").is_file()
    few = (
        "--num_samples=4",
        "--features=pixels",
        "--features.components=2",
        "--solver=euler",
        "--num_steps=1",
    )
    words = (f"mine={run}", *few, "--reference=~/pictures", "--out=~/figures/sweep")
    assert call(tools.evaluate.sweep, *words) == 0
    assert (home / "figures" / "sweep" / "sweep.csv").is_file()
    assert call(tools.convert.export, run, "~/figures/a.safetensors") == 0
    assert call(tools.sample.main, "~/figures/a.safetensors", *DRAW, "--out=~/drawn_a") == 0


def test_encoding(home: Path) -> None:
    words = ("--codec=pixels", "--image_size=8", "--flip=false", "--labels=$HOME/labels.csv")
    assert call(tools.encode.main, "~/pictures", "~/latents/a", *words) == 0
    assert Manifest.load("~/latents/a").samples == 6
    assert Manifest.load(home / "latents" / "a").classes == ("c0", "c1")
    assert call(tools.shards.verify, "$HOME/latents/a") == 0
    assert call(tools.shards.info, "~/latents/a") == 0
    assert call(tools.encode.main, "~/pictures", "$DIT_UNSET/a", *words) == 1
    assert call(tools.encode.main, "~/$DIT_UNSET", "~/latents/b", *words) == 1


def test_an_index(home: Path) -> None:
    write_shards(home / "foreign", [4, 4])
    (home / "foreign.txt").write_bytes("# Größe\n~/foreign/*.tar\n".encode("utf-8-sig"))
    (home / "names.txt").write_bytes("".join(f"größe {i}\n" for i in range(10)).encode("utf-16"))
    words = ("--codec=unknown", "--codec.channels=2", "--classes=~/names.txt")
    for i, spec in enumerate(("~/foreign", "$HOME/foreign/*.tar", "~/foreign.txt")):
        assert call(tools.shards.index, spec, f"~/index{i}", *words) == 0
        assert Manifest.load(home / f"index{i}").classes[1] == "größe 1"


def test_a_codec_that_is_relative_to_another_folder_says_so(
    train: Callable[..., int], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as here:
        here.chdir(home)
        assert train("~/runs/relative", codec={"name": "vae", "path": "data/vae"}) == 0
    assert call(tools.sample.main, "~/runs/relative", *DRAW, "--out=~/drawn_b") == 1
    said = capsys.readouterr().err
    assert f"no folder data/vae is here (the path is relative to {Path.cwd()}" in said
    assert "--codec.path=FOLDER" in said
    assert (
        call(tools.sample.main, "~/runs/relative", *DRAW, "--out=~/drawn_b", "--codec.path=~/data/vae") == 0
    )
    for path in ("./data/vae", "../data/vae/x"):
        words = (f"--codec.path={path}", "--out=~/drawn_c")
        assert call(tools.sample.main, "~/runs/relative", *DRAW, *words) == 1
        assert f"(the path is relative to {Path.cwd()}" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["runs/none", "/nowhere/runs"])
def test_a_run_that_is_missing(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tools.sample.main, what, *DRAW, "--out=~/drawn_d") == 1
    said = capsys.readouterr().err
    assert f"{what} is missing" in said
    assert ("the path is relative to" in said) == (what[0] != "/")


def test_a_data_set_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tools.shards.info, "data/none") == 1
    assert f"no such folder (the path is relative to {Path.cwd()}" in capsys.readouterr().err
