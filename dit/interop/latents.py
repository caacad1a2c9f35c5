"""What weights do not say of the latents that they were trained on: given, or as usual for their project."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from dit.config import ConfigError, config, to_dict
from dit.data.codecs.autoencoders import unknown_vae
from dit.data.codecs.base import Codec, CodecConfig
from dit.data.codecs.codec import CODECS
from dit.data.codecs.norm import LatentNorm, codec_norm
from dit.errors import Notice
from dit.interop.files import read_stats
from dit.interop.format import FACTOR, SCALE, RunArguments
from dit.interop.weights import Count


@config
class Choices:
    """What the weights do not say. None: as is known of the project's own models."""

    num_heads: Count | None = None  # of the attention; null = as usual for the width
    # classes without the null row; null = as the table says
    num_classes: Annotated[int, Field(ge=0)] | None = None
    codec: Annotated[CodecConfig, CODECS] | None = None  # the VAE that they go with
    scaling_factor: Annotated[float, Field(gt=0)] | None = None  # what its latents were multiplied with
    latents_stats: str | None = (
        None  # a file of each channel's mean and std, by which latents were normalised
    )
    factor: Count | None = None  # pixels of a latent pixel, on a side; null = the codec's, or as usual


def contract_of(
    arguments: RunArguments, choices: Choices, usual_factor: int = FACTOR, usual_scale: float | None = SCALE
) -> dict[str, Any]:
    """What sampling must know of the latents: see `Parts.contract`.

    usual_factor, usual_scale: the project's, where nothing says others. A Notice says what is taken to be so.
    """
    channels, stats, factor = arguments.in_channels, None, choices.factor or usual_factor
    if choices.latents_stats is not None:
        stats = read_stats(choices.latents_stats, channels)
    identity = unknown_vae(channels, choices.scaling_factor or usual_scale)
    if choices.codec:
        identity, factor = _known(choices.codec.build(), channels, choices.factor)
    elif usual_scale is None and not choices.factor:
        _say(f"a latent pixel is taken to be {factor} x {factor} pixels: --factor says another size")
    return {
        "norm": to_dict(_norm(identity, usual_scale is None, choices, stats, channels)),
        "codec": identity,
        "shape": [channels, arguments.input_size, arguments.input_size],
        "image_size": arguments.input_size * factor,
        "classes": [f"class_{i}" for i in range(arguments.num_classes)],
    }


def _known(codec: Codec, channels: int, factor: int | None) -> tuple[dict[str, Any], int]:
    """(identity, pixels of a latent pixel) of a codec. ConfigError where it does not fit what else is known."""
    if codec.channels != channels:
        raise ConfigError(
            f"the codec has {codec.channels} channels, the model {channels}; give the codec that the weights were "
            "trained with"
        )
    if factor not in (None, codec.factor):
        raise ConfigError(f"factor is {factor}, but the codec's is {codec.factor}: leave out --factor")
    return codec.identity(), codec.factor


def _norm(
    identity: Mapping[str, Any],
    is_unusual: bool,
    choices: Choices,
    stats: LatentNorm | None,
    channels: int,
) -> LatentNorm:
    """By statistics and then a factor; by one of them; or as the codec brings it along, if it must."""
    scale = choices.scaling_factor
    if stats is None and scale is None:
        if not is_unusual or identity.get("config", {}).get("scaling_factor"):
            return codec_norm(identity)
        _say(
            "how latents were normalised is not in the weights, and they are taken as they are: --latents_stats=FILE "
            "has each channel's mean and std (latents_stats.pt beside the data that they were trained on)"
        )
    plain = stats or LatentNorm(mean=(0.0,) * channels, std=(1.0,) * channels)
    return replace(plain, std=tuple(s / (scale or 1.0) for s in plain.std))


def _say(text: str) -> None:
    warnings.warn(text, Notice, stacklevel=3)
