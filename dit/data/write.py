"""Writing a data set: shards, their checksums, the statistics of the latents, and the folder that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from dit.data import DataError
from dit.data.blocks import END, pack, record_key
from dit.data.manifest import Block, Names, Shard
from dit.files import sync, write_atomically

MAX_BLOCK_BYTES = 16 << 20  # readers hold many blocks, so blocks of big samples hold fewer


class ShardWriter:
    """Writes records into shard-000000.tar, shard-000001.tar, ... of at most `shard_bytes` (one record at least)."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.limit = folder, shard_bytes
        self.shards: list[Shard] = []
        self.blocks: list[Block] = []
        self._file = contextlib.ExitStack()
        self._offset = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Append one block."""
        pieces = pack(record_key(len(self.blocks)), arrays)
        size = sum(len(p) for p in pieces)
        if self._offset and self._offset + size + len(END) > self.limit:
            self.finish()
        if not self._offset:
            self._name = f"shard-{len(self.shards):06d}.tar"
            self._out = self._file.enter_context((self.folder / self._name).open("wb"))
            self._sha256 = hashlib.sha256()
        crc = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            self._write(piece)
        self.blocks.append(
            Block(
                shard=len(self.shards),
                offset=self._offset,
                bytes=size,
                samples=len(next(iter(arrays.values()))),
                crc32=crc,
            )
        )
        self._offset += size

    def _write(self, data: bytes | memoryview) -> None:
        self._out.write(data)
        self._sha256.update(data)

    def finish(self) -> None:
        """End the shard that is being written."""
        if self._offset:
            self._write(END)
            self._out.flush()
            os.fsync(self._out.fileno())
            self._file.close()
            size = self._offset + len(END)
            self.shards.append(Shard(name=self._name, bytes=size, sha256=self._sha256.hexdigest()))
            self._offset = 0


class BlockCutter:
    """Takes samples a batch at a time, as {name: (n, ...)}, and gives them back as blocks of `most` samples.

    Of fewer where those would take more than MAX_BLOCK_BYTES. The blocks do not depend on the batches.
    """

    def __init__(self, most: int):
        self._most = most
        self.block = 0  # samples of a full block, known after the first batch
        self._waiting: dict[str, np.ndarray] = {}

    def full(self, arrays: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Take in a batch; the blocks that are full now."""
        if self._waiting:
            arrays = {name: np.concatenate([self._waiting[name], a]) for name, a in arrays.items()}
        count = len(next(iter(arrays.values())))
        sample_bytes = sum(a[:1].nbytes for a in arrays.values() if a.ndim > 1)
        self.block = self.block or max(1, min(self._most, MAX_BLOCK_BYTES // sample_bytes))
        whole = count // self.block * self.block
        for start in range(0, whole, self.block):
            yield {name: a[start : start + self.block] for name, a in arrays.items()}
        self._waiting = {name: a[whole:] for name, a in arrays.items()}

    def rest(self) -> Iterator[dict[str, np.ndarray]]:
        """The last block, if there is something left for it."""
        if any(len(a) for a in self._waiting.values()):
            yield self._waiting


def write_names(folder: Path, names: Sequence[str]) -> Names:
    """The names file; DataError for a name with a line break in it."""
    odd = next((n for n in names if "\n" in n), None)
    if odd is not None:
        raise DataError(f"the name {odd!r} has a line break in it: rename the file")
    data = "".join(f"{n}\n" for n in names).encode()
    written = Names(count=len(names), sha256=hashlib.sha256(data).hexdigest())
    write_atomically(folder / written.file, data)
    return written


@dataclass
class ChannelStats:
    """Mean and std of latents per channel, merged in float64 (Chan, Golub & LeVeque 1983, eq. 2.1).

    The variance of a draw is Var[posterior mean] + E[posterior std^2].
    """

    count: int = 0
    mean: np.ndarray | float = 0.0  # (C,)
    spread: np.ndarray | float = 0.0  # (C,) sum of squared distances from the mean
    noise: np.ndarray | float = 0.0  # (C,) mean of std^2

    def add(self, moments: np.ndarray) -> None:
        """Take in moments (..., 2, C, H, W), or latents as (..., 1, C, H, W)."""
        flat = moments.reshape(-1, *moments.shape[-4:]).astype(np.float64)  # (n, 1 or 2, C, H, W)
        mean = flat[:, 0].mean((0, 2, 3))  # (C,)
        spread = ((flat[:, 0] - mean[:, None, None]) ** 2).sum((0, 2, 3))
        noise = (flat[:, 1] ** 2).mean((0, 2, 3)) if flat.shape[1] == 2 else 0.0
        n = flat[:, 0].size // len(mean)
        self.count += n
        step = mean - self.mean
        self.mean = self.mean + step * (n / self.count)
        self.spread = self.spread + spread + step**2 * (n * (self.count - n) / self.count)
        self.noise = self.noise + (noise - self.noise) * (n / self.count)

    @property
    def std(self) -> np.ndarray:
        """(C,)"""
        return np.asarray(np.sqrt(self.spread / self.count + self.noise))


@contextlib.contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """An empty folder OUT.partial that becomes `out` if the body ends well, and is removed if it does not.

    What a killed process left there is cleared by the next one; a lock keeps two at a time apart.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already: remove it or choose another name")
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{partial} is being written by another process") from None
        for left_over in partial.iterdir():
            left_over.unlink()
        try:
            yield partial
            sync(partial)
            partial.rename(out)  # onto nothing or an empty folder
        except BaseException:
            shutil.rmtree(partial)
            raise
        sync(out.parent)
    finally:
        os.close(descriptor)
