"""Reading blocks: records (records.py) of up to a few hundred samples, checked, from wherever the shards are."""

from __future__ import annotations

import tarfile
import threading
from typing import Any, Literal

import numpy as np
import xxhash

from dit.data import DataError
from dit.data.shards.manifest import Manifest
from dit.data.shards.records import TAR_BLOCK, parse_members, parse_npy
from dit.data.storage.cached import BlockTable, CachedBlock, CachedStorage, with_cache
from dit.data.storage.files import State, Storage, describe, open_storage
from dit.data.storage.nodecache import CacheStats, NodeCacheConfig, file_of
from dit.data.storage.remote import public


class BlockError(DataError):
    """A block that cannot be had as it was written. what: the reason alone; the text says also where."""

    def __init__(self, what: str, text: str):
        self.what = what
        super().__init__(text)


class BlockReader:
    """Reads single blocks of a data set, checking all that can be checked. Threads may share one.

    verify: check a block's hash, names, types and shapes "always", or "first": when this process reads it for the
    first time, and again when the shard's size, time or inode has changed since.
    cache: a folder of this node that blocks are kept in (nodecache.py); `cache_stats` tells what it did.
    `reads` counts the blocks read.
    """

    def __init__(
        self,
        manifest: Manifest,
        verify: Literal["first", "always"] = "first",
        cache: NodeCacheConfig | None = None,
    ):
        self.manifest = manifest
        self.verify = verify
        self.reads = 0
        self.storage = with_cache(
            self.open_storage(manifest.root), cache, _table(manifest), manifest.root, verify == "always"
        )
        # a record's first arrays
        self.big: dict[str, np.dtype[Any]] = {manifest.array: np.dtype(manifest.dtype)}
        if manifest.eps:
            self.big["eps"] = np.dtype(np.float32)
        self._verified: dict[int, State] = {}  # block -> state of its shard
        self._lock = threading.Lock()

    def open_storage(self, root: str) -> Storage:
        """Open what holds the shards."""
        return open_storage(root)

    @property
    def cache_stats(self) -> CacheStats | None:
        """What this reader's cache did so far; None where it has none."""
        return self.storage.cache.stats if isinstance(self.storage, CachedStorage) else None

    def distrust(self) -> None:
        """Check every block again when it is read next."""
        with self._lock:
            self._verified.clear()

    def read(self, index: int, buffer: memoryview | None = None) -> dict[str, np.ndarray]:
        """Read block `index`: {"moments" or "latents": (n, *shape), "label": (n,) int64, "id": (n,) uint64}.

        With "eps": (n, *shape) float32 where the data set stores noise. buffer: at least the block's bytes, which the
        arrays then lie in: they hold until it is filled again; memory of their own by default.
        Raises BlockError with the shard, the record and the place in the file.
        """
        block = self.manifest.blocks[index]
        record = memoryview(bytearray(block.bytes) if buffer is None else buffer)[: block.bytes]
        state = self.fetch(index, record)
        with self._lock:
            self.reads += 1
            known = self.verify == "first" and self._verified.get(index) == state
        if not known:
            self._check_hash(index, record)
        try:
            arrays = self.parse(index, record)
        except (ValueError, tarfile.TarError) as error:
            raise self.fault(index, f"not what the manifest describes: {error}") from None
        self._check_labels(index, arrays["label"])
        with self._lock:
            self._verified[index] = state
        return arrays

    def fetch(self, index: int, record: memoryview) -> State:
        """Read a block's bytes into `record`; returns the file's state. Raises BlockError."""
        block = self.manifest.blocks[index]
        try:
            return self.storage.read(self.manifest.shards[block.shard].name, block.offset, record)
        except EOFError as error:
            raise self.fault(index, str(error)) from None
        except OSError as error:
            raise self.fault(index, f"cannot be read: {describe(error)}") from None

    def parse(self, index: int, record: memoryview) -> dict[str, np.ndarray]:
        """Return the arrays in a block's bytes, checked against the manifest. Raises ValueError or tarfile.TarError."""
        n, members = self.manifest.blocks[index].samples, list(parse_members(record))
        rows = (n, *self.manifest.shape)
        expected = {name: (dtype, rows) for name, dtype in self.big.items()}
        expected |= {"label": (np.dtype(np.int64), (n,)), "id": (np.dtype(np.uint64), (n,))}
        names = [name for name, _ in members]
        key = names[0].partition(".")[0]
        if names != [f"{key}.{name}.npy" for name in expected]:
            raise ValueError(f"holds {', '.join(names)}, expected {', '.join([*self.big, 'label'])} and id")
        arrays = {}
        for (path, data), (name, (dtype, shape)) in zip(members, expected.items(), strict=True):
            array = parse_npy(data)
            if (array.dtype, array.shape) != (dtype, shape):
                raise ValueError(f"'{path}' is {array.dtype} of {array.shape}, not {dtype} of {shape}")
            arrays[name] = array
        return arrays

    def _check_hash(self, index: int, record: memoryview) -> None:
        expected, found = self.manifest.blocks[index].xxh3, xxhash.xxh3_64_hexdigest(record)
        if found != expected:
            raise self.fault(index, f"altered: its xxh3 is {found}, the manifest has {expected}")

    def _check_labels(self, index: int, labels: np.ndarray) -> None:
        """Raise BlockError for labels (n,) that are neither -1 nor the index of a class."""
        classes = len(self.manifest.classes)
        outside = (labels < -1) | (labels >= classes)
        if outside.any():
            row = int(np.argmax(outside))
            raise self.fault(index, f"sample {row} has the label {labels[row]}, of {classes} classes")

    def keys(self, record: bytes) -> list[str]:
        """Return what the records in a block's bytes are called."""
        name = tarfile.TarInfo.frombuf(record[:TAR_BLOCK], "utf-8", "strict").name
        return [name.partition(".")[0]]

    def expected_keys(self, index: int, names: list[str]) -> list[str]:
        """Return what they should be called; names: of the names file."""
        return [self.manifest.record(index)]

    def fault(self, index: int, what: str) -> BlockError:
        """Make an error about block `index`: shard, record and offset, what is wrong and what to do."""
        block = self.manifest.blocks[index]
        return BlockError(
            what,
            f"{public(self.manifest.path(block.shard))}: record {self.manifest.record(index)} (bytes {block.offset} to "
            f"{block.offset + block.bytes}): {what}. Copy the file again or encode again; "
            f"`tools/shards.py verify {public(self.manifest.root)}` lists all that is broken",
        )


def _table(manifest: Manifest) -> BlockTable:
    """The blocks as a node's cache knows them."""
    table = {}
    for block in manifest.blocks:
        shard = manifest.shards[block.shard]
        file = file_of(shard.sha256, block.offset, block.bytes)
        table[shard.name, block.offset] = CachedBlock(file, block.bytes, block.xxh3)
    return table
