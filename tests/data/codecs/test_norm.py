"""The normalisation of latents: by the statistics of the data, or by the codec's own constant."""

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import ConfigError, from_dict, to_dict
from dit.data import DataError
from dit.data.codecs.codec import PixelCodec
from dit.data.codecs.norm import LatentNorm, codec_norm, latent_norm
from dit.data.encoding.encode import EncodeOptions, encode
from dit.data.sources.images import open_source
from dit.rng import Draws, Purpose
from tests.data.helpers import write_dataset

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


def test_a_channel_of_one_value_names_the_way_out(tmp_path):
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        pixels[..., 1] = 51
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    made = encode(open_source(tmp_path), PixelCodec(), tmp_path / "out", EncodeOptions(image_size=8)).manifest
    with pytest.raises(
        DataError, match=r"1 of 3 channels \(1\) have one value everywhere.*Set latents.norm=codec"
    ):
        latent_norm(made)
    assert latent_norm(made, "codec") == LatentNorm(mean=(0.0,) * 3, std=(1.0,) * 3)


def test_a_wrong_number_of_channels_is_refused():
    with pytest.raises(ConfigError, match="latents of 3 channels, but statistics of 2"):
        NORM.invert(torch.zeros(1, 3, 2, 2))


def test_normalising_by_the_data_or_by_the_codec(tmp_path):
    codec = {"name": "vae", "config": {"latent_channels": 2, "scaling_factor": 0.25, "shift_factor": 0.5}}
    manifest = write_dataset(tmp_path / "set", [4, 4], codec=codec)
    assert to_dict(latent_norm(manifest)) == {"mean": list(manifest.mean), "std": list(manifest.std)}
    assert latent_norm(manifest, "codec") == LatentNorm(mean=(0.5, 0.5), std=(4.0, 4.0))


def test_the_constants_of_codecs():
    stable_diffusion = {"latent_channels": 3, "scaling_factor": 0.18215, "shift_factor": None}
    norm = codec_norm({"name": "vae", "config": stable_diffusion})
    torch.testing.assert_close(norm.invert(torch.ones(1, 3, 1, 1) * 0.18215), torch.ones(1, 3, 1, 1))
    assert codec_norm({"name": "pixels"}) == LatentNorm(mean=(0.0,) * 3, std=(1.0,) * 3)
    # the width of latents is not always what the config calls latent_channels
    vector_quantised = {"name": "vae", "class": "VQModel", "channels": 5, "config": {**stable_diffusion}}
    assert codec_norm(vector_quantised).std == (1 / 0.18215,) * 5


def test_a_codec_without_a_constant_says_what_to_do():
    with pytest.raises(DataError, match=r"AutoencoderX brings no scaling_factor.*latents.norm to dataset"):
        codec_norm({"name": "vae", "class": "AutoencoderX", "channels": 2, "config": {}})
