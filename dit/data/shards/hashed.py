"""A storage as verify reads it: each file from front to end, hashed as it comes by, until the storage is at fault."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from dit.data import DataError
from dit.data.storage.files import State, Storage
from dit.data.storage.remote import advice_of, advised

T = TypeVar("T")
CHUNK = 4 << 20  # bytes read at a time where there is no block

Progress = Callable[[int], object]  # called with the number of bytes read since the last call


class Reading:
    """A storage whose files are read from front to end, each by one thread, and hashed as they come by."""

    def __init__(self, storage: Storage, progress: Progress):
        self.storage, self.progress = storage, progress
        self.hashes: dict[str, hashlib._Hash] = {}
        self.at: Counter[str] = Counter()
        self.last: dict[str, memoryview] = {}  # what was read last of each file
        self.fault: DataError | None = None  # of the storage, and not of a file

    def read(self, name: str, offset: int, buffer: memoryview) -> State:
        state = self._asked(lambda: self.storage.read(name, offset, buffer))
        if offset == self.at[name]:
            self._passed(name, buffer)
        self.last[name] = buffer
        return state

    def rest(self, name: str, size: int) -> Iterator[memoryview]:
        """Read what comes after the last block, to the file's end."""
        while (at := self.at[name]) < size:
            chunk = memoryview(bytearray(min(CHUNK, size - at)))
            self._asked(partial(self.storage.read, name, at, chunk))
            self._passed(name, chunk)
            yield chunk

    def _asked(self, request: Callable[[], T]) -> T:
        """What the storage answers. DataError, from then on at once, where the storage is at fault and no file."""
        if self.fault is not None:
            raise self.fault
        try:
            return request()
        except OSError as error:
            if advice_of(error):
                self.fault = DataError(f"{error.filename}: {advised(error)}")
                raise self.fault from None
            raise

    def _passed(self, name: str, data: memoryview) -> None:
        self.hashes.setdefault(name, hashlib.sha256()).update(data)
        self.at[name] += len(data)
        self.progress(len(data))

    def sha256(self, name: str) -> str:
        return self.hashes.get(name, hashlib.sha256()).hexdigest()

    def bytes(self, name: str) -> bytes:
        return self.storage.bytes(name)

    def size(self, name: str) -> int:
        return self._asked(lambda: self.storage.size(name))
