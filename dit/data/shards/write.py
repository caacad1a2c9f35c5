"""Writing a data set: shards, their checksums, the statistics of the latents, and the folder that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from dit.data import DataError
from dit.data.shards.manifest import MAX_BLOCK_BYTES, Block, Names, Shard, record_key
from dit.data.shards.records import END, pack, record_bytes
from dit.files import sync, write_atomically

PLAN = "plan.json"  # in an OUT.partial that several ranks write (parts.py)


class ShardFile:
    """One tar of records, written beside its name in `folder`, and given it when it is whole.

    number: of the shard, which its blocks hold. tag: goes into the name it has until then; writers that may be at
    the same shard at the same time need their own. As a context it leaves nothing behind unless finish was called.
    """

    def __init__(self, folder: Path, name: str, number: int = 0, tag: str = ""):
        self.path, self.number = folder / name, number
        self.blocks: list[Block] = []
        self.bytes = 0  # so far
        self._beside = folder / f".{name}{tag}.partial"
        self._out = self._beside.open("wb")
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._out.closed:
            with contextlib.suppress(OSError):  # what is buffered need not arrive: the file goes
                self._out.close()
            self._beside.unlink(missing_ok=True)

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Append one block."""
        total, start = xxhash.xxh3_64(), self.bytes
        for piece in pack(record_key(self.path.name, len(self.blocks)), arrays):
            total.update(piece)
            self._write(piece)
        self.blocks.append(
            Block(
                shard=self.number,
                offset=start,
                bytes=self.bytes - start,
                samples=len(next(iter(arrays.values()))),
                xxh3=total.hexdigest(),
            )
        )

    def _write(self, data: bytes | memoryview) -> None:
        self._out.write(data)
        self._sha256.update(data)
        self.bytes += len(data)

    def finish(self) -> Shard:
        """End it: from now on it is there, and lasts once the folder is synced."""
        self._write(END)
        self._out.flush()
        os.fsync(self._out.fileno())
        self._beside.replace(self.path)
        self._out.close()
        return Shard(name=self.path.name, bytes=self.bytes, sha256=self._sha256.hexdigest())


class ShardWriter:
    """Writes records into shard-000000.tar, shard-000001.tar, ... of at most `shard_bytes` (one record at least)."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.limit = folder, shard_bytes
        self.shards: list[Shard] = []
        self.blocks: list[Block] = []
        self._file: ShardFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.__exit__(*error)

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Append one block."""
        if self._file and self._file.bytes + record_bytes(arrays) + len(END) > self.limit:
            self.finish()
        if not self._file:
            self._file = ShardFile(self.folder, shard_name(len(self.shards)), len(self.shards))
        self._file.add(arrays)
        self.blocks.append(self._file.blocks[-1])

    def finish(self) -> None:
        """End the shard that is being written."""
        if self._file:
            self.shards.append(self._file.finish())
            self._file = None


def shard_name(number: int) -> str:
    """Name a shard: `shard-000012.tar`."""
    return f"shard-{number:06d}.tar"


def samples_per_block(most: int, sample_bytes: int) -> int:
    """Return the samples of a full block: `most`, or fewer where those would take more than MAX_BLOCK_BYTES."""
    return max(1, min(most, MAX_BLOCK_BYTES // sample_bytes))


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
        self.block = self.block or samples_per_block(self._most, sample_bytes)
        whole = count // self.block * self.block
        for start in range(0, whole, self.block):
            yield {name: a[start : start + self.block] for name, a in arrays.items()}
        self._waiting = {name: a[whole:] for name, a in arrays.items()}

    def rest(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the last block, if there is something left for it."""
        if any(len(a) for a in self._waiting.values()):
            yield self._waiting


def names_file(names: Sequence[str]) -> tuple[bytes, Names]:
    """Make the names file's content, and what the manifest says of it; DataError for a name with a line break."""
    odd = next((n for n in names if "\n" in n), None)
    if odd is not None:
        raise DataError(f"the name {odd!r} has a line break in it: rename the file")
    data = "".join(f"{n}\n" for n in names).encode()
    return data, Names(count=len(names), sha256=hashlib.sha256(data).hexdigest())


def write_names(folder: Path, names: Sequence[str]) -> Names:
    """Write the names file; DataError for a name with a line break in it."""
    data, written = names_file(names)
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
        noise = (flat[:, 1] ** 2).mean((0, 2, 3)) if flat.shape[1] == 2 else np.zeros_like(mean)
        self.merge(ChannelStats(flat[:, 0].size // len(mean), mean, spread, noise))

    def merge(self, other: ChannelStats) -> None:
        """Take in the statistics of other latents."""
        if not other.count:
            return
        n = other.count
        self.count += n
        step = other.mean - self.mean
        self.mean = self.mean + step * (n / self.count)
        self.spread = self.spread + other.spread + step**2 * (n * (self.count - n) / self.count)
        self.noise = self.noise + (other.noise - self.noise) * (n / self.count)

    @property
    def std(self) -> np.ndarray:
        """(C,)"""
        return np.asarray(np.sqrt(self.spread / self.count + self.noise))

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON values, exactly: Python writes each float with the digits that give it back."""
        arrays = {name: np.ravel(getattr(self, name)).tolist() for name in ("mean", "spread", "noise")}
        return {"count": self.count, **arrays}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ChannelStats:
        """Return what to_plain was called on."""
        arrays = {name: np.array(plain[name], np.float64) for name in ("mean", "spread", "noise")}
        return cls(int(plain["count"]), **arrays)


@contextlib.contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """Make an empty folder OUT.partial that becomes `out` if the body ends well, and is removed if it does not.

    What a killed process left there is cleared by the next one; a lock keeps two at a time apart.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already: remove it or choose another name")
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    if (partial / PLAN).exists():
        raise DataError(f"{partial} holds an encode that can go on: remove it or choose another name")
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
