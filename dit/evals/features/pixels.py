"""Principal components of pixels: a space that needs no trained network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from dit.config import config
from dit.evals.features.network import FEATURES, Extracted, FeatureError, FeatureNetwork, FeatureSpace, Sample

BLOCK = 64  # images that are in float64 at a time


@dataclass(frozen=True)
class Pca:
    """The leading principal components of a reference set's pixels.

    No trained network is needed, so the space is the same everywhere; good for simple images alone. Distances in
    it are not FIDs.
    """

    mean: np.ndarray  # (P,)
    components: np.ndarray  # (K, P), orthonormal rows

    @classmethod
    def fit(cls, images: np.ndarray, components: int) -> Pca:
        """images (N, H, W, 3) uint8; K = components, at most min(N, P)."""
        pixels = _pixels(images)
        mean = pixels.mean(0)
        _, _, rows = np.linalg.svd(pixels - mean, full_matrices=False)
        if not 1 <= components <= len(rows):
            raise ValueError(f"components must be in 1..{len(rows)}, got {components}")
        return cls(mean, rows[:components])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, K) float64."""
        features: np.ndarray = (_pixels(images) - self.mean) @ self.components.T
        return features


def _pixels(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 to (N, P) float64 in [0, 1]."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"expected images (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    return images.reshape(len(images), -1).astype(np.float64) / 255


@FEATURES.register("pixels")
@config
class PixelComponents(FeatureSpace):
    """Principal components of the reference's pixels: no network, the same everywhere; for simple images alone."""

    components: Annotated[int, Field(ge=1)] = (
        32  # features; fewer where the reference has fewer images or pixels
    )
    side: Annotated[int, Field(ge=1)] = 32  # pixels a side; larger images are averaged down to it
    images: Annotated[int, Field(ge=2)] = 2000  # of the reference that they are fitted on, chosen evenly
    fitted: ClassVar[bool] = True

    def build(self, device: torch.device, sample: Sample | None = None) -> FeatureNetwork:
        """Fit the components on images of the reference."""
        if sample is None:
            raise FeatureError(
                "features=pixels is fitted on the reference's images: give images as reference"
            )
        images = _averaged(torch.from_numpy(sample(self.images)), self.side)
        pixels = images.reshape(len(images), -1)
        most = min(len(pixels) - 1, pixels.shape[1])
        if most < 1:
            raise FeatureError("features=pixels needs at least 2 images as reference")
        mean = pixels.mean(0)
        _, _, rows = np.linalg.svd(pixels - mean, full_matrices=False)
        identity = {"name": "pixels", "components": min(self.components, most), "side": self.side}
        pca = Pca(mean, rows[: min(self.components, most)])
        return PixelNetwork(pca, self.side, {**identity, "fitted_on": len(pixels), "dtype": "float64"})

    def restore(self, state: Mapping[str, np.ndarray], identity: Mapping[str, Any]) -> FeatureNetwork:
        """The components of a statistics file."""
        return PixelNetwork(Pca(state["mean"], state["components"]), int(identity["side"]), dict(identity))


class PixelNetwork(FeatureNetwork):
    """Components that are fitted, as a network: (B, K) float64 of pixels in [0, 1]."""

    def __init__(self, pca: Pca, side: int, identity: dict[str, Any]):
        self.pca, self.side, self.identity = pca, side, identity

    def __call__(self, images: Tensor) -> Extracted:
        pixels = _averaged(images.cpu(), self.side).reshape(len(images), -1)
        if pixels.shape[1] != len(self.pca.mean):
            side = round((len(self.pca.mean) / 3) ** 0.5)
            raise FeatureError(
                f"features=pixels compares images of one size: {images.shape[2]}x{images.shape[1]} came, and it was "
                f"fitted on {side}x{side}; --image_size={images.shape[1]} brings files of images to that size, and a "
                "statistics file is made with it by `evaluate.py reference`"
            )
        return Extracted(torch.from_numpy((pixels - self.pca.mean) @ self.pca.components.T))

    def state(self) -> dict[str, np.ndarray]:
        """Mean and components."""
        return {"mean": self.pca.mean, "components": self.pca.components}


def _averaged(images: Tensor, side: int) -> np.ndarray:
    """(N, H, W, 3) uint8 as float64 in [0, 1], of at most `side` pixels a side, each the mean of those it covers."""
    size = tuple(min(side, length) for length in images.shape[1:3])
    made = np.empty((len(images), *size, 3))
    for part, block in zip(torch.arange(len(images)).split(BLOCK), images.split(BLOCK), strict=True):
        x = block.permute(0, 3, 1, 2).double() / 255
        if size != tuple(images.shape[1:3]):
            x = interpolate(x, size, mode="area")
        made[part.numpy()] = x.permute(0, 2, 3, 1).numpy()
    return made
