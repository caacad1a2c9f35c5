"""The codec axis: what every codec promises, pixels, the command line's keys, and telling two codecs apart."""

import pytest
import torch

from dit.config import ConfigError, to_dict
from dit.data import DataError
from dit.data.codecs.codec import CODECS, check_same_codec, parse_codec
from dit.rng import Draws, Purpose
from tests.data.codecs.compvis import random_autoencoder
from tests.data.helpers import tiny_vae


@pytest.fixture
def choices(tmp_path):
    """A choice of each codec, with what it needs on disk."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    torch.save(random_autoencoder().state_dict(), tmp_path / "ldm.ckpt")
    fields = {
        "vae": {"path": str(tmp_path / "vae")},
        "ldm": {"path": str(tmp_path / "ldm.ckpt"), "groups": 4},
    }
    return {name: CODECS.parse({"name": name, **fields.get(name, {})}) for name in CODECS}


def images(n=2, size=16):
    return Draws(0, 0, torch.arange(n), n).normal(Purpose.PRIOR, (3, size, size)).clamp(-1, 1)


@pytest.mark.parametrize("name", CODECS.names())
def test_every_codec_keeps_its_promises(choices, name):
    codec = choices[name].build()
    moments = codec.encode(images())
    side = 16 // codec.factor
    assert moments.shape == (2, 2 if codec.has_posterior else 1, codec.channels, side, side)
    assert moments.dtype == torch.float32
    assert not moments.requires_grad
    assert moments[:, 1:].ge(0).all()  # stds
    decoded = codec.decode(moments[:, 0])
    assert decoded.shape == (2, 3, 16, 16)
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    assert codec.decode(100 * moments[:, 0]).abs().max() <= 1
    assert len(codec.norm.mean) == codec.channels


@pytest.mark.parametrize("name", CODECS.names())
def test_every_codec_is_the_same_each_time(choices, name):
    codec, again = choices[name].build(), CODECS.parse(to_dict(choices[name])).build()
    assert codec.identity() == again.identity()
    assert torch.equal(codec.encode(images()), again.encode(images()))
    latents = codec.encode(images())[:, 0]
    assert torch.equal(codec.decode(latents), again.decode(latents))
    assert torch.equal(codec.encode(images())[1], codec.encode(images()).clone()[1])


@pytest.mark.parametrize("name", CODECS.names())
def test_an_image_does_not_depend_on_its_neighbours(choices, name):
    codec = choices[name].build()
    batch = codec.encode(images())
    torch.testing.assert_close(codec.encode(images()[1:])[0], batch[1], rtol=1e-5, atol=1e-5)
    latents = batch[:, 0]
    torch.testing.assert_close(codec.decode(latents[1:])[0], codec.decode(latents)[1], rtol=1e-4, atol=1e-5)


def test_pixels_are_their_own_latents():
    codec = CODECS.parse("pixels").build()
    assert torch.equal(codec.decode(codec.encode(images())[:, 0]), images())


def test_the_keys_of_a_command_line():
    base = {"name": "vae", "path": "a", "subfolder": "vae"}
    assert parse_codec(base, {"codec.path": "b", "codec_dtype": "bfloat16"}) == CODECS.parse(
        {**base, "path": "b", "dtype": "bfloat16"}
    )
    assert parse_codec(base, {"codec.download": "true", "codec.tile": "512"}) == CODECS.parse(
        {**base, "download": True, "tile": 512}
    )
    other = parse_codec(base, {"codec.name": "ldm", "codec.path": "c.ckpt"})
    assert other == CODECS.parse({"name": "ldm", "path": "c.ckpt"})
    with pytest.raises(ConfigError, match=r"subfolders: unknown key; did you mean subfolder"):
        parse_codec(base, {"codec.subfolders": "x"})
    with pytest.raises(ConfigError, match="tile"):
        parse_codec(base, {"codec.tile": "0"})


# --- two codecs --------------------------------------------------------------------------------------------


def identity(**changes):
    settings = {"latent_channels": 4, "scaling_factor": 0.18215, "block_out_channels": [128, 256]}
    return {"name": "vae", "config": {**settings, **changes}, "sha256": "0123456789abcdef" * 4}


def refusal(ours, theirs):
    with pytest.raises(DataError) as refused:
        check_same_codec(ours, theirs, "the checkpoint", "the data")
    return str(refused.value)


def test_the_same_codec_is_accepted():
    check_same_codec({"name": "pixels"}, {"name": "pixels"}, "the checkpoint", "the data")
    check_same_codec(identity(), identity(), "the checkpoint", "the data")


def test_only_what_differs_is_shown_with_the_mend():
    text = refusal(identity(), {**identity(scaling_factor=0.13025), "sha256": "fedcba98" * 8})
    assert "the checkpoint and the data come from different codecs" in text
    assert "(config.scaling_factor: 0.18215 against 0.13025; sha256: 01234567 against fedcba98)" in text
    assert "latent_channels" not in text
    assert "89abcdef" not in text
    assert "Encode the images again" in text
    assert "--codec.path=PATH" in text
    assert len(text) < 400


def test_codecs_of_different_kinds():
    text = refusal({"name": "pixels"}, identity())
    assert "name: pixels against vae" in text
    assert "sha256: none against 01234567" in text
    many = refusal(identity(), identity(**{f"key{i}": "x" * 1000 for i in range(20)}))
    assert "and 14 more" in many
    assert len(many) < 1000
