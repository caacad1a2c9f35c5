"""Stage 1 by the same engine and loop: runs on one and two ranks, pictures, and the folder it exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import ConfigError, from_dict, merge, to_dict
from dit.data.codecs.autoencoders import Vae, weights_hash
from dit.data.shards.manifest import Manifest
from dit.experiments.autoencoder import AutoencoderExperiment, export
from dit.ranks.group import World
from dit.train.checkpoints.checkpoint import CheckpointError, Reader, read
from dit.train.start import train
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import at_step, column

STEPS = 12


def values(digits: Digits, run_dir: Path, **sections: Any) -> dict[str, Any]:
    base = {
        "data": {"path": str(digits.pixels), "val": str(digits.pixels_val), "lanes": 8},
        "run_dir": str(run_dir),
        "autoencoder": {"widths": [8, 8], "groups": 4, "latent_channels": 2},
        "optim": {"lr": 3e-3},
        "ema": {"decay": 0.5},
        "train": {"steps": STEPS, "global_batch": 32, "micro_batch": 8, "log_every": 1},
        "checkpoint": {"every": 6, "keep": 0},
        "val": {"every": 6, "batches": 1},
        "sample": {"every": 6, "count": 5},
    }
    return merge(base, sections)


def go(given: dict[str, Any]) -> None:
    cfg = from_dict(AutoencoderExperiment, given)
    train(cfg, AutoencoderExperiment.make_parts)


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    go(values(digits, folder, engine="local"))
    return folder


def test_it_learns_and_logs_both_terms(run: Path) -> None:
    loss, pixel, kl = (np.array(column(run, name)) for name in ("loss", "pixel_mse", "kl"))
    np.testing.assert_allclose(loss, pixel + 1e-3 * kl, rtol=1e-5)
    assert pixel[-1] < 0.9 * pixel[0]


def test_two_ranks_at_stage_3_are_plain_torch(
    digits: Digits, ranks: Server, run: Path, tmp_path: Path
) -> None:
    ranks.run(2, go, values(digits, tmp_path, zero={"stage": 3}))
    assert column(tmp_path, "batch_hash") == column(run, "batch_hash")
    np.testing.assert_allclose(column(tmp_path, "loss"), column(run, "loss"), rtol=1e-4)
    np.testing.assert_allclose(column(tmp_path, "grad_norm"), column(run, "grad_norm"), rtol=1e-3)


def test_pictures_show_originals_above_reconstructions(run: Path) -> None:
    grid = np.asarray(Image.open(run / "samples" / "step-00000012.png"))
    assert grid.shape == (2 + 2 * 10, 2 + 5 * 10, 3)
    above, below = grid[2:10, 2:10].astype(int), grid[12:20, 2:10].astype(int)
    assert above.std() > 30  # a digit
    assert (above != below).any()


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_what_is_exported_is_the_codec_that_was_trained(run: Path, tmp_path: Path, weights: str) -> None:
    done = export(str(run), tmp_path / "vae", weights)
    assert done.step == STEPS
    assert sorted(p.name for p in done.folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    codec = Vae(path=str(done.folder)).build()
    assert (codec.channels, codec.factor) == (2, 2)
    assert codec.norm.std == (1.0, 1.0)
    cfg = from_dict(AutoencoderExperiment, read(at_step(run, STEPS)).meta["config"])
    module = cfg.autoencoder.build()
    module.load_state_dict(Reader(read(at_step(run, STEPS))).state_dict(weights))
    assert codec.identity()["sha256"] == weights_hash(module.vae)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = codec.encode(images)
    assert moments.shape == (2, 2, 2, 4, 4)
    assert codec.decode(moments[:, 0]).shape == images.shape


def test_a_checkpoint_of_a_step_can_be_exported(run: Path, tmp_path: Path) -> None:
    assert export(str(at_step(run, 6)), tmp_path / "vae").step == 6
    with pytest.raises(CheckpointError, match="nowhere is missing"):
        export(str(tmp_path / "nowhere"), tmp_path / "other")


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"data": {"path": "moments", "val": None}, "val": {"every": 0}},
            "an autoencoder is trained on pixels",
        ),
        ({"autoencoder": {"widths": [8] * 5}}, "images of 8x8 cannot be halved 4 times"),
        ({"autoencoder": {"widths": [6, 8]}}, "groups = 4 must divide"),
        ({"kl_weight": -1}, "kl_weight"),
        ({"objective": {}}, "objective: unknown key"),
    ],
)
def test_what_cannot_be_trained_is_refused(digits: Digits, tmp_path: Path, sections: dict, says: str) -> None:
    given = values(digits, tmp_path / "run", engine="local")
    if "data" in sections:
        sections = {**sections, "data": {"path": str(digits.moments), "val": None}}
    with pytest.raises(ConfigError) as error:
        go(merge(given, sections))
    assert says in str(error.value)
    assert not (tmp_path / "run").exists()


def test_flops_are_three_forward_passes(digits: Digits, tmp_path: Path) -> None:
    """2 per multiply-add: a convolution's weight acts at 16 to 64 places of an 8x8 image halved once."""
    cfg = from_dict(AutoencoderExperiment, values(digits, tmp_path))
    parts = cfg.make_parts(Manifest.load(digits.pixels), World())
    weights = sum(p.numel() for n, p in parts.build().named_parameters() if p.ndim == 4)
    assert 3 * 2 * weights * 16 < parts.flops_per_image < 3 * 2 * weights * 64
    assert from_dict(AutoencoderExperiment, to_dict(cfg)) == cfg
