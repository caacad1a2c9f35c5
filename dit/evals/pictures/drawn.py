"""A folder of tools/sample.py: its images in whichever form it has, with their classes and its record of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit.evals.pictures.npz import open_npz
from dit.evals.pictures.pictures import Pictures, PicturesError, labels_hash
from dit.evals.pictures.source import open_pictures_of
from dit.outputs import RECORD, read_record
from dit.sample.formats import FORMATS
from dit.sample.labels import Labels

NPZ = FORMATS["npz"].names[0]


def record_of(folder: Path) -> dict[str, Any] | None:
    """The record of a folder of drawn images; None of any other."""
    return read_record(folder / RECORD) if (folder / RECORD).is_file() else None


def form_of(place: Path) -> tuple[Path, str] | None:
    """The folder of drawn images that a folder lies in as one of its forms, and that form; None of any other."""
    place = Path(os.path.abspath(place))  # "." has a name too
    record = record_of(place.parent) if place.is_dir() else None
    for name in (record or {}).get("formats") or ():
        if name in FORMATS and FORMATS[name].names[0] == place.name:
            return place.parent, name
    return None


def open_drawn(
    folder: Path, named: str, record: Mapping[str, Any], image_size: int | None, form: str | None = None
) -> Pictures:
    """The images that a record is of, never the pictures beside them: the same set in every form.

    form: which one, of FORMATS; None: the first there is, an npz before others. image_size: as `open_pictures` has it;
    None for an npz. PicturesError where the folder has latents alone, or another number of images than were drawn.
    """
    if (folder / NPZ).is_file() and form in (None, "npz"):
        return open_npz(folder / NPZ, named, record)
    forms = record.get("formats")
    if forms is None:  # another program's record
        return open_pictures_of(named, image_size, record)
    place = next(
        (folder / FORMATS[name].names[0] for name in FORMATS if name in forms and form in (None, name)), None
    )
    if place is None:
        raise PicturesError(
            f"{named} has {' and '.join(forms)} alone, and no images: draw them by the same command without --preview"
        )
    pictures = open_pictures_of(str(place), image_size, record)
    if len(pictures) != record["num_samples"]:
        raise PicturesError(
            f"{named}: {len(pictures)} images in {place.name}, and {record['num_samples']} were drawn: draw them anew"
        )
    labels = _labels(record)
    about = {**pictures.about, "labels": labels_hash(labels)}
    return replace(pictures, named=named, labels=labels, classes=(), about=about)


def _labels(record: Mapping[str, Any]) -> np.ndarray | None:
    """The classes by number, as an npz has them; None where images are of no class."""
    of = Labels(record["classes"], record.get("label_order", "balanced"), record["sampler"]["seed"])
    labels: np.ndarray = of(torch.arange(record["num_samples"])).numpy()
    return None if (labels < 0).all() else labels
