"""Small random autoencoders of diffusers, one of each kind that the codecs must know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from tests.data.helpers import tiny_vae

LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def deep_compression(latent_channels: int = 8, **changes: Any) -> Any:
    """Sana's DC-AE with its multi-scale linear attention at the lowest level: factor 4, no posterior."""
    levels = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (16, 16, 32),
    }
    settings: dict[str, Any] = {
        f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in levels.items()
    }
    for side in ("encoder", "decoder"):
        settings |= {f"{side}_layers_per_block": (1, 1, 1), f"{side}_qkv_multiscales": ((), (), (5,))}
    made = {"latent_channels": latent_channels, "attention_head_dim": 8, "scaling_factor": 0.41407}
    return seeded(lambda: diffusers.AutoencoderDC(**{**settings, **made, **changes}))


def vector_quantised() -> Any:
    """Its latents have another width than the codebook's neighbours: 3 channels of latents, 5 of codes."""
    return seeded(
        lambda: diffusers.VQModel(
            **LEVELS,
            block_out_channels=(8, 8),
            latent_channels=3,
            vq_embed_dim=5,
            num_vq_embeddings=16,
            mid_block_add_attention=False,
        )
    )


def taesd(**changes: Any) -> Any:
    """AutoencoderTiny: factor 8, as its tiling takes for granted."""
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    counts = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    return seeded(lambda: diffusers.AutoencoderTiny(**{**blocks, **counts, **changes}))


def asymmetric() -> Any:
    return seeded(
        lambda: diffusers.AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            down_block_out_channels=(8, 8),
            up_block_out_channels=(8, 16),
            norm_num_groups=4,
        )
    )


def flux2() -> Any:
    """A KL autoencoder whose config has no scaling_factor."""
    return seeded(
        lambda: diffusers.AutoencoderKLFlux2(
            **LEVELS, block_out_channels=(8, 8), latent_channels=4, mid_block_add_attention=False
        )
    )


def video() -> Any:
    """Stable Video Diffusion's: the encoder takes images, the decoder frames."""
    return seeded(
        lambda: diffusers.AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",), block_out_channels=(32,), latent_channels=4
        )
    )


# name -> (how to make it, factor, channels, whether it has a posterior, its own scale and shift)
AUTOENCODERS: dict[str, tuple[Callable[[], Any], int, int, bool, tuple[float, float] | None]] = {
    "AutoencoderKL": (tiny_vae, 2, 3, True, (0.25, 0.5)),
    "AutoencoderDC": (deep_compression, 4, 8, False, (0.41407, 0.0)),
    "VQModel": (vector_quantised, 2, 5, False, (0.18215, 0.0)),
    "AutoencoderTiny": (taesd, 8, 4, False, (1.0, 0.0)),
    "AsymmetricAutoencoderKL": (asymmetric, 2, 4, True, (0.18215, 0.0)),
    "AutoencoderKLFlux2": (flux2, 2, 4, True, None),
}
