"""Sets of images to encode: `open_source` over all the ways in which they come.

Whatever the source, an image has a name, a label (-1 = none) and a place in a fixed order (its id), and is
read to a square uint8 RGB array.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from dit.data import DataError
from dit.data.sources.folders import open_digits, open_folder
from dit.data.sources.labels import relabel
from dit.data.sources.parquet import open_parquet
from dit.data.sources.source import EXTENSIONS, BadImage, ImageSource
from dit.data.sources.tars import open_tars

__all__ = ["SOURCES", "BadImage", "ImageSource", "open_source"]

# Each opens what it knows by its spec and gives None for the rest; the folder comes last, as it says what is amiss.
SOURCES: list[Callable[[str], ImageSource | None]] = [open_digits, open_tars, open_parquet, open_folder]


def open_source(
    spec: str | os.PathLike[str], classes: str | None = None, labels: str | os.PathLike[str] | None = None
) -> ImageSource:
    """The images that `spec` names.

    - `digits:train` (1297 images), `digits:test` (500): scikit-learn's handwritten digits, 8x8 pixels
    - a folder of class folders (CLASS/name.jpg; classes sorted by name); images directly in it have label -1
    - a tar of images, classes being the folders in it; or a tar with KEY.jpg and KEY.cls (WebDataset)
    - ImageNet's tar of class tars, or a folder of them (n01440764.tar, ...)
    - Parquet with the images in it, as Hugging Face lays it out
    - several such tars or Parquet files: a folder of them, a pattern (`train-*.tar`) or a range
      (`train-{000..099}.tar`)

    classes: "imagenet1k" for the standard order of ImageNet's 1000 classes, which the source's must be among.
    labels: a file of lines `name class`, which is used in place of the source's own labels.
    Raises DataError for whatever is missing, broken or not clear.
    """
    spec = os.fspath(spec)
    source = next(found for opener in SOURCES if (found := opener(spec)) is not None)
    if not len(source):
        raise DataError(
            f"{spec}: no images in it (looked for {', '.join(EXTENSIONS)}); expected CLASS/name.jpg, "
            "a tar of such files, WebDataset tars of KEY.jpg and KEY.cls, or Parquet with image bytes"
        )
    return relabel(source, classes, None if labels is None else os.fspath(labels))
