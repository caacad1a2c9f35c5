"""A normalisation of latents inside a VAE."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from dit.data.codecs.norm import LatentNorm
from dit.interop.pipeline.vae import normalised
from tests.gaussian import normal

NORMS = {
    "scale": LatentNorm(mean=(0.0,) * 4, std=(4.0,) * 4),
    "channels": LatentNorm(mean=(0.5, -1.0, 0.0, 2.0), std=(0.5, 1.0, 2.0, 3.0)),
    "shift": LatentNorm(mean=(0.5,) * 4, std=(4.0,) * 4),
}


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_it_decodes_and_encodes_the_latents_that_the_network_sees(name: str, convolutions: bool) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.3, shift_factor=0.1,
        use_quant_conv=convolutions, use_post_quant_conv=convolutions,
    ).eval()  # fmt: skip
    before = {key: tensor.clone() for key, tensor in vae.state_dict().items()}
    norm = NORMS[name]
    made = normalised(vae, norm)
    x, image = normal(2, 4, 8, 8).float(), normal(2, 3, 8, 8).float()
    with torch.no_grad():
        got = made.decode(x / made.config.scaling_factor).sample
        torch.testing.assert_close(got, vae.decode(norm.invert(x)).sample, rtol=1e-4, atol=1e-4)
        theirs, ours = (v.encode(image).latent_dist for v in (vae, made))
    mean, std = (torch.tensor(values)[:, None, None] for values in (norm.mean, norm.std))
    torch.testing.assert_close(
        ours.mean * made.config.scaling_factor, (theirs.mean - mean) / std, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(ours.std * made.config.scaling_factor, theirs.std / std, rtol=1e-4, atol=1e-5)
    assert made.config.scaling_factor == pytest.approx(0.25 if name == "scale" else 1.0)
    assert made.config.shift_factor is None
    assert all(torch.equal(before[key], tensor) for key, tensor in vae.state_dict().items())
