"""How the file of an image becomes RGB pixels, the same for all sources: which way is up, transparency, colours, depth.

Pillow by itself gives pixels as they are stored: a photo that was taken upright lies on its side, transparent places
show whatever colour is hidden there, a colour profile is ignored, and 32-bit grey is cut off at 255.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pydantic
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError
from pydantic import Field

from dit.config import config
from dit.data.sources.deep import as_eight_bits, bits_of, mask_of
from dit.data.sources.formats import FORMATS, HEAD, Refused, format_of
from dit.data.sources.profiles import Outcome, to_srgb
from dit.data.sources.whole import check_whole

MAX_PIXELS = 178_956_970  # Pillow's own limit: twice what it warns of
ImageFileOrPixels = bytes | Image.Image

# What may be done to an image, and what is said of those to which it was, in the order in which it is said.
COUNTED: Mapping[str, str] = {
    "turned": "turned upright by their EXIF orientation",
    "unreadable_exif": "with EXIF data that cannot be read, taken as they are stored",
    "converted": "converted to sRGB from their ICC profile",
    "unusable_profile": "with an ICC profile that cannot be used, taken without it",
    "transparent": "with transparency, laid on the background",
    "first_frame": "of several frames or pages, of which the first was taken",
}
TURNS: Mapping[
    int, Image.Transpose
] = {  # by EXIF's orientation (CIPA DC-008, tag 274): what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BACK = {
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
}
NAMED = {"#ffffff": "white", "#000000": "black"}
BROKEN_EXIF = (struct.error, SyntaxError, ValueError, KeyError, TypeError, IndexError, OSError, OverflowError)
STRAIGHT = {
    "La": "LA",
    "RGBa": "RGBA",
}  # modes whose colours are multiplied by alpha, and the ones without that


class Decoded(NamedTuple):
    """RGB pixels, and which of COUNTED was done to get them."""

    image: Image.Image
    told: frozenset[str]


def in_order(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts in the order of COUNTED, without those of none."""
    return {name: counts[name] for name in COUNTED if counts.get(name)}


def count_lines(counts: Mapping[str, int]) -> list[str]:
    """What was done to how many images, such as `3 turned upright by their EXIF orientation`, a line each."""
    return [f"{count} {COUNTED.get(name, name)}" for name, count in counts.items()]


def _colour(text: str) -> str:
    """Any of CSS's ways to write a colour as `#rrggbb`."""
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        raise ValueError(f"{text!r} is no colour; expected white, black, a name of CSS or #rrggbb") from None
    return f"#{red:02x}{green:02x}{blue:02x}"


# --- how many pixels ---------------------------------------------------------------------------------------

_here = threading.local()  # `depth`: how often this thread is inside own_bound
_pillows_check = Image._decompression_bomb_check


@contextlib.contextmanager
def own_bound() -> Iterator[None]:
    """Keep Pillow from warning of large images, or refusing them with no way out, in this thread: check_pixels decides.

    Pillow's bound, `PIL.Image.MAX_IMAGE_PIXELS`, is one for the whole process, and stays what the program that imports
    this has set it to, for its own images.
    """
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1


def _check_unless_here(*size: Any, **how: Any) -> None:
    if not getattr(_here, "depth", 0):
        _pillows_check(*size, **how)


# All of Pillow calls it by this name, and has no way to be told of a bound in a call. In a Pillow that has it no more,
# Pillow's own bound holds beside max_pixels.
Image._decompression_bomb_check = _check_unless_here


def check_pixels(image: Image.Image, most: int) -> None:
    """Refuse, before anything is decoded, an image of more pixels than that: raises Refused."""
    count = image.width * image.height
    if count > most:
        raise Refused(
            f"{image.width} x {image.height} = {count:,} pixels, expected at most {most:,}; --max_pixels={count} takes "
            f"it, in about {6 * count / 2**30:.1f} GiB of memory a thread"
        )


# --- from a file to pixels ---------------------------------------------------------------------------------


@config
class Decode:
    """How files become pixels. Of all this nothing is random; `max_pixels` decides about no byte."""

    exif: Literal["turn", "ignore"] = "turn"  # turn upright, or take pixels as they are stored
    background: Annotated[str, pydantic.AfterValidator(_colour)] = (
        "#ffffff"  # under transparent places: white, black, #rrggbb
    )
    icc: Literal["convert", "ignore"] = "convert"  # colours to sRGB by the image's profile, or as numbers
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS  # of an image; larger ones are unreadable

    @property
    def text(self) -> str:
        """What is done to an image before it is cropped, for the manifest."""
        turned = "upright by EXIF orientation" if self.exif == "turn" else "EXIF orientation ignored"
        colours = "ICC profiles to sRGB" if self.icc == "convert" else "ICC profiles ignored"
        return f"{turned}; {colours}; transparency on {NAMED.get(self.background, self.background)}"

    @own_bound()
    def __call__(self, file: ImageFileOrPixels) -> Decoded:
        """Give the pixels of a file. Raises Refused, or what Pillow raises on damaged bytes."""
        told: set[str] = set()
        with open_image(file) as image:
            check_pixels(image, self.max_pixels)
            if getattr(image, "is_animated", False):
                told.add("first_frame")
            bits = bits_of(image)
            turn = self._turn(image, told)
            if isinstance(file, bytes):
                check_whole(image.format or "", file)
            colour, alpha = _colour_and_alpha(image, bits)
            pixels = self._rgb(colour, image.info.get("icc_profile"), told)
        if alpha is not None and alpha.getextrema() != (255, 255):
            told.add("transparent")
            ground = Image.new("RGB", pixels.size, self.background)
            ground.paste(pixels, mask=alpha)
            pixels = ground
        return Decoded(pixels if turn is None else pixels.transpose(turn), frozenset(told))

    def _turn(self, image: Image.Image, told: set[str]) -> Image.Transpose | None:
        """Load the image; what then makes it upright, or (ignore) takes back what Pillow did to a TIFF itself."""
        try:
            stated = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        except BROKEN_EXIF:
            told.add("unreadable_exif")
            image.load()
            return None
        image.load()
        if stated is None:
            return None
        is_done = ExifTags.Base.Orientation not in image.getexif()
        if self.exif == "ignore":
            return BACK.get(stated, stated) if is_done else None
        told.add("turned")
        return None if is_done else stated

    def _rgb(self, colour: Image.Image, profile: bytes | None, told: set[str]) -> Image.Image:
        if colour.mode != "LAB" and (self.icc == "ignore" or not profile):
            return colour.convert("RGB")
        pixels, outcome = to_srgb(colour, profile or b"")
        if outcome is not Outcome.SAME:
            told.add(outcome.value)
        return pixels


@own_bound()
def before(file: ImageFileOrPixels) -> Image.Image:
    """Give RGB pixels as they were before there was a choice: for OUT.partial folders that were begun then."""
    with open_image(file) as image:
        check_pixels(image, MAX_PIXELS)
        if image.mode.startswith("I"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


@own_bound()
def open_image(file: ImageFileOrPixels) -> Image.Image:
    """Read the header of the image in the bytes of a file; pixels are given as they are. Raises Refused for others."""
    if not isinstance(file, bytes):
        return file
    try:
        return Image.open(io.BytesIO(file), formats=FORMATS)
    except UnidentifiedImageError:
        pass
    if not file:
        raise Refused("the file is empty")
    if known := format_of(file[:HEAD]):
        raise Refused(f"begins as {known}, and is damaged or of a kind that is not read")
    raise Refused(f"not an image that is read ({', '.join(FORMATS)}): it begins with {file[:16]!r}")


# --- colours and transparency ------------------------------------------------------------------------------


def _colour_and_alpha(image: Image.Image, bits: int) -> tuple[Image.Image, Image.Image | None]:
    """8-bit colours of any mode, not multiplied by alpha, and alpha (mode L) where there may be transparency.

    bits: of a value in the file.
    """
    key = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        return as_eight_bits(image, bits), None if key is None else mask_of(image, key, bits)
    if image.mode in STRAIGHT:
        image = image.convert(STRAIGHT[image.mode])
    if image.mode in ("P", "PA") and image.has_transparency_data:
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if image.mode in ("1", "L", "RGB") and key is not None:
        return image, mask_of(image, key, bits)
    return image, None
