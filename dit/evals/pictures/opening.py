"""From what was typed to a set of images: an npz, a folder of drawn images, or any source that can be encoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dit.evals.pictures.drawn import NPZ, form_of, open_drawn, record_of
from dit.evals.pictures.npz import open_npz
from dit.evals.pictures.pictures import Pictures, PicturesError
from dit.evals.pictures.source import open_pictures_of
from dit.files import expand

Opener = Callable[[str, int | None], Pictures | None]


def _npz(spec: str, image_size: int | None) -> Pictures | None:
    """A file that ends in .npz."""
    if Path(spec).suffix.lower() != ".npz":
        return None
    record = record_of(Path(spec).parent) if Path(spec).name == NPZ else None
    return _of_size(open_npz(Path(spec), spec, record), image_size)


def _drawn(spec: str, image_size: int | None) -> Pictures | None:
    """A folder that tools/sample.py wrote, or one in it: its images, with the record of how they were drawn."""
    folder, record = Path(spec), record_of(Path(spec))
    if record is None:
        place = form_of(folder)
        record = None if place is None else record_of(place[0])
        return (
            None
            if place is None or record is None
            else open_drawn(place[0], spec, record, image_size, place[1])
        )
    pictures = open_drawn(folder, spec, record, image_size)
    return _of_size(pictures, image_size) if (folder / NPZ).is_file() else pictures


OPENERS: list[Opener] = [
    _npz,
    _drawn,
    open_pictures_of,
]  # the first that knows what it is; the last takes all


def open_pictures(spec: str | os.PathLike[str], image_size: int | None = None) -> Pictures:
    """Open a set of images: an npz of the ADM suite, a folder of tools/sample.py, or what `open_source` opens.

    image_size: pixels a side to crop and resize files of images to, as encoding does; an npz has to have that size.
    Raises PicturesError or DataError for what is missing, broken, no image or an npz of another size.
    """
    place = expand(os.fspath(spec))
    return next(found for opener in OPENERS if (found := opener(place, image_size)) is not None)


def _of_size(pictures: Pictures, image_size: int | None) -> Pictures:
    """An npz whose images have the size that is asked for: one flag holds for samples and reference alike."""
    if image_size is not None and pictures.size != (image_size, image_size):
        height, width = pictures.size
        raise PicturesError(
            f"{pictures.named}: --image_size is of files of images; those of an npz are evaluated as they are, which "
            + (f"is {width}x{height} and not {image_size}" if height else "are no images but statistics")
        )
    return pictures
