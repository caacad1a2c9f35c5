"""From what was typed to a set of images: an npz, a folder of drawn images, or any source that can be encoded."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dit.evals.pictures.npz import open_npz
from dit.evals.pictures.pictures import Pictures, PicturesError, labels_hash
from dit.evals.pictures.source import open_pictures_of
from dit.files import expand
from dit.outputs import RECORD, read_record
from dit.sample.formats import Npz, Png, WebDataset
from dit.sample.pictures import GRID

NPZ, SHARDS, (IMAGES, TABLE) = (
    *Npz.names,
    *WebDataset.names,
    Png.names,
)  # as they lie in a folder of drawn images
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
    """A folder that tools/sample.py wrote, or its images or shards: in whatever form, with the record of the drawing.

    The grid beside them is none of the images.
    """
    folder, forms = Path(spec), [SHARDS, IMAGES]
    if folder.name in forms and (folder.parent / RECORD).is_file() and not (folder / RECORD).is_file():
        folder, forms = folder.parent, [folder.name]
    if not (folder / RECORD).is_file():
        return None
    record = read_record(folder / RECORD)
    if len(forms) > 1 and (folder / NPZ).is_file():
        _refuse_size(spec, image_size)
        return open_npz(folder / NPZ, spec, record)
    form = next((form for form in forms if (folder / form).is_dir()), None)
    if form is not None:
        return _files(folder, form, image_size, record)
    if (folder / GRID).is_file():
        raise PicturesError(
            f"{spec}: {GRID} and no images in it; draw them by --formats=npz, png or webdataset"
        )
    return open_pictures_of(spec, image_size, record)


def _files(folder: Path, form: str, image_size: int | None, record: Mapping[str, Any]) -> Pictures:
    """Images that were drawn into files. PicturesError where there are more or fewer than the record says."""
    found = open_pictures_of(str(folder / form), image_size, record)
    count = record.get("num_samples", len(found))
    if len(found) != count:
        raise PicturesError(
            f"{folder / form} has {len(found)} images, and {count} were drawn: start tools/sample.py again with "
            "--overwrite, or take the folder's record away"
        )
    table = folder / TABLE
    if form != IMAGES or not table.is_file():
        return found
    try:
        with table.open(newline="") as lines:
            labels = np.array([int(row["label"] or -1) for row in csv.DictReader(lines)], np.int64)
    except (ValueError, KeyError, csv.Error) as error:
        raise PicturesError(f"{table} is damaged ({type(error).__name__}: {error})") from None
    if len(labels) != count:
        raise PicturesError(f"{table} has {len(labels)} labels of {count} images: it is damaged")
    known = None if (labels < 0).all() else labels
    return replace(found, labels=known, about={**found.about, "labels": labels_hash(known)})


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
