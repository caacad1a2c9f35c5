"""A file of labels for a flat set: names of images and their classes, a line each, as people write such files.

Columns are parted by tabs, commas or semicolons, with quotes as in CSV and maybe a header; or by a space, where the
names of the images say how far a name goes.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from dit.data import DataError
from dit.data.sources.classes import USUAL
from dit.files import FileError, read_text

BOXES = re.compile(r"(n\d{8})(?: \d+){4}")  # LOC_val_solution.csv: the class, then boxes of objects
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
NAMES = ("filename", "file_name", "file", "image", "img", "image_id", "imageid", "path", "name", "key", "id")
SAMPLE = 100  # lines that say how the columns are parted
UNKNOWN, TWICE = -1, -2  # in the place of an image's number


@dataclass(frozen=True)
class Table:
    """The lines of a file. places: of each the number of its image; UNKNOWN, or TWICE for a name of several images."""

    names: list[str]
    labels: list[str]
    places: list[int]
    described: str


def read_table(file: Path, images: Sequence[str], key: str | None = None) -> Table:
    """The names and labels in a file, and which of the images they are of. key: the label's column in its header.

    DataError where it is no text, or where it is not clear which column holds what.
    """
    lines = _text(file).splitlines()
    finder = Finder(images)
    found = [grid for mark in SEPARATORS if (grid := SeparatedLines.of(lines, mark)) is not None]
    if not found:
        return _of_spaces(file, lines, finder)
    named = (grid for grid in found if any(p != UNKNOWN for p in finder.find(grid.last)))
    return _of_columns(file, next(named, found[0]), finder, key)


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, FileError) as error:
        raise DataError(f"cannot be read as a file of labels: {error}") from None  # which names the file


# --- columns -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeparatedLines:
    """Lines that are parted by `separator` into columns: as many as `first` has. last: of the lines looked at."""

    lines: list[str]
    separator: str
    quoting: int
    first: list[str]
    last: list[str]

    @classmethod
    def of(cls, lines: list[str], separator: str) -> SeparatedLines | None:
        """None where not every one of the first lines has the separator."""
        some = [line for line in lines[:SAMPLE] if line.strip()]
        if not some or not all(separator in line for line in some):
            return None
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):  # a quote may also be part of a name
            try:
                rows = [row for _, row in SeparatedLines(some, separator, quoting, [], []).rows()]
            except csv.Error:
                continue
            if len(rows[0]) > 1:
                return cls(lines, separator, quoting, rows[0], rows[-1])
        return None

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """(number of the line, cells) of every line that is not empty."""
        how: dict[str, Any] = {"delimiter": self.separator, "quoting": self.quoting}
        reader = csv.reader(self.lines, skipinitialspace=True, strict=True, **how)
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield reader.line_num, cells


def _of_columns(file: Path, grid: SeparatedLines, finder: Finder, key: str | None) -> Table:
    """The columns of names and labels, of all lines. DataError for the first that is not as the first line is."""
    has_head = all(place == UNKNOWN for place in finder.find(grid.first))
    name, label = _columns(file, grid, finder, key, has_head)
    names, labels, words = list[str](), list[str](), dict[str, str]()
    try:
        for number, row in islice(grid.rows(), int(has_head), None):
            if len(row) != len(grid.first) or not row[name] or not row[label]:
                raise DataError(
                    f"{file}: line {number} is {grid.separator.join(row)[:60]!r}, expected a name and its class in "
                    f"{len(grid.first)} columns parted by {SEPARATORS[grid.separator]}, as in the first line"
                )
            names.append(row[name])
            labels.append(words.setdefault(row[label], _first_box(row[label])))
    except csv.Error as error:
        raise DataError(f"{file}: cannot be read as a file of labels: {error}") from None
    by = f"column '{grid.first[label]}' of {file.name}" if has_head else file.name
    return Table(names, labels, finder.find(names), by)


def _columns(
    file: Path, grid: SeparatedLines, finder: Finder, key: str | None, has_head: bool
) -> tuple[int, int]:
    """Which columns hold names and labels: the header says it, or that one of two holds names of images."""
    head = [cell.lower() for cell in grid.first] if has_head else []
    known = [i for i, place in enumerate(finder.find(grid.last)) if place != UNKNOWN]
    label = next((head.index(word) for word in USUAL if word in head), None)
    chosen = key or (head[label] if label is not None else "")
    if (grid.first if key else head).count(chosen) > 1:
        raise DataError(
            f"{file}: its first line has several columns '{chosen}': rename all but that of the labels"
        )
    if key:
        if key not in grid.first or not has_head:
            columns = f"first line: {', '.join(grid.first)[:80]}"
            raise DataError(f"{file}: no column '{key}' (--label_key={key}) in its {columns}")
        label = grid.first.index(key)
    name = next((head.index(word) for word in NAMES if word in head and head.index(word) != label), None)
    if name is None:
        name = next((i for i in known if i != label), 0 if label != 0 else 1)
    if label is None and len(grid.first) == 2:
        label = 1 - name
    if label is None:
        mark = grid.separator if grid.separator != "\t" else " (tab) "
        raise DataError(
            f"{file}: {len(grid.first)} columns, and no first line that says which holds the labels "
            f"({', '.join(grid.first)[:80]}): begin with a line such as filename{mark}label, or choose with --label_key"
        )
    return name, label


def _first_box(label: str) -> str:
    boxes = BOXES.match(label)
    return boxes[1] if boxes else label


# --- names and spaces --------------------------------------------------------------------------------------


def _of_spaces(file: Path, lines: list[str], finder: Finder) -> Table:
    """A name, a space, a class: where either has spaces of its own, the name is that of an image."""
    names, labels = list[str](), list[str]()
    for number, line in ((n, line) for n, line in enumerate(lines, 1) if line.strip()):
        cuts = list(_cuts(line.strip()))
        if not cuts:
            raise DataError(f"{file}: line {number} is {line[:60]!r}, expected a name and its class")
        known = [
            cut
            for cut, place in zip(cuts, finder.find([n for n, _ in cuts]), strict=True)
            if place != UNKNOWN
        ]
        whole = [cut for cut in known if finder.is_whole(cut[0])]
        if not known and not names and number == 1:
            continue  # a header
        if len(known) > 1 and len(whole) != 1:
            raise DataError(
                f"{file}: line {number} is {line[:60]!r}, where {' and '.join(repr(n) for n, _ in known[:2])} are both "
                "images: part names and classes by a tab"
            )
        name, label = (whole or known or cuts)[0]
        names.append(name)
        labels.append(_first_box(label))
    return Table(names, labels, finder.find(names), file.name)


def _cuts(line: str) -> Iterator[tuple[str, str]]:
    """All ways in which a line may be a name and a class; a name in quotes is one."""
    quoted = re.fullmatch(r"\"([^\"]+)\"\s+\"?([^\"]+)\"?", line)
    if quoted:
        yield quoted[1], quoted[2]
        return
    for gap in re.finditer(r"\s+", line):
        yield line[: gap.start()], line[gap.end() :]


def _inside(name: str) -> str:
    return name.rsplit(":", 1)[-1]


def _base(name: str) -> str:
    return os.path.basename(_inside(name))


def _stem(name: str) -> str:
    return os.path.splitext(_base(name))[0]


class Finder:
    """Finds images by their names: whole, or without the tar, the folders, the ending, as far as those are unique.

    One table of names at a time is made, when it is needed: of ImageNet-21k all of them would take gigabytes.
    """

    FORMS: ClassVar[tuple[Callable[[str], str], ...]] = (str, _inside, _base, _stem)

    def __init__(self, images: Sequence[str]):
        self.images = images
        self._tables: dict[int, dict[str, int]] = {}

    def find(self, names: Sequence[str]) -> list[int]:
        """The number of each image; UNKNOWN, or TWICE."""
        found = [UNKNOWN] * len(names)
        left: Sequence[int] = range(len(names))
        for form in range(len(self.FORMS)):
            table = self._table(form)
            for i in left:
                found[i] = table.get(names[i], UNKNOWN)
            left = [i for i in left if found[i] == UNKNOWN]
            if not left:
                break
        return found

    def is_whole(self, name: str) -> bool:
        """Whether it is the name of an image with its ending."""
        return any(name in self._table(form) for form in range(len(self.FORMS) - 1))

    def _table(self, form: int) -> dict[str, int]:
        if form not in self._tables:
            table: dict[str, int] = {}
            for i, name in enumerate(self.images):
                short = self.FORMS[form](name)
                if table.setdefault(short, i) != i:
                    table[short] = TWICE
            self._tables[form] = table
        return self._tables[form]
