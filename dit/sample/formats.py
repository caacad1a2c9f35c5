"""The forms in which drawn images are given: the ADM suite's npz, a folder of PNGs, WebDataset shards; and latents.

Each is written a block at a time, so that memory does not grow with the number of images, and read back one image
after the other, so that a finished result can be given in another form without drawing anything again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from PIL import Image

from dit.config import Registry, config
from dit.files import sync
from dit.ranks import group

# what reading raises where a file is not as it was written; Pillow says SyntaxError of a broken PNG
DAMAGE = (OSError, EOFError, ValueError, KeyError, SyntaxError, zipfile.BadZipFile, tarfile.TarError)
SHARD_BYTES = 256_000_000  # of a shard, about: it is closed behind the image that reaches it
FASTEST = 1  # of zlib's levels: a tenth larger than the default's files in a fraction of the time
Add = Callable[
    [np.ndarray, np.ndarray], None
]  # values (n, ...) of the next images, and their classes (n,) int64


class Format(ABC):
    """A form of result. array: what of a block it is made of. names: the files and folders in OUT that it makes."""

    array: ClassVar[str] = "images"
    names: ClassVar[tuple[str, ...]]
    checks_each: ClassVar[bool] = True  # an image by itself, whatever became of the others

    @abstractmethod
    def writing(self, folder: Path, count: int) -> contextlib.AbstractContextManager[Add]:
        """Write `count` images into a folder, in turn, as what is entered takes them; whole when that is left."""

    @abstractmethod
    def read(self, out: Path) -> Iterator[np.ndarray]:
        """One image (H, W, 3) uint8 after the other, as OUT holds them; checked. Raises one of DAMAGE."""

    @abstractmethod
    def rescue(self, out: Path, count: int) -> Iterator[np.ndarray | None]:
        """What can be read of `count` images in a damaged result, in turn; None for each that cannot."""


FORMATS: Registry[Format] = Registry("format")
LATENTS = "latents"  # beside the forms that images have


# --- one file ----------------------------------------------------------------------------------------------


@FORMATS.register("npz")
@config
class Npz(Format):
    """samples.npz, the ADM suite's format: arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,)."""

    names = ("samples.npz",)
    checks_each = False  # all have one checksum
    dtype: ClassVar[Any] = np.uint8

    @contextlib.contextmanager
    def writing(self, folder: Path, count: int) -> Iterator[Add]:
        path, labels = folder / self.names[0], list[np.ndarray]()
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:

                def add(values: np.ndarray, label: np.ndarray) -> None:
                    if not labels:
                        member.write(_header((count, *values.shape[1:]), values.dtype))
                    member.write(np.ascontiguousarray(values).data)
                    labels.append(label)

                yield add
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.concatenate(labels))
        sync(path)

    def read(self, out: Path) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(out / self.names[0]) as archive:
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")
            with archive.open("arr_0.npy") as member:
                yield from self._rows(member)

    def rescue(self, out: Path, count: int) -> Iterator[np.ndarray | None]:
        """The rows as they lie behind the header of the file's first member, up to where it ends."""
        return _as_far_as(self._uncompressed(out), count)

    def _uncompressed(self, out: Path) -> Iterator[np.ndarray]:
        """Rows without a look at the table of contents, which stands at the end, or at a checksum."""
        with (out / self.names[0]).open("rb") as file:
            local = file.read(30)
            if local[:4] != b"PK\x03\x04":
                raise zipfile.BadZipFile("it does not begin as a zip file does")
            name, extra = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
            file.seek(name + extra, os.SEEK_CUR)
            yield from self._rows(file)

    def _rows(self, member: IO[bytes]) -> Iterator[np.ndarray]:
        """The rows of a .npy file, (H, W, 3) each or what the form's dtype has."""
        np.lib.format.read_magic(member)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype != self.dtype or len(shape) != 4 or is_fortran:
            raise ValueError(f"an array of {shape} {dtype}")
        size = int(np.prod(shape[1:])) * dtype.itemsize
        for _ in range(shape[0]):
            yield np.frombuffer(member.read(size), dtype).reshape(shape[1:])


@config
class Latents(Npz):
    """latents.npz: arr_0 float32 (N, C, H, W), as the network sees them; arr_1 int64 (N,), their classes."""

    array = "latents"
    names = ("latents.npz",)
    dtype = np.float32


def format_of(name: str) -> Format:
    """The form of this name in a record."""
    return Latents() if name == LATENTS else FORMATS[name]()


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """What a .npy file begins with."""
    header = io.BytesIO()
    form = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, form)
    return header.getvalue()


def _as_far_as(rows: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray | None]:
    """Up to `count` rows, as far as they can be read, and None for each that is lacking."""
    done = 0
    with contextlib.suppress(*DAMAGE):  # where it breaks off, the rest is lacking
        for row in islice(rows, count):
            yield row
            done += 1
    yield from [None] * (count - done)


# --- a file an image ---------------------------------------------------------------------------------------


@FORMATS.register("png")
@config
class Png(Format):
    """images/00000000.png, images/00000001.png, ..., and labels.csv with the class of each (none where it has none)."""

    names = ("images", "labels.csv")

    @contextlib.contextmanager
    def writing(self, folder: Path, count: int) -> Iterator[Add]:
        images = folder / self.names[0]
        shutil.rmtree(images, ignore_errors=True)  # of a start that was killed in here
        images.mkdir()
        numbers = iter(range(count))
        with (folder / self.names[1]).open("w", newline="", encoding="utf-8") as table, _encoder() as encoded:
            rows = csv.writer(table, lineterminator="\n")
            rows.writerow(("file", "label"))

            def add(values: np.ndarray, label: np.ndarray) -> None:
                for data, of_class in zip(encoded(values), label.tolist(), strict=True):
                    name = f"{next(numbers):08d}.png"
                    (images / name).write_bytes(data)
                    rows.writerow((name, of_class if of_class >= 0 else ""))

            yield add
        os.sync()  # once for all of them, where one call a file would take minutes

    def read(self, out: Path) -> Iterator[np.ndarray]:
        found = sorted(path.name for path in (out / self.names[0]).iterdir())
        wrong = next((n for i, n in enumerate(found) if n != f"{i:08d}.png"), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is there, and the one before it is not, or it is no image's name")
        for name in found:
            yield _decoded((out / self.names[0] / name).read_bytes())

    def rescue(self, out: Path, count: int) -> Iterator[np.ndarray | None]:
        """Every file that is there and whole."""
        for number in range(count):
            image = None
            with contextlib.suppress(*DAMAGE):
                image = _decoded((out / self.names[0] / f"{number:08d}.png").read_bytes())
            yield image


@FORMATS.register("webdataset")
@config
class WebDataset(Format):
    """shards/000000.tar, ... with KEY.png and KEY.cls, the class (no KEY.cls where it has none); KEY as 00000000."""

    names = ("shards",)

    @contextlib.contextmanager
    def writing(self, folder: Path, count: int) -> Iterator[Add]:
        shards = folder / self.names[0]
        shutil.rmtree(shards, ignore_errors=True)  # of a start that was killed in here
        shards.mkdir()
        numbers = iter(range(count))
        with contextlib.ExitStack() as last, _encoder() as encoded:
            names = (shards / f"{number:06d}.tar" for number in range(10**6))
            open_shard: list[tuple[tarfile.TarFile, Path]] = []

            def close() -> None:
                for shard, path in open_shard:
                    shard.close()
                    sync(path)
                open_shard.clear()

            last.callback(close)

            def add(values: np.ndarray, label: np.ndarray) -> None:
                for data, of_class in zip(encoded(values), label.tolist(), strict=True):
                    if not open_shard:
                        path = next(names)
                        shard = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
                        open_shard.append((shard, path))
                    key, (shard, _) = f"{next(numbers):08d}", open_shard[0]
                    _add_member(shard, f"{key}.png", data)
                    if of_class >= 0:
                        _add_member(shard, f"{key}.cls", str(of_class).encode())
                    if shard.offset >= SHARD_BYTES:
                        close()

            yield add

    def read(self, out: Path) -> Iterator[np.ndarray]:
        number = 0
        for path in sorted((out / self.names[0]).glob("*.tar")):
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    if not member.name.endswith(".png"):
                        continue
                    held = shard.extractfile(member)
                    if member.name != f"{number:08d}.png" or held is None:
                        raise ValueError(f"{path.name} has {member.name} where {number:08d}.png should be")
                    yield _decoded(held.read())
                    number += 1

    def rescue(self, out: Path, count: int) -> Iterator[np.ndarray | None]:
        """What shards hold before the place where each breaks off, but for single images that are damaged."""
        number = 0
        for path in sorted((out / self.names[0]).glob("*.tar")):
            with contextlib.suppress(*DAMAGE), tarfile.open(path, "r:") as shard:
                for member in shard:
                    key, _, kind = member.name.partition(".")
                    if kind != "png" or not key.isdecimal() or not number <= int(key) < count:
                        continue
                    yield from [None] * (int(key) - number)
                    number = int(key) + 1
                    image = None
                    with contextlib.suppress(*DAMAGE):
                        image = _decoded(shard.extractfile(member).read())  # type: ignore[union-attr]
                    yield image
        yield from [None] * (count - number)


def _add_member(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file of a shard, with nothing in it of when and by whom it was made."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    shard.addfile(info, io.BytesIO(data))


@contextlib.contextmanager
def _encoder() -> Iterator[Callable[[np.ndarray], Iterator[bytes]]]:
    """What makes PNGs (in turn) of images (n, H, W, 3) uint8, on this rank's cores: compressing holds no lock."""
    with ThreadPoolExecutor(group.cores()) as pool:
        yield lambda images: pool.map(_encoded, images)


def _encoded(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG", compress_level=FASTEST)
    return data.getvalue()


def _decoded(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 of a PNG, whose checksums are compared. Raises one of DAMAGE."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        picture.verify()  # all chunks; reading alone compares only some checksums
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        if picture.mode != "RGB":
            raise ValueError(f"a PNG in mode {picture.mode}, not RGB")
        return np.asarray(picture)
