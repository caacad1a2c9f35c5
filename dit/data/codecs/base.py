"""What a codec is: images to latents and back. The choices are gathered in codec.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from dit.data.codecs.norm import LatentNorm, codec_norm


def in_range(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) clamped to [-1, 1], in float32. What is not finite stays so, for the caller to see."""
    images = images.float()
    return torch.where(images.isfinite(), images.clamp(-1, 1), images)


class Codec(ABC):
    """Images in [-1, 1] to latents of `channels` channels and 1 / `factor` of the size, and back."""

    channels: int
    factor: int
    has_posterior: bool  # whether encode gives two moments
    # where and how it computes: the last bits of latents follow from these too
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    tile: int | None = None  # pixels a side, of images that go through it in tiles

    @property
    def norm(self) -> LatentNorm:
        """The codec's own normalisation (a Stable Diffusion VAE's 0.18215), for weights trained with it.

        DataError where it has none.
        """
        return codec_norm(self.identity())

    @property
    def advice(self) -> str:
        """What to try where what it computes is not finite; empty where it computes in float32 already."""
        name = str(self.dtype).removeprefix("torch.")
        return "" if self.dtype == torch.float32 else f"set codec.dtype to float32 (it is {name})"

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Turn (B, 3, H, W) in [-1, 1] into (B, 2, C, h, w), mean and std; (B, 1, C, h, w) without a posterior."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Turn (B, C, h, w), not normalised, into images (B, 3, H, W) in [-1, 1]; what overflows stays so."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return plain values, the same for the same function: what was configured, and a hash of the weights."""


class CodecConfig(ABC):
    """A choice on the codec axis."""

    @abstractmethod
    def build(self, device: torch.device | str = "cpu") -> Codec:
        """Load it."""
