"""One foreign shard, read once from front to end: its samples, checked, and what the manifest says of its blocks.

tarwalk.py refuses tars that nobody should trust; what is decoded here is decoded again in the same way when blocks
are read (foreign.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import BinaryIO, Never, cast

import numpy as np
import xxhash

from dit.data import DataError
from dit.data.foreign.reader import Place, Sample, decode, places, samples_in, split_path, wanted
from dit.data.manifest import MAX_BLOCK_BYTES, Foreign
from dit.data.sources.tarwalk import Member, walk
from dit.data.storage.files import AnyStorage
from dit.data.storage.remote import public
from dit.data.write import ChannelStats

CHUNK = 4 << 20  # bytes asked for at a time
MAX_STRETCH = 4 * MAX_BLOCK_BYTES  # bytes of a block in its shard, with what lies beside the arrays
MAX_SAMPLE = 1 << 30  # bytes of one sample, with all its members


class Tape:
    """A shard read once, from front to end: what tarwalk needs of a file, and the bytes of blocks."""

    def __init__(self, location: str, progress: Callable[[int], object]):
        self.storage, self.name, self._progress = AnyStorage(""), location, progress
        self.sha256 = hashlib.sha256()
        self._held, self._base, self._at = bytearray(), 0, 0
        self.size = self.storage.size(location)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = self.size if whence == 2 else offset
        return self._at

    def read(self, size: int) -> bytes:
        piece = bytes(self._bytes(self._at, min(self._at + size, self.size)))
        self._at += len(piece)
        return piece

    def take(self, start: int, stop: int) -> bytearray:
        """These bytes; all before `stop` are forgotten."""
        piece = self._bytes(start, stop)
        del self._held[: stop - self._base]
        self._base = stop
        return piece

    def _bytes(self, start: int, stop: int) -> bytearray:
        while (end := self._base + len(self._held)) < stop:
            chunk = bytearray(min(CHUNK, self.size - end))
            self.storage.read(self.name, end, [memoryview(chunk)])
            self.sha256.update(chunk)
            self._held += chunk
            self._progress(len(chunk))
        return self._held[start - self._base : stop - self._base]


@dataclass
class Indexed:
    """What one shard holds. blocks: offset, bytes, samples and xxh3."""

    location: str
    bytes: int = 0
    sha256: str = ""
    blocks: list[tuple[int, int, int, str]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    stats: ChannelStats = field(default_factory=ChannelStats)


@dataclass(frozen=True)
class Layout:
    """How samples are stored, and what they become: arrays of `shape` and `dtype`, `block` of them at a time.

    no_labels: that there are none was not said, but seen in the first sample.
    """

    foreign: Foreign
    shape: tuple[int, ...]
    dtype: str
    block: int
    no_labels: bool


class ShardIndexer:
    """Indexes one shard."""

    def __init__(self, location: str, layout: Layout, progress: Callable[[int], object]):
        self.layout, self.found = layout, Indexed(location)
        self.wanted = wanted(layout.foreign)
        self.tape = Tape(location, progress)

    def run(self) -> Indexed:
        start = end = 0
        samples: list[Sample] = []
        for key, group in groups(self.tape, self.found.location):
            members = dict[str, Place]()
            for place, member in enumerate(group):
                full = len(samples) == self.layout.block or member.header - start > MAX_STRETCH
                if place == 0 and samples and full:
                    self._block(start, member.header, samples)
                    start, samples = member.header, []
                self._take_in(members, member, start)
                end = member.end
                if end - start > MAX_STRETCH + MAX_SAMPLE:
                    self.fail(start, f"{end - start} bytes up to the end of sample {key!r}, too many at once")
            if members:
                samples.append(Sample(key.encode(), members))
        if not samples:
            self.fail(0, f"no samples: none has a member .{self.layout.foreign.array}; leave this shard out")
        self._block(start, end, samples)
        self.found.bytes, self.found.sha256 = self.tape.size, self.tape.sha256.hexdigest()
        return self.found

    def _take_in(self, members: dict[str, Place], member: Member, start: int) -> None:
        """Note a member that is wanted, with its place in the block."""
        extension = split_path(member.path.encode())[1]
        if extension in members:
            self.fail(member.header, f"a second member {extension!r} of the sample; as {member.path!r}")
        if extension == "cls" and self.layout.no_labels:
            self.fail(
                member.header,
                f"{member.path!r}, but the first sample has no label; --label=none for no labels",
            )
        if extension in self.wanted:
            members[extension] = Place(member.path.encode(), member.offset - start, member.size)

    def _block(self, start: int, stop: int, samples: list[Sample]) -> None:
        """Decode a block as the reader will, and note what the manifest says of it."""
        layout, data = self.layout, self.tape.take(start, stop)
        try:
            known = list(samples_in(places(data), self.wanted)) == samples
        except ValueError:
            known = False
        if not known:
            self.fail(start, "headers that the reader of blocks would take for something else")
        out = np.empty((len(samples), *layout.shape), layout.dtype)
        try:
            labels = decode(layout.foreign, samples, data, out)
        except ValueError as error:
            self.fail(start, f"{error}")
        odd = [
            s
            for s, array, label in zip(samples, out, labels, strict=True)
            if label < -1 or not np.isfinite(array).all()
        ]
        if odd:
            what = f"a label below -1, or values that are not finite in {layout.dtype} (try --dtype=float32)"
            self.fail(start, f"the sample {odd[0].key.decode()!r} has {what}")
        self.found.blocks.append((start, stop - start, len(samples), xxhash.xxh3_64_hexdigest(data)))
        self.found.keys += [s.key.decode() for s in samples]
        self.found.labels.append(labels)
        self.found.stats.add(out if out.ndim == 6 else out[:, :, None])

    def fail(self, start: int, what: str) -> Never:
        raise DataError(f"{public(self.found.location)}: from byte {start} on: {what}")


def groups(tape: Tape, location: str) -> Iterator[tuple[str, Iterator[Member]]]:
    """The members of a tar by the key that those next to each other share."""
    return groupby(
        walk(cast(BinaryIO, tape), public(location)), lambda m: split_path(m.path.encode())[0].decode()
    )
