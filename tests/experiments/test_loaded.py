"""`dit.load`: the pixels of the command line, latents and their images, the denoiser, and what is refused."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tools.sample
from dit.config import ConfigError
from dit.errors import Notice, UserError
from dit.experiments.loaded import HowToDraw, TrainedModel, load
from dit.sample.finite import NotFiniteError
from dit.sample.generate import SamplerSpec
from dit.sample.solve import Euler
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.checkpoints.export import export
from tests.commands import call
from tests.datasets import Digits
from tests.train.runs import at_step, random_run

pytestmark = pytest.mark.filterwarnings("ignore::dit.errors.Notice")  # averages of so few steps


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(digits, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return load(run)


def commanded(out: Path, source: Path, *words: object) -> np.ndarray:
    """What tools/sample.py draws."""
    assert call(tools.sample.main, source, *words, f"--out={out}") == 0
    with np.load(out / "samples.npz") as held:
        return held["arr_0"]


# How to load, how to draw, and both on the command line.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "plain": (
        {},
        {"num_samples": 7, "classes": [0, "3"], "cfg_scale": 2, "num_steps": 2, "batch_size": 4, "seed": 5},
        ("--num_samples=7", "--classes=0,3", "--cfg_scale=2", "--num_steps=2", "--batch_size=4", "--seed=5"),
    ),
    "a solver that draws, a shifted grid, other weights": (
        {"weights": "model", "codec": {"dtype": "bfloat16"}},
        {
            "num_samples": 2,
            "solver": {"name": "edm", "s_churn": 3.0},
            "num_steps": 3,
            "grid": "karras",
            "shift": 2,
        },
        (
            *("--weights=model", "--codec.dtype=bfloat16", "--num_samples=2", "--solver=edm"),
            *("--solver.s_churn=3", "--num_steps=3", "--grid=karras", "--shift=2"),
        ),
    ),
    "in bf16, guided in an interval": (
        {"precision": "bf16"},
        {
            "num_samples": 3,
            "classes": "3",
            "solver": Euler(),
            "num_steps": 2,
            "guidance": {"name": "cfg", "scale": 2, "interval": [0.2, 0.7]},
        },
        (
            *("--precision=bf16", "--num_samples=3", "--classes=3", "--solver=euler", "--num_steps=2"),
            "--guidance={name: cfg, scale: 2, interval: [0.2, 0.7]}",
        ),
    ),
}


@pytest.mark.parametrize(("loading", "drawing", "flags"), SAME.values(), ids=SAME.keys())
def test_the_pixels_are_those_of_the_command_line(
    run: Path, tmp_path: Path, loading: dict[str, Any], drawing: dict[str, Any], flags: tuple[str, ...]
) -> None:
    expected = commanded(tmp_path, run, *flags)
    found = load(run, **loading).sample(**drawing)
    assert (found.dtype, found.shape) == (np.uint8, expected.shape)
    assert found.std() > 1
    assert (found == expected).all()


def test_an_exported_file_draws_what_its_run_does(run: Path, model: TrainedModel, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    export(str(run), str(file), "ema", None)
    exported = load(file)
    how: dict[str, Any] = {"num_samples": 3, "num_steps": 2, "progress": False}
    assert (exported.sample(**how) == model.sample(**how)).all()
    assert (exported.path, exported.step, exported.classes) == (file, 2, model.classes)


def test_what_it_says_of_itself(run: Path, model: TrainedModel) -> None:
    assert model.classes == tuple(str(n) for n in range(10))
    assert (model.shape, model.image_size, model.step) == ((4, 8, 8), 16, 2)
    assert model.path == at_step(run, 2)
    with pytest.warns(Notice, match="not of trained weights alone"):
        assert load(at_step(run, 1)).step == 1
    assert "ema" in repr(model)
    assert "latents 4 x 8 x 8, 10 classes, on cpu" in repr(model)
    assert model.config.objective is model.objective


def test_how_to_draw_is_the_spec() -> None:
    assert set(typing.get_type_hints(HowToDraw)) == {f.name for f in dataclasses.fields(SamplerSpec)}


def test_latents_are_what_images_are_decoded_from(model: TrainedModel, capsys) -> None:
    how: dict[str, Any] = {"num_samples": 5, "classes": "4", "num_steps": 2, "batch_size": 2}
    sizes: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    latents = model.sample_latents(**how)
    hook.remove()
    assert sizes == [2] * 12  # of Heun's two steps: the last batch is a whole one too
    assert (latents.shape, latents.dtype) == ((5, 4, 8, 8), torch.float32)
    images = model.sample(**how)
    said = capsys.readouterr().err
    assert "sampling: 5/5 image" in said
    assert (model.decode(latents, batch_size=2) == images).all()
    assert "decoding: 5/5 image" in capsys.readouterr().err
    assert (model.decode(latents.numpy(), batch_size=2, progress=False) == images).all()
    assert model.sample(**how, progress=False).shape == images.shape
    assert capsys.readouterr() == ("", "")


def test_the_codec_is_opened_once_and_not_for_latents(run: Path, tmp_path: Path) -> None:
    nowhere = load(run, codec={"path": str(tmp_path / "nowhere")})
    assert nowhere.sample_latents(1, num_steps=1).shape == (1, 4, 8, 8)
    with pytest.raises(UserError, match="nowhere"):
        nowhere.sample(1, num_steps=1)
    with pytest.raises(
        ConfigError, match="did you mean cfg_scale"
    ):  # said before the codec takes its seconds
        nowhere.sample(1, cfgscale=2)  # type: ignore[call-arg]
    model = load(run)
    assert model.codec is model.codec


# --- the network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.3, torch.tensor([0.1, 0.9])])
def test_the_endpoints_mix_to_x_and_are_those_of_the_network(model: TrainedModel, t: Any) -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = model.denoise(x, t, ["3", 7])
    times = torch.as_tensor(t).expand(2)
    coeffs = model.objective.path.coeffs(times)
    torch.testing.assert_close(coeffs.mix(found.data, found.eps), x)
    with torch.no_grad():
        model_time = model.objective.path.model_time(times)
        said = model.network(x, model_time, {"label": torch.tensor([3, 7])})
    torch.testing.assert_close(found.velocity(coeffs), said)  # its prediction is the velocity


def test_one_label_is_all_and_none_is_no_class(model: TrainedModel) -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seven, none = model.denoise(x, 0.5, 7).data, model.denoise(x, 0.5).data
    assert torch.equal(seven, model.denoise(x, 0.5, torch.tensor([7, 7])).data)
    assert torch.equal(none, model.denoise(x, 0.5, -1).data)
    assert not torch.equal(seven, none)


def test_gradients_flow_to_x(model: TrainedModel) -> None:
    x = torch.zeros(1, 4, 8, 8, requires_grad=True)
    model.denoise(x, 0.5, 1).data.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"classes": [0, 11]}, r"\[11\] are out of range: this model knows 0..9 \(-1 = no class\)"),
        ({"classes": "eleven"}, "no class is named 'eleven'"),
        ({"classes": -1, "cfg_scale": 2}, "no effect"),
        ({"num_samples": 0}, "num_samples: .* got 0"),
        ({"num_samples": 2.5}, "num_samples: .* got 2.5"),
        ({"batch_size": -1}, "batch_size: .* got -1"),
        ({"solver": "huen"}, "solver: unknown solver 'huen'; did you mean heun"),
        ({"num_step": 3}, "num_step: unknown key; did you mean num_steps"),
        ({"num_steps": 0}, "num_steps: .* got 0"),
        ({"cfg_scale": True}, "cfg_scale"),
        ({"shift": 2, "grid": {"name": "uniform", "shift": 3}}, "shift is given twice"),
    ],
)
def test_what_cannot_be_drawn_is_named(model: TrainedModel, how: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        model.sample(**how)


@pytest.mark.parametrize(
    ("x", "t", "label", "says"),
    [
        ((2, 4, 8), 0.5, 0, r"shape \(2, 4, 8\), expected \(N, 4, 8, 8\)"),
        ((2, 3, 8, 8), 0.5, 0, r"shape \(2, 3, 8, 8\), expected \(N, 4, 8, 8\)"),
        ((0, 4, 8, 8), 0.5, 0, "with N of 1 or more"),
        ((2, 4, 8, 8), 1.5, 0, r"t = 1.5: .* times in \[0, 1\]"),
        ((2, 4, 8, 8), torch.tensor([0.5, float("nan")]), 0, "t = nan"),
        ((2, 4, 8, 8), torch.tensor([0.5, 0.5, 0.5]), 0, r"t has the shape \(3,\)"),
        ((2, 4, 8, 8), 0.5, [1, 2, 3], "3 classes for 2 latents"),
        ((2, 4, 8, 8), 0.5, 10, r"\[10\] are out of range"),
    ],
)
def test_what_cannot_be_denoised_is_named(
    model: TrainedModel, x: tuple[int, ...], t: Any, label: Any, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        model.denoise(torch.zeros(x), t, label)


def test_latents_that_are_not_finite_are_named(model: TrainedModel) -> None:
    latents = torch.zeros(3, 4, 8, 8)
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="image 1"):
        model.decode(latents, batch_size=2)


def test_what_cannot_be_loaded_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="emma"):
        load(run, weights="emma")
    with pytest.raises(ConfigError, match="precision is 'fp16', expected run"):
        load(run, precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="device=gpu: no such device; expected cpu, cuda"):
        load(run, device="gpu")
    with pytest.raises(ConfigError, match=r"codec: expected keys over training's, as .*, got '/vae'"):
        load(run, codec="/vae")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pth: unknown key; did you mean path"):
        load(run, codec={"pth": "x"}).decode(torch.zeros(1, 4, 8, 8))
