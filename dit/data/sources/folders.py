"""Folders of images, and scikit-learn's digits."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dit.data import DataError
from dit.data.sources.classes import LabelChoice
from dit.data.sources.folder_classes import of_folders
from dit.data.sources.source import FORMATS, ImageSource, is_image, listing
from dit.rng import Purpose, permutation

DIGITS_HELD_OUT = 500
PACKED = (".tar", ".parquet")


def open_folder(spec: str, choice: LabelChoice = LabelChoice()) -> ImageSource:  # noqa: B008
    """A folder of class folders (CLASS/name.jpg), classes sorted by name; images directly in it have label -1.

    Folders that are all called by whole numbers are sorted as those: class 2 stands before class 10.
    """
    root = Path(spec)
    if not root.exists():
        raise DataError(f"{root}: no such folder, tar or Parquet file, and not digits:train or digits:test")
    if not root.is_dir():
        raise DataError(
            f"{root}: neither a folder nor a .tar or .parquet (compressed archives have to be unpacked first)"
        )
    if (root / "manifest.json").exists():
        raise DataError(f"{root}: holds encoded latents (manifest.json), not images")
    folders = sorted(d.name for d in os.scandir(root) if d.is_dir() and not d.name.startswith("."))
    names: list[str] = []
    places: list[int] = []
    faults: list[str] = []
    ignored = 0
    for place, folder in [(-1, ""), *enumerate(folders)]:
        files, deeper = _listed(root / folder)
        images = [f for f in files if is_image(f)]
        if folder and (deeper or not images):
            faults.append(_fault(root / folder, files, deeper))
        names += [f"{folder}/{f}" if folder else f for f in images]
        places += [place] * len(images)
        ignored += len(files) - len(images)
    if faults:
        raise DataError(listing(f"{root}: {len(faults)} class folder(s) that cannot be used", faults))
    found = of_folders(folders, choice.type, str(root))
    labels = np.append(found.labels, -1)[np.array(places, np.int64)]
    return ImageSource(
        tuple(names), labels, open=partial(_open, root, names), ignored=ignored, **found.fields()
    )


def is_class(root: Path) -> bool:
    """Whether a folder looks like one class of its parent: it has images, and a folder beside it has some, too."""
    parent = root.resolve().parent
    names = [e.name for e in os.scandir(parent) if e.is_dir() and not e.name.startswith(".")]
    beside = (parent / name for name in names if name != root.resolve().name)
    return _has_images(root) and any(map(_has_images, beside))


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(is_image(entry.name) for entry in os.scandir(folder))


def _open(root: Path, names: list[str], index: int) -> Image.Image:
    return Image.open(root / names[index], formats=FORMATS)


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """The names of files and of folders in a folder, sorted."""
    entries = list(os.scandir(folder))
    files = sorted(e.name for e in entries if e.is_file())
    return files, sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _fault(folder: Path, files: list[str], deeper: list[str]) -> str:
    where = f"class folder '{folder.name}' in {folder.parent}"
    if any(is_image(f) for f in files):
        return f"{where} has images and folders ('{deeper[0]}'), whose images would not be read"
    packed = next((f for f in files if f.endswith(PACKED)), None)
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
