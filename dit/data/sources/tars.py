"""Images in tars, read in place: tars of class folders, WebDataset shards, ImageNet's class tars and tar of them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dit.data import DataError
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

WNID = re.compile(r"n\d{8}")  # WordNet's number of a noun, which ImageNet's classes are called by
MAX_CLASS = 10**6
MAX_LABEL = 1 << 20  # bytes of a file with a label


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
        """Of a tar: its name without .tar."""
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


class Shard(NamedTuple):
    """The images of one tar, their labels where files beside them say so, and how many other files of each ending."""

    images: list[Held]
    labels: list[int] | None
    others: Counter[str]


def open_tars(spec: str) -> ImageSource | None:
    """What one or several tars hold, in one of these layouts.

    - KEY.jpg (or .png, .webp, ...) with KEY.cls, a class number (WebDataset); in a tar without any .cls, KEY.json
      with a number under "label" or "cls"
    - CLASS/name.jpg: the class is the folder an image lies in
    - several tars, all called by a WordNet number (n01440764.tar), or one tar of tars: each tar is a class
    """
    tars = files_of(spec, ".tar")
    if not tars:
        return None
    whole = [Held(tar, "", 0, tar.stat().st_size) for tar in tars]
    named = [bool(WNID.fullmatch(tar.stem)) for tar in tars]
    if all(named):
        return _class_tars(spec, whole)
    shards, inner, faults = [], [], list[str]()
    for part, held in _walked(whole):
        inner += [m for m in held if m.path.endswith(".tar")]
        shards.append(_shard(part.tar, held, faults))
    mixed = any(named) or (inner and any(shard.images for shard in shards))
    if mixed:
        raise DataError(f"{spec}: tars that are classes beside tars of images; name the ones to encode alone")
    if inner:
        return _class_tars(spec, inner)
    return _shards(spec, shards, faults)


def _walked(parts: Sequence[Held]) -> Iterator[tuple[Held, list[Held]]]:
    """The files in tars, or in tars within tars, without hidden ones."""
    total = sum(part.size for part in parts)
    with tqdm(total=total, unit="B", unit_scale=True, desc="index", leave=False, delay=2) as bar:
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


def _others(held: Sequence[Held], taken: Sequence[Held]) -> Counter[str]:
    known = {m.path for m in taken}
    return count_endings(m.path for m in held if m.path not in known)


def _source(
    images: Sequence[Held], names: Sequence[str], labels: Sequence[int], **fields: Any
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


def _class_tars(spec: str, parts: Sequence[Held]) -> ImageSource:
    """Names, order and labels are those of a folder of class folders that the tars were unpacked into."""
    parts = sorted(parts, key=lambda part: part.stem)
    faults = [f"'{a.stem}' is there twice: {a} and {b}" for a, b in pairwise(parts) if a.stem == b.stem]
    images: list[Held] = []
    names: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, (part, held) in enumerate(_walked(parts)):
        inside = sorted(_images(held), key=lambda m: m.path)
        if not inside:
            faults.append(f"{part}: no images in it")
        images += inside
        names += [f"{part.stem}/{m.path.removeprefix(part.stem + '/')}" for m in inside]
        labels += [label] * len(inside)
        others += _others(held, inside)
    if faults:
        raise DataError(listing(f"{spec}: {len(faults)} class tar(s) that cannot be used", faults))
    return _source(images, names, labels, classes=tuple(p.stem for p in parts), others=others)


# --- each tar a shard --------------------------------------------------------------------------------------


def _shards(spec: str, shards: Sequence[Shard], faults: list[str]) -> ImageSource:
    """All shards as one set: with the numbers beside the images, in the order of the tars; or by folders, sorted."""
    images = [m for shard in shards for m in shard.images]
    if any(shard.labels is not None for shard in shards):
        for shard in shards:
            if shard.labels is None:
                faults += [
                    f"{m.tar}: '{m.path}' has no .cls beside it, though others have" for m in shard.images
                ]
        if faults:
            raise DataError(listing(f"{spec}: {len(faults)} sample(s) that cannot be used", faults))
        labels = [label for shard in shards for label in shard.labels or ()]
        classes = tuple(str(i) for i in range(max(labels, default=-1) + 1))
    else:
        images.sort(key=lambda m: (m.path, m.tar))
        labels, classes = _path_labels(images)
    names = [f"{m.tar.name}:{m.path}" if len(shards) > 1 else m.path for m in images]
    others = sum((shard.others for shard in shards), Counter[str]())
    return _source(images, names, labels, classes=classes, others=others)


def _path_labels(images: Sequence[Held]) -> tuple[list[int], tuple[str, ...]]:
    """The class is the folder an image lies in, whatever lies above it (`cats/1.jpg`, `set/train/cats/1.jpg`)."""
    folders = {os.path.dirname(m.path) for m in images} - {""}
    twice = [name for name, n in Counter(os.path.basename(f) for f in folders).items() if n > 1]
    if twice:
        both = sorted(f for f in folders if os.path.basename(f) == twice[0])
        raise DataError(
            f"{images[0].tar}: two folders give class '{twice[0]}': {', '.join(both)}; split the tar"
        )
    classes = tuple(sorted(os.path.basename(f) for f in folders))
    index = {name: i for i, name in enumerate(classes)}
    return [index.get(os.path.basename(os.path.dirname(m.path)), -1) for m in images], classes


def _shard(tar: Path, held: Sequence[Held], faults: list[str]) -> Shard:
    """Images with the numbers in the files of the same key; what is wrong is added to `faults`."""
    ending = _label_ending(held)
    if ending is None:
        images = _images(held)
        return Shard(images, None, _others(held, images))
    members: dict[str, list[Held]] = {}
    for m in held:
        folder, base = os.path.split(m.path)
        members.setdefault(os.path.join(folder, base.split(".", 1)[0]), []).append(m)
    images, labels = [], []
    for sample in (_sample(tar, parts, ending, faults) for parts in members.values()):
        if "image" in sample and "label" in sample:
            images.append(sample["image"])
            labels.append(_label(sample["label"], LABELS[ending], faults))
        elif "image" in sample:
            faults.append(f"{tar}: '{sample['image'].path}' has no {ending} beside it, though others have")
        elif "label" in sample:
            faults.append(f"{tar}: '{sample['label'].path}' has no image beside it, though others have")
    others = _others(held, [*images, *(m for m in held if m.path.endswith(ending))])
    return Shard(images, labels, others)


def _sample(tar: Path, members: Sequence[Held], ending: str, faults: list[str]) -> dict[str, Held]:
    """The image and the label among the files of one key; two of them are a fault."""
    sample: dict[str, Held] = {}
    kinds = {"image": _image_of(members), "label": [m for m in members if m.path.endswith(ending)]}
    for kind, found in kinds.items():
        for m in found:
            if sample.setdefault(kind, m) is not m:
                faults.append(f"{tar}: '{sample[kind].path}' and '{m.path}' belong to the same sample")
    return sample


def _image_of(members: Sequence[Held]) -> list[Held]:
    """By the usual endings; only where there is none, by the others, and then by first bytes.

    Beside a photo there may be masks or depths that are pictures, too.
    """
    for is_one in (lambda m: is_usual(m.path), lambda m: is_image(m.path), _begins_as_image):
        if found := [m for m in members if is_one(m)]:
            return found
    return []


def _label_ending(held: Sequence[Held]) -> str | None:
    """What the files with labels end in: .cls if there is one, else .json if that of the first image holds one."""
    if any(m.path.endswith(".cls") for m in held):
        return ".cls"
    first = next((m.path for m in held if is_image(m.path) or _begins_as_image(m)), "")
    key = os.path.join(os.path.dirname(first), os.path.basename(first).split(".", 1)[0])
    beside = next((m for m in held if m.path == f"{key}.json"), None)
    return ".json" if beside is not None and LABELS[".json"](_small(beside)) is not None else None


def _small(file: Held) -> bytes:
    if file.size > MAX_LABEL:
        raise DataError(
            f"{file.tar}: '{file.path}' has {file.size} bytes, expected at most {MAX_LABEL} of a label"
        )
    return file.read()


def _label(file: Held, parse: Callable[[bytes], int | None], faults: list[str]) -> int:
    data = _small(file)
    label = parse(data)
    if label is None:
        faults.append(f"{file.tar}: '{file.path}' holds {data[:20]!r}, expected a class number or -1")
        return -1
    return label


def _cls_label(data: bytes) -> int | None:
    return int(data) if re.fullmatch(rb"-1|\d{1,6}", data.strip()) else None


def _json_label(data: bytes) -> int | None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):  # that of brackets in brackets
        return None
    found = [fields[key] for key in ("label", "cls") if key in fields] if isinstance(fields, dict) else []
    return found[0] if found and type(found[0]) is int and -1 <= found[0] < MAX_CLASS else None


LABELS = {".cls": _cls_label, ".json": _json_label}
