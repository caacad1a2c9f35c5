"""Arrays in an npz, read row by row: an archive of 50,000 images is larger than the memory it is read in.

numpy's own reader gives an array whole. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from dit.evals.pictures.pictures import PicturesError
from dit.files import sought

LOCAL = struct.Struct(
    "<4s5H3I2H"
)  # a member's header: 30 bytes, its last two fields the lengths of name and extra
BROKEN = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


class Archive:
    """The arrays of an npz: names, and each as `Rows`. Raises PicturesError where the file is none, or is cut off."""

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            raise PicturesError(
                f"{path} is a folder: an npz was expected by its name; rename a folder of images"
            )
        if not path.is_file():
            raise PicturesError(f"{path}: no such file{sought(path)}")
        try:
            self.zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            with path.open("rb") as file:
                head = file.read(4)
            what = "it is cut off or damaged" if head[:2] == b"PK" else f"it begins with {head!r}"
            raise PicturesError(f"{path} is not a whole npz: {what} ({error}); copy it again") from None
        self.members = {info.filename.removesuffix(".npy"): info for info in self.zip.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def rows(self, name: str) -> Rows:
        """An array by its name."""
        return Rows(self, name)

    def whole(self, name: str) -> np.ndarray:
        """A small array by its name, as numpy reads it and checks it."""
        self.rows(name)
        try:
            with self.zip.open(self.members[name]) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except BROKEN as error:
            raise self.broken(name, error) from None

    def broken(self, name: str, error: BaseException) -> PicturesError:
        """What to raise where a member cannot be read."""
        return PicturesError(
            f"{self.path}: {name} cannot be read ({type(error).__name__}: {error}): the file is damaged"
        )


class Rows:
    """One array of an archive: shape, dtype, and rows of it. Its checksum is taken for what its content is.

    Stored arrays (numpy.savez) are read where they lie; compressed ones from their beginning on, so rows that are asked
    for in ascending order are unpacked once.
    """

    def __init__(self, archive: Archive, name: str):
        self.archive, self.name, self.info = archive, name, archive.members[name]
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._descriptor: int | None = None
        try:
            with archive.zip.open(self.info) as file:
                self.shape, fortran, self.dtype = _header(file)
                self._begin = file.tell()
        except BROKEN as error:
            raise archive.broken(name, error) from None
        if self.dtype.hasobject:
            raise PicturesError(
                f"{archive.path}: {name} holds Python objects, which are never unpickled: save it as a plain array "
                "(uint8, (N, H, W, 3)), as numpy.stack of the images makes one"
            )
        if fortran and math.prod(self.shape) > max(self.shape, default=0):
            raise PicturesError(
                f"{archive.path}: {name} is in Fortran order: save numpy.ascontiguousarray of it"
            )
        self._row = self.dtype.itemsize * math.prod(self.shape[1:])
        expected = self._begin + self.dtype.itemsize * math.prod(self.shape)
        if self.info.file_size != expected:
            raise PicturesError(
                f"{archive.path}: {name} has {self.info.file_size} bytes, and {self.shape} {self.dtype} takes "
                f"{expected}: it is cut off or damaged"
            )

    @property
    def crc(self) -> int:
        """The checksum of the array in the archive's own directory."""
        return self.info.CRC

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop)."""
        count = (stop - start) * self._row
        data = bytearray(count)
        with self._lock:
            try:
                stored = self.info.compress_type == zipfile.ZIP_STORED
                got = (
                    self._pread(memoryview(data), start) if stored else self._unpack(memoryview(data), start)
                )
            except BROKEN as error:
                raise self.archive.broken(self.name, error) from None
        if got != count:
            raise PicturesError(
                f"{self.archive.path}: {self.name} ends before row {stop}: the file is cut off"
            )
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])

    def _pread(self, into: memoryview, start: int) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.archive.path, os.O_RDONLY)
            head = os.pread(self._descriptor, LOCAL.size, self.info.header_offset)
            *_, name, extra = LOCAL.unpack(head)
            self._data = self.info.header_offset + LOCAL.size + name + extra + self._begin
        got = 0
        while got < len(into):
            now = os.preadv(self._descriptor, [into[got:]], self._data + start * self._row + got)
            if not now:
                break
            got += now
        return got

    def _unpack(self, into: memoryview, start: int) -> int:
        if self._file is None:
            self._file = self.archive.zip.open(self.info)
        self._file.seek(self._begin + start * self._row)
        got = 0
        while got < len(into):
            now = self._file.readinto(into[got:])  # type: ignore[attr-defined]
            if not now:
                break
            got += now
        return got

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"an array of format {version}")
    shape, fortran, dtype = read[version](file)
    return shape, fortran, dtype
