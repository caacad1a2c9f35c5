"""Labels of another order than the source's own: standard lists of classes, and files of labels for flat sets."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dit.config import did_you_mean
from dit.data import DataError
from dit.data.sources.source import ImageSource, listing
from dit.files import FileError, expand, read_text

Classes = tuple[str, ...]
BOXES = re.compile(r"(n\d{8})(?: \d+){4}")  # LOC_val_solution.csv: the class, then boxes of objects


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


def relabel(source: ImageSource, classes: str | None, labels: str | None) -> ImageSource:
    """The source with the labels of a file (labels) and the classes of a standard list (classes) in place of its own.

    Raises DataError that lists what the list or the file does not know.
    """
    if classes is not None and classes not in CLASS_LISTS:
        raise DataError(f"no list of classes '{classes}'{did_you_mean(classes, CLASS_LISTS)}")
    if labels is not None:
        source = _from_file(source, Path(expand(labels)))
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
    return replace(source, labels=places[source.labels], classes=standard)


def _from_file(source: ImageSource, file: Path) -> ImageSource:
    """Labels by the lines `name class` of a file: each image must have one, and each line an image."""
    rows = _rows(file)
    places = _places(source.names)
    found: dict[int, str] = {}
    faults: list[str] = []
    for number, (name, word) in enumerate(rows):
        places_of = places.get(name, ())
        if len(places_of) == 1 and places_of[0] not in found:
            found[places_of[0]] = word
        elif places_of:
            faults.append(f"'{name}' stands for more than one image, or is there twice")
        elif number:  # the first line may be a header
            faults.append(f"no image is called '{name}'")
    faults += [f"no label for '{name}'" for i, name in enumerate(source.names) if i not in found]
    if faults:
        raise DataError(listing(f"{file}: {len(faults)} fault(s) as labels of {len(source)} images", faults))
    words = [found[i] for i in range(len(source))]
    classes, index = _numbered(words)
    labels = np.array([index[word] for word in words], np.int64)
    return replace(source, labels=labels, classes=classes)


def _rows(file: Path) -> list[tuple[str, str]]:
    """(name, class) of each line, with a tab, else a comma, else the first space between them."""
    try:
        lines = [line for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, FileError) as error:
        raise DataError(f"{file}: cannot be read as a file of labels: {error}") from None
    separator = next((s for s in "\t," if lines and all(s in line for line in lines)), None)
    rows = []
    for number, line in enumerate(lines, 1):
        name, *rest = (part.strip() for part in line.split(separator, 1 if separator is None else -1))
        if len(rest) != 1 or not rest[0]:
            raise DataError(f"{file}: line {number} is {line[:60]!r}, expected a name and its class")
        boxes = BOXES.match(rest[0])
        rows.append((name, boxes[1] if boxes else rest[0]))
    return rows


def _places(names: Sequence[str]) -> Mapping[str, Sequence[int]]:
    """Image numbers by name: whole, without the tar, the folders, the ending."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        inside = name.rsplit(":", 1)[-1]
        base = os.path.basename(inside)
        for key in {name, inside, base, os.path.splitext(base)[0]}:
            places.setdefault(key, []).append(i)
    return places


def _numbered(words: Sequence[str]) -> tuple[Classes, Mapping[str, int]]:
    """Classes and the label of each word: whole numbers are labels themselves, others are sorted, -1 is none."""
    distinct = set(words) - {"-1"}
    if all(re.fullmatch(r"[0-9]{1,6}", word) for word in distinct):
        numbers = {word: int(word) for word in distinct}
        return tuple(str(i) for i in range(max(numbers.values(), default=-1) + 1)), numbers | {"-1": -1}
    classes = tuple(sorted(distinct))
    return classes, {word: i for i, word in enumerate(classes)} | {"-1": -1}
