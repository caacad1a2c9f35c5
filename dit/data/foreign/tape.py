"""One foreign shard, read once from front to end: its samples, checked, and what the manifest says of its blocks.

tarwalk.py refuses tars that nobody should trust; what is decoded here is decoded again in the same way when blocks
are read (foreign.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, BinaryIO, Never, cast

import numpy as np
import xxhash

from dit.data import DataError
from dit.data.foreign.reader import (
    MemberError,
    Place,
    Sample,
    decode,
    decode_labels,
    places,
    samples_in,
    split_path,
    wanted,
)
from dit.data.origin import Foreign
from dit.data.shards.manifest import MAX_BLOCK_BYTES
from dit.data.shards.records import TAR_BLOCK
from dit.data.shards.write import ChannelStats
from dit.data.sources.beside import MAX_LABEL, json_fields
from dit.data.sources.classes import USUAL, Label, LabelColumn, LabelType, read_label
from dit.data.sources.tarwalk import Member, walk
from dit.data.storage.files import AnyStorage
from dit.data.storage.remote import public

CHUNK = 4 << 20  # bytes asked for at a time
MAX_STRETCH = 4 * MAX_BLOCK_BYTES  # bytes of a block in its shard, with what lies beside the arrays
MAX_SAMPLE = 1 << 30  # bytes of one sample, with all its members


class Beginning:
    """A shard of which the first samples are looked at: what tarwalk needs of a file. Holds what it read last alone."""

    def __init__(self, location: str):
        self.storage, self.name = AnyStorage(""), location
        self._held, self._base, self._at = bytearray(), 0, 0
        self.size = self.storage.size(location)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = self.size if whence == 2 else offset
        return self._at

    def read(self, size: int) -> bytes:
        stop = min(self._at + size, self.size)
        self._hold(self._at, stop)
        with memoryview(self._held) as held:
            piece = bytes(held[self._at - self._base : stop - self._base])
        self._at += len(piece)
        return piece

    def member(self, member: Member, most: int) -> bytes:
        """Read a member's data. ValueError for one of more than `most` bytes."""
        if member.size > most:
            raise ValueError(f"{member.size} bytes, expected at most {most}")
        self.seek(member.offset)
        return self.read(member.size)

    def _hold(self, start: int, stop: int) -> None:
        if start < self._base or stop > self._base + len(self._held):
            self._base, self._held = start, bytearray(max(stop - start, min(CHUNK, self.size - start)))
            self.storage.read(self.name, start, memoryview(self._held))


class Tape(Beginning):
    """A shard read once, from front to end, and hashed; the bytes of a block are held until they are taken."""

    def __init__(self, location: str, progress: Callable[[int], object]):
        super().__init__(location)
        self.sha256, self._progress = hashlib.sha256(), progress

    def take(self, start: int, stop: int) -> bytearray:
        """Return these bytes; all before `stop` are forgotten."""
        self._hold(start, stop)
        piece = self._held[start - self._base : stop - self._base]
        del self._held[: stop - self._base]
        self._base = stop
        return piece

    def _hold(self, start: int, stop: int) -> None:
        while (end := self._base + len(self._held)) < stop:
            chunk = bytearray(min(CHUNK, self.size - end))
            self.storage.read(self.name, end, memoryview(chunk))
            self.sha256.update(chunk)
            self._held += chunk
            self._progress(len(chunk))


@dataclass
class Indexed:
    """What one shard holds. blocks: offset, bytes, samples and xxh3."""

    location: str
    bytes: int = 0
    sha256: str = ""
    blocks: list[tuple[int, int, int, str]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    labels: LabelColumn = field(default_factory=LabelColumn)
    stats: ChannelStats = field(default_factory=ChannelStats)


@dataclass(frozen=True)
class SampleFormat:
    """How samples are stored, and what they become: arrays of `shape` and `dtype`, `block` of them at a time.

    labels: what they are taken as. no_labels: that there are none was not said, but seen in the first sample, whose
    JSON has other keys: then no other may have one.
    """

    foreign: Foreign
    shape: tuple[int, ...]
    dtype: str
    block: int
    no_labels: bool
    labels: LabelType = "auto"
    keys: str = ""


class ShardIndexer:
    """Indexes one shard."""

    def __init__(self, location: str, layout: SampleFormat, progress: Callable[[int], object]):
        self.layout, self.found = layout, Indexed(location, labels=LabelColumn(layout.labels))
        self.wanted = wanted(layout.foreign)
        self.tape = Tape(location, progress)
        # where no sample should have a label: files of the block that may hold one
        self.labels: list[Place] = []

    def run(self) -> Indexed:
        start = end = 0
        samples: list[Sample] = []
        for key, group in groups(self.tape, self.found.location, self.layout.foreign.dotted):
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
        extension = split_path(member.path.encode(), self.layout.foreign.dotted)[1]
        if extension in members:
            self.fail(member.header, f"a second member {extension!r} of the sample; as {member.path!r}")
        place = Place(member.path.encode(), member.offset - start, member.size)
        if extension == "cls" and self.layout.no_labels:
            self._unexpected(member.header, member.path)
        if extension == "json" and self.layout.no_labels and member.size <= MAX_LABEL:
            self.labels.append(place)
        if extension == self.layout.foreign.label and member.size > MAX_LABEL:
            self.fail(member.header, f"{member.path!r} of {member.size} bytes is no label")
        if extension in self.wanted:
            members[extension] = place

    def _label(self, value: Any) -> Label | None:
        """A label, to be judged when all are there; where it alone is none, the place in the shard is said now."""
        return None if value is None else read_label(value, self.layout.labels)

    def _unexpected(self, start: int, path: str) -> Never:
        self.fail(start, f"{path!r}, but the first sample has no label; --label=none for no labels")

    def _block(self, start: int, stop: int, samples: list[Sample]) -> None:
        """Decode a block as the reader will, and note what the manifest says of it."""
        layout, data = self.layout, self.tape.take(start, stop)
        try:
            known = list(samples_in(places(data), self.wanted, layout.foreign.dotted)) == samples
        except ValueError:
            known = False
        if not known:
            self.fail(start, "headers that the reader of blocks would take for something else")
        out = np.empty((len(samples), *layout.shape), layout.dtype)
        try:
            decode(layout.foreign, samples, data, out)
            labels = decode_labels(layout.foreign, samples, data, self._label)
        except MemberError as error:
            self.fail(start + error.offset, f"{error}")
        odd = [s for s, array in zip(samples, out, strict=True) if not np.isfinite(array).all()]
        if odd:
            what = f"values that are not finite{self._why(odd[0], data)}"
            place = odd[0].members[layout.foreign.array]
            self.fail(start + place.offset - TAR_BLOCK, f"the sample {odd[0].key.decode()!r} has {what}")
        self._none_labelled(start, data)
        self.found.blocks.append((start, stop - start, len(samples), xxhash.xxh3_64_hexdigest(data)))
        self.found.keys += [s.key.decode() for s in samples]
        for label in labels:
            self.found.labels.add(label)
        self.found.stats.add(out if out.ndim == 6 else out[:, :, None])

    def _why(self, sample: Sample, data: bytearray) -> str:
        """Whether that is for the array itself, or because it does not fit into the data set's dtype."""
        exact = np.empty((1, *self.layout.shape), np.float32)
        decode(self.layout.foreign, [sample], data, exact)
        if np.isfinite(exact).all():
            return f" in {self.layout.dtype}, though they are as stored: --dtype=float32 takes them"
        return " as they are stored, which no --dtype mends: make this sample anew, or leave it out"

    def _none_labelled(self, start: int, data: bytearray) -> None:
        for path, offset, size in self.labels:
            try:
                fields = json_fields(bytes(data[offset : offset + size]))
            except ValueError:
                continue  # what is no JSON is no label either
            if any(fields.get(key) is not None for key in USUAL):
                self._unexpected(start + offset, path.decode())
        self.labels = []

    def fail(self, start: int, what: str) -> Never:
        raise DataError(f"{public(self.found.location)}: from byte {start} on: {what}")


def groups(tape: Beginning, location: str, dotted: bool = False) -> Iterator[tuple[str, Iterator[Member]]]:
    """Group the members of a tar by the key that those next to each other share."""
    return groupby(
        walk(cast(BinaryIO, tape), public(location)),
        lambda m: split_path(m.path.encode(), dotted)[0].decode(),
    )
