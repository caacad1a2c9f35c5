"""Fréchet distance between Gaussians fitted to features, in float64 and without a matrix square root that fails."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gaussian:
    """mean (D,) and cov (D, D), float64, of `count` samples' features."""

    mean: np.ndarray
    cov: np.ndarray
    count: int

    @classmethod
    def fit(cls, features: np.ndarray) -> Gaussian:
        """features (N, D), N > 1. ValueError where they are not finite or too few."""
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"expected features (N, D) with N > 1, got {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features are not finite")
        return cls(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)), len(features))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (Dowson & Landau, 1982; Heusel et al., 2017).

    The product is formed symmetrically, so its eigenvalues are real and non-negative up to rounding, which is
    clipped: singular covariances (fewer samples than features) give no NaN.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.shape[0]} and {b.mean.shape[0]} dimensions cannot be compared")
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # C_a^1/2
    cross = np.linalg.eigvalsh(root @ b.cov @ root).clip(min=0)
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * np.sqrt(cross).sum()
    return float(max(distance, 0.0))
