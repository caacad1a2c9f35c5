"""Records written once to a local file, to be read in any order by all processes of a machine.

For sources that give their records only in their own order: reading each record of a Parquet file alone means decoding
its whole row group each time. The file lies in the folder for temporary files (TMPDIR), is as large as the records, and
goes when the last process that reads it ends; after a kill it stays, and is used by the next run of the same source.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from dit.data import DataError


class Spill:
    """`count` records of bytes. read(i) is safe from any thread.

    key: names the content: equal keys, equal records. records: called to give them, in order, by the one process that
    writes; bytes_: about what they need. Raises DataError where the disk has not that much room.
    """

    def __init__(self, key: str, count: int, bytes_: int, records: Callable[[], Iterable[bytes]]):
        self._path = _folder() / f"{key}.bin"
        with _alone(self._path):  # one writes, the others wait for it
            if not self._path.exists():
                _write(self._path, count, bytes_, records)
            # for writing too: over NFS nothing else can be locked alone, as `_close` does
            self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(self._file, fcntl.LOCK_SH)
        self.close = weakref.finalize(self, _close, self._file, self._path)
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, 8 * (count + 1), size - 8 * (count + 1))
        self._offsets = np.frombuffer(tail, np.int64)

    def size(self, index: int) -> int:
        """Bytes of record `index`."""
        return int(self._offsets[index + 1] - self._offsets[index])

    def read(self, index: int) -> bytes:
        """Record `index`."""
        start, stop = self._offsets[index : index + 2].tolist()
        data = os.pread(self._file, stop - start, start)
        if len(data) < stop - start:
            raise OSError(f"{self._path}: ends early")
        return data


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"dit-spill-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise DataError(f"{error}; TMPDIR says where temporary files go") from None
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise DataError(f"{folder} belongs to somebody else: set TMPDIR to a folder of your own")
    return folder


def _write(path: Path, count: int, bytes_: int, records: Callable[[], Iterable[bytes]]) -> None:
    """Records one after the other, then where each begins and the last ends: int64 (count + 1,)."""
    free = shutil.disk_usage(path.parent).free
    if bytes_ > free:
        raise DataError(
            f"needs about {bytes_ / 1e9:.1f} GB in {path.parent}, which has {free / 1e9:.1f} GB free: "
            "set TMPDIR to a folder on a larger disk"
        )
    offsets = np.zeros(count + 1, np.int64)
    partial = path.with_suffix(".partial")  # what a kill leaves of it is written over by the next run
    try:
        with partial.open("wb") as file:
            for i, record in enumerate(records()):
                file.write(record)
                offsets[i + 1] = len(record)
            file.write(np.cumsum(offsets).tobytes())
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{partial}: {error}; TMPDIR says where temporary files go") from None
    finally:
        partial.unlink(missing_ok=True)


def _close(file: int, path: Path) -> None:
    with _alone(path):  # while this process holds the file it is there, so nobody is long about it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another process still reads it, and will remove it
        else:
            path.unlink(missing_ok=True)
        finally:
            os.close(file)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time. The lock's file stays: one that waits for a file without a name keeps nobody out."""
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            what = f"{path.parent}: a file cannot be locked here ({error.strerror})"
            raise DataError(f"{what}: set TMPDIR to a folder on a disk of this machine") from None
        yield
    finally:
        os.close(lock)
