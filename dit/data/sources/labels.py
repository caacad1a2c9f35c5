"""Labels of another order than the source's own: standard lists of classes, and files of labels for flat sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from dit.config import did_you_mean
from dit.data import DataError
from dit.data.sources.classes import Classes, LabelChoice, LabelColumn
from dit.data.sources.source import ImageSource, listing
from dit.data.sources.table import UNKNOWN, read_table
from dit.files import FileError, expand, read_text


def imagenet1k() -> Classes:
    """The WordNet numbers of ImageNet's 1000 classes, in the order that everybody numbers them by (sorted)."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


CLASS_LISTS: dict[str, Callable[[], Classes]] = {"imagenet1k": imagenet1k}


def read_classes(spec: str) -> Classes:
    """The names of classes, by their numbers: of a standard list, or of a text file with one a line."""
    if spec in CLASS_LISTS:
        return CLASS_LISTS[spec]()
    try:
        names = read_text(Path(expand(spec))).splitlines()
    except (OSError, FileError) as error:
        raise DataError(
            f"{spec}: neither a list of classes{did_you_mean(spec, CLASS_LISTS)} nor a text file ({error})"
        ) from None
    return tuple(names)


def relabel(
    source: ImageSource,
    classes: str | None,
    labels: str | None,
    choice: LabelChoice = LabelChoice(),  # noqa: B008
) -> ImageSource:
    """The source with the labels of a file (labels) and the classes of a standard list (classes) in place of its own.

    choice: how the labels of the file are found and taken. Raises DataError that lists what the list or the file does
    not know.
    """
    if classes is not None and classes not in CLASS_LISTS:
        raise DataError(f"no list of classes '{classes}'{did_you_mean(classes, CLASS_LISTS)}")
    if labels is not None:
        source = _from_file(source, Path(expand(labels)), choice)
    return source if classes is None else _standard(source, classes)


def _standard(source: ImageSource, name: str) -> ImageSource:
    """Classes by their names in the list, or by their numbers in it."""
    standard = CLASS_LISTS[name]()
    index = {word: i for i, word in enumerate(standard)}
    index |= {str(i): i for i in range(len(standard))}
    if not source.classes:
        raise DataError(
            f"the images have no classes, so there are none of {name}; name a file of them with labels="
        )
    unknown = [repr(word) for word in source.classes if word not in index]
    if unknown:
        head = f"{len(unknown)} of {len(source.classes)} classes are not of {name} (such as {standard[0]}, or numbers)"
        raise DataError(listing(head, unknown))
    places = np.array([*(index[word] for word in source.classes), -1], np.int64)  # label -1 takes the last
    return replace(source, labels=places[source.labels], classes=standard, classes_before=None)


def _from_file(source: ImageSource, file: Path, choice: LabelChoice) -> ImageSource:
    """Labels by the lines of a file, a name and a class: each image must have one, and each line an image."""
    table = read_table(file, source.names, choice.key)
    rows = np.full(len(source), -1, np.int64)  # the line of each image
    faults: list[str] = []
    for row, place in enumerate(table.places):
        if place >= 0 and rows[place] < 0:
            rows[place] = row
        elif place != UNKNOWN:
            faults.append(f"'{table.names[row]}' stands for more than one image, or is there twice")
        else:
            faults.append(f"no image is called '{table.names[row]}'")
    faults += [f"no label for '{source.names[i]}'" for i in np.flatnonzero(rows < 0).tolist()]
    if faults:
        raise DataError(listing(f"{file}: {len(faults)} fault(s) as labels of {len(source)} images", faults))
    column = LabelColumn(choice.type)
    for row in rows.tolist():
        column.add(table.labels[row])
    labels, classes = column.numbered(str(file), lambda i: f"'{source.names[i]}'")
    return replace(
        source,
        labels=labels,
        classes=classes,
        classes_before=None,
        labelled_by=f"labels from {table.described}",
    )
