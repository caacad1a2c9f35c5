"""Images of more than 8 bits a value: 16-bit grey by its upper 8, and no guesses about the scale of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from dit.data.sources.formats import Refused

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags (TIFF 6.0, section 8)
PNG_BITS = {
    "1": 1,
    "2": 2,
    "4": 4,
    "16B": 16,
    "16": 16,
}  # by what follows the ; in how Pillow calls raw pixels
UNSIGNED = ("PNG", "PPM")  # formats whose mode I is of 16 bits, from 0 to 65535


def bits_of(image: Image.Image) -> int:
    """Bits of a value as it is stored, of an image that is not loaded yet: 8 where nothing else is known."""
    tags = getattr(image, "tag_v2", {})
    if BITS_PER_SAMPLE in tags:
        return int(tags[BITS_PER_SAMPLE][0])
    tiles = getattr(image, "tile", None)
    raw = tiles[0][3] if tiles and image.format == "PNG" else ""
    raw = raw[0] if isinstance(raw, tuple) else raw
    if raw == "1":
        return 1
    return PNG_BITS.get(str(raw).partition(";")[2], 16 if image.mode.startswith("I") else 8)


def as_eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """Mode L from a deep mode: the upper 8 of 16 (or 12) bits. Refused for whole numbers of 32 bits, and for floats.

    bits: of a value in the file.
    """
    is_16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format in UNSIGNED)
    if not is_16:
        whole = f"whole numbers of {bits} bits{' with a sign' if bits == 16 else ''}"
        kind = "floating-point numbers" if image.mode == "F" else whole
        low, high = (f"{v:g}" for v in image.getextrema())
        raise Refused(
            f"its pixels are {kind} (Pillow's mode {image.mode}, from {low} to {high}), of which nobody knows what "
            "is white; write it anew with 8 or 16 bits a value, without a sign"
        )
    values = np.asarray(image).astype(np.uint16)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = ((1 << bits) - 1) - values
    return Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))


def mask_of(image: Image.Image, key: Any, bits: int) -> Image.Image:
    """0 where an image without alpha has the one value (or RGB triple) that stands for transparent, else 255; mode L.

    key: as the file has it, in values of `bits` bits; Pillow widens those below 8, and takes the upper 8 of colours.
    """
    if image.mode == "1":
        image = image.convert("L")
    if image.mode == "RGB":
        wanted = np.array([v >> max(0, bits - 8) for v in key])
        hidden = (np.asarray(image) == wanted).all(-1)
    else:
        wide = 255 // ((1 << bits) - 1) if 1 < bits < 8 else 1  # Pillow says 0 or 255 of 1 bit itself
        hidden = np.asarray(image) == key * wide
    return Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))
