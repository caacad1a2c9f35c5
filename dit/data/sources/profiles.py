"""Colours by ICC profiles: to sRGB, which is what everything after it takes RGB for."""

from __future__ import annotations

import enum
import io
from functools import lru_cache
from typing import Literal, cast

import numpy as np
from PIL import Image, ImageCms

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by the profile's name of what it is about
# Values apart at most: rounding; and what sets the many profiles that are called sRGB apart from each other.
SAME, SAME_BY_NAME = 2, 12
KEPT = 64  # profiles, with what was made of them
Transform = ImageCms.ImageCmsTransform | Literal["same", "unusable"]


class Outcome(enum.Enum):
    """What became of an image's colours; the values are names of counts (decode.py)."""

    SAME = ""
    CONVERTED = "converted"
    UNUSABLE = "unusable_profile"


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, Outcome]:
    """The image in sRGB (mode RGB), from the colours that its profile describes; without alpha.

    A profile that is sRGB, or as good as that, changes no value; one that is damaged, or of other colours than the
    image has, is left aside. Grey with an RGB profile is that grey in RGB. LAB needs no profile, and has none.
    """
    if image.mode == "LAB":
        return _applied(image, _from_lab()), Outcome.SAME
    mode = _mode(profile)
    if image.mode not in ("L", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if image.mode == "L" and mode == "RGB":
        image = image.convert("RGB")
    transform = _transform(profile) if mode == image.mode else "unusable"
    if isinstance(transform, str):
        return image.convert("RGB"), Outcome.SAME if transform == "same" else Outcome.UNUSABLE
    return _applied(image, transform), Outcome.CONVERTED


@lru_cache(KEPT)
def _mode(profile: bytes) -> str | None:
    """Pillow's mode of the colours that a profile is about; None where it is damaged or about others."""
    try:
        return MODES.get(ImageCms.getOpenProfile(io.BytesIO(profile)).profile.xcolor_space.strip())
    except (ImageCms.PyCMSError, OSError, AttributeError):
        return None


@lru_cache(KEPT)
def _transform(profile: bytes) -> Transform:
    """From a profile's colours to sRGB; `same` where that changes next to nothing. Made once for all images with it."""
    mode = _mode(profile) or ""
    try:
        opened = ImageCms.getOpenProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(opened)
        transform = _build(opened, mode)
    except (ImageCms.PyCMSError, OSError):
        return "unusable"
    if mode == "CMYK":
        return transform
    # what a profile does is looked at, since any profile may be called sRGB
    probe = _probe(mode)
    change = np.asarray(_applied(probe, transform), int) - np.asarray(probe.convert("RGB"), int)
    return "same" if np.abs(change).max() <= (SAME_BY_NAME if "srgb" in name.lower() else SAME) else transform


def _build(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    """As browsers do it: relative colorimetric, with black at black."""
    return ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _applied(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    return cast(Image.Image, ImageCms.applyTransform(image, transform))  # None only where it works in place


@lru_cache(1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    return _build(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")


def _probe(mode: str) -> Image.Image:
    """All greys, or 16 x 16 x 16 colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3))
