"""Sets of images to encode: `open_source` over all the ways in which they come.

Whatever the source, an image has a name, a label (-1 = none) and a place in a fixed order (its id), and is
read to a square uint8 RGB array.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from dit.data import DataError
from dit.data.sources.classes import LabelChoice, empty_classes_note
from dit.data.sources.folders import is_class, open_digits, open_folder
from dit.data.sources.formats import ENDINGS, shown_endings
from dit.data.sources.labels import relabel
from dit.data.sources.parquet import Columns, open_parquet
from dit.data.sources.source import BadImage, ImageSource
from dit.data.sources.tars import HeldImages, open_tars
from dit.files import expand

__all__ = [
    "SOURCES",
    "BadImage",
    "ImageSource",
    "check_spec",
    "label_warning",
    "open_source",
    "unlabelled_note",
]

# Each opens what it knows by its spec and gives None for the rest; the folder comes last, as it says what is amiss.
SOURCES: list[Callable[[str, LabelChoice], ImageSource | None]] = [
    open_digits,
    open_tars,
    open_parquet,
    open_folder,
]


URL = re.compile(r"[a-z][a-z0-9+.-]*:/", re.IGNORECASE)
SPECIAL = re.compile(r"[*?\[{]|^digits:")


def check_spec(spec: str) -> None:
    """Without listing anything: DataError where `spec` names nothing that could be here."""
    spec = expand(spec)
    if URL.match(spec):
        raise DataError(
            f"{spec}: images at URLs are not read; download them first, and give the file or folder"
        )
    if not SPECIAL.search(spec) and not Path(spec).exists():
        raise DataError(f"{spec}: no such folder, tar or Parquet file, and not digits:train or digits:test")


def _found(source: ImageSource) -> str:
    return f"{source.ignored} files: {shown_endings(source.others)}" if source.ignored else "it is empty"


def unlabelled_note(spec: str, source: ImageSource) -> str | None:
    """What whoever encodes should know of images without a label; None where all have one."""
    loose = np.flatnonzero(source.labels < 0)
    if not len(loose):
        return None
    some = "" if len(loose) == len(source) else f" of {len(source)}"
    which = "" if not some else f" (first {source.names[loose[0]]})"
    mean = ""
    if not source.classes and Path(spec).is_dir() and is_class(Path(spec)):
        mean = f"; did you mean {Path(spec).resolve().parent}?"
    why = f" ({source.labelled_by})" if source.labelled_by and not source.classes else ""
    return (
        f"{len(loose)}{some} images have no label{which}{why}: fine for an unconditional model, else give "
        f"--labels=FILE{mean}"
    )


def label_warning(source: ImageSource) -> str | None:
    """What is odd about the numbers of the classes, and how to mend it; None where nothing is."""
    labels = source.labels[source.labels >= 0]
    return empty_classes_note(source.classes, np.bincount(labels, minlength=len(source.classes)))


def open_source(
    spec: str | os.PathLike[str],
    classes: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    columns: Columns = Columns(),  # noqa: B008
    choice: LabelChoice = LabelChoice(),  # noqa: B008
) -> ImageSource:
    """The images that `spec` names.

    - `digits:train` (1297 images), `digits:test` (500): scikit-learn's handwritten digits, 8x8 pixels
    - a folder of class folders (CLASS/name.jpg; sorted by name, as numbers where all are); other images have label -1
    - a tar of images, classes being the folders in it; or a tar with KEY.jpg and KEY.cls (WebDataset)
    - ImageNet's tar of class tars, or a folder of them (n01440764.tar, ...)
    - Parquet with the images in it, as Hugging Face lays it out
    - several such tars or Parquet files: a folder of them, a pattern (`train-*.tar`) or a range
      (`train-{000..099}.tar`)

    classes: "imagenet1k" for the standard order of ImageNet's 1000 classes, which the source's must be among.
    labels: a file of lines `name class`, which is used in place of the source's own labels.
    columns: of Parquet files, those of images and labels where they cannot be told by their names.
    choice: how labels are found and taken, where they do not say it themselves (classes.py has the rule).
    Raises DataError for whatever is missing, broken or not clear.
    """
    spec = expand(os.fspath(spec))
    check_spec(spec)
    if labels is not None and columns.label:
        raise DataError(f"labels come from {labels} or from the column {columns.label}: name one of them")
    own = choice
    if labels is not None:
        columns, own = replace(columns, label=""), LabelChoice(replaced=True)
    source = open_parquet(spec, own, columns) if columns else None
    if columns and columns != Columns(label="") and source is None:
        raise DataError(f"{spec}: --image_column and --label_column are of Parquet files; these are none")
    if source is None:
        source = next(found for opener in SOURCES if (found := opener(spec, own)) is not None)
    _check_found(spec, source, own)
    return relabel(source, classes, None if labels is None else os.fspath(labels), choice)


def _check_found(spec: str, source: ImageSource, choice: LabelChoice) -> None:
    """DataError where there are no images, or none that a label's key could be looked up for."""
    if choice.key and not isinstance(source.open, HeldImages):
        raise DataError(
            f"{spec}: --label_key={choice.key} is of the JSON in tars, or of a file of labels; Parquet has "
            "--label_column"
        )
    if not len(source):
        raise DataError(
            f"{spec}: no images in it ({_found(source)}; taken are {', '.join(chain(*ENDINGS.values()))}, and what "
            "begins as one of those); expected CLASS/name.jpg, a tar of such files, WebDataset tars of KEY.jpg and "
            "KEY.cls, or Parquet with image bytes"
        )
