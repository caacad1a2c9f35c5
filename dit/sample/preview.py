"""Latents to look at without a codec: their three main directions as red, green and blue."""

from __future__ import annotations

import numpy as np

LEAST = 64  # pixels a side: smaller latents are magnified
REACH = 2.5  # standard deviations from grey to black or white


def false_colours(latents: np.ndarray) -> np.ndarray:
    """(N, h, w, 3) uint8 of latents (N, C, H, W): the principal components of their channels, magnified by pixels.

    Up to 3 components, the first in all three colours where there is but one channel, the third grey where there are
    two. Components are scaled to their standard deviation over all N, and their signs are those of their largest
    weight, so that the same latents give the same colours on every machine (up to rounding).
    """
    count, channels, height, width = latents.shape
    rows = latents.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, channels)
    rows = rows - rows.mean(0)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))  # ascending
    vectors = vectors[:, ::-1][:, :3]
    vectors *= np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    spread = np.sqrt(np.maximum(values[::-1][:3], 1e-24))
    shown = np.zeros((len(rows), 3))
    shown[:, : vectors.shape[1]] = rows @ vectors / spread
    if channels == 1:
        shown[:] = shown[:, :1]
    pixels = np.clip(np.rint(127.5 * (1 + shown / REACH)), 0, 255).astype(np.uint8)
    times = -(-LEAST // min(height, width))
    image = pixels.reshape(count, height, width, 3)
    return image.repeat(times, 1).repeat(times, 2)
