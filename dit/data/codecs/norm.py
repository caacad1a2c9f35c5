"""Between what a codec gives and the unit variance that a model sees: `draw` in training, `invert` in sampling."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from dit.config import ConfigError, config, from_dict
from dit.data import DataError
from dit.data.shards.manifest import Manifest
from dit.data.storage.remote import public
from dit.rng import Draws, Purpose


@config
class LatentNorm:
    """Per-channel mean and std of latents: `draw` goes to the model's unit variance, `invert` comes back."""

    mean: tuple[float, ...]  # of each channel, in stored units
    std: tuple[float, ...]  # of each channel, in stored units

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConfigError(f"{len(self.mean)} means and {len(self.std)} stds; expected one each a channel")
        if not all(0 < s < float("inf") for s in self.std) or not all(
            abs(m) < float("inf") for m in self.mean
        ):
            raise ConfigError(f"mean {self.mean} and std {self.std}: expected finite numbers, std above 0")

    def draw(self, moments: Tensor, draws: Draws) -> Tensor:
        """Draw normalised latents (B, C, H, W) float32 of moments (B, 2, C, H, W), or take (B, 1, C, H, W) as they are.

        Two moments are mean and std of a Gaussian posterior, drawn from with draws' POSTERIOR numbers.
        """
        mean = moments[:, 0].float()  # (B, C, H, W)
        if moments.shape[1] == 2:
            mean = mean + moments[:, 1].float() * draws.normal(Purpose.POSTERIOR, mean.shape[1:])
        return (mean - _per_channel(self.mean, mean)) / _per_channel(self.std, mean)

    def invert(self, latents: Tensor) -> Tensor:
        """Return what the codec decodes, (B, C, H, W) float32, of normalised latents of that shape."""
        latents = latents.float()
        return latents * _per_channel(self.std, latents) + _per_channel(self.mean, latents)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    if like.shape[1] != len(values):
        raise ConfigError(f"latents of {like.shape[1]} channels, but statistics of {len(values)}")
    return _constant(values, like.device)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) float32. Kept, because making one on a GPU makes the host wait for it."""
    with torch.inference_mode(False):  # else one first made while sampling could not be used in training
        return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)


def codec_norm(identity: Mapping[str, Any]) -> LatentNorm:
    """Return the normalisation that a codec brings along in its identity: (latents - shift_factor) * scaling_factor.

    DataError for a codec whose config has no scaling_factor.
    """
    if identity["name"] == "pixels":
        return LatentNorm(mean=(0.0,) * 3, std=(1.0,) * 3)
    settings = identity["config"]
    channels, shift = identity.get("channels", settings.get("latent_channels")), settings.get("shift_factor")
    scale = settings.get("scaling_factor")
    if not scale:
        raise DataError(
            f"the codec {identity.get('class', identity['name'])} brings no scaling_factor to normalise by; set "
            "latents.norm to dataset, which takes the statistics of the data"
        )
    return LatentNorm(mean=(shift or 0.0,) * channels, std=(1.0 / scale,) * channels)


def latent_norm(manifest: Manifest, which: Literal["dataset", "codec"] = "dataset") -> LatentNorm:
    """Choose by `dataset`, the statistics of these latents, or `codec`, the codec's own constant (official weights)."""
    if which == "codec":
        return codec_norm(manifest.codec)
    constant = [str(i) for i, std in enumerate(manifest.std) if std == 0]
    if constant:
        raise DataError(
            f"{public(manifest.root)}: latents cannot be normalised by their statistics: {len(constant)} of "
            f"{len(manifest.std)} channels ({', '.join(constant)}) have one value everywhere. Set latents.norm=codec "
            "for the codec's own constants (pixels as they are), or encode images that differ"
        )
    try:
        return from_dict(LatentNorm, {"mean": manifest.mean, "std": manifest.std})
    except ConfigError as error:
        raise DataError(
            f"{public(manifest.root)}: latents cannot be normalised by their statistics ({error})"
        ) from None
