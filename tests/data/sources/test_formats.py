"""Which files are images: by their endings, or by their first bytes."""

import io

import pytest
from PIL import Image, features

from dit.data.sources.formats import (
    ENDINGS,
    HEAD,
    IMAGES,
    OTHERS,
    USUAL,
    count_endings,
    format_of,
    is_image,
    is_junk,
    is_usual,
    says_nothing,
    shown_endings,
)
from tests.data.sources.pictures import picture


def first_bytes(kind, mode="RGB", **how):
    buffer = io.BytesIO()
    picture(1, mode=mode).save(buffer, kind, **how)
    return buffer.getvalue()[:HEAD]


@pytest.mark.parametrize("kind", ENDINGS)
def test_every_format_is_known_by_its_first_bytes(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert format_of(first_bytes(kind)) == kind
    assert kind in Image.registered_extensions().values() or kind in Image.ID


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("PPM", {"mode": "L"}),
        ("PPM", {"mode": "1"}),
        ("JPEG2000", {"no_jp2": True}),
        ("TIFF", {"big_tiff": True}),
        ("WEBP", {"lossless": True}),
        ("GIF", {"mode": "P"}),
    ],
)
def test_their_kinds_too(kind, how):
    assert format_of(first_bytes(kind, **how)) == kind


def test_comments_in_the_header_of_a_ppm():
    assert (
        format_of(b"P6\n# CREATOR: GIMP PNM Filter Version 1.1, which says so at length\n20 16\n255\n")
        == "PPM"
    )


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"BMW is a maker of cars, and this is a text about them, long enough to have a header",
        b"P1 is a text as well",
        b"P5",
        b"RIFF....WAVEfmt ",
        b"\0\0\0\x20ftypheic\0\0\0\0mif1heic",  # HEIC: in the same box as AVIF
        b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
        b"%PDF-1.7",
        b"<svg xmlns=",
    ],
)
def test_what_is_no_image(head):
    assert format_of(head) is None


def test_endings():
    assert not IMAGES & OTHERS
    assert set(USUAL) <= IMAGES
    assert all(is_image(f"a/B{ending.upper()}") for ending in IMAGES)
    assert is_usual("a.JPEG")
    assert not is_usual("a.gif")
    assert [says_nothing(n) for n in ("a", "a.0001", "a.jpg~", "a.jpg", "a.txt", ".a")] == [True] * 3 + [
        False
    ] * 3


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "a/._b.jpg", "__MACOSX/a/b.jpg", "a/Thumbs.db", "@eaDir", "x/@eaDir/1.jpg", "__MACOSX"],
)
def test_junk(name):
    assert is_junk(name)
    assert not is_image(name)
    assert not says_nothing(name)


def test_endings_are_counted_in_few_words():
    names = ["a.txt", "b.TXT", "c", *(f"{i}.e{i}" for i in range(7))]
    counts = count_endings(names)
    assert shown_endings(counts, 3) == "2 .txt, 1 without an ending, 1 .e0, 6 of other endings"
    assert shown_endings({".json": 3}) == "3 .json"
