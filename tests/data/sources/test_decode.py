"""From files to RGB pixels: right side up, transparency on the background, right colours, deep grey, sizes."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, features

from dit.config import ConfigError, from_dict
from dit.data.sources.decode import (
    COUNTED,
    TURNS,
    Decode,
    before,
    count_lines,
    in_order,
    open_image,
    own_bound,
)
from dit.data.sources.formats import ENDINGS, Refused
from dit.data.sources.images import ImageSource
from tests.data.sources.pictures import picture

LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def saved(image, kind="PNG", **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def pixels(file, **how):
    return np.asarray(Decode(**how)(file).image)


def told(file, **how):
    return set(Decode(**how)(file).told)


# --- which way is up ---------------------------------------------------------------------------------------


def oriented(image, orientation, kind, **how):
    """A file of `image` whose pixels are stored so that EXIF's orientation makes them upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    back = {6: TURNS[8], 8: TURNS[6]}.get(orientation, TURNS.get(orientation))
    stored = image if back is None else image.transpose(back)
    return stored, saved(stored, kind, exif=exif, **how)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_orientation_is_turned_upright(kind, orientation):
    image = picture(1, 20, 12)
    stored, file = oriented(image, orientation, kind, **LOSSLESS[kind])
    assert np.array_equal(pixels(file), np.asarray(image))
    assert np.array_equal(pixels(file, exif="ignore"), np.asarray(stored))
    assert told(file) == (set() if orientation == 1 else {"turned"})
    assert told(file, exif="ignore") == set()


@pytest.mark.parametrize("kind", ["JPEG", *(["AVIF"] if features.check("avif") else [])])
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_orientation_in_lossy_formats(kind, orientation):
    y, x = np.mgrid[:48, :32]
    image = Image.fromarray(np.stack([4 * x, 4 * y, 0 * x + 90], -1).astype(np.uint8))
    _, file = oriented(image, orientation, kind, quality=95)
    assert np.abs(pixels(file).astype(int) - np.asarray(image)).max() < 25
    assert told(file) == {"turned"}


def test_orientation_in_a_text_chunk_of_png_and_in_xmp():
    image, info = picture(1, 20, 12), PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>')
    file = saved(image.transpose(TURNS[8]), pnginfo=info)
    assert np.array_equal(pixels(file), np.asarray(image))


def test_exif_that_cannot_be_read_is_counted():
    file = saved(picture(1), "PNG", exif=b"Exif\0\0nonsense")
    assert told(file) == {"unreadable_exif"}
    assert np.array_equal(pixels(file), np.asarray(picture(1)))


@pytest.mark.parametrize("orientation", [0, 9, 257])
def test_orientations_that_there_are_none_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert told(saved(picture(1), exif=exif)) == set()


# --- transparency ------------------------------------------------------------------------------------------

ALPHA = np.linspace(0, 255, 16).round().astype(np.uint8)[None].repeat(8, 0)  # (8, 16), from none to all


def with_alpha(mode):
    colour = picture(3, 16, 8, mode[:-1])
    image = colour.copy()
    image.putalpha(Image.fromarray(ALPHA))
    return image, np.asarray(colour.convert("RGB"), float)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize(("background", "ground"), [("white", 255), ("#000", 0), ("#204060", (32, 64, 96))])
def test_alpha_is_laid_on_the_background(mode, kind, background, ground):
    image, colour = with_alpha(mode)
    how = {**LOSSLESS[kind], "exact": True} if kind == "WEBP" else {}
    file = saved(image, kind, **how)
    share = ALPHA[..., None] / 255
    assert np.abs(pixels(file, background=background) - (share * colour + (1 - share) * ground)).max() <= 1
    assert told(file) == {"transparent"}


def test_opaque_images_with_alpha_are_left_alone_and_not_counted():
    image = picture(3)
    image.putalpha(255)
    assert np.array_equal(pixels(saved(image)), np.asarray(picture(3)))
    assert told(saved(image)) == set()


def keyed():
    """(file, where it is transparent, its colours): images whose one value, or palette entry, is transparent."""
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    grey = Image.fromarray(values)
    yield saved(grey, transparency=9), values == 9, values[..., None].repeat(3, -1)
    deep = (values.astype(np.uint16) * 257) + 3
    yield (
        saved(Image.fromarray(deep), transparency=9 * 257 + 3),
        values == 9,
        (deep >> 8)[..., None].repeat(3, -1),
    )
    colours = np.stack([values, values // 8, values * 0 + 7], -1)
    yield saved(Image.fromarray(colours), transparency=(9, 1, 7)), values == 9, colours
    palette = grey.convert("P")
    palette.putpalette([v for i in range(256) for v in (i, 0, 255 - i)])
    expected = np.stack([values, values * 0, 255 - values], -1)
    yield saved(palette, transparency=9), values == 9, expected
    yield saved(palette, "GIF", transparency=9), values == 9, expected
    two = Image.fromarray(values >= 32)
    yield saved(two, transparency=0), values < 32, 255 * (values >= 32)[..., None].repeat(3, -1)


@pytest.mark.parametrize("index", range(6), ids=["L", "I;16", "RGB", "P", "GIF", "1"])
def test_a_transparent_colour_is_laid_on_the_background(index):
    file, hidden, colours = list(keyed())[index]
    expected = np.where(hidden[..., None], (1, 2, 3), colours)
    assert np.array_equal(pixels(file, background="#010203"), expected)
    assert told(file) == {"transparent"}


@pytest.mark.parametrize("bits", [2, 4])
def test_a_transparent_grey_of_few_bits(bits):
    """Pillow widens the values to 8 bits, and gives the transparent one as it is in the file."""
    palette = Image.fromarray((np.arange(64).reshape(8, 8) % 4).astype(np.uint8))
    palette = palette.convert("P")
    file = bytearray(saved(palette, bits=bits))
    file[25] = 0  # grey instead of a palette
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    key = b"tRNS" + struct.pack(">H", 2)
    start = file.index(b"PLTE") - 4
    end = file.index(b"IDAT") - 4
    file[start:end] = struct.pack(">I", 2) + key + struct.pack(">I", zlib.crc32(key))
    values = np.arange(64).reshape(8, 8) % 4
    wide = 255 // (2**bits - 1)
    expected = np.where(values == 2, 255, values * wide)
    assert np.array_equal(pixels(bytes(file))[..., 0], expected)


def test_colours_that_are_multiplied_by_alpha():
    image, colour = with_alpha("RGBA")
    share = ALPHA[..., None] / 255
    got = np.asarray(Decode()(image.convert("RGBa")).image, float)
    assert np.abs(got - (share * colour + (1 - share) * 255)).max() <= 2


def test_the_background_is_one_however_it_is_written():
    assert Decode(background="white") == Decode(background="#FFF") == Decode(background="#ffffff") == Decode()
    assert Decode(background="black").text.endswith("transparency on black")
    with pytest.raises(ConfigError, match="'whit' is no colour; expected white, black"):
        from_dict(Decode, {"background": "whit"})


# --- depth -------------------------------------------------------------------------------------------------

DEEP = (np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_keep_their_upper_eight(kind):
    how = {"irreversible": False} if kind == "JPEG2000" else {}
    assert np.array_equal(pixels(saved(Image.fromarray(DEEP), kind, **how))[..., 0], DEEP >> 8)


def test_sixteen_bits_in_tiff_of_the_other_order_and_with_white_at_zero():
    assert np.array_equal(pixels(saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"))[..., 0], DEEP >> 8)
    white_is_zero = saved(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(pixels(white_is_zero)[..., 0], (65535 - DEEP) >> 8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32), r"floating-point numbers \(Pillow's mode F, from 0 to 1\)"),
        (np.linspace(0, 255, 64, dtype=np.float32), "floating-point numbers"),
        (np.arange(64, dtype=np.int32), r"whole numbers of 32 bits \(.* I, from 0 to 63\)"),
        (np.arange(64, dtype=np.int32) * 10_000_000, "whole numbers of 32 bits"),
    ],
)
def test_a_depth_of_unknown_scale_is_refused(values, words):
    with pytest.raises(Refused, match=words + ".*write it anew with 8 or 16 bits"):
        Decode()(saved(Image.fromarray(values.reshape(8, 8)), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_ordinary_modes_are_what_pillow_makes_of_them(mode):
    image = picture(5, mode=mode)
    file = saved(image, "TIFF", compression="tiff_lzw")  # Pillow 12 cannot read its own YCbCr without
    assert np.array_equal(pixels(file), np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
    assert told(file) == set()


def test_lab_grey_is_grey():
    """L* of 53.585 is sRGB 128 (CIE 15, IEC 61966-2-1)."""
    image = Image.new("LAB", (4, 4), (round(53.585 * 2.55), 128, 128))
    assert np.abs(pixels(saved(image, "TIFF")).astype(int) - 128).max() <= 2


# --- profiles ----------------------------------------------------------------------------------------------


def srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped():
    """sRGB by its name, with the primaries of red and green exchanged."""
    profile = srgb()
    return profile.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colours_are_converted_by_their_profile(kind):
    file = saved(Image.new("RGB", (8, 8), (255, 0, 0)), kind, icc_profile=swapped(), **LOSSLESS[kind])
    assert np.abs(pixels(file).astype(int) - (0, 255, 0)).max() <= 1
    assert (pixels(file, icc="ignore") == (255, 0, 0)).all()
    assert (told(file), told(file, icc="ignore")) == ({"converted"}, set())


def test_srgb_changes_no_value():
    image = picture(7, 64, 64)
    assert np.array_equal(pixels(saved(image, icc_profile=srgb())), np.asarray(image))
    assert told(saved(image, icc_profile=srgb())) == set()
    grey = picture(7, 64, 64, "L")  # grey with a profile of colours is common
    assert np.array_equal(pixels(saved(grey, icc_profile=srgb()))[..., 1], np.asarray(grey))


@pytest.mark.parametrize(
    ("profile", "mode", "kind"),
    [(b"nonsense", "RGB", "PNG"), (srgb()[:200], "RGB", "PNG"), (srgb(), "CMYK", "TIFF")],
    ids=["nonsense", "cut", "of other colours"],
)
def test_a_profile_that_cannot_be_used_is_counted(profile, mode, kind):
    image = picture(7, mode=mode)
    file = saved(image, kind, icc_profile=profile)
    assert told(file) == {"unusable_profile"}
    assert np.array_equal(pixels(file), np.asarray(image.convert("RGB")))


def test_transparency_under_a_profile():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.putpixel((3, 3), (255, 0, 0, 0))
    got = pixels(saved(image, icc_profile=swapped()))
    assert (got[3, 3] == 255).all()
    assert np.abs(got[0, 0].astype(int) - (0, 255, 0)).max() <= 1


# --- frames, sizes, damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    how = {"lossless": True} if kind == "WEBP" else {}
    file = saved(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    assert (pixels(file) == (255, 0, 0)).all()
    assert told(file) == {"first_frame"}


@pytest.mark.filterwarnings("error")
def test_sizes_are_looked_at_before_anything_is_decoded():
    big = saved(Image.new("1", (10_000, 9_500)))
    assert open_image(big).size == (10_000, 9_500)  # of which Pillow would warn
    with pytest.raises(
        Refused, match=r"10000 x 9500 = 95,000,000 pixels, expected at most 1,000,000; --max_pixels=95000000"
    ):
        Decode(max_pixels=1_000_000)(big)
    small = saved(picture(1, 20, 16))
    assert Decode(max_pixels=320)(small).image.size == (20, 16)
    with pytest.raises(Refused, match="--max_pixels=320 takes it"):
        Decode(max_pixels=319)(small)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("setting", [None, 50])
def test_pillows_own_bound_stays_the_programs(monkeypatch, setting):
    """It holds for the program's own images, in this thread and in others, while others are decoded here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", setting)
    files = [saved(picture(1, 20, 16), kind) for kind in ("PNG", "TIFF", "WEBP", "GIF")]
    assert {Decode()(file).image.size for file in files} == {(20, 16)}
    source = ImageSource(("a",), np.array([-1]), (), lambda index: files[1])
    assert source.load(0, 12).shape == (12, 12, 3)

    def of_the_program():
        if setting is None:
            return Image.open(io.BytesIO(files[0])).size == (20, 16)
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(files[0]))
        return True

    with ThreadPoolExecutor(1) as other, own_bound():
        assert open_image(files[0]).size == (20, 16)
        assert other.submit(of_the_program).result()
    assert of_the_program()
    for file in files:
        with pytest.raises(Refused, match="--max_pixels=320 takes it"):
            Decode(max_pixels=319)(file)
        with pytest.raises(Refused, match="it begins with"):
            Decode()(b"none" + file)
    assert of_the_program()
    assert setting == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ENDINGS)
def test_every_format_is_read(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    y, x = np.mgrid[:32, :48]
    image = Image.fromarray(np.stack([5 * x, 7 * y, 0 * x + 90], -1).astype(np.uint8))
    got = pixels(saved(image, kind, **({"quality": 95} if kind in ("JPEG", "AVIF", "WEBP") else {})))
    assert np.abs(got.astype(int) - np.asarray(image)).mean() < 8


def test_before_is_what_pillow_alone_makes_of_a_file():
    for file in (
        oriented(picture(1), 6, "PNG")[1],
        saved(with_alpha("RGBA")[0]),
        saved(picture(2), icc_profile=swapped()),
    ):
        assert np.array_equal(
            np.asarray(before(file)), np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        )
    assert np.array_equal(np.asarray(before(saved(Image.fromarray(DEEP))))[..., 0], DEEP >> 8)


def test_counts_are_told_in_one_order():
    counts = {"first_frame": 2, "turned": 1, "transparent": 0}
    assert list(in_order(counts).items()) == [("turned", 1), ("first_frame", 2)]
    assert count_lines(in_order(counts))[0] == f"1 {COUNTED['turned']}"
