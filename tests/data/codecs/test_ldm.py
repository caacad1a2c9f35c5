"""Original weights of latent diffusion against a second implementation, and against diffusers' own folders."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from dit.config import ConfigError
from dit.data import DataError
from dit.data.codecs.autoencoders import Vae
from dit.data.codecs.ldm import Ldm
from dit.rng import Draws, Purpose
from tests.data.codecs.compvis import random_autoencoder

SHAPES = {
    "f4 with attention at mid": {},
    "f8": {"widths": (8, 8, 16, 16), "layers": 1},
    "f16 of 16 channels with attention at the lowest level": {
        "widths": (4, 4, 8, 8, 16),
        "layers": 1,
        "channels": 16,
        "attention": (4,),
    },
    "attention at two levels": {"widths": (8, 16, 8), "attention": (1, 2)},
    "without quant convolutions": {"quant": False},
    "without attention": {"mid_attention": False, "layers": 3},
}


def images(size=16):
    return Draws(0, 0, torch.arange(2), 2).normal(Purpose.PRIOR, (3, size, size)).clamp(-1, 1)


def save(path, state):
    """By suffix, as the projects save them."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def build(path, **fields):
    return Ldm(path=str(path), **{"groups": 4, **fields}).build()


@pytest.fixture
def file(tmp_path):
    return save(tmp_path / "model.safetensors", random_autoencoder().state_dict())


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_it_computes_what_a_second_implementation_does(tmp_path, settings):
    theirs = random_autoencoder(**settings)
    codec = build(save(tmp_path / "model.safetensors", theirs.state_dict()))
    mean, std = theirs.encode(images())
    torch.testing.assert_close(codec.encode(images()), torch.stack([mean, std], 1), rtol=1e-5, atol=1e-5)
    decoded = theirs.decode(mean)
    assert (decoded.abs() < 1).float().mean() > 0.5  # else the clamp hides what was decoded
    torch.testing.assert_close(codec.decode(mean), decoded.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    assert codec.factor == 2 ** (len(settings.get("widths", (8, 16, 16))) - 1)
    assert codec.channels == settings.get("channels", 4)


def whole_model(state):
    """A latent diffusion checkpoint around the autoencoder: a denoiser, a text encoder, what training left behind."""
    others = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2),
        "cond_stage_model.transformer.encoder.layers.0.weight": torch.ones(2),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.tensor(0.9999),
    }
    return {**others, **{f"first_stage_model.{name}": tensor for name, tensor in state.items()}}


WRAPPED = {
    "model.ckpt": lambda state: {"state_dict": whole_model(state), "epoch": 3, "callbacks": {}},
    "sd.safetensors": whole_model,
    "kl.ckpt": lambda state: {"state_dict": {**state, "loss.logvar": torch.zeros(())}},
    "kl16.pth": lambda state: {"model": state},
    "vae.pt": dict,
    "fork.bin": lambda state: {f"vae.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_every_wrapping_holds_the_same_codec(tmp_path, file, name):
    path = save(tmp_path / name, WRAPPED[name](random_autoencoder().state_dict()))
    codec = build(path)
    assert codec.identity() == build(file).identity()
    assert torch.equal(codec.encode(images()), build(file).encode(images()))


def test_old_files_and_half_precision(tmp_path):
    state = random_autoencoder().state_dict()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert build(tmp_path / "old.pt").channels == 4
    half = build(save(tmp_path / "half.safetensors", {n: t.half() for n, t in state.items()}))
    assert half.encode(images()).dtype == torch.float32
    torch.testing.assert_close(
        half.encode(images()), build(tmp_path / "old.pt").encode(images()), atol=0.05, rtol=0.05
    )


def test_the_identity_is_that_of_the_same_weights_in_a_diffusers_folder(tmp_path, file):
    from dit.data.codecs.ldm import build_autoencoder, read_first_stage

    ours = build(file, scale=0.3611, shift=0.1159)
    model = build_autoencoder(read_first_stage(file), "it", groups=4, scale=0.3611, shift=0.1159)
    model.save_pretrained(tmp_path / "vae")
    theirs = Vae(path=str(tmp_path / "vae")).build()
    assert theirs.identity() == ours.identity()
    assert torch.equal(theirs.encode(images()), ours.encode(images()))
    assert ours.norm.std == (1 / 0.3611,) * 4
    assert ours.norm.mean == (0.1159,) * 4
    assert build(file).identity() != ours.identity()
    assert build(file).norm.std == (1 / 0.18215,) * 4


def test_reading_draws_no_random_numbers(file):
    before = torch.get_rng_state()
    build(file)
    assert torch.equal(before, torch.get_rng_state())


def test_the_file_may_go_once_it_is_read(tmp_path):
    state = random_autoencoder().state_dict()
    codec = build(save(tmp_path / "model.ckpt", state))
    before = codec.encode(images())
    (tmp_path / "model.ckpt").write_bytes(b"\0" * (tmp_path / "model.ckpt").stat().st_size)
    assert torch.equal(codec.encode(images()), before)


# --- what cannot be read -----------------------------------------------------------------------------------


def test_pickles_of_more_than_tensors_are_not_run(tmp_path):
    state = {"state_dict": random_autoencoder().state_dict(), "hyper_parameters": argparse.Namespace(lr=1)}
    torch.save(state, tmp_path / "model.ckpt")
    with pytest.raises(DataError, match=r"model.ckpt .*may run any code.*weights_only=False") as refused:
        build(tmp_path / "model.ckpt")
    command = str(refused.value).split('python -c "')[1].split('"')[0]
    exec(command, {})  # the mend that the message gives
    assert build(tmp_path / "model.safetensors").channels == 4


def without(*names):
    return lambda state: {k: v for k, v in state.items() if not k.startswith(names)}


BROKEN = {
    "no encoder": (without("encoder."), r"holds no autoencoder of latent diffusion.*it has \['decoder"),
    "no decoder": (without("decoder."), "has 'decoder.conv_out.weight', and it is not there"),
    "a tensor less": (
        without("decoder.mid.block_2.conv1.bias"),
        "Missing key.*mid_block.resnets.1.conv1.bias",
    ),
    "a tensor more": (lambda s: {**s, "encoder.more.weight": torch.ones(1)}, "Unexpected key.*encoder.more"),
    "another width": (lambda s: {**s, "encoder.conv_out.weight": torch.ones(8, 4, 3, 3)}, "size mismatch"),
    "vector quantised": (lambda s: {**s, "quantize.embedding.weight": torch.ones(1)}, "vector quantised"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_other_tensors_are_refused(tmp_path, kind, suffix):
    change, words = BROKEN[kind]
    path = save(tmp_path / f"model.{suffix}", change(random_autoencoder().state_dict()))
    with pytest.raises(DataError, match=rf"model.{suffix}.*{words}"):
        build(path)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_files_that_are_not_there_or_damaged(tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    with pytest.raises(DataError, match=f"model.{suffix} is missing"):
        build(path)
    save(path, random_autoencoder().state_dict())
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=f"cannot read weights from .*model.{suffix}"):
        build(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"cannot read weights from .*model.{suffix}"):
        build(path)
    with pytest.raises(DataError, match="is a folder: the codec vae"):
        build(tmp_path)


def test_what_has_to_be_said(file):
    with pytest.raises(ConfigError, match="needs a path"):
        Ldm().build()
    with pytest.raises(ConfigError, match=r"widths \[8, 16, 16\], which groups = 32 does not divide"):
        Ldm(path=str(file)).build()
