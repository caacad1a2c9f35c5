"""Reading blocks: records (records.py) of up to a few hundred samples, checked, from wherever the shards are."""

from __future__ import annotations

import contextlib
import math
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dit.data import DataError
from dit.data.shards.manifest import Manifest
from dit.data.shards.records import (
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
from dit.data.storage.files import LocalStorage, State, Storage, describe, open_storage
from dit.data.storage.nodecache import CacheStats, NodeCacheConfig
from dit.data.storage.pieces import Pieces
from dit.data.storage.remote import public


class BlockError(DataError):
    """A block that cannot be had as it was written. what: the reason alone; the text says also where."""

    def __init__(self, what: str, text: str):
        self.what = what
        super().__init__(text)


@dataclass(frozen=True)
class Layout:
    """Where what is not in a record's big arrays goes: `rest` bytes of memory.

    samples, bytes: of the record. sizes: bytes of each big array. heads: for each, where in `rest` what stands before
    it is: padding and headers. tail: where what stands after the last begins: padding, and from `members` on the
    members of labels and ids.
    """

    samples: int
    bytes: int
    sizes: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    tail: int
    members: int
    rest: int

    @classmethod
    def of(cls, samples: int, sample_bytes: list[int]) -> Layout:
        """Of a record of so many samples of so many bytes in each big array."""
        sizes = tuple(samples * size for size in sample_bytes)
        padding = [member_bytes(size) - HEAD - size for size in sizes]
        heads, start = [], 0
        for before in (0, *padding[:-1]):
            heads.append((start, start + before + HEAD))
            start += before + HEAD
        members, small = start + padding[-1], 2 * member_bytes(8 * samples)
        return cls(
            samples, sum(sizes) + members + small, sizes, tuple(heads), start, members, members + small
        )

    def piece(self, rest: np.ndarray, start: int, stop: int) -> Pieces:
        """Bytes [start, stop) of `rest`."""
        return Pieces(np.array([[rest.ctypes.data + start, stop - start]], np.uint64))

    def small(self, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels and ids, (n,) each."""
        first = self.members + HEAD
        second = first + member_bytes(8 * self.samples)
        label = np.frombuffer(rest, np.int64, self.samples, first)
        return label, np.frombuffer(rest, np.uint64, self.samples, second)


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
        self._scratch = threading.local()
        self._layouts: dict[int, Layout] = {}  # by samples

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

    def distrust(self) -> None:
        """Check every block again when it is read next."""
        with self._lock:
            self._verified.clear()

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
        layout = self._layout(index)
        if tuple(row.nbytes for row in rows) != layout.sizes:
            raise ValueError(
                f"memory for {[row.nbytes for row in rows]} bytes, block {index} has {layout.sizes}"
            )
        rest = np.empty(layout.rest, np.uint8)
        parts: list[memoryview] = []
        for row, (start, stop) in zip(rows, layout.heads, strict=True):
            parts += [rest[start:stop].data, row.reshape(-1).view(np.uint8).data]
        self.receive(index, [*parts, rest[layout.tail :].data], lambda: self._check(index, layout, rest))
        return layout.small(rest)

    def scatter(self, index: int, bodies: list[Pieces]) -> tuple[np.ndarray, np.ndarray]:
        """As `read_into`, the bytes of each big array to pieces of memory in turn.

        A file's block is checked in memory that stays in the processor's cache, and then read again, once, to its
        pieces: no copy by hand is as fast as the system's.
        """
        found = self._scatter_known(index, bodies)
        if found is not None:
            with self._lock:
                self.reads += 1
            return found
        rows = self._scratch_rows(index)
        found = self.read_into(index, *rows)
        again = self._scatter_known(index, bodies)
        if again is None:
            for body, row in zip(bodies, rows, strict=True):
                body.fill(row)
        return again or found

    def _scatter_known(self, index: int, bodies: list[Pieces]) -> tuple[np.ndarray, np.ndarray] | None:
        """None where the block has to be checked, or cannot be read like that."""
        known = self._verified.get(index)
        if known is None or self.verify != "first" or not isinstance(self.storage, LocalStorage):
            return None
        block, layout = self.manifest.blocks[index], self._layout(index)
        rest = np.empty(layout.rest, np.uint8)
        parts = [
            p
            for body, head in zip(bodies, layout.heads, strict=True)
            for p in (layout.piece(rest, *head), body)
        ]
        pieces = Pieces.joined(*parts, layout.piece(rest, layout.tail, layout.rest))
        with self._explained(index):
            state = self.storage.scatter(self.manifest.shards[block.shard].name, block.offset, pieces)
        return layout.small(rest) if state == known else None

    def _layout(self, index: int) -> Layout:
        """How a block's record is laid out. BlockError where the manifest gives it another length."""
        block = self.manifest.blocks[index]
        if block.samples not in self._layouts:
            self._layouts[block.samples] = Layout.of(block.samples, self._sample_bytes)
        layout = self._layouts[block.samples]
        if block.bytes != layout.bytes:
            raise self.fault(
                index, f"{block.samples} samples take {layout.bytes} bytes: the manifest contradicts itself"
            )
        return layout

    def _scratch_rows(self, index: int) -> list[np.ndarray]:
        """Memory of this thread for a block's big arrays."""
        most, n = self.manifest.block, self.manifest.blocks[index].samples
        if not hasattr(self._scratch, "rows"):
            self._scratch.rows = [np.empty((most, *self.manifest.shape), t) for t in self.big.values()]
        return [rows[:n] for rows in self._scratch.rows]

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
        with self._explained(index):
            return self.storage.read(self.manifest.shards[block.shard].name, block.offset, buffers)

    @contextlib.contextmanager
    def _explained(self, index: int) -> Iterator[None]:
        """Errors of the storage as those of a block."""
        try:
            yield
        except EOFError as error:
            raise self.fault(index, str(error)) from None
        except OSError as error:
            raise self.fault(index, f"cannot be read: {describe(error)}") from None

    def check_hash(self, index: int, parts: list[memoryview]) -> None:
        """BlockError unless the record's bytes, in these parts, have the manifest's hash."""
        expected, found = self.manifest.blocks[index].xxh3, xxh3_of(parts)
        if found != expected:
            raise self.fault(index, f"altered: its xxh3 is {found}, the manifest has {expected}")

    def _check(self, index: int, layout: Layout, rest: np.ndarray) -> None:
        """That a record is built as the manifest says. rest: what is not in its big arrays, (layout.rest,) bytes."""
        n, names = self.manifest.blocks[index].samples, []
        shape, data = (n, *self.manifest.shape), rest.tobytes()
        try:
            for (_, stop), size, dtype in zip(layout.heads, layout.sizes, self.big.values(), strict=True):
                head = data[stop - HEAD : stop]
                info = tarfile.TarInfo.frombuf(head[:TAR_BLOCK], "utf-8", "strict")
                found = parse_npy_header(head[TAR_BLOCK:])
                if found != (dtype, shape, NPY_HEADER) or info.size != NPY_HEADER + size:
                    raise ValueError(f"'{info.name}' is {found[0]} of {found[1]}, not {dtype} of {shape}")
                names.append(info.name)
            members = parse_members(memoryview(data)[layout.members :])
            arrays = {name: parse_npy(member) for name, member in members}
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
