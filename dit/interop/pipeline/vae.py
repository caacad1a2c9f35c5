"""A VAE with our normalisation of latents in it, as DiTPipeline decodes: latents / scaling_factor, and no more.

Means and standard deviations of channels go into the 1 x 1 convolutions next to the latents, which every AutoencoderKL
has or may have; so its latents are those that the network sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit.data.codecs.norm import LatentNorm


def normalised(vae: Any, norm: LatentNorm) -> Any:
    """diffusers' AutoencoderKL that decodes the network's latents divided by its scaling_factor, and encodes to them.

    One number for all channels, and no mean, is its scaling_factor; anything else is folded into its weights, and
    scaling_factor is 1. `vae` stays as it is.
    """
    plain = len(set(norm.std)) == 1 and not any(norm.mean)
    own = {"scaling_factor": 1.0 / norm.std[0] if plain else 1.0, "shift_factor": None}
    folded = {} if plain else {"use_quant_conv": True, "use_post_quant_conv": True}
    made = type(vae).from_config({**vae.config, **own, **folded})
    state = dict(vae.state_dict())
    if not plain:
        state |= _folded(state, norm)
    made.load_state_dict(state)
    return made.to(torch.float32).eval()


def _folded(state: dict[str, Tensor], norm: LatentNorm) -> dict[str, Tensor]:
    """The convolutions before and after the latents (C, 2C, 1, 1), with the normalisation in them."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (norm.mean, norm.std))
    after, bias = _layer(state, "post_quant_conv", len(mean))
    before, offset = _layer(state, "quant_conv", 2 * len(mean))
    scale = torch.cat([1 / std, torch.ones_like(std)])
    shift = torch.cat([-mean / std, -2.0 * std.log()])  # of the mean, and of the log variance
    made = {
        "post_quant_conv.weight": after * std[None, :, None, None],
        "post_quant_conv.bias": bias + after[:, :, 0, 0] @ mean,
        "quant_conv.weight": before * scale[:, None, None, None],
        "quant_conv.bias": offset * scale + shift,
    }
    return {name: tensor.float() for name, tensor in made.items()}


def _layer(state: dict[str, Tensor], name: str, channels: int) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a convolution, float64; of one that is not there the identity's."""
    if f"{name}.weight" not in state:
        return torch.eye(channels, dtype=torch.float64)[:, :, None, None], torch.zeros(channels).double()
    return state[f"{name}.weight"].double().cpu(), state[f"{name}.bias"].double().cpu()
