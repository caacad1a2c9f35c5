"""Features of images in which sets of them are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
