"""Images of a folder, tars, Parquet or digits:test, as whatever is encoded is opened: at the size they have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from dit.data.sources.crops import Centre, Crop
from dit.data.sources.decode import Decode, own_bound
from dit.data.sources.images import ImageSource, open_source
from dit.data.sources.source import BadImage
from dit.evals.pictures.pictures import Pictures, labels_hash

DECODE = Decode()


@dataclass(frozen=True)
class Whole(Crop):
    """An image as it is, which has to be of this (height, width)."""

    size: tuple[int, int]

    @property
    def text(self) -> str:
        return ""

    def __call__(self, image: Image.Image, size: int, draws: Any = None) -> np.ndarray:
        """All pixels. ValueError where they are of another size."""
        if (image.height, image.width) != self.size:
            raise ValueError(
                f"{image.width}x{image.height}, and the first one is {self.size[1]}x{self.size[0]}: images are "
                "compared at one size; give --image_size=N to crop and resize all to N as encoding does"
            )
        return np.asarray(image)


@dataclass(frozen=True)
class SourcePictures(Pictures):
    """Images of a source, decoded when they are asked for."""

    source: ImageSource | None = None
    crop: Crop = Centre()  # noqa: RUF009
    converted_ones: dict[str, set[int]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return 0 if self.source is None else len(self.source)

    def block(self, index: Sequence[int]) -> np.ndarray:
        """Decode images one after the other."""
        assert self.source is not None
        side = min(self.size)
        loaded = [self.source.load_and_tell(i, side, self.crop, 0) for i in index]
        for number, image in zip(index, loaded, strict=True):
            for name in image.told:
                self.converted_ones.setdefault(name, set()).add(int(number))
        return np.stack([image.pixels for image in loaded])

    def told(self) -> Mapping[str, set[int]]:
        return self.converted_ones


def open_pictures_of(
    spec: str, image_size: int | None = None, record: Mapping[str, Any] | None = None
) -> Pictures:
    """The images of a source: as they are, or (image_size) cropped and resized as encoding does (ADM's).

    record: of what drew them. Raises DataError where there are none, BadImage for one that cannot be read.
    """
    source = open_source(spec)
    size = _first_size(source) if image_size is None else (image_size, image_size)
    crop: Crop = Whole(size) if image_size is None else Centre()
    labels = None if (source.labels < 0).all() else source.labels
    about = {
        "kind": "source",
        "images": len(source),
        "names": hashlib.sha256("\n".join(source.names).encode()).hexdigest()[:12],
        "labels": labels_hash(labels),
        "decoded": DECODE.text,
        "size": image_size,
    }
    converted = crop.text
    return SourcePictures(spec, size, labels, about, source.classes, converted, record, {}, source, crop)


def _first_size(source: ImageSource) -> tuple[int, int]:
    """(height, width) of the first image."""
    try:
        with own_bound():
            image = DECODE(source.open(0)).image
    except (ValueError, OSError, SyntaxError) as error:
        raise BadImage(source.names[0], str(error)) from error
    return image.height, image.width
