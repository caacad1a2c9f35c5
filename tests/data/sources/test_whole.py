"""Files that were damaged in the middle: what can be told is told, and nothing is said of whole ones."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dit.data.sources.decode import Decode, before
from dit.data.sources.formats import Refused
from dit.data.sources.whole import PADDING, damage_of
from tests.data.sources.pictures import picture

KINDS = {
    "baseline": {},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "4:4:4": {"subsampling": 0},
}


def photo(mode="RGB"):
    """Something with structure at all scales."""
    y, x = np.mgrid[:200, :300]
    rgb = np.stack([x % 256, y % 256, (x * y // 100) % 256], -1)
    noise = np.random.default_rng(0).integers(0, 12, rgb.shape)
    return Image.fromarray((rgb + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg(mode="RGB", **how):
    buffer = io.BytesIO()
    photo(mode).save(buffer, "JPEG", quality=90, **how)
    return buffer.getvalue()


def zeroed(data, start, share):
    middle = int(start * len(data))
    return data[:middle] + bytes(int(share * len(data))) + data[middle + int(share * len(data)) :]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_jpegs_are_whole(kind, mode):
    assert damage_of(jpeg(mode, **KINDS[kind])) is None
    Decode()(jpeg(mode, **KINDS[kind]))


@pytest.mark.parametrize("start", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_whose_middle_is_gone_is_refused(kind, start):
    data = zeroed(jpeg(**KINDS[kind]), start, 0.1)
    assert before(data).size == (300, 200)  # Pillow has nothing to say
    with pytest.raises(Refused, match="JPEG damaged: "):
        Decode()(data)


def test_random_bytes_in_the_middle_of_a_jpeg():
    data = bytearray(jpeg())
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(40):
        start = int(rng.integers(1000, len(data) - 2000))
        damaged = bytes(data[:start] + rng.integers(0, 256, 1000, np.uint8).tobytes() + data[start + 1000 :])
        try:
            Decode()(damaged)
        except (Refused, OSError):
            refused += 1
    assert refused >= 38


@pytest.mark.parametrize("stray", [1, PADDING])
def test_padding_before_the_end_is_no_damage(stray):
    data = jpeg()
    assert damage_of(data[:-2] + bytes(stray) + data[-2:]) is None
    assert "extraneous bytes before marker 0xd9" in (
        damage_of(data[:-2] + bytes(stray + 32) + data[-2:]) or ""
    )


def test_threads_do_not_hear_each_others_warnings():
    good, bad = jpeg(), zeroed(jpeg(), 0.5, 0.1)
    before(good)
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(damage_of, [good, bad] * 50))
    assert said[::2] == [None] * 50
    assert all(said[1::2])


def test_kinds_of_jpeg_that_are_read_otherwise_are_left_alone():
    """A lossless frame (0xC3) has no blocks."""
    data = bytearray(jpeg())
    data[data.index(b"\xff\xc0") + 1] = 0xC3
    assert damage_of(bytes(data)) is None
    assert damage_of(b"\xff\xd8\xff") is None


def test_any_byte_of_the_pixels_of_a_png():
    """Pillow by itself takes some of the last ones."""
    buffer = io.BytesIO()
    picture(1, 40, 40, "P").save(buffer, "PNG", compress_level=6)
    data = buffer.getvalue()
    start, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    for place in range(start, end):
        damaged = bytearray(data)
        damaged[place] ^= 4
        with pytest.raises((Refused, OSError, SyntaxError)):
            Decode()(bytes(damaged))
    with pytest.raises(Refused, match=f"PNG cut off at byte {end - 5}, within its chunk IDAT"):
        Decode()(data[: end - 5])
