"""From what was typed to a set of images: an npz, a folder of drawn images, or any source that can be encoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dit.evals.pictures.npz import open_npz
from dit.evals.pictures.pictures import Pictures, PicturesError
from dit.evals.pictures.source import open_pictures_of
from dit.files import expand
from dit.outputs import RECORD, read_record

Opener = Callable[[str, int | None], Pictures | None]


def _npz(spec: str, image_size: int | None) -> Pictures | None:
    """A file that ends in .npz."""
    if Path(spec).suffix.lower() != ".npz":
        return None
    _refuse_size(spec, image_size)
    record = Path(spec).with_name(RECORD)
    is_drawn = Path(spec).name == "samples.npz" and record.is_file()
    return open_npz(Path(spec), spec, read_record(record) if is_drawn else None)


def _drawn(spec: str, image_size: int | None) -> Pictures | None:
    """A folder that tools/sample.py wrote: its images, with the record of how they were drawn."""
    folder = Path(spec)
    if not (folder / RECORD).is_file():
        return None
    record = read_record(folder / RECORD)
    if (folder / "samples.npz").is_file():
        _refuse_size(spec, image_size)
        return open_npz(folder / "samples.npz", spec, record)
    return open_pictures_of(spec, image_size, record)


OPENERS: list[Opener] = [
    _npz,
    _drawn,
    open_pictures_of,
]  # the first that knows what it is; the last takes all


def open_pictures(spec: str | os.PathLike[str], image_size: int | None = None) -> Pictures:
    """Open a set of images: an npz of the ADM suite, a folder of tools/sample.py, or what `open_source` opens.

    image_size: pixels a side to crop and resize to, as encoding does; of files of images alone. Raises PicturesError or
    DataError for what is missing, broken or no image.
    """
    place = expand(os.fspath(spec))
    return next(found for opener in OPENERS if (found := opener(place, image_size)) is not None)


def _refuse_size(spec: str, image_size: int | None) -> None:
    if image_size is not None:
        raise PicturesError(
            f"{spec}: --image_size is of files of images; those of an npz are evaluated as they are"
        )
