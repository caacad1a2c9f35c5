"""Whole runs: diffusers' own pipeline and its schedulers' loops against our sampler, and folders as runs of ours."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline

import dit
from dit.config import ConfigError, from_dict
from dit.experiments.trained import Trained
from dit.interop.latents import Choices
from dit.interop.pipeline.given import Given, from_run
from dit.interop.pipeline.taken import to_run
from dit.interop.weights import WeightsError
from dit.outputs import OutputError
from dit.sample.generate import Sampler, SamplerSpec
from dit.train.checkpoints.checkpoint import CheckpointError
from tests.datasets import Digits
from tests.interop.random_models import DDPM, SIT, random_run

CPU = torch.device("cpu")
CLASSES = [3, 0, 7]
V_ZERO = {"path": {"name": "ddpm", "zero_terminal_snr": True}, "prediction": "v"}
WITHIN = 1e-4  # of images in [0, 1], where 1 / 255 is promised; most of their pixels are not clipped
STRIDED = {"name": "respaced", "stride": "ddim"}
RUNS: dict[str, dict[str, Any]] = {
    "fitted": {"objective": DDPM, "norm": "dataset"},
    "learned variance": {
        "objective": {**DDPM, "auxiliary": "learned_range"},
        "learn_sigma": True,
        "time_frequencies": "ddpm",
    },
    "v": {"objective": V_ZERO, "time_frequencies": "ddpm", "norm": "dataset"},
    "data": {"objective": {"path": "iddpm", "prediction": "data"}},
    "3 heads, patch 4": {"objective": DDPM, "time_frequencies": "ddpm", "heads": 3, "width": 36, "patch": 4},
}


def sampler_of(
    run: Path | str, steps: int, solver: str = "ddim", grid: Any = "uniform", scale: float = 1.5
) -> Sampler:
    trained = Trained.load(str(run), "ema", CPU)
    how = {"solver": solver, "num_steps": steps, "grid": grid, "cfg_scale": scale}
    return trained.sampler(from_dict(SamplerSpec, how), {}, CPU, "fp32")


@torch.no_grad()
def drawn(sampler: Sampler, start: torch.Tensor, classes: list[int]) -> np.ndarray:
    """Images (N, H, W, 3) in [0, 1] from this noise."""
    cond = {"label": torch.tensor(classes)}
    x = sampler.spec.solver(sampler.denoise, start, sampler.times(), sampler.path, None, cond)
    return ((sampler.decode(x) + 1) / 2).permute(0, 2, 3, 1).numpy()


def piped(folder: Path, steps: int, scale: float = 1.5) -> np.ndarray:
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    how = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "np"}
    return pipeline(CLASSES, generator=torch.Generator().manual_seed(5), **how).images


def noise() -> torch.Tensor:
    """As the pipeline draws it."""
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", RUNS)
def test_their_pipeline_draws_what_we_do(kind: str, digits: Digits, tmp_path: Path) -> None:
    """DDIM from the same noise: with and without guidance, and at numbers of steps that divide the fitted one."""
    run = random_run(tmp_path / "run", digits, **RUNS[kind])
    given = from_run(str(run), tmp_path / "folder")
    assert given.is_new
    assert any("fitted" in note for note in given.notes) == (kind in ("fitted", "data"))
    for steps, scale in ((50, 1.5), (10, 1.0)):
        expected = drawn(sampler_of(run, steps, grid=STRIDED, scale=scale), noise(), CLASSES)
        got = piped(given.folder, steps, scale)
        assert ((expected > 0) & (expected < 1)).mean() > 0.9
        assert np.abs(got - expected).max() < WITHIN


@pytest.mark.parametrize("kind", RUNS)
def test_a_folder_of_theirs_draws_the_same_as_a_run_of_ours(
    kind: str, digits: Digits, tmp_path: Path
) -> None:
    run = random_run(tmp_path / "run", digits, **RUNS[kind])
    folder = from_run(str(run), tmp_path / "folder").folder
    there = tmp_path / "theirs"  # saved by them: no record of ours
    DiTPipeline.from_pretrained(folder).save_pretrained(there)
    done = to_run(there, tmp_path / "back", Choices())
    assert done.experiment.objective == Trained.load(str(run), "ema", CPU).experiment.objective
    model = dit.load(done.folder, device="cpu")
    assert len(model.classes) == 10
    got = drawn(sampler_of(done.folder, 10, grid=STRIDED), noise(), CLASSES)
    assert np.abs(got - piped(there, 10)).max() < WITHIN
    assert model.sample(2, classes=[3, 0], num_steps=2, progress=False).shape == (2, 16, 16, 3)


def code_of(folder: Path) -> str:
    """The Python in a folder's card."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


FLOWS: dict[str, dict[str, Any]] = {
    "flow": {"objective": {}, "time_frequencies": "ddpm"},
    "fitted flow": {"objective": {}, "norm": "dataset"},
    "sit": {"objective": SIT},
    "pixels": {"objective": {}, "data": "pixels", "norm": "dataset"},
}


@pytest.mark.parametrize("kind", FLOWS)
def test_the_loop_of_the_card_draws_what_our_euler_does(
    kind: str, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = random_run(tmp_path / "run", digits, **FLOWS[kind])
    given = from_run(str(run), tmp_path / "folder", num_steps=20)
    assert not (given.folder / "model_index.json").exists()
    assert any("DiTPipeline cannot sample this model" in note for note in given.notes)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    held: dict[str, Any] = {}
    exec(code_of(given.folder), held)
    torch.manual_seed(5)
    start = torch.randn(2, *held["x"].shape[1:])
    expected = drawn(sampler_of(run, 20, "euler"), start, [0, 1])
    assert np.abs(held["images"].permute(0, 2, 3, 1).numpy() - expected).max() < WITHIN
    back = to_run(given.folder, tmp_path / "back", Choices())
    got = drawn(sampler_of(back.folder, 20, "euler"), start, [0, 1])
    assert np.abs(got - expected).max() < WITHIN


def test_the_pipeline_of_the_card_is_loaded_as_it_says(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = random_run(tmp_path / "run", digits, DDPM)
    folder = from_run(str(run), tmp_path / "folder", num_steps=2).folder
    monkeypatch.chdir(tmp_path)
    held: dict[str, Any] = {}
    exec(code_of(folder), held)
    assert [image.size for image in held["images"]] == [(16, 16)] * 2
    assert held["pipeline"].get_label_ids(["7", "0"]) == [7, 0]


def test_a_path_that_they_have_no_scheduler_for_comes_back_by_our_record(
    digits: Digits, tmp_path: Path
) -> None:
    run = random_run(tmp_path / "run", digits, {"path": "cosine", "prediction": "v"}, time_frequencies="ddpm")
    folder = from_run(str(run), tmp_path / "folder").folder
    assert not (folder / "scheduler").exists()
    back = to_run(folder, tmp_path / "back", Choices())
    expected, got = (drawn(sampler_of(r, 4, "heun"), noise(), CLASSES) for r in (run, back.folder))
    assert np.abs(got - expected).max() < 1e-5
    (folder / "spec.json").unlink()
    with pytest.raises(ConfigError, match="has no folder scheduler/, and nothing else says"):
        to_run(folder, tmp_path / "again", Choices())


def test_more_classes_than_their_pipeline_knows_are_parts_and_no_pipeline(
    digits: Digits, tmp_path: Path
) -> None:
    run = random_run(tmp_path / "run", digits, DDPM, num_classes=1001)
    given = from_run(str(run), tmp_path / "folder", num_steps=10)
    assert any("it knows 1000 classes, these are 1001" in note for note in given.notes)
    assert not (given.folder / "model_index.json").exists()


def test_what_they_lack_is_refused_before_anything_is_written(digits: Digits, tmp_path: Path) -> None:
    narrow = random_run(tmp_path / "narrow", digits, DDPM, mlp_ratio=2.0)
    with pytest.raises(WeightsError, match="MLPs of 4 times its width"):
        again(narrow, tmp_path / "folder")
    run = random_run(tmp_path / "run", digits, DDPM)
    with pytest.raises(ConfigError, match="num_steps is 250: so many times cannot be fitted"):
        again(run, tmp_path / "folder", num_steps=250)
    assert not list(tmp_path.glob("folder*"))


def test_a_folder_of_theirs_that_is_no_run_is_told_what_makes_one(digits: Digits, tmp_path: Path) -> None:
    folder = again(random_run(tmp_path / "run", digits, DDPM), tmp_path / "folder").folder
    with pytest.raises(
        CheckpointError, match=r"It is a folder of diffusers: python tools/convert\.py diffusers"
    ):
        dit.load(folder)


def again(run: Path, folder: Path, **how: Any) -> Given:
    return from_run(str(run), folder, **{"num_steps": 10, **how})


def test_nothing_is_replaced_in_silence(digits: Digits, tmp_path: Path) -> None:
    run, folder = random_run(tmp_path / "run", digits, DDPM), tmp_path / "folder"
    assert again(run, folder).is_new
    before = (folder / "README.md").stat().st_mtime_ns
    assert not again(run, folder).is_new
    assert (folder / "README.md").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="num_steps: 10 there, 20 now"):
        again(run, folder, num_steps=20)
    assert again(run, folder, num_steps=20, overwrite=True).is_new
    assert not list(tmp_path.glob("*.partial"))
    shutil.copytree(folder, tmp_path / "theirs")
    (tmp_path / "theirs" / "spec.json").unlink()
    with pytest.raises(OutputError, match="nothing says how it was made"):
        again(run, tmp_path / "theirs")
    with pytest.raises(OutputError, match="is a run directory, and a folder for diffusers is to be written"):
        again(run, run, overwrite=True)
    with pytest.raises(ConfigError, match="is there already"):
        to_run(folder, run, Choices())


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is of a FluxPipeline; expected a DiTPipeline"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}, "are of no path here"),
        ("transformer/config.json", {"num_embeds_ada_norm": 9}, "weights that do not fit its config.json"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(
    name: str, values: dict[str, Any], says: str, digits: Digits, tmp_path: Path
) -> None:
    folder = again(random_run(tmp_path / "run", digits, DDPM), tmp_path / "folder").folder
    held = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**held, **values}))
    with pytest.raises(WeightsError, match=says):
        to_run(folder, tmp_path / "back", Choices())
    assert not list(tmp_path.glob("back*"))


def test_classes_are_those_that_have_names_or_are_asked_for(digits: Digits, tmp_path: Path) -> None:
    folder = again(random_run(tmp_path / "run", digits, DDPM), tmp_path / "folder").folder
    (folder / "spec.json").unlink()
    named = to_run(folder, tmp_path / "named", Choices())
    assert named.arguments.num_classes == 10
    asked = to_run(folder, tmp_path / "asked", Choices(num_classes=3))
    assert dit.load(asked.folder, device="cpu").classes == ("0", "1", "2")
    with pytest.raises(WeightsError, match=r"num_classes is 2000, and .* has 1000 classes"):
        to_run(folder, tmp_path / "more", Choices(num_classes=2000))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": {"5": "five"}}))
    every = dit.load(to_run(folder, tmp_path / "every", Choices()).folder, device="cpu").classes
    assert (len(every), every[5], every[4]) == (10, "five", "class_4")
