"""What a run refuses before its first step, its dry run and its preflight refuse too, in the same words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tools.train
import tools.train_classifier
import tools.train_vae
from dit.data.shards.manifest import Manifest
from dit.errors import Notice
from dit.experiments.trained import Trained
from dit.sample.generate import SamplerSpec
from dit.train.preflight.checks import CHECKS
from tests.commands import call
from tests.data.helpers import edit_manifest
from tests.datasets import Digits
from tests.experiments.test_autoencoder import values as vae_values
from tests.experiments.test_classifier import values as classifier_values
from tests.train.runs import at_step, go, sign, values

WAYS = {"start": (), "dry run": ("--dry_run",), "preflight": ("--preflight",)}
Sections = dict[str, Any]


def other_classes(digits: Digits, folder: Path) -> str:
    shutil.copytree(digits.moments_val, folder)
    edit_manifest(folder, classes=[f"digit {c}" for c in Manifest.load(folder).classes])
    return str(folder)


def held_out(digits: Digits, folder: Path, path: str) -> Sections:
    return {"data": {"val": path}, "val": {"every": 1}}


# name -> (what is wrong with the run of `values`, words of the refusal)
BROKEN: dict[str, tuple[Callable[[Digits, Path], Sections], str]] = {
    "no data": (lambda d, f: {"data": {"path": "nowhere"}}, "nowhere: no manifest.json"),
    "batch above the data": (
        lambda d, f: {"train": {"global_batch": 1000, "micro_batch": 8}},
        "a global batch of 1000 is larger than the data set of 160 samples",
    ),
    "batch above a share of a mixture": (
        lambda d, f: {
            "data": {
                "path": None,
                "mix": [{"path": str(d.moments), "weight": 1e6}, {"path": str(d.moments_val), "weight": 1}],
            }
        },
        "raise its weight or the batch",
    ),
    "micro-batch": (lambda d, f: {"train": {"micro_batch": 5}}, "train.micro_batch = 5 does not divide"),
    "coupling's group": (
        lambda d, f: {"objective": {"coupling": {"name": "ot", "group": 16}}},
        "a micro-batch of 8 samples is no multiple of 16, the group of objective.coupling",
    ),
    "coupling's noise": (
        lambda d, f: {"objective": {"coupling": "reflow"}},
        "takes the noise that is stored",
    ),
    "held-out classes": (
        lambda d, f: held_out(d, f, other_classes(d, f / "other")),
        "differ in classes",
    ),
    "held-out codec": (lambda d, f: held_out(d, f, str(d.pixels_val)), "come from different codecs"),
    "no held-out data": (lambda d, f: held_out(d, f, "gone"), "gone: no manifest.json"),
    "held-out data fewer than a group": (
        lambda d, f: (
            held_out(d, f, str(d.moments_val))
            | {
                "objective": {"coupling": {"name": "ot", "group": 64}},
                "train": {"global_batch": 64, "micro_batch": 64},
            }
        ),
        "are fewer than the 64 that the objective takes together",
    ),
    "pictures' codec": (
        lambda d, f: {"sample": {"every": 1}, "codec": {"path": "gone"}},
        "gone",
    ),
    "pictures without a codec": (
        lambda d, f: {"sample": {"every": 1}, "codec": None},
        "nothing says where it is",
    ),
    "guidance of pictures": (
        lambda d, f: {
            "sample": {"every": 1, "guidance": [{"name": "autoguidance", "checkpoint": "gone", "scale": 2}]}
        },
        "gone is missing",
    ),
    "guidance on more channels than there are": (
        lambda d, f: {"sample": {"every": 1, "guidance": [{"name": "cfg", "scale": 2, "channels": 9}]}},
        "channels",
    ),
    "codec that contradicts the data": (
        lambda d, f: {"data": {"path": str(d.pixels)}},
        "codec is 'vae', and the data in",
    ),
    "too few classes": (lambda d, f: {"model": {"num_classes": 3}}, "num_classes is 3 and the data have 10"),
    "frozen pattern": (lambda d, f: {"train": {"freeze": ["block.0.*"]}}, "did you mean blocks.0.*?"),
    "no init": (lambda d, f: {"init": {"from": "gone"}}, "gone is missing"),
    "no branch": (lambda d, f: {"init": {"branch": "gone"}}, "gone is missing"),
    "hpz": (
        lambda d, f: {"zero": {"stage": 3, "hpz": 2}, "engine": "deepspeed"},
        "zero.hpz = 2 does not divide 1 ranks",
    ),
}


def said(
    main: Callable[..., None], config: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Status and error of a command, without what the preflight puts around it."""
    status = call(main, config, *words)
    return status, capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_all_three_refuse_a_file_in_the_place_of_the_run_directory(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str
) -> None:
    (tmp_path / "run").write_text("precious")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values(digits, Path(f"{tmp_path}/run{below}"), engine="local")))
    found = {way: said(tools.train.main, config, flags, capsys) for way, flags in WAYS.items()}
    assert all(
        status == 1 and f"{tmp_path}/run is no directory" in text for status, text in found.values()
    ), found
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize("name", BROKEN)
def test_all_three_refuse_it_in_the_same_words(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    broken, words = BROKEN[name]
    config = tmp_path / "config.yaml"
    given = values(digits, tmp_path / "run", **{"engine": "local", **broken(digits, tmp_path)})
    config.write_text(yaml.safe_dump(given))
    found = {way: said(tools.train.main, config, flags, capsys) for way, flags in WAYS.items()}
    error = found["start"][1].removeprefix("error: ").strip()
    assert words in error
    for way, (status, text) in found.items():
        assert status == 1, (way, text)
        assert error in text, way
        assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


# --- a run that is there -----------------------------------------------------------------------------------


def begun(digits: Digits, folder: Path, **sections: Any) -> Sections:
    """A run of two steps, as plain values."""
    given = values(digits, folder, engine="local", train={"steps": 2}, checkpoint={"every": 1}, **sections)
    go(given)
    return given


@pytest.fixture(scope="module")
def source(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    begun(digits, folder)
    return folder


def other_model(source: Path) -> Sections:
    return {"init": {"from": str(source)}, "model": {"size": "nano", "patch": 4}}


def no_such_weights(source: Path) -> Sections:
    return {"init": {"from": str(source), "weights": "ema_0.5"}}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (other_model, "does not fit this model"),
        (no_such_weights, "holds the weights model, ema; got 'ema_0.5'"),
    ],
)
def test_weights_to_begin_with_that_do_not_fit(
    digits: Digits, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: Any, words: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values(digits, tmp_path / "run", engine="local", **broken(source))))
    found = {way: said(tools.train.main, config, flags, capsys) for way, flags in WAYS.items()}
    error = found["start"][1].removeprefix("error: ").strip()
    assert words in error
    assert all(status == 1 and error in text for status, text in found.values()), found
    assert not (tmp_path / "run").exists()


def test_such_weights_are_taken_by_all(digits: Digits, source: Path, tmp_path: Path, capsys) -> None:
    config = tmp_path / "config.yaml"
    given = values(digits, tmp_path / "run", init={"from": str(source)}, train={"steps": 1}, engine="local")
    config.write_text(yaml.safe_dump(given))
    for flags in (*list(WAYS.values())[1:], ()):
        assert call(tools.train.main, config, *flags) == 0, capsys.readouterr().err
    assert "starting from the ema weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: {"seed": 3}, "seed: 0 there, 3 now"),
        (lambda d: {"data": {"path": str(d.moments_val)}}, "was trained on other data than the ones given"),
    ],
)
def test_another_run_or_other_data_in_its_place(
    digits: Digits, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, words: str
) -> None:
    run = Path(shutil.copytree(source, tmp_path / "run"))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    config = tmp_path / "config.yaml"
    given = values(
        digits, source, engine="local", train={"steps": 4}, checkpoint={"every": 1}, **change(digits)
    )
    config.write_text(yaml.safe_dump({**given, "run_dir": str(run)}))
    found = {way: said(tools.train.main, config, flags, capsys) for way, flags in WAYS.items()}
    error = found["start"][1].removeprefix("error: ").strip()
    assert words in error
    assert all(status == 1 and error in text for status, text in found.values()), found
    assert {p: p.read_bytes() for p in before} == before


def test_a_codec_that_contradicts_the_data_is_warned_of_where_the_run_has_begun(
    digits: Digits, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """As a run of before that was let through: `codec` may change, and is compared with the data alone."""
    run = tmp_path / "run"
    given = begun(digits, run, data={"path": str(digits.pixels)}, codec={"name": "pixels"})
    given["codec"] = {"name": "vae", "path": str(digits.vae)}
    given["train"]["steps"] = 3
    recwarn.clear()
    go(given)
    (told,) = [w for w in recwarn.list if w.category is Notice]
    assert "codec is 'vae', and the data in" in str(told.message)
    assert "goes on as it began" in str(told.message)
    assert at_step(run, 3).is_dir()
    recwarn.clear()  # and sampling from it
    trained = Trained.load(str(run), "model", torch.device("cpu"))
    trained.sampler(SamplerSpec(), {}, torch.device("cpu"), "fp32")
    (told,) = [w for w in recwarn.list if w.category is Notice]
    assert "codec is 'vae', and the data in the run of" in str(told.message)


# --- every experiment --------------------------------------------------------------------------------------


def test_every_experiment_has_all_three(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {
        "dit": (tools.train.main, values),
        "vae": (tools.train_vae.main, vae_values),
        "classifier": (tools.train_classifier.main, classifier_values),
    }
    for name, (main, given) in kinds.items():
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(given(digits, tmp_path / name, engine="local", train={"steps": 2})))
        assert call(main, config, "--dry_run") == 0
        rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        assert {
            "run",
            "device",
            "parameters",
            "model",
            "objective",
            "data",
            "batch",
            "rate",
            "ema",
            "hours",
        } <= set(rows), name
        assert "images/s" in rows["hours"]
        assert "measured here" in rows["hours"]
        assert call(main, config, "--preflight") == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(CHECKS)
        assert call(main, config, "--dry_run", "--preflight") == 1
        assert "two things" in capsys.readouterr().err
        assert call(main, config, "--dry_run", "--train.global_batch=1000", "--train.micro_batch=8") == 1
        assert "is larger than the data set of" in capsys.readouterr().err
        assert not (tmp_path / name).exists()


# --- an old run --------------------------------------------------------------------------------------------


def aged(run: Path) -> None:
    """The run as a version wrote it that knew of no warming up."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["ema"]["warmup"]
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for folder in (run / "checkpoints").iterdir():
        sign(folder, lambda meta: meta["config"]["ema"].pop("warmup"))


@pytest.mark.parametrize("with_config", [True, False])
def test_a_run_from_before_warming_up_goes_on_without_it(
    digits: Digits, tmp_path: Path, with_config: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its unchanged command, bit for bit as one that was never warmed up; its config.yaml says so then."""
    rest = {"engine": "local", "checkpoint": {"every": 2}, "data": {"val": str(digits.moments_val)}}
    rest["val"] = {"every": 2, "batches": 1}
    plain = values(digits, tmp_path / "plain", ema={"warmup": False}, train={"steps": 4}, **rest)
    go(plain)
    run = Path(shutil.copytree(tmp_path / "plain", tmp_path / "run"))
    shutil.rmtree(at_step(run, 4))
    aged(run)
    if not with_config:
        (run / "config.yaml").unlink()
    config = tmp_path / "config.yaml"
    unchanged = values(digits, tmp_path / "plain", train={"steps": 4}, **rest)
    config.write_text(yaml.safe_dump({**unchanged, "run_dir": str(run)}))
    assert call(tools.train.main, config, "--ema.warmup=true") == 1
    assert "ema.warmup: false there, true now" in capsys.readouterr().err
    assert call(tools.train.main, config, "--dry_run") == 0
    assert "decay 0.9; " in capsys.readouterr().out
    assert call(tools.train.main, config) == 0
    expected, found = (tmp_path / "plain", run)
    for name in ("held_out.jsonl",):
        rows = [[json.loads(line) for line in (r / name).read_text().splitlines()] for r in (expected, found)]
        assert rows[0] == rows[1]
    files = [at_step(r, 4) / "rank-00000.safetensors" for r in (expected, found)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert yaml.safe_load((run / "config.yaml").read_text())["ema"]["warmup"] is False


def test_a_new_run_says_that_it_is_warmed_up(source: Path) -> None:
    assert yaml.safe_load((source / "config.yaml").read_text())["ema"]["warmup"] is True
