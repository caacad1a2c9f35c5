"""Codecs: pixels and a tiny random AutoencoderKL, their identity, and the normalisation of latents."""

import shutil

import pytest
import torch

from dit.config import ConfigError, from_dict, to_dict
from dit.data import DataError
from dit.data.codec import CODECS, WEIGHTS, LatentNorm, VaeCodec, check_same_codec, codec_norm, latent_norm
from dit.rng import Draws, Purpose
from tests.data.helpers import tiny_vae, write_dataset


@pytest.fixture
def folder(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def build(path, **fields):
    return CODECS.parse({"name": "vae", "path": str(path), **fields}).build()


def images(n=2, size=8):
    return Draws(0, 0, torch.arange(n), n).normal(Purpose.PRIOR, (3, size, size)).clamp(-1, 1)


def test_every_codec_keeps_its_promises(folder):
    paths = {"vae": {"path": str(folder)}}
    for name in CODECS.names():
        codec = CODECS.parse({"name": name, **paths.get(name, {})}).build()
        moments = codec.encode(images())
        side = 8 // codec.factor
        assert moments.shape == (2, 2 if codec.has_posterior else 1, codec.channels, side, side)
        assert moments.dtype == torch.float32
        decoded = codec.decode(moments[:, 0])
        assert decoded.shape == (2, 3, 8, 8)
        assert decoded.dtype == torch.float32
        assert decoded.abs().max() <= 1
        assert not moments.requires_grad
        assert codec.identity()["name"] == name
        assert codec.identity() == CODECS.parse({"name": name, **paths.get(name, {})}).build().identity()
        assert len(codec.norm.mean) == codec.channels


def test_pixels_are_their_own_latents():
    codec = CODECS.parse("pixels").build()
    assert torch.equal(codec.decode(codec.encode(images())[:, 0]), images())


def test_the_vae_computes_what_diffusers_does(folder):
    theirs = tiny_vae().eval()
    codec = build(folder)
    with torch.no_grad():
        posterior = theirs.encode(images()).latent_dist
        assert torch.equal(codec.encode(images()), torch.stack([posterior.mean, posterior.std], 1))
        latents = posterior.mean
        assert torch.equal(codec.decode(latents), theirs.decode(latents).sample.clamp(-1, 1))
    assert (codec.factor, codec.channels) == (2, 3)


def test_other_dtypes_still_give_float32(folder):
    moments = build(folder, dtype="bfloat16").encode(images())
    assert moments.dtype == torch.float32
    assert torch.allclose(moments, build(folder).encode(images()), atol=0.1)


def test_the_identity_is_of_the_function_not_of_the_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    identity = build(folder).identity()
    assert build(tmp_path / "copy").identity() == identity
    assert build(folder, dtype="bfloat16").identity() == identity
    assert VaeCodec(tiny_vae(seed=1)).identity()["sha256"] != identity["sha256"]
    assert VaeCodec(tiny_vae(scaling_factor=0.5)).identity() != identity
    assert identity["config"]["block_out_channels"] == [8, 8]  # plain values, as JSON has them


def test_two_codecs_are_refused_with_both_sides_named():
    check_same_codec({"name": "pixels"}, {"name": "pixels"}, "the checkpoint", "the data")
    with pytest.raises(DataError, match="sha256: the checkpoint has 'a', the data has 'b'"):
        check_same_codec(
            {"name": "vae", "sha256": "a"}, {"name": "vae", "sha256": "b"}, "the checkpoint", "the data"
        )


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="needs a path"):
        CODECS.parse("vae").build()
    with pytest.raises(DataError, match=r"nothing/config.json is missing.*hf download"):
        build(tmp_path / "nothing")
    (folder / WEIGHTS).rename(folder / "elsewhere")
    with pytest.raises(DataError, match=rf"{WEIGHTS} is missing"):
        build(folder)
    with pytest.raises(DataError, match="set the codec's subfolder to vae"):
        build(tmp_path)


def test_a_subfolder(folder, tmp_path):
    assert build(tmp_path, subfolder="vae").identity() == build(folder).identity()


def test_pickled_weights_are_never_read(folder):
    torch.save(tiny_vae().state_dict(), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(DataError, match=rf"{WEIGHTS} is missing"):
        build(folder)


def test_a_hub_name_out_of_reach_says_how_to_go_on(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hf download nobody/nothing --local-dir FOLDER"):
        build("nobody/nothing")


def test_weights_of_another_model_are_refused(folder):
    """diffusers alone would fill what is missing with random numbers."""
    tiny_vae(layers_per_block=2).save_config(folder)
    with pytest.raises(DataError, match=r"missing keys: .*mixes two models"):
        build(folder)


def test_damaged_weights_are_refused(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(DataError, match="cannot load an AutoencoderKL"):
        build(folder)


# --- normalisation -----------------------------------------------------------------------------------------

NORM = LatentNorm(mean=(1.0, -2.0), std=(0.5, 3.0))


def test_drawing_latents():
    draws = Draws(0, 4, torch.arange(6), 6)
    noise = draws.normal(Purpose.POSTERIOR, (2, 3, 3))
    mean, std = torch.full((6, 2, 3, 3), 2.0).half(), torch.full((6, 2, 3, 3), 0.25).half()
    latents = NORM.draw(torch.stack([mean, std], 1), draws)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents[:, 0], (2.0 + 0.25 * noise[:, 0] - 1.0) / 0.5)
    torch.testing.assert_close(latents[:, 1], (2.0 + 0.25 * noise[:, 1] + 2.0) / 3.0)
    torch.testing.assert_close(NORM.invert(latents), mean.float() + std.float() * noise)
    alone = NORM.draw(mean[:, None], draws)
    torch.testing.assert_close(NORM.invert(alone), mean.float())


def test_statistics_first_used_while_sampling_can_be_trained_with():
    norm = LatentNorm(mean=(0.25, 0.125), std=(7.0, 9.0))  # used by no other test
    with torch.inference_mode():
        norm.invert(torch.zeros(1, 2, 3, 3))
    latents = torch.zeros(1, 2, 3, 3, requires_grad=True)
    norm.invert(latents).sum().backward()
    assert latents.grad[0, :, 0, 0].tolist() == [7.0, 9.0]


def test_a_micro_batch_draws_what_the_batch_draws():
    draws, moments = Draws(0, 4, torch.arange(6), 6), torch.ones(6, 2, 2, 3, 3)
    part = slice(2, 5)
    assert torch.equal(NORM.draw(moments[part], draws.select(part)), NORM.draw(moments, draws)[part])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mean": (0.0,), "std": (1.0, 1.0)}, "1 means and 2 stds"),
        ({"mean": (), "std": ()}, "0 means"),
        ({"mean": (0.0,), "std": (0.0,)}, "std above 0"),
        ({"mean": (float("nan"),), "std": (1.0,)}, "finite"),
    ],
)
def test_statistics_that_cannot_normalise(fields, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(LatentNorm, fields)


def test_a_wrong_number_of_channels_is_refused():
    with pytest.raises(ConfigError, match="latents of 3 channels, but statistics of 2"):
        NORM.invert(torch.zeros(1, 3, 2, 2))


def test_normalising_by_the_data_or_by_the_codec(tmp_path):
    manifest = write_dataset(tmp_path / "set", [4, 4])
    assert to_dict(latent_norm(manifest)) == {"mean": list(manifest.mean), "std": list(manifest.std)}
    stable_diffusion = VaeCodec(tiny_vae(scaling_factor=0.18215, shift_factor=None)).identity()
    norm = codec_norm(stable_diffusion)
    torch.testing.assert_close(norm.invert(torch.ones(1, 3, 1, 1) * 0.18215), torch.ones(1, 3, 1, 1))
    assert VaeCodec(tiny_vae()).norm == LatentNorm(mean=(0.5,) * 3, std=(4.0,) * 3)
