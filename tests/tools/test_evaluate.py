"""tools/evaluate.py: figures of images, and of given features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tools.sample
from dit.commandline.cli import run as run_command
from dit.config import ConfigError
from dit.evals.features.spaces import EfficientNetLite0, PixelComponents, Timm
from dit.evals.record import read
from tests.commands import ROOT, call
from tests.datasets import Digits
from tests.train.runs import go, random_run, values
from tools.evaluate import TOOL, features, history, images, read_spaces, reference

GOLDEN = ROOT / "tests" / "golden" / "metrics.npz"
FIGURES = ["frechet", "kid", "precision", "recall", "density", "coverage", "mind", "inception_score"]
FEW = "--mind.projections=20"


def test_figures_intervals_and_protocol_of_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "new" / "figures.json"
    assert call(features, GOLDEN, GOLDEN, FEW, "--bootstrap=20", f"--json_file={place}") == 0
    said = capsys.readouterr().out
    found = json.loads(place.read_text())
    with np.load(GOLDEN) as held:
        for name in FIGURES:
            if name != "mind":
                assert found[name] == pytest.approx(float(held[name]), rel=1e-6)
            assert found["intervals"][name][0] <= found[name] <= found["intervals"][name][1]
            assert f"{found[name]:.6g}  {found['hashes'][name]}" in said
    assert set(found) == {*FIGURES, "intervals", "bootstrap", "samples", "protocol", "hash", "hashes"}
    assert found["samples"] == {"generated": 900, "reference": 1100}
    assert found["bootstrap"] == {"resamples": 20, "level": 0.95, "seed": 0}
    assert found["protocol"]["metrics"]["mind"]["projections"] == 20
    assert found["hash"] in said


def test_without_logits_there_is_no_inception_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    np.savez(ours, rng.normal(size=(30, 4)))
    np.savez(theirs, features=rng.normal(size=(40, 4)))
    assert call(features, ours, theirs, FEW, f"--json_file={tmp_path / 'f.json'}") == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["inception_score"] is None
    assert found["bootstrap"] is None
    assert set(found) >= set(FIGURES)
    assert "needs logits" in capsys.readouterr().out
    assert call(features, ours, theirs, "--metrics=inception_score") == 1
    assert "ours.npz: inception_score needs logits" in capsys.readouterr().err
    assert call(features, ours, theirs, "--metrics=kid") == 0
    assert "frechet" not in capsys.readouterr().out
    assert call(features, ours, GOLDEN) == 1
    assert "features of 4 dimensions, the reference of 48" in capsys.readouterr().err
    assert call(features, ours, theirs, "--bootstrap=3") == 1
    assert "expected 0 (no intervals) or at least 20" in capsys.readouterr().err


def test_where_the_figures_go_is_looked_at_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(features, "nowhere.npz", GOLDEN, f"--json_file={tmp_path}") == 1
    assert "is a folder, and a file is to be written" in capsys.readouterr().err


# --- images ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and 12 images that were drawn from it."""
    folder = tmp_path_factory.mktemp("run")
    run = random_run(digits, folder)
    words = (run, "--num_samples=12", "--num_steps=1", "--batch_size=12", f"--out={folder / 'drawn'}")
    assert call(tools.sample.main, *words) == 0
    return run, folder / "drawn"


def test_figures_of_drawn_images_are_kept_beside_their_run(
    drawn: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, samples = drawn
    size = np.load(samples / "samples.npz")["arr_0"].shape[1]
    words = (
        samples,
        "--features.components=3",
        "--features=pixels",
        "--metrics=frechet,kid",
        "--bootstrap=20",
    )
    place, kept = tmp_path / "f.json", tmp_path / "features.npz"
    statistics = tmp_path / "statistics.npz"
    pixels = ("--features=pixels", "--features.components=3", f"--image_size={size}")
    assert call(reference, "digits:test", statistics, *pixels, "--keep_features") == 0
    told = (f"--reference={statistics}", f"--json_file={place}", f"--save_features={kept}")
    assert call(images, *words, *told) == 0
    said = capsys.readouterr().out
    (space,) = json.loads(place.read_text())["spaces"]
    assert space["hash"] in said
    assert f"{space['figures']['frechet']:.6g}" in said
    (row,) = read(run)
    assert row["figures"] == space["figures"]
    assert row["protocol"]["samples"]["sampler"] is not None
    spec = json.loads((samples / "spec.json").read_text())
    assert (row["step"], row["digest"], row["weights"]) == (spec["step"], spec["digest"], spec["weights"])
    assert call(history, run) == 0
    assert space["hash"] in capsys.readouterr().out
    assert (
        call(features, kept, kept, "--metrics=frechet,kid", f"--json_file={place}") == 0
    )  # the same by themselves
    again = json.loads(place.read_text())
    assert again["frechet"] == pytest.approx(space["figures"]["frechet"], rel=1e-9)


def test_without_a_word_images_are_evaluated_and_what_is_amiss_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    np.savez(tmp_path / "a.npz", np.zeros((4, 8, 8, 3), np.float32))
    with pytest.raises(SystemExit) as ended:
        run_command(TOOL, argv=[str(tmp_path / "a.npz"), "--reference=digits:test", "--features=pixels"])
    assert ended.value.code == 1
    assert "expected uint8" in capsys.readouterr().err
    assert call(images, "digits:test", "--reference=digits:train") == 1
    assert "pt_inception-2015-12-05-6726825d.pth" in capsys.readouterr().err
    assert call(images, "digits:test", "--reference=digits:train", "--features=pixel") == 1
    assert "did you mean pixels?" in capsys.readouterr().err
    assert call(reference, "digits:test", tmp_path / "a.txt", "--features=pixels") == 2
    assert call(history, tmp_path) == 1
    assert "is no run directory" in capsys.readouterr().err


def test_several_feature_spaces_are_named_or_listed() -> None:
    assert read_spaces("pixels,efficientnet_lite0", {}) == (PixelComponents(), EfficientNetLite0())
    listed = "{name: pixels, components: 4}, {name: timm, model: test_vit, weights: a.pth}"
    expected = (PixelComponents(components=4), Timm(model="test_vit", weights="a.pth"))
    assert read_spaces(listed, {}) == read_spaces(f"[{listed}]", {}) == expected
    assert read_spaces("pixels", {"features.components": "4"}) == read_spaces(
        "pixels", {"features_components": "4"}
    )
    with pytest.raises(ConfigError, match="a field of one network"):
        read_spaces("pixels,inception", {"features.weights": "a"})
    with pytest.raises(ConfigError, match="components"):
        read_spaces("pixels", {"features.component": "4"})


def test_runs_are_compared_in_one_command(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for name, seed in (("a", 0), ("b", 1)):
        go(
            values(
                digits,
                tmp_path / name,
                engine="local",
                seed=seed,
                train={"steps": 2},
                checkpoint={"every": 2},
            )
        )
        runs.append(str(tmp_path / name))
    page = tmp_path / "page.html"
    run_command(TOOL, argv=["compare-runs", *runs, f"--out={page}"])
    said = capsys.readouterr().out
    assert "b from a: other batches from step 1 on" in said
    assert "seed  0  1" in said
    assert page.read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(SystemExit):
        run_command(TOOL, argv=["compare-runs", runs[0], f"--out={page}"])
    assert "two runs or more are compared, got 1" in capsys.readouterr().err


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small sets of images and one of features, in the folder that the command runs in."""
    rng = np.random.default_rng(0)
    for name, count in (("s.npz", 12), ("r.npz", 14)):
        np.savez(tmp_path / name, rng.integers(0, 256, (count, 4, 4, 3), np.uint8), np.arange(count))
    np.savez(tmp_path / "f.npz", rng.normal(size=(12, 3)))
    (tmp_path / "spec.json").write_text('{"sampler": 1}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["s.npz", "--reference=r.npz", "--features=pixels", "--json_file=s.npz"],
        ["s.npz", "--reference=r.npz", "--features=pixels", "--json_file=spec.json"],
        ["s.npz", "--reference=r.npz", "--features=pixels", "--save_features=r.npz"],
        ["features", "f.npz", "f.npz", "--json_file=f.npz"],
        ["reference", "r.npz", "r.npz", "--features=pixels", "--overwrite"],
    ],
)
def test_what_is_no_earlier_result_is_never_replaced(
    words: list[str], sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in sets.iterdir()}
    with pytest.raises(SystemExit) as ended:
        run_command(TOOL, argv=words)
    assert ended.value.code == 1
    assert "it is kept" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in sets.iterdir()} == before


def test_earlier_figures_and_features_are_replaced(sets: Path) -> None:
    (sets / "new.json").touch()  # as mktemp makes one
    words = [
        *("s.npz", "--reference=r.npz", "--features=pixels", FEW),
        *("--json_file=new.json", "--save_features=new.npz"),
    ]
    for _ in range(2):
        run_command(TOOL, argv=words)
    run_command(TOOL, argv=["features", "new.npz", "new.npz", FEW, "--json_file=new.json"])
    assert "frechet" in json.loads((sets / "new.json").read_text())


@pytest.mark.parametrize("text", ["[3, null]", "[[pixels]]"])
def test_networks_that_are_neither_names_nor_keys(text: str) -> None:
    with pytest.raises(ConfigError, match="expected names"):
        read_spaces(text, {})
