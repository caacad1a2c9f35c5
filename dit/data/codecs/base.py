"""What a codec is: images to latents and back. The choices are gathered in codec.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from dit.data.codecs.norm import LatentNorm, codec_norm


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

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Turn (B, 3, H, W) in [-1, 1] into (B, 2, C, h, w), mean and std; (B, 1, C, h, w) without a posterior."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Turn (B, C, h, w), not normalised, into images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return plain values, the same for the same function: what was configured, and a hash of the weights."""


class CodecConfig(ABC):
    """A choice on the codec axis."""

    @abstractmethod
    def build(self, device: torch.device | str = "cpu") -> Codec:
        """Load it."""
