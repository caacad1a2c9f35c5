"""Crops: shapes and modes for all of them, known pictures for each."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dit.config import ConfigError, from_dict
from dit.data.sources.crops import CROPS, Centre, RandomResized
from dit.rng import Draws
from tests.data.sources.pictures import picture

centre = Centre()
EVERY = pytest.mark.parametrize("crop", [cls() for _, cls in CROPS.items()], ids=list(CROPS))


def draws(index, seed=0):
    return Draws(seed, 0, torch.tensor([index]), 1)


def gradient(width, height):
    """Red is the column, green is the row, in steps of 1."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


# --- all of them -------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("size", [(500, 333), (64, 63), (97, 301), (5, 9), (1, 1), (1, 40)])
def test_any_size_becomes_square(crop, size):
    pixels = crop(Image.new("RGB", size, (10, 200, 30)), 32, draws(3))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == (10, 200, 30)).all()


@EVERY
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "I;16", "F"])
def test_only_rgb_is_cropped(crop, mode):
    with pytest.raises(ConfigError, match=f"takes RGB pixels, as Decode gives them, not mode {mode}"):
        crop(Image.new(mode, (32, 32)), 32, draws(0))


@EVERY
def test_a_crop_is_its_configuration_and_says_what_it_does(crop):
    assert CROPS.parse(CROPS.name_of(crop)) == crop
    assert "size" in crop.text
    assert [cls().text for _, cls in CROPS.items()].count(crop.text) == 1


@EVERY
def test_the_same_id_gives_the_same_pixels_whatever_came_before(crop):
    image = picture(0, 50, 40)
    once = crop(image, 16, draws(7))
    crop(image, 16, draws(8))
    assert np.array_equal(crop(image, 16, Draws(0, 0, torch.tensor([7, 8, 9]), 3).select(slice(0, 1))), once)


# --- centre ------------------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_left_alone():
    image = picture(0, 32, 32)
    assert np.array_equal(centre(image, 32), np.asarray(image))


def test_the_middle_is_kept():
    wide, high = picture(0, 32, 16), picture(0, 16, 33)
    assert np.array_equal(centre(wide, 16), np.asarray(wide)[:, 8:24])
    assert np.array_equal(centre(high, 16), np.asarray(high)[8:24])


def test_halving_is_a_mean_of_four():
    image = picture(0, 64, 64)
    mean = np.asarray(image).reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
    assert np.abs(centre(image, 32) - mean).max() <= 1  # two passes, each rounded


# --- random resized ----------------------------------------------------------------------------------------

SIDES = st.integers(1, 5000)


@given(
    SIDES,
    SIDES,
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.floats(0.2, 5),
    st.floats(0.2, 5),
    st.integers(0, 2**40),
)
def test_boxes_keep_to_the_bounds(width, height, a, b, c, d, index):
    """Inside the image; of an allowed area and ratio up to the rounding of sides, or the largest in the middle."""
    crop = RandomResized(scale_min=min(a, b), scale_max=max(a, b), ratio_min=min(c, d), ratio_max=max(c, d))
    left, top, right, bottom = crop.box(width, height, draws(index))
    w, h = right - left, bottom - top
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    allowed = (
        (w + 0.501) * (h + 0.501) >= crop.scale_min * width * height
        and (w - 0.501) * (h - 0.501) <= crop.scale_max * width * height
        and (w + 0.501) / max(h - 0.501, 1e-9) >= crop.ratio_min
        and (w - 0.501) / (h + 0.501) <= crop.ratio_max
    )
    assert allowed or ((w == width or h == height) and (left, top) == ((width - w) // 2, (height - h) // 2))


def test_an_image_that_no_box_fits_into_gives_its_middle():
    crop = RandomResized(scale_min=0.9)
    assert crop.box(100, 10, draws(0)) == (43, 0, 56, 10)
    assert crop.box(10, 100, draws(0)) == (0, 43, 10, 56)


def test_area_ratio_and_place_are_uniform():
    """Of a square, up to 0.7 of the area fits with any ratio below 4/3, so nothing is drawn twice."""
    crop, side, n = RandomResized(scale_max=0.7), 10_000, 2000
    left, top, right, bottom = np.array([crop.box(side, side, draws(i)) for i in range(n)], float).T
    w, h = right - left, bottom - top
    uniform = {
        "area": (w * h / side**2 - 0.08) / 0.62,
        "ratio": (np.log(w / h) / math.log(4 / 3) + 1) / 2,
        "x": left / (side - w),
        "y": top / (side - h),
    }
    for name, u in uniform.items():
        assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n), name
        assert abs(u.var() - 1 / 12) < 5 / math.sqrt(180 * n), name  # Var[(u - 1/2)^2] = 1/180
        assert -0.001 < u.min() < 0.01 < 0.99 < u.max() < 1.001, name
    correlation = np.corrcoef(list(uniform.values())) - np.eye(4)
    assert np.abs(correlation).max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("index", range(8))
def test_pixels_are_those_of_the_box(index):
    """A linear gradient stays one under bicubic interpolation, away from the edges of the box."""
    crop, size = RandomResized(scale_min=0.2), 16
    left, top, right, bottom = crop.box(240, 200, draws(index))
    pixels = crop(gradient(240, 200), size, draws(index)).astype(float)
    column = left + (np.arange(size) + 0.5) * (right - left) / size - 0.5
    row = top + (np.arange(size) + 0.5) * (bottom - top) / size - 0.5
    inner = slice(2, -2)
    assert np.abs(pixels[inner, inner, 0] - column[None, inner]).max() <= 1
    assert np.abs(pixels[inner, inner, 1] - row[inner, None]).max() <= 1


def test_boxes_differ_between_ids_and_seeds():
    crop = RandomResized()
    boxes = {crop.box(500, 400, draws(i, seed)) for i in range(10) for seed in range(10)}
    assert len(boxes) == 100


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scale_min": 0.5, "scale_max": 0.2}, "scale_min is 0.5, above scale_max of 0.2"),
        ({"ratio_min": 2, "ratio_max": 1}, "ratio_min is 2.0, above ratio_max of 1.0"),
        ({"scale_min": 0}, "expected more than 0"),
        ({"scale_max": 1.5}, "expected 1 or less"),
        ({"scale": 0.5}, "unknown key"),
    ],
)
def test_bounds_that_make_no_sense(fields, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(RandomResized, fields)


def test_a_random_crop_needs_draws():
    with pytest.raises(ConfigError, match="needs draws"):
        RandomResized()(picture(0), 8, None)
