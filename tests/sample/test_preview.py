"""Latents in false colours."""

from __future__ import annotations

import numpy as np
import pytest

from dit.sample.preview import LEAST, false_colours


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_any_channels_give_pictures(channels: int) -> None:
    shown = false_colours(np.random.default_rng(0).standard_normal((3, channels, 8, 8)).astype(np.float32))
    assert (shown.shape, shown.dtype) == ((3, LEAST, LEAST, 3), np.uint8)
    assert (shown[:, :8, :8] == shown[:, :1, :1]).all()  # a pixel of the latent, magnified
    assert shown[..., 0].std() > 20
    if channels == 2:
        assert (shown[..., 2] == 128).all()


def test_what_varies_most_is_red_and_order_of_channels_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((2, 4, 8, 8)) * np.array([1.0, 5.0, 2.0, 0.1])[:, None, None]
    shown = false_colours(latents)
    red = shown[:, ::8, ::8, 0].astype(float).ravel()
    assert abs(np.corrcoef(red, latents[:, 1].ravel())[0, 1]) > 0.95
    assert np.abs(false_colours(latents[:, [3, 1, 0, 2]]).astype(int) - shown).max() <= 1


def test_flat_latents_are_grey() -> None:
    assert (false_colours(np.ones((1, 4, 8, 8), np.float32)) == 128).all()
