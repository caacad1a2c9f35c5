"""A set of images, whatever it was read from: names, labels, an order, and one image at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dit.data import DataError
from dit.data.origin import Split
from dit.data.sources.crops import Centre, Crop
from dit.data.sources.decode import Decode, Decoded, ImageFileOrPixels, before, own_bound
from dit.data.sources.formats import Refused, is_junk, is_usual, shown_endings
from dit.rng import Draws

MAX_IMAGE = 1 << 30  # bytes of a file
SPLIT = re.compile(r"(?<![a-z])(train|test|val|valid|validation|dev)(?![a-z])", re.IGNORECASE)


class BadImage(DataError):
    """One image that cannot be read: `name` says which, the text also why."""

    def __init__(self, name: str, reason: str):
        self.name = name
        super().__init__(f"{name}: {reason}")


class Loaded(NamedTuple):
    """An image as it is encoded: (size, size, 3) uint8, whether it was enlarged for that, and what else was done."""

    pixels: np.ndarray
    enlarged: bool
    told: frozenset[str]  # of decode.COUNTED


@dataclass(frozen=True)
class ImageSource:
    """Images in a fixed order. names, labels: one each; open(i) gives the bytes of image i's file, or its pixels.

    others: how many files of each ending are no images. open is called from any thread. classes_before: the same
    classes as versions before numbered them, where that was another order: an encode that was begun in it goes on in
    it. labelled_by: where the labels come from, or why there are none, where that is in doubt. split: which part of a
    larger set this is. Raises DataError for names that cannot stand as a line of UTF-8 each.
    """

    names: tuple[str, ...]
    labels: np.ndarray  # (N,) int64, index into classes or -1
    classes: tuple[str, ...]
    open: Callable[[int], ImageFileOrPixels]
    others: Mapping[str, int] = field(default_factory=dict)
    classes_before: tuple[str, ...] | None = None
    labelled_by: str = ""
    split: Split | None = None

    def __post_init__(self) -> None:
        odd = [repr(name) for name in (*self.names, *self.classes) if not _is_line(name)]
        if odd:
            what = f"{len(odd)} name(s) with a line break or with bytes that are not UTF-8: rename the files"
            raise DataError(listing(what, odd))

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        loose = int((self.labels < 0).sum())
        counts = f"{len(self)} images in {len(self.classes)} classes"
        which = f": {shown_endings(self.others)}" if self.others else ""
        return f"{counts}, {loose} without a label, {self.ignored} other files{which}"

    @property
    def ignored(self) -> int:
        """Files that are not images."""
        return sum(self.others.values())

    def numbered_by(self, classes: tuple[str, ...]) -> ImageSource:
        """The same images with the classes in this order, of the same names."""
        place = {name: i for i, name in enumerate(classes)}
        table = np.array([*(place[name] for name in self.classes), -1], np.int64)
        return replace(self, labels=table[self.labels], classes=classes, classes_before=None)

    def load(self, index: int, size: int, crop: Crop = Centre(), seed: int = 0) -> np.ndarray:  # noqa: B008
        """Image `index`, cropped to (size, size, 3) uint8: a pure function of the image, the crop, seed and index.

        Raises BadImage with its name; DataError where the source itself is broken.
        """
        return self.load_and_tell(index, size, crop, seed).pixels

    def load_and_tell(
        self,
        index: int,
        size: int,
        crop: Crop,
        seed: int,
        decode: Decode | None = Decode(),  # noqa: B008
    ) -> Loaded:
        """As load; and what was done to the image. decode: None for pixels as they were before there was a choice."""
        try:
            file = self.open(index)
            draws = Draws(seed, 0, torch.tensor([index]), 1) if crop.is_random else None
            with own_bound():
                image, told = decode(file) if decode is not None else Decoded(before(file), frozenset())
                return Loaded(crop(image, size, draws), min(image.size) < size, told)
        except (MemoryError, DataError):
            raise
        except Refused as error:
            raise BadImage(self.names[index], str(error)) from error
        except Exception as error:
            # Pillow's decoders raise nearly any exception on damaged bytes (OSError, SyntaxError, struct.error, ...)
            raise BadImage(self.names[index], f"{type(error).__name__}: {error}") from error


def _is_line(name: str) -> bool:
    return (name.isascii() and name.isprintable()) or (_encodes(name) and not re.search(r"[\n\r\0]", name))


def _encodes(name: str) -> bool:
    return not re.search(
        "[\ud800-\udfff]", name
    )  # what file systems and tars give for bytes that are not UTF-8


def check_size(size: int, where: object) -> None:
    """Refuse, before a file is read whole, one that is larger than any image: raises Refused."""
    if size > MAX_IMAGE:
        raise Refused(f"{where}: {size} bytes, expected at most {MAX_IMAGE} of an image")


def listing(head: str, faults: Iterable[str], most: int = 5, total: int | None = None) -> str:
    """`head`, the first faults on a line each, and how many more there are: of `total`, where not all are given."""
    faults = list(faults)
    total = len(faults) if total is None else total
    rest = [f"... and {total - most} more"] if total > most else []
    return "\n".join([f"{head}:", *(f"  {fault}" for fault in [*faults[:most], *rest])])


def files_of(spec: str, suffix: str) -> list[Path]:
    """The files with this suffix that `spec` names, sorted; none where it names something else.

    spec: a file, a folder of them (without folders and images in it), a pattern (`train-*.tar`) or a range
    (`train-{000..099}.tar`), of which none may be missing.
    """
    path = Path(spec)
    if path.is_dir():
        seen = [entry for entry in path.iterdir() if not is_junk(entry.name)]
        if any(entry.is_dir() or is_usual(entry.name) for entry in seen):
            return []
        files = _whole(spec, sorted(entry for entry in seen if entry.suffix == suffix))
        splits = sorted({m[0].lower() for file in files if (m := SPLIT.search(file.stem))})
        if len(splits) > 1:
            each = " or ".join(f"{path}/*{split}*{suffix}" for split in splits)
            raise DataError(f"{path}: holds several parts ({', '.join(splits)}); name one: {each}")
        return files
    if path.is_file():
        return [path] if path.suffix == suffix else []
    patterns = [Path(p) for p in expand_range(spec)]
    found = {p for pattern in patterns for p in pattern.parent.glob(pattern.name) if p.suffix == suffix}
    missing = [p for p in patterns if not any(c in str(p) for c in "*?[") and not p.exists()]
    if len(patterns) > 1 and missing and path.suffix == suffix:
        raise DataError(f"{spec}: {len(missing)} of {len(patterns)} shards are missing, first {missing[0]}")
    return _whole(spec, sorted(found))


def _whole(spec: str, files: list[Path]) -> list[Path]:
    """The same, if all of them are files: what is left out in silence would shift all that comes after it."""
    faults = [f"{file}{leads_to(file)}" for file in files if not file.is_file()]
    if faults:
        raise DataError(
            listing(f"{spec}: {len(faults)} of {len(files)} are no files: mend or remove", faults)
        )
    return files


def leads_to(path: Path) -> str:
    """Say of a link where it leads to; nothing of others."""
    return f" (a link to {path.readlink()})" if path.is_symlink() else ""


def expand_range(spec: str) -> list[str]:
    """What a range in braces stands for: a-{08..10} for a-08, a-09 and a-10; all else for itself."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if not match:
        return [spec]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [f"{spec[: match.start()]}{n:0{len(first)}d}{spec[match.end() :]}" for n in numbers]
