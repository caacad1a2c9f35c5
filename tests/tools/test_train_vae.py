"""tools/train_vae.py: from pixel shards to a folder that the vae codec and the encoder take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import tools.encode
import tools.train_vae
from dit.data.codecs.autoencoders import Vae
from dit.data.shards.manifest import Manifest
from dit.experiments.autoencoder import AutoencoderExperiment
from tests.commands import call
from tests.datasets import Digits
from tests.experiments.test_autoencoder import values
from tests.train.runs import column


@pytest.fixture
def config(digits: Digits, tmp_path: Path) -> Path:
    path = tmp_path / "vae.yaml"
    path.write_text(yaml.safe_dump(values(digits, tmp_path / "run", engine="local", train={"steps": 3})))
    return path


def test_it_trains_exports_and_the_images_can_be_encoded_with_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tools.train_vae.main, config) == 0
    vae = tmp_path / "run" / "vae"
    said = capsys.readouterr().out
    assert f"the autoencoder of step 3 is in {vae}" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    figures = next(row for row in rows if "psnr" in row)
    assert f"PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f} (held out, step 3" in said
    words = ("--codec=vae", f"--codec.path={vae}", "--image_size=16", "--batch_size=512")
    assert call(tools.encode.main, "digits:test", tmp_path / "latents", *words, "--flip=false") == 0
    manifest = Manifest.load(tmp_path / "latents")
    assert manifest.shape == (1, 2, 2, 8, 8)
    assert manifest.codec == Vae(path=str(vae)).build().identity()


def test_it_exports_the_weights_that_are_asked_for(config: Path, tmp_path: Path, capsys) -> None:
    kinds = ("model", "ema", "ema_0.25")
    found = {}
    for weights in kinds:
        assert call(tools.train_vae.main, config, "--ema.also=[0.25]", f"--weights={weights}") == 0
        assert f"is in {tmp_path / 'run' / 'vae'}: {weights} " in capsys.readouterr().out
        found[weights] = Vae(path=str(tmp_path / "run" / "vae")).build().identity()["sha256"]
    assert len(set(found.values())) == len(kinds)
    assert call(tools.train_vae.main, config, "--weights=emma", f"--run_dir={tmp_path / 'other'}") == 1
    assert "there are no weights 'emma'; this run has model, ema" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_vq_autoencoder_with_a_discriminator_becomes_a_codec_too(
    config: Path, tmp_path: Path, capsys
) -> None:
    words = ("--autoencoder.name=vq", "--autoencoder.widths=8,8", "--autoencoder.groups=4")
    words += (
        "--discriminator.layers=1",
        "--discriminator.width=8",
        "--discriminator.start=1",
        "--val.every=0",
    )
    assert call(tools.train_vae.main, config, *words) == 0
    assert "PSNR" not in capsys.readouterr().out  # nothing was held out
    vae = tmp_path / "run" / "vae"
    words = ("--codec=vae", f"--codec.path={vae}", "--image_size=16", "--batch_size=512")
    assert call(tools.encode.main, "digits:test", tmp_path / "latents", *words, "--flip=false") == 0
    manifest = Manifest.load(tmp_path / "latents")
    assert manifest.shape == (1, 4, 8, 8)  # a draw: nothing is random, so there are no moments
    assert manifest.codec == Vae(path=str(vae)).build().identity()


def test_started_again_it_goes_on_and_exports_the_newer_one(config: Path, tmp_path: Path, capsys) -> None:
    assert call(tools.train_vae.main, config) == 0
    before = Vae(path=str(tmp_path / "run" / "vae")).build().identity()
    assert call(tools.train_vae.main, config) == 0  # done: nothing to train, exported all the same
    assert Vae(path=str(tmp_path / "run" / "vae")).build().identity() == before
    assert "has done its 3 steps" in capsys.readouterr().out
    assert call(tools.train_vae.main, config, "--train.steps=5") == 0
    assert "step 5" in capsys.readouterr().out
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4, 5]
    assert Vae(path=str(tmp_path / "run" / "vae")).build().identity() != before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--autoencodr.layers=2"], "did you mean autoencoder"),
        (["--model.size=S"], "model: unknown key"),
        (["--autoencoder.widths=6,8"], "groups = 4 must divide"),
        (["--kl_weight=-1"], "kl_weight"),
        (["--discriminator.strat=5"], "did you mean discriminator.start"),
        (["--perceptual.weights=/nowhere/vgg16.pth"], "curl -LO"),
        (["--pixel=l3"], "unknown pixel loss"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    config: Path, tmp_path: Path, capsys, words: list[str], says: str
) -> None:
    assert call(tools.train_vae.main, config, *words) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_lists_its_keys(capsys) -> None:
    assert call(tools.train_vae.main, "--help", config=AutoencoderExperiment) == 0
    said = capsys.readouterr().out
    assert "  autoencoder.latent_channels " in said
    assert "  kl_weight " in said
    assert "  discriminator.start " in said
    assert "  perceptual.weights " in said
