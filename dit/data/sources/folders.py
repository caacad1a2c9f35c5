"""Folders of images, and scikit-learn's digits."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dit.data import DataError
from dit.data.sources.classes import LabelChoice
from dit.data.sources.folder_classes import of_folders
from dit.data.sources.formats import HEAD, Refused, count_endings, format_of, is_image, is_junk, says_nothing
from dit.data.sources.source import ImageSource, check_size, leads_to, listing
from dit.rng import Purpose, permutation

DIGITS_HELD_OUT = 500
PACKED = (".tar", ".parquet")
# What to do with other archives, by their endings.
UNPACK = {
    ".zip": "unzip -q {name} -d FOLDER -x '__MACOSX/*'",
    ".7z": "7z x {name} -oFOLDER",
    ".rar": "unrar x {name} FOLDER/",
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".xz", ".zst"), "mkdir FOLDER && tar -xf {name} -C FOLDER"),
}


class Folder(NamedTuple):
    """What lies in a folder, by names, sorted; hidden files and the like left out.

    images: all that may be one, also what cannot be read: when it is opened, it says so. others: endings of the rest.
    links: that lead nowhere and are not called as an image; they are among the images, too.
    """

    images: list[str]
    folders: list[str]
    others: Counter[str]
    packed: list[str]
    links: list[str]


def open_folder(spec: str, choice: LabelChoice = LabelChoice()) -> ImageSource:  # noqa: B008
    """A folder of class folders (CLASS/name.jpg), classes sorted by name; images directly in it have label -1.

    Folders that are all called by whole numbers are sorted as those: class 2 stands before class 10.
    """
    root = Path(spec)
    if not root.exists():
        raise DataError(f"{root}: no such folder, tar or Parquet file, and not digits:train or digits:test")
    if not root.is_dir():
        raise DataError(f"{root}: neither a folder nor a .tar or .parquet{_unpack(root)}")
    if (root / "manifest.json").exists():
        raise DataError(f"{root}: holds encoded latents (manifest.json), not images")
    top = _listed(root)
    names: list[str] = []
    places: list[int] = []
    others: Counter[str] = Counter()
    faults = [_lost(root / name) for name in top.links]
    for place, folder in [(-1, ""), *enumerate(top.folders)]:
        try:
            here = _listed(root / folder) if folder else top
        except DataError as error:
            faults.append(str(error))
            continue
        if folder and (here.folders or not here.images):
            faults.append(_fault(root / folder, here))
        names += [f"{folder}/{f}" if folder else f for f in here.images]
        places += [place] * len(here.images)
        others += here.others
    if faults:
        raise DataError(listing(f"{root}: {len(faults)} class folder(s) that cannot be used", faults))
    found = of_folders(top.folders, choice.type, str(root))
    labels = np.append(found.labels, -1)[np.array(places, np.int64)]
    return ImageSource(
        tuple(names), labels, open=partial(_read, root, names), others=others, **found.fields()
    )


def _unpack(file: Path) -> str:
    """How to go on with an archive that is not read."""
    how = UNPACK.get(file.suffix.lower())
    if how is None:
        return ""
    return f"; unpack it and give the folder: {how.format(name=file.name)}"


def is_class(root: Path) -> bool:
    """Whether a folder looks like one class of its parent: it has images, and a folder beside it has some, too."""
    parent = root.resolve().parent
    try:
        names = [e.name for e in os.scandir(parent) if _kind(e) == stat.S_IFDIR and not is_junk(e.name)]
        beside = (parent / name for name in names if name != root.resolve().name)
        return _has_images(root) and any(map(_has_images, beside))
    except PermissionError:  # what lies beside it is not to be seen, so nothing can be said
        return False


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(is_image(entry.name) for entry in os.scandir(folder))


def _read(root: Path, names: list[str], index: int) -> bytes:
    """The bytes of an image's file, which may have become anything since it was listed."""
    file = root / names[index]
    try:
        return _bytes(file)
    except FileNotFoundError:
        if file.is_symlink():
            raise Refused(f"leads nowhere{leads_to(file)}") from None
        raise


def _bytes(path: Path, most: int = -1) -> bytes:
    """The first bytes of a file, all by default. OSError where it is none: opening a pipe would wait for a writer."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(file, "rb") as opened:
        is_, size = os.fstat(file).st_mode, os.fstat(file).st_size
        if not stat.S_ISREG(is_):
            raise OSError(errno.EINVAL, "neither a file nor a folder")
        if most < 0:
            check_size(size, path.name)
        return opened.read(most)


def _kind(entry: os.DirEntry[str]) -> int:
    """stat's S_IFDIR or S_IFREG, of what a link leads to; 0 for links that lead nowhere, pipes, sockets, devices."""
    try:
        return stat.S_IFDIR if entry.is_dir() else stat.S_IFREG if entry.is_file() else 0
    except OSError:  # links that lead to each other, or where nobody may look
        return 0


def _listed(folder: Path) -> Folder:
    """What lies in a folder. DataError where that cannot be seen."""
    try:
        entries = [(e.name, _kind(e), e.is_symlink()) for e in os.scandir(folder) if not is_junk(e.name)]
    except OSError as error:
        raise DataError(
            f"folder '{folder.name}' in {folder.parent} cannot be listed: {error.strerror}"
        ) from None
    files = sorted(name for name, kind, _ in entries if kind == stat.S_IFREG)
    lost = [(name, is_link) for name, kind, is_link in entries if not kind]
    images = {f for f in files if is_image(f) or (says_nothing(f) and _may_be_image(folder / f))}
    return Folder(
        images=sorted([*images, *(name for name, _ in lost)]),
        folders=sorted(name for name, kind, _ in entries if kind == stat.S_IFDIR),
        others=count_endings(f for f in files if f not in images),
        packed=[f for f in files if f.endswith(PACKED)],
        links=sorted(name for name, is_link in lost if is_link and not is_image(name)),
    )


def _may_be_image(file: Path) -> bool:
    """By the first bytes; a file that cannot be read may be one, too."""
    try:
        return format_of(_bytes(file, HEAD)) is not None
    except OSError:
        return True


def _lost(link: Path) -> str:
    return (
        f"link '{link.name}' in {link.parent} leads nowhere (to {link.readlink()}): were it a class, the labels of the "
        "ones after it would be others; mend it or remove it"
    )


def _fault(folder: Path, here: Folder) -> str:
    where, deeper = f"class folder '{folder.name}' in {folder.parent}", here.folders
    if here.images:
        return f"{where} has images and folders ('{deeper[0]}'), whose images would not be read"
    packed = next(iter(here.packed), None)
    inside = f"folders ('{deeper[0]}')" if deeper else f"'{packed}'"
    hint = f"; it holds {inside}: did you mean {folder}?" if deeper or packed else ""
    return f"{where} has no images: fill it or remove it{hint}"


def open_digits(spec: str, choice: LabelChoice = LabelChoice()) -> ImageSource | None:  # noqa: B008
    """`digits:train` or `digits:test`: scikit-learn's 1797 digits of 8x8, in a fixed split of 1297 and 500."""
    if not spec.startswith("digits:"):
        return None
    split = spec.removeprefix("digits:")
    if split not in ("train", "test"):
        raise DataError(f"digits:{split}: no such part; expected digits:train or digits:test")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError('digits need scikit-learn: pip install "dit[demo]"') from None
    digits = load_digits()
    order = permutation(0, Purpose.ENCODE, 0, len(digits.target))
    chosen = np.sort(order[:-DIGITS_HELD_OUT] if split == "train" else order[-DIGITS_HELD_OUT:])
    pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # (N, 8, 8) from 0..16
    return ImageSource(
        names=tuple(f"digits/{i:04d}" for i in chosen),
        labels=digits.target[chosen].astype(np.int64),
        classes=tuple(str(i) for i in range(10)),
        open=partial(_from_array, pixels),
    )


def _from_array(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index])
