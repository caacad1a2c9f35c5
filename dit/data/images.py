"""Sets of images to encode: a folder of class folders, tars, WebDataset shards, scikit-learn's digits.

Whatever the source, an image has a name, a label (-1 = none) and a place in a fixed order (its id), and is
read to a square uint8 RGB array.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dit.data import DataError
from dit.rng import Purpose, permutation

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
TRANSFORM = "box-halve while short side >= 2 x size; bicubic to short side = size; centre crop; uint8 RGB"
DIGITS_HELD_OUT = 500


class BadImage(DataError):
    """One image that cannot be read: `name` says which, the text also why."""

    def __init__(self, name: str, reason: str):
        self.name = name
        super().__init__(f"{name}: {reason}")


@dataclass(frozen=True)
class ImageSource:
    """Images in a fixed order. names, labels: one each; open(i) gives image i as PIL has it."""

    names: tuple[str, ...]
    labels: np.ndarray  # (N,) int64, index into classes or -1
    classes: tuple[str, ...]
    open: Callable[[int], Image.Image]
    ignored: int = 0  # files that are not images

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        loose = int((self.labels < 0).sum())
        counts = f"{len(self)} images in {len(self.classes)} classes"
        return f"{counts}, {loose} without a label, {self.ignored} other files"

    def load(self, index: int, size: int) -> np.ndarray:
        """Image `index`, cropped: (size, size, 3) uint8. Raises BadImage with its name."""
        try:
            with self.open(index) as image:
                return centre_crop(image, size)
        except MemoryError:
            raise
        except Exception as error:
            # Pillow's decoders raise nearly any exception on damaged bytes (OSError, SyntaxError, struct.error, ...)
            raise BadImage(self.names[index], f"{type(error).__name__}: {error}") from error


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The square middle of an image as (size, size, 3) uint8 RGB.

    Preprocessing of guided diffusion (ADM; Dhariwal & Nichol, arXiv 2105.05233), which DiT and SiT use too:
    halve with a box filter while the short side is at least twice the target, then bicubic, then crop.
    """
    image = _rgb(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips everything above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def open_source(spec: str | os.PathLike[str]) -> ImageSource:
    """The images that `spec` names.

    - `digits:train` (1297 images), `digits:test` (500): scikit-learn's handwritten digits, 8x8 pixels
    - a folder of class folders (CLASS/name.jpg; classes sorted by name); images directly in it have label -1
    - a tar of images, classes being the folders in it; or a tar with KEY.jpg and KEY.cls (WebDataset)
    - several such tars: a folder of them, a pattern (`train-*.tar`) or a range (`train-{000..099}.tar`)
    """
    spec = str(spec)
    if spec.startswith("digits:"):
        return _digits(spec.removeprefix("digits:"))
    tars = _tars(spec)
    source = _from_tars(tars) if tars else _from_folder(Path(spec))
    if not len(source):
        raise DataError(
            f"{spec}: no images in it (looked for {', '.join(EXTENSIONS)}); expected CLASS/name.jpg, "
            "a tar of such files, or WebDataset tars of KEY.jpg and KEY.cls"
        )
    return source


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


# --- folders -----------------------------------------------------------------------------------------------


def _from_folder(root: Path) -> ImageSource:
    if not root.exists():
        raise DataError(f"{root}: no such folder or tar, and not digits:train or digits:test")
    if not root.is_dir():
        raise DataError(
            f"{root}: neither a folder nor a .tar (compressed archives have to be unpacked first)"
        )
    if (root / "manifest.json").exists():
        raise DataError(f"{root}: holds encoded latents (manifest.json), not images")
    folders = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    names, labels, ignored = [], [], 0
    for label, folder in [(-1, ""), *enumerate(folders)]:
        files = sorted(f.name for f in os.scandir(root / folder) if f.is_file())
        images = [f for f in files if _is_image(f)]
        if folder and not images:
            raise DataError(_empty_class(root / folder))
        names += [f"{folder}/{f}" if folder else f for f in images]
        labels += [label] * len(images)
        ignored += len(files) - len(images)
    paths = [root / name for name in names]
    return ImageSource(
        tuple(names), np.array(labels, np.int64), tuple(folders), lambda i: Image.open(paths[i]), ignored
    )


def _empty_class(folder: Path) -> str:
    deeper = next((d.name for d in sorted(folder.iterdir()) if d.is_dir()), None)
    hint = f"; it holds folders ('{deeper}'): did you mean {folder}?" if deeper else ""
    return f"class folder '{folder.name}' in {folder.parent} has no images: fill it or remove it{hint}"


# --- tars --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """A file in a tar: where its bytes are, so that threads can read them in any order."""

    tar: Path
    path: str  # inside the tar, without a leading ./
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def _tars(spec: str) -> list[Path]:
    """The tars that `spec` names, sorted; none where it names a folder of images."""
    path = Path(spec)
    if path.is_dir():
        if any(entry.is_dir() or _is_image(entry.name) for entry in path.iterdir()):
            return []
        return sorted(path.glob("*.tar"))
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    patterns = _expand_range(spec)
    folder = path.parent
    found = sorted({p for pattern in patterns for p in folder.glob(Path(pattern).name)})
    missing = [p for p in patterns if not any(c in p for c in "*?[") and not Path(p).exists()]
    if len(patterns) > 1 and missing:
        raise DataError(f"{spec}: {len(missing)} of {len(patterns)} shards are missing, first {missing[0]}")
    return found


def _expand_range(spec: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if not match:
        return [spec]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [f"{spec[: match.start()]}{n:0{len(first)}d}{spec[match.end() :]}" for n in numbers]


def _members(tar: Path) -> list[_Member]:
    import tarfile

    members = []
    try:
        with tarfile.open(
            tar, "r:"
        ) as archive:  # "r:" = uncompressed only: the others cannot be read at random
            for info in archive:
                path = info.name.removeprefix("./")
                if (info.islnk() or info.issym()) and _is_image(path):
                    raise DataError(f"{tar}: '{path}' is a link; write the tar anew with `tar --dereference`")
                if info.isfile() and not os.path.basename(path).startswith("."):
                    members.append(_Member(tar, path, info.offset_data, info.size))
    except tarfile.TarError as error:
        raise DataError(f"{tar}: not a whole, uncompressed tar ({error}); copy or unpack it again") from None
    return members


def _from_tars(tars: list[Path]) -> ImageSource:
    members = [m for tar in tars for m in _members(tar)]
    images = [m for m in members if _is_image(m.path)]
    if any(m.path.endswith(".cls") for m in members):
        images, labels, classes = _webdataset_labels(members)
    else:
        images.sort(key=lambda m: (m.path, m.tar))
        labels, classes = _path_labels(images)
    prefix = len(tars) > 1
    names = tuple(f"{m.tar.name}:{m.path}" if prefix else m.path for m in images)
    others = sum(not _is_image(m.path) and not m.path.endswith(".cls") for m in members)
    return ImageSource(
        names, labels, classes, lambda i: Image.open(io.BytesIO(images[i].read())), ignored=others
    )


def _path_labels(images: list[_Member]) -> tuple[np.ndarray, tuple[str, ...]]:
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
    labels = [index.get(os.path.basename(os.path.dirname(m.path)), -1) for m in images]
    return np.array(labels, np.int64), classes


def _webdataset_labels(members: list[_Member]) -> tuple[list[_Member], np.ndarray, tuple[str, ...]]:
    """Images with the whole numbers of their KEY.cls files, in the order of the tars."""
    samples: dict[tuple[Path, str], dict[str, _Member]] = {}
    for m in members:
        folder, base = os.path.split(m.path)
        kind = "image" if _is_image(base) else "cls" if base.endswith(".cls") else "other"
        sample = samples.setdefault((m.tar, os.path.join(folder, base.split(".", 1)[0])), {})
        if kind in sample and kind != "other":
            raise DataError(f"{m.tar}: '{sample[kind].path}' and '{m.path}' belong to the same sample")
        sample[kind] = m
    pictured = [s for s in samples.values() if "image" in s]
    labels = np.array([_read_cls(s) for s in pictured], np.int64)
    count = int(labels.max(initial=-1)) + 1
    return [s["image"] for s in pictured], labels, tuple(str(i) for i in range(count))


def _read_cls(sample: dict[str, _Member]) -> int:
    image = sample["image"]
    if "cls" not in sample:
        raise DataError(f"{image.tar}: '{image.path}' has no .cls beside it, though others have")
    text = sample["cls"].read().strip()
    if not re.fullmatch(rb"-1|\d{1,6}", text):
        raise DataError(
            f"{image.tar}: '{sample['cls'].path}' holds {text[:20]!r}, expected a class number or -1"
        )
    return int(text)


# --- digits ------------------------------------------------------------------------------------------------


def _digits(split: str) -> ImageSource:
    """scikit-learn's 1797 digits of 8x8, in a fixed split of 1297 (train) and 500 (test)."""
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
