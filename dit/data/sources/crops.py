"""How a square of the wanted size is cut from an image."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from dit.config import ConfigError, Registry, config
from dit.rng import Draws, Purpose

MAX_PIXELS = 178_956_970  # of an image while it is cropped; Pillow opens none with more
Box = tuple[int, int, int, int]  # left, top, right, bottom


class Crop:
    """A way to cut: stateless, its own configuration; equal crops give equal pixels for equal draws."""

    is_random: ClassVar[bool] = False  # whether it needs draws

    @property
    def text(self) -> str:
        """What is done to an image, for the manifest."""
        raise NotImplementedError

    def __call__(self, image: Image.Image, size: int, draws: Draws | None) -> np.ndarray:
        """A square of an image of any size and mode: (size, size, 3) uint8 RGB.

        draws: of one slot, the image's id; only random crops need them.
        """
        raise NotImplementedError


CROPS: Registry[Crop] = Registry("crop")


@CROPS.register("centre")
@config
class Centre(Crop):
    """The square middle, as in guided diffusion (ADM; Dhariwal & Nichol, arXiv 2105.05233), DiT and SiT.

    Halve with a box filter while the short side is at least twice the target, then bicubic, then crop.
    """

    @property
    def text(self) -> str:
        return "box-halve while short side >= 2 x size; bicubic to short side = size; centre crop; uint8 RGB"

    def __call__(self, image: Image.Image, size: int, draws: Draws | None = None) -> np.ndarray:
        image = _rgb(image)
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
        if width * height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels is too long and thin to crop")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size)))


@CROPS.register("random_resized")
@config
class RandomResized(Crop):
    """A random rectangle of the image, resized to the square (Inception; Szegedy et al., arXiv 1409.4842, §6).

    Its share of the area is uniform, the logarithm of its ratio of width to height too, its place as well. One that
    does not fit into the image is drawn again; after 10 tries it is the largest one in the middle with an allowed
    ratio. Pixels are rounded, so area and ratio are up to half a pixel a side. One crop per image: it is
    encoded once.
    """

    scale_min: Annotated[float, Field(gt=0, le=1)] = 0.08  # least share of the image's area
    scale_max: Annotated[float, Field(gt=0, le=1)] = 1.0  # largest share of the image's area
    ratio_min: Annotated[float, Field(gt=0)] = 3 / 4  # least width / height
    ratio_max: Annotated[float, Field(gt=0)] = 4 / 3  # largest width / height

    is_random: ClassVar[bool] = True
    tries: ClassVar[int] = 10

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise ConfigError(f"{name}_min is {low}, above {name}_max of {high}")

    @property
    def text(self) -> str:
        return (
            f"random crop of {self.scale_min:g} to {self.scale_max:g} of the area, width / height "
            f"{self.ratio_min:g} to {self.ratio_max:g}; bicubic to size x size; uint8 RGB"
        )

    def __call__(self, image: Image.Image, size: int, draws: Draws | None) -> np.ndarray:
        if draws is None:
            raise ConfigError("a random crop needs draws of the image's id")
        image = _rgb(image)
        box = self.box(image.width, image.height, draws)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))

    def box(self, width: int, height: int, draws: Draws) -> Box:
        """The rectangle cut from an image of this size, in pixels, inside it."""
        words = draws.bits(Purpose.CROP, 4 * self.tries)[0].to(torch.float64)
        for area, ratio, x, y in ((words + 0.5) * 2.0**-32).reshape(self.tries, 4).tolist():
            share = self.scale_min + area * (self.scale_max - self.scale_min)
            shape = math.exp(math.log(self.ratio_min) + ratio * math.log(self.ratio_max / self.ratio_min))
            w = round(math.sqrt(share * width * height * shape))
            h = round(math.sqrt(share * width * height / shape))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio_max)))
        h = min(height, max(1, round(width / self.ratio_min)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips everything above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
