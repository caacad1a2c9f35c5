"""Where a data set's files lie: a local folder, or anything that fsspec reads by byte range (http, s3, ...)."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Protocol

from dit.data.storage.remote import RemoteStorage, has_own_root, is_remote, split
from dit.data.storage.web import HttpStorage

State = Hashable  # of a file: differs after the file has changed
REMOTE = {"http": HttpStorage, "https": HttpStorage}  # protocols that need more than fsspec's `cat_file`


class Storage(Protocol):
    """Reads files of one folder, by name. Raises OSError; FileNotFoundError where there is no such file."""

    def read(self, name: str, offset: int, buffer: memoryview) -> State:
        """Fill a buffer of bytes from a file's `offset` on. EOFError where it ends before."""

    def bytes(self, name: str) -> bytes:
        """Read all of a small file."""

    def size(self, name: str) -> int:
        """Return the bytes that a file has."""


def open_storage(root: str) -> Storage:
    """Open the storage of a folder or URL. Raises DataError where a protocol is unknown or its package missing."""
    if not is_remote(root):
        return LocalStorage(Path(root))
    protocol, _, rest = root.partition("://")
    if protocol == "file":
        return LocalStorage(Path(rest))
    return REMOTE.get(protocol, RemoteStorage)(root)


def describe(error: OSError) -> str:
    """Say what went wrong, without the file's name."""
    return error.strerror or str(error)


def fill(descriptor: int, offset: int, buffer: memoryview) -> None:
    """Fill a buffer of bytes from an open file's `offset` on. OSError; EOFError where the file ends before."""
    done = 0
    while done < len(buffer):  # one system call gives at most 2 GiB
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise EOFError(f"truncated: the file ended at byte {offset + done} while it was read")
        done += count


class LocalStorage:
    """A folder of this machine's file systems."""

    def __init__(self, root: Path):
        self.root = root

    def read(self, name: str, offset: int, buffer: memoryview) -> State:
        """Fill the buffer; the state is the file's inode, size and time."""
        descriptor = os.open(self.root / name, os.O_RDONLY)
        try:
            stat = os.fstat(descriptor)
            if stat.st_size < offset + len(buffer):
                raise EOFError(f"truncated: the file ends at byte {stat.st_size}")
            fill(descriptor, offset, buffer)
        finally:
            os.close(descriptor)
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def bytes(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size


class AnyStorage:
    """Files of one folder, and such as lie elsewhere: their names are whole paths and URLs (foreign shards)."""

    def __init__(self, root: str):
        self._root = root
        self._storages: dict[str, Storage] = {}

    def read(self, name: str, offset: int, buffer: memoryview) -> State:
        storage, name = self._find(name)
        return storage.read(name, offset, buffer)

    def bytes(self, name: str) -> bytes:
        storage, name = self._find(name)
        return storage.bytes(name)

    def size(self, name: str) -> int:
        storage, name = self._find(name)
        return storage.size(name)

    def _find(self, name: str) -> tuple[Storage, str]:
        """The storage of a file's folder, and its name there; a URL's query belongs to the folder (join)."""
        root = self._root
        if has_own_root(name):
            root, name = split(name)
        if root not in self._storages:
            self._storages[root] = open_storage(root)
        return self._storages[root], name
