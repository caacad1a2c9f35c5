"""Reading blocks: records (records.py) of up to a few hundred samples, checked, from wherever the shards are."""

from __future__ import annotations

import math
import tarfile
import threading
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from dit.data import DataError
from dit.data.manifest import Manifest
from dit.data.records import (
    HEAD,
    NPY_HEADER,
    TAR_BLOCK,
    member_bytes,
    parse_members,
    parse_npy,
    parse_npy_header,
    xxh3_of,
)
from dit.data.storage.cached import CachedStorage, with_cache
from dit.data.storage.files import State, Storage, describe, open_storage
from dit.data.storage.nodecache import CacheStats, NodeCacheConfig
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
        self.storage = with_cache(self.open_storage(manifest.root), cache, manifest, verify == "always")
        # what is read in place, in a record's order
        self.big: dict[str, np.dtype[Any]] = {manifest.array: np.dtype(manifest.dtype)}
        if manifest.eps:
            self.big["eps"] = np.dtype(np.float32)
        self._sample_bytes = [math.prod(manifest.shape) * dtype.itemsize for dtype in self.big.values()]
        self._verified: dict[int, State] = {}  # block -> state of its shard
        self._lock = threading.Lock()

    def open_storage(self, root: str) -> Storage:
        """Where the shards lie."""
        return open_storage(root)

    @property
    def cache_stats(self) -> CacheStats | None:
        """What this reader's cache did so far; None where it has none."""
        return self.storage.cache.stats if isinstance(self.storage, CachedStorage) else None

    @property
    def block_bytes(self) -> int:
        """Bytes that the samples of a full block take in memory."""
        return self.manifest.block * sum(self._sample_bytes)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """Block `index`: {"moments" or "latents": (n, *shape), "label": (n,) int64, "id": (n,) uint64}.

        With "eps": (n, *shape) float32 where the data set stores noise.
        """
        shape = (self.manifest.blocks[index].samples, *self.manifest.shape)
        rows = {name: np.empty(shape, dtype) for name, dtype in self.big.items()}
        label, identity = self.read_into(index, *rows.values())
        return {**rows, "label": label, "id": identity}

    def read_into(self, index: int, *rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read block `index`, its big arrays into `rows`, one for each of `big`, (n, ...) C-contiguous.

        Returns (label, id). Raises DataError with the shard, the record and the place in the file.
        """
        return self.scatter(index, [[r.reshape(-1).view(np.uint8).data] for r in rows])

    def scatter(self, index: int, bodies: list[list[memoryview]]) -> tuple[np.ndarray, np.ndarray]:
        """Read block `index`; for each of `big`, its bytes go to the pieces of memory in `bodies`, one after another.

        Returns (label, id). Raises DataError with the shard, the record and the place in the file.
        """
        block, small = self.manifest.blocks[index], member_bytes(8 * self.manifest.blocks[index].samples)
        sizes = [block.samples * size for size in self._sample_bytes]
        whole = sum(member_bytes(size) for size in sizes) + 2 * small
        if [sum(map(len, body)) for body in bodies] != sizes or block.bytes != whole:
            raise self.fault(
                index, f"{block.samples} samples take {whole} bytes: the manifest contradicts itself"
            )
        padding = [member_bytes(size) - HEAD - size for size in sizes]
        heads = [bytearray(pad + HEAD) for pad in (0, *padding[:-1])]  # what stands before each body
        tail = bytearray(padding[-1] + 2 * small)
        parts = [p for head, body in zip(heads, bodies, strict=True) for p in (memoryview(head), *body)]
        parts.append(memoryview(tail))
        self.receive(
            index, parts, lambda: self._check(index, [h[-HEAD:] for h in heads], sizes, tail[padding[-1] :])
        )
        label = np.frombuffer(tail, np.int64, block.samples, padding[-1] + HEAD)
        identity = np.frombuffer(tail, np.uint64, block.samples, padding[-1] + small + HEAD)
        return label, identity

    def receive(self, index: int, parts: list[memoryview], check: Callable[[], None] = lambda: None) -> None:
        """Read the record's bytes into the parts. Bytes not known to be good are hashed, and `check` is called."""
        state = self.fetch(index, parts)
        with self._lock:
            self.reads += 1
            known = self.verify == "first" and self._verified.get(index) == state
        if not known:
            self.check_hash(index, parts)
            check()
            with self._lock:
                self._verified[index] = state

    def fetch(self, index: int, buffers: list[memoryview]) -> State:
        """Read the record's bytes into the buffers; returns the file's state. Raises BlockError."""
        block = self.manifest.blocks[index]
        name = self.manifest.shards[block.shard].name
        try:
            return self.storage.read(name, block.offset, buffers)
        except EOFError as error:
            raise self.fault(index, str(error)) from None
        except OSError as error:
            raise self.fault(index, f"cannot be read: {describe(error)}") from None

    def check_hash(self, index: int, parts: list[memoryview]) -> None:
        """BlockError unless the record's bytes, in these parts, have the manifest's hash."""
        expected, found = self.manifest.blocks[index].xxh3, xxh3_of(parts)
        if found != expected:
            raise self.fault(index, f"altered: its xxh3 is {found}, the manifest has {expected}")

    def _check(self, index: int, heads: list[bytearray], sizes: list[int], tail: bytearray) -> None:
        """That a record is built as the manifest says. tail: the members after the big ones."""
        n, names = self.manifest.blocks[index].samples, []
        shape = (n, *self.manifest.shape)
        try:
            for head, size, dtype in zip(heads, sizes, self.big.values(), strict=True):
                info = tarfile.TarInfo.frombuf(bytes(head[:TAR_BLOCK]), "utf-8", "strict")
                found = parse_npy_header(bytes(head[TAR_BLOCK:]))
                if found != (dtype, shape, NPY_HEADER) or info.size != NPY_HEADER + size:
                    raise ValueError(f"'{info.name}' is {found[0]} of {found[1]}, not {dtype} of {shape}")
                names.append(info.name)
            arrays = {name: parse_npy(data) for name, data in parse_members(memoryview(tail))}
        except (ValueError, tarfile.TarError) as error:
            raise self.fault(index, f"not what the manifest describes: {error}") from None
        key, names = names[0].split(".")[0], [*names, *arrays]
        if names != [f"{key}.{part}.npy" for part in (*self.big, "label", "id")]:
            expected = ", ".join([*self.big, "label"])
            raise self.fault(index, f"holds {', '.join(names)}, expected {expected} and id")
        for array, expect in zip(arrays.values(), (np.int64, np.uint64), strict=True):
            if array.shape != (n,) or array.dtype != expect:
                raise self.fault(
                    index, f"a {array.dtype} array of shape {array.shape}, expected {expect} of ({n},)"
                )
        self.check_labels(index, arrays[f"{key}.label.npy"])

    def check_labels(self, index: int, labels: np.ndarray) -> None:
        """BlockError for labels (n,) that are neither -1 nor the index of a class."""
        classes = len(self.manifest.classes)
        outside = (labels < -1) | (labels >= classes)
        if outside.any():
            row = int(np.argmax(outside))
            raise self.fault(index, f"sample {row} has the label {labels[row]}, of {classes} classes")

    def keys(self, record: bytes) -> list[str]:
        """What the records in a block's bytes are called."""
        name = tarfile.TarInfo.frombuf(record[:TAR_BLOCK], "utf-8", "strict").name
        return [name.partition(".")[0]]

    def expected_keys(self, index: int, names: list[str]) -> list[str]:
        """What they should be called; names: of the names file."""
        return [self.manifest.record(index)]

    def fault(self, index: int, what: str) -> BlockError:
        """An error about block `index`: shard, record and offset, what is wrong and what to do."""
        block = self.manifest.blocks[index]
        return BlockError(
            what,
            f"{public(self.manifest.path(block.shard))}: record {self.manifest.record(index)} (bytes {block.offset} to "
            f"{block.offset + block.bytes}): {what}. Copy the file again or encode again; "
            f"`tools/shards.py verify {public(self.manifest.root)}` lists all that is broken",
        )
