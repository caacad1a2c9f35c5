"""Runs with everything turned on: the same at every ZeRO stage and number of ranks, resumed bit for bit, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file

from dit.config import ConfigError, from_dict
from dit.data.shards.manifest import Manifest
from dit.experiments.autoencoder import AutoencoderExperiment, export
from dit.ranks.group import World
from dit.train.checkpoints.checkpoint import CheckpointError, Reader, read
from tests.datasets import Digits
from tests.experiments.test_autoencoder import go, values
from tests.rank_processes import Server
from tests.train.runs import at_step, column, differing, state

START, STEPS = 3, 8
MODELS = {"kl": AutoencoderKL, "vq": VQModel}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


def everything(digits: Digits, run_dir: Path, weights: Path, name: str, **sections: Any) -> dict[str, Any]:
    """A run's values; the discriminator is heard from step START on."""
    return values(
        digits,
        run_dir,
        autoencoder={"name": name, "widths": [8, 8], "groups": 4, "latent_channels": 2},
        discriminator={"width": 8, "layers": 1, "groups": 4, "start": START, "lr_factor": 0.5},
        perceptual={"backbone": "test_resnet", "layers": [0, 1], "weights": str(weights), "weight": 0.1},
        pixel="l1",
        sample={"every": 0},
        **{"checkpoint": {"every": 4, "keep": 0}, "val": {"every": STEPS, "batches": 1}, **sections},
    ) | {
        "train": {
            "steps": STEPS,
            "global_batch": 32,
            "micro_batch": 8,
            "log_every": 1,
            **sections.get("train", {}),
        }
    }


@pytest.fixture(scope="module")
def plain(digits: Digits, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each autoencoder by plain torch."""
    found = {}
    for name in MODELS:
        found[name] = tmp_path_factory.mktemp(name)
        go(everything(digits, found[name], weights, name, engine="local"))
    return found


def figures(run_dir: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run_dir / "held_out.jsonl").read_text().splitlines()]
    return {k: v for row in rows for k, v in row.items() if isinstance(v, float)}


@pytest.mark.parametrize("name", MODELS)
def test_every_term_is_logged_and_the_discriminator_is_heard_from_its_start(
    plain: dict[str, Path], name: str
) -> None:
    run = plain[name]
    adaptive = np.array(column(run, "adaptive_weight"))
    assert (adaptive[:START] == 0).all()
    assert (adaptive[START:] > 0).all()
    for term in ("pixel_mae", "perceptual", "discriminator", "score_real", "score_fake"):
        assert np.isfinite(np.array(column(run, term), float)).all()
    found = figures(run)
    assert {"psnr", "ssim", "frechet_test_resnet", "pixel_mae", "perceptual"} <= set(found)
    assert "discriminator" not in found
    assert ("codebook_used" in found) == (name == "vq")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_neither_ranks_nor_stage_show(
    digits: Digits,
    ranks: Server,
    weights: Path,
    plain: dict[str, Path],
    tmp_path: Path,
    name: str,
    stage: int,
    size: int,
) -> None:
    ranks.run(size, go, everything(digits, tmp_path, weights, name, zero={"stage": stage}))
    assert column(tmp_path, "batch_hash") == column(plain[name], "batch_hash")
    for term in ("loss", "grad_norm", "adaptive_weight", "discriminator"):
        np.testing.assert_allclose(column(tmp_path, term), column(plain[name], term), rtol=1e-4, atol=1e-7)
    assert figures(tmp_path) == pytest.approx(figures(plain[name]), rel=1e-3, abs=1e-6)


def test_two_ranks_at_stage_3_are_plain_torch(
    digits: Digits, ranks: Server, weights: Path, plain: dict[str, Path], tmp_path: Path
) -> None:
    """The one of the slow test above that is most likely to break."""
    ranks.run(2, go, everything(digits, tmp_path, weights, "vq", zero={"stage": 3}))
    for term in ("loss", "grad_norm", "adaptive_weight", "discriminator"):
        np.testing.assert_allclose(column(tmp_path, term), column(plain["vq"], term), rtol=1e-4, atol=1e-7)
    assert figures(tmp_path) == pytest.approx(figures(plain["vq"]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_the_same_bit_for_bit(
    digits: Digits, weights: Path, plain: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Stopped before the discriminator is heard, and again after."""
    for steps in (2, 5, STEPS):
        go(everything(digits, tmp_path, weights, name, engine="local", train={"steps": steps}))
    assert differing(state(at_step(tmp_path, STEPS)), state(at_step(plain[name], STEPS))) == []
    assert column(tmp_path, "loss") == column(plain[name], "loss")


@pytest.mark.slow
def test_it_goes_on_at_another_stage_with_other_ranks(
    digits: Digits, ranks: Server, weights: Path, plain: dict[str, Path], tmp_path: Path
) -> None:
    given = everything(digits, tmp_path, weights, "kl")
    for size, stage, steps in ((2, 3, 4), (1, 2, 6), (2, 0, STEPS)):
        ranks.run(size, go, given | {"zero": {"stage": stage}, "train": given["train"] | {"steps": steps}})
    np.testing.assert_allclose(column(tmp_path, "loss"), column(plain["kl"], "loss"), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_trains(
    digits: Digits, ranks: Server, weights: Path, plain: dict[str, Path], tmp_path: Path, stage: int
) -> None:
    given = everything(digits, tmp_path, weights, "vq", zero={"stage": stage}, train={"precision": "bf16"})
    ranks.run(2, go, given)
    np.testing.assert_allclose(column(tmp_path, "loss"), column(plain["vq"], "loss"), rtol=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_the_discriminator_and_the_backbone_are_not_exported(
    plain: dict[str, Path], tmp_path: Path, name: str
) -> None:
    done = export(str(plain[name]), tmp_path)
    held = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    vae = MODELS[name].from_pretrained(str(tmp_path), use_safetensors=True)
    assert held.keys() == vae.state_dict().keys()
    saved = Reader(read(at_step(plain[name], done.step))).state_dict("ema")
    assert all(torch.equal(held[k], saved[f"autoencoder.vae.{k}"]) for k in held)
    others = {k.split(".")[0] for k in saved if not k.startswith("autoencoder.")}
    assert others == {"discriminator"}


# --- the identity of a run ---------------------------------------------------------------------------------


def test_the_backbones_weights_are_part_of_the_run_and_their_place_is_not(
    digits: Digits, weights: Path, tmp_path: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved.safetensors"
    moved.write_bytes(weights.read_bytes())
    short: Any = {"engine": "local", "val": {"every": 0}}
    go(everything(digits, run, weights, "kl", train={"steps": 1}, **short))
    go(everything(digits, run, moved, "kl", train={"steps": 2}, **short))
    assert column(run, "step") == [1, 2]
    torch.manual_seed(4)
    save_file(timm.create_model("test_resnet").state_dict(), moved)
    with pytest.raises(CheckpointError, match=r"contract\.perceptual\.sha256"):
        go(everything(digits, run, moved, "kl", train={"steps": 3}, **short))


def test_a_start_that_was_changed_is_refused(digits: Digits, weights: Path, tmp_path: Path) -> None:
    given = everything(digits, tmp_path, weights, "kl", engine="local", train={"steps": 1}, val={"every": 0})
    go(given)
    with pytest.raises(ConfigError, match=r"discriminator\.start: 3 there, 4 now"):
        go(given | {"discriminator": given["discriminator"] | {"start": 4}})


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"discriminator": {"layers": 3}}, "images of 8x8 are too small for a discriminator"),
        ({"discriminator": {"wieght": 1}}, "did you mean discriminator.weight"),
        ({"pixel": "l3"}, "unknown pixel loss 'l3'"),
        ({"autoencoder": {"name": "vae"}}, "unknown autoencoder 'vae'"),
        ({"autoencoder": {"name": "kl", "codebook": 8}}, "codebook"),
        ({"kl_weight": 0.5}, "kl_weight = 0.5 is of the kl autoencoder; vq has no KL term"),
        ({"perceptual": {"weights": "/nowhere.pth"}}, "curl -LO"),
        ({"perceptual": {}}, "weights: is required"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(
    digits: Digits, tmp_path: Path, sections: dict, says: str
) -> None:
    vq = {"name": "vq", "widths": [8, 8], "groups": 4}
    given = values(digits, tmp_path / "run", engine="local") | {"autoencoder": vq} | sections
    with pytest.raises(ConfigError) as error:
        go(given)
    assert says in str(error.value)
    assert not (tmp_path / "run").exists()


def test_flops_count_the_discriminator_and_the_backbone(
    digits: Digits, weights: Path, tmp_path: Path
) -> None:
    """2 per multiply-add; a strided 4x4 convolution from 3 to 8 channels gives 4x4 places, and so on."""

    def flops(**without: None) -> float:
        cfg = from_dict(AutoencoderExperiment, everything(digits, tmp_path, weights, "kl") | without)
        return cfg.make_parts(Manifest.load(digits.pixels), World()).flops_per_image

    first, second, last = 16 * 48 * 8, 9 * 128 * 16, 4 * 256 * 1
    assert flops(perceptual=None) - flops(perceptual=None, discriminator=None) == 8 * 2 * (
        first + second + last
    )
    assert flops(discriminator=None) > flops(perceptual=None, discriminator=None)
