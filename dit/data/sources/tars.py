"""Images in tars, read in place: tars of class folders, WebDataset shards, ImageNet's class tars and tar of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dit.data import DataError
from dit.data.sources.beside import BesideLabels
from dit.data.sources.classes import LabelChoice
from dit.data.sources.folder_classes import of_folders
from dit.data.sources.formats import (
    HEAD,
    count_endings,
    format_of,
    is_image,
    is_junk,
    is_usual,
    says_nothing,
)
from dit.data.sources.source import ImageSource, check_size, files_of, listing
from dit.data.sources.tarwalk import walk
from dit.progress import Bar

WNID = re.compile(r"n\d{8}")  # WordNet's number of a noun, which ImageNet's classes are called by


class Held(NamedTuple):
    """A file in a tar, or (path "") a whole tar: where its bytes are, so that threads can read them in any order."""

    tar: Path
    path: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}:{self.path}" if self.path else str(self.tar)

    @property
    def stem(self) -> str:
        """Return the name of a tar without .tar."""
        return os.path.basename(self.path or self.tar).removesuffix(".tar")

    def read(self) -> bytes:
        """All of it. Whoever calls has looked at its size."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.tar} ends {self.size - len(data)} bytes before the image does")
        return data


@dataclass(frozen=True)
class HeldImages:
    """Gives the file of image i; arrays instead of objects, of which ImageNet would have over a million."""

    tars: tuple[Path, ...]
    tar: np.ndarray  # (N,) int32, index into tars
    offset: np.ndarray  # (N,) int64
    size: np.ndarray  # (N,) int64

    def __call__(self, index: int) -> bytes:
        tar, offset, size = self.tars[self.tar[index]], int(self.offset[index]), int(self.size[index])
        check_size(size, f"{tar}, byte {offset}")
        return Held(tar, "", offset, size).read()


class TarShard(NamedTuple):
    """The images of one tar, and how many of its other files, by ending, may hold labels, and how many cannot.

    spare: images beside that of their sample, such as masks; images like any other where no label is beside any.
    """

    images: list[Held]
    spare: list[Held]
    beside: Counter[str]
    others: Counter[str]


def open_tars(spec: str, choice: LabelChoice = LabelChoice()) -> ImageSource | None:  # noqa: B008
    """What one or several tars hold, in one of these layouts.

    - KEY.jpg (or .png, .webp, ...) with KEY.cls, the number or name of a class (WebDataset); in a tar without any .cls,
      KEY.json with it under one of the usual keys
    - CLASS/name.jpg: the class is the folder an image lies in
    - several tars, all called by a WordNet number (n01440764.tar), or one tar of tars: each tar is a class
    """
    tars = files_of(spec, ".tar")
    if not tars:
        return None
    whole = [Held(tar, "", 0, tar.stat().st_size) for tar in tars]
    named = [bool(WNID.fullmatch(tar.stem)) for tar in tars]
    if all(named):
        return _class_tars(spec, whole, choice)
    shards, inner, faults = [], [], list[str]()
    beside = BesideLabels(choice)
    for part, held in _walked(whole):
        inner += [m for m in held if m.path.endswith(".tar")]
        shards.append(_shard(part.tar, held, beside, faults))
    mixed = any(named) or (inner and any(shard.images for shard in shards))
    if mixed:
        raise DataError(f"{spec}: tars that are classes beside tars of images; name the ones to encode alone")
    if inner:
        return _class_tars(spec, inner, choice)
    return _shards(spec, shards, beside, faults)


def _walked(parts: Sequence[Held]) -> Iterator[tuple[Held, list[Held]]]:
    """The files in tars, or in tars within tars, without hidden ones."""
    total = sum(part.size for part in parts)
    with Bar[None](total=total, unit="B", scale=True, desc="index", leave=False, delay=2) as bar:
        for part in parts:
            held = []
            with part.tar.open("rb") as file:
                for m in walk(file, str(part), part.offset, part.offset + part.size):
                    if not is_junk(m.path):
                        held.append(Held(part.tar, m.path, m.offset, m.size))
                    bar.update(m.size)
            yield part, held


def _images(held: Sequence[Held]) -> list[Held]:
    """Those that are images, by their endings, or by their first bytes where the ending says nothing."""
    return [m for m in held if is_image(m.path) or _begins_as_image(m)]


def _begins_as_image(file: Held) -> bool:
    return says_nothing(file.path) and format_of(file._replace(size=min(file.size, HEAD)).read()) is not None


def _but(held: Sequence[Held], taken: Sequence[Held]) -> list[Held]:
    known = {m.path for m in taken}
    return [m for m in held if m.path not in known]


def _endings(held: Sequence[Held]) -> Counter[str]:
    return count_endings(m.path for m in held)


def _source(
    images: Sequence[Held], names: Sequence[str], labels: Sequence[int] | np.ndarray, **fields: Any
) -> ImageSource:
    tars = {tar: i for i, tar in enumerate(dict.fromkeys(m.tar for m in images))}
    opener = HeldImages(
        tuple(tars),
        np.array([tars[m.tar] for m in images], np.int32),
        np.array([m.offset for m in images], np.int64),
        np.array([m.size for m in images], np.int64),
    )
    return ImageSource(tuple(names), np.array(labels, np.int64), open=opener, **fields)


# --- each tar a class --------------------------------------------------------------------------------------


def _class_tars(spec: str, parts: Sequence[Held], choice: LabelChoice) -> ImageSource:
    """Names, order and labels are those of a folder of class folders that the tars were unpacked into."""
    BesideLabels(choice).refuse_chosen(spec)
    parts = sorted(parts, key=lambda part: part.stem)
    faults = [f"'{a.stem}' is there twice: {a} and {b}" for a, b in pairwise(parts) if a.stem == b.stem]
    images: list[Held] = []
    names: list[str] = []
    places: list[int] = []
    others: Counter[str] = Counter()
    for place, (part, held) in enumerate(_walked(parts)):
        inside = sorted(_images(held), key=lambda m: m.path)
        if not inside:
            faults.append(f"{part}: no images in it")
        images += inside
        names += [f"{part.stem}/{m.path.removeprefix(part.stem + '/')}" for m in inside]
        places += [place] * len(inside)
        others += _endings(_but(held, inside))
    if faults:
        raise DataError(listing(f"{spec}: {len(faults)} class tar(s) that cannot be used", faults))
    found = of_folders([part.stem for part in parts], choice.type, spec)
    return _source(images, names, found.labels[places], **found.fields(), others=others)


# --- each tar a shard --------------------------------------------------------------------------------------


def _shards(spec: str, shards: Sequence[TarShard], beside: BesideLabels, faults: list[str]) -> ImageSource:
    """All shards as one set: with labels beside the images, in the order of the tars; or by folders, sorted."""
    images = [m for shard in shards for m in shard.images]
    fields: dict[str, Any] = {"labelled_by": beside.described()}
    others = sum((shard.others for shard in shards), Counter[str]())
    if beside.has_labels:
        labels, fields["classes"] = beside.labels(
            spec, lambda i: f"{images[i].tar}: '{images[i].path}'", faults
        )
        others += _endings([m for shard in shards for m in shard.spare])
    else:
        beside.refuse_chosen(spec)
        images += [m for shard in shards for m in shard.spare]
        images.sort(key=lambda m: (m.path, m.tar))
        labels, more = _path_labels(images, beside.choice)
        fields |= more
        others += sum((shard.beside for shard in shards), Counter[str]())
    names = [f"{m.tar.name}:{m.path}" if len(shards) > 1 else m.path for m in images]
    return _source(images, names, labels, **fields, others=others)


def _path_labels(images: Sequence[Held], choice: LabelChoice) -> tuple[np.ndarray, dict[str, Any]]:
    """The class is the folder an image lies in, whatever lies above it (`cats/1.jpg`, `set/train/cats/1.jpg`)."""
    folders = {os.path.dirname(m.path) for m in images} - {""}
    twice = [name for name, n in Counter(os.path.basename(f) for f in folders).items() if n > 1]
    if twice:
        both = sorted(f for f in folders if os.path.basename(f) == twice[0])
        raise DataError(
            f"{images[0].tar}: two folders give class '{twice[0]}': {', '.join(both)}; split the tar"
        )
    names = sorted(os.path.basename(f) for f in folders)
    found = of_folders(names, choice.type, str(images[0].tar) if images else "")
    label = dict(zip(names, found.labels.tolist(), strict=True))
    labels = [label.get(os.path.basename(os.path.dirname(m.path)), -1) for m in images]
    return np.array(labels, np.int64), found.fields()


def _shard(tar: Path, held: Sequence[Held], beside: BesideLabels, faults: list[str]) -> TarShard:
    """The images of a tar, with what the files of the same key say taken in by `beside`; what is wrong with them is
    added to `faults`."""
    ending = beside.ending_of(lambda e: any(m.path.lower().endswith(e) for m in held))
    if ending is None:
        images = _images(held)
        beside.skip(len(images))
        return TarShard(images, [], Counter(), _endings(_but(held, images)))
    samples, twice = _by_key(held, ending, dots=False)
    if twice:
        again, still = _by_key(held, ending, dots=True)
        samples, twice = (again, []) if not still and _all_whole(again) else (samples, twice)
    faults += [f"{tar}: '{a.path}' and '{b.path}' belong to the same sample" for a, b in twice]
    with tar.open("rb") as file:
        for sample in samples.values():
            label = sample.get("label")
            if "image" in sample:
                beside.add(ending, None if label is None else label.size, partial(_small, file, label))
            elif label is not None:
                faults.append(f"{tar}: '{label.path}' has no image beside it, though others have")
    images = [sample["image"] for sample in samples.values() if "image" in sample]
    labels = [m for m in held if m.path.lower().endswith(ending)]
    more = [
        b for _, b in twice if not b.path.lower().endswith(ending)
    ]  # a fault, unless no sample has a label
    beside.skip(len(more))
    images += more
    spare = _images(_but(held, [*images, *labels]))
    return TarShard(images, spare, _endings(labels), _endings(_but(held, [*images, *labels, *spare])))


Samples = dict[str, dict[str, Held]]


def _by_key(held: Sequence[Held], ending: str, dots: bool) -> tuple[Samples, list[tuple[Held, Held]]]:
    """Images and labels by their key, and those that have the place of another.

    dots: a key may have some, and ends at the last one; else at the first, as the webdataset library has it.
    """
    members: dict[str, list[Held]] = {}
    for m in held:
        folder, base = os.path.split(m.path)
        key = os.path.splitext(base)[0] if dots else base.split(".", 1)[0]
        members.setdefault(os.path.join(folder, key), []).append(m)
    samples: Samples = {}
    twice: list[tuple[Held, Held]] = []
    for key, found in members.items():
        kinds = {"image": _image_of(found), "label": [m for m in found if m.path.lower().endswith(ending)]}
        samples[key] = {kind: those[0] for kind, those in kinds.items() if those}
        twice += [(those[0], m) for those in kinds.values() for m in those[1:]]
    return {key: sample for key, sample in samples.items() if sample}, twice


def _image_of(members: Sequence[Held]) -> list[Held]:
    """By the usual endings; only where there is none, by the others, and then by first bytes.

    Beside a photo there may be masks or depths that are pictures, too.
    """
    for is_one in (lambda m: is_usual(m.path), lambda m: is_image(m.path), _begins_as_image):
        if found := [m for m in members if is_one(m)]:
            return found
    return []


def _all_whole(samples: Samples) -> bool:
    return all(len(sample) == 2 for sample in samples.values())


def _small(file: BinaryIO, held: Held | None) -> bytes:
    """A file with a label, whose size was looked at, in its open tar."""
    if held is None:
        return b""
    file.seek(held.offset)
    return file.read(held.size)
