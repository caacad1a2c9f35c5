"""Checking a data set against its manifest: everything in one read, and all that is wrong, not the first alone."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dit.config import ConfigError, from_dict
from dit.data import DataError
from dit.data.shards.blocks import BlockError, BlockReader
from dit.data.shards.hashed import Progress, Reading
from dit.data.shards.manifest import CHECKSUM, FILE, Manifest, folder_of
from dit.data.shards.readers import open_reader
from dit.data.shards.write import ChannelStats
from dit.data.storage.files import describe, open_storage
from dit.data.storage.remote import is_remote
from dit.files import expand

STATISTICS_TOLERANCE = 1e-6  # relative to the std; they come from the same float16 values
NOISE_TOLERANCE = 6.0  # standard errors of the mean and the std of standard normal numbers
SHOWN = 20  # of many faults of one kind


@dataclass(frozen=True)
class Damage:
    """Something broken: in which file, which part of it ("" = the whole), and what is wrong."""

    file: str
    part: str
    what: str


def check_manifest(path: str | os.PathLike[str]) -> tuple[Manifest | None, list[Damage]]:
    """Load a data set's manifest and say what is wrong with the file itself; the manifest also where it was altered.

    None where it cannot be understood. Raises DataError where there is no manifest at all.
    """
    try:
        manifest = Manifest.load(path)
    except DataError as error:
        return _altered(os.fspath(path), error)
    if open_storage(manifest.root).bytes(FILE) != manifest.text():
        return manifest, [Damage(FILE, "", "altered: it says the same, but not byte for byte as written")]
    return manifest, []


def _altered(path: str, error: DataError) -> tuple[Manifest | None, list[Damage]]:
    """What can be had of a manifest that does not load, and why it does not."""
    root = folder_of(expand(path))
    try:
        values = json.loads(open_storage(root).bytes(FILE))
        values.pop(CHECKSUM, None)
        manifest = from_dict(Manifest, {**values, "root": root})
    except OSError:
        raise error from None
    except (ValueError, AttributeError, TypeError, RecursionError, ConfigError):
        return None, [Damage(FILE, "", str(error))]
    faults = [Damage(FILE, "", problem) for problem in manifest.problems()]
    if not faults or "altered" in str(error):
        faults.insert(0, Damage(FILE, "", str(error)))
    return None if manifest.odd_names() else manifest, faults


def verify(manifest: Manifest, progress: Progress = lambda n: None, threads: int = 4) -> list[Damage]:
    """Read every byte of a data set once, and say all that is not as its manifest has it.

    Of a manifest that contradicts itself only the files as a whole are checked. threads: shards at a time. Raises
    DataError, and reads no more, where the storage does not answer or cannot send parts of files.
    """
    (names, faults), reader = _names(manifest), open_reader(manifest, verify="always")
    reading = reader.storage = Reading(reader.storage, progress)
    sound = not manifest.problems()
    blocks: list[list[int]] = [[] for _ in manifest.shards]
    for index, block in enumerate(manifest.blocks if sound else ()):
        blocks[block.shard].append(index)

    def check(number: int) -> _Shard:
        shard = _Shard(manifest, number)
        if not shard.is_there(reading):
            shard.unread = len(blocks[number])
            return shard
        for index in blocks[number]:
            shard.check_block(reader, reading, index, names)
        shard.check_file(reading, sound)
        return shard

    pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="dit-verify")
    try:
        shards = list(pool.map(check, range(len(manifest.shards))))
    finally:
        pool.shutdown(cancel_futures=True)
    faults += [f for shard in shards for f in shard.faults] + [
        f for shard in shards for f in shard.block_faults
    ]
    if sound:
        faults += _ids(manifest, shards)
        if not any(shard.unread for shard in shards):
            faults += _together(manifest, shards)
    return faults


def strays(manifest: Manifest) -> list[str]:
    """List shards in the data set's folder, where that is here, that are no part of it: of another encode, say."""
    if is_remote(manifest.root) or manifest.foreign is not None:
        return []
    ours = {shard.name for shard in manifest.shards}
    return sorted(p.name for p in Path(manifest.root).glob("shard-*.tar") if p.name not in ours)


def check_answers(manifest: Manifest) -> None:
    """Raise DataError where shards lie behind a URL that does not answer, or sends no parts of files."""
    reading = Reading(open_reader(manifest).storage, lambda n: None)
    with contextlib.suppress(OSError, EOFError):  # what is wrong with the file is for verify
        reading.read(manifest.shards[0].name, 0, memoryview(bytearray(1)))


def _names(manifest: Manifest) -> tuple[list[str] | None, list[Damage]]:
    file = manifest.names.file
    try:
        names = manifest.read_names()
    except DataError as error:
        return None, [Damage(file, "", str(error))]
    found = []
    if len(names) != manifest.names.count:
        found.append(Damage(file, "", f"{len(names)} names, the manifest says {manifest.names.count}"))
    if manifest.samples + len(manifest.bad) != manifest.names.count:
        counts = (
            f"{manifest.samples} samples and {len(manifest.bad)} bad images, but {manifest.names.count} names"
        )
        found.append(Damage(FILE, "names", counts))
    return names, found


# --- one shard ---------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """What was found in one shard. stats: of the latents, noise: of the eps that they were generated from."""

    manifest: Manifest
    number: int
    faults: list[Damage] = field(default_factory=list)
    block_faults: list[Damage] = field(default_factory=list)
    size: int = 0  # bytes of its file
    unread: int = 0  # blocks
    stats: ChannelStats = field(default_factory=ChannelStats)
    noise: ChannelStats = field(default_factory=ChannelStats)
    records: list[int] = field(default_factory=list)  # blocks that could be read, with their
    ids: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)

    def is_there(self, reading: Reading) -> bool:
        """Whether there is such a file that may be looked at."""
        try:
            self.size = reading.size(self.manifest.shards[self.number].name)
        except FileNotFoundError:
            self._file("missing")
        except OSError as error:
            self._file(f"cannot be read: {describe(error)}")
        return not self.faults

    def check_file(self, reading: Reading, sound: bool) -> None:
        """Check what the blocks left unread, and the whole file. sound: whether the manifest says where blocks are."""
        shard = self.manifest.shards[self.number]
        end, left_over, size = reading.at[shard.name], False, self.size
        if size != shard.bytes:
            self._file(f"{size} bytes, the manifest says {shard.bytes}")
        try:
            for chunk in reading.rest(shard.name, size):
                left_over |= bool(bytes(chunk).strip(b"\0"))
            if left_over and sound and not self.unread:
                self._file("neither records nor zeros", f"bytes {end} to {size}")
        except (OSError, EOFError) as error:
            self._file(f"cannot be read: {describe(error) if isinstance(error, OSError) else error}")
        else:
            if (found := reading.sha256(shard.name)) != shard.sha256:
                self._file(f"sha256 {found[:16]}..., the manifest says {shard.sha256[:16]}...")

    def _file(self, what: str, part: str = "") -> None:
        self.faults.append(Damage(self.manifest.shards[self.number].name, part, what))

    def check_block(self, reader: BlockReader, reading: Reading, index: int, names: list[str] | None) -> None:
        """Check one block by its hash and its contents. names: the names file's, where it can be used."""
        name = self.manifest.shards[self.number].name
        try:
            arrays = reader.read(index)
        except BlockError as error:
            self.unread += 1
            self._record(index, error.what)
            return
        if self.manifest.foreign is None or names is not None:
            found = reader.keys(bytes(reading.last[name]))
            for here, expected in zip(found, reader.expected_keys(index, names or []), strict=False):
                if here != expected:
                    self._record(index, f"is called {here!r}, expected {expected!r}")
                    break
        self._values(index, arrays)
        self.records.append(index)
        self.ids.append(arrays["id"])
        self.labels.append(arrays["label"])

    def _values(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """That numbers are finite and standard deviations not negative; and their statistics."""
        big = arrays[self.manifest.array]
        kinds = {self.manifest.array: self.stats, **({"eps": self.noise} if self.manifest.eps else {})}
        for name, total in kinds.items():
            stats = ChannelStats()
            with np.errstate(invalid="ignore", over="ignore"):
                stats.add(arrays[name] if name == "moments" else arrays[name][:, :, None])
                total.merge(stats)
            if np.isfinite(stats.std).all():
                continue  # which one number that is not would have prevented
            odd = np.flatnonzero(~np.isfinite(arrays[name]).reshape(len(big), -1).all(1))
            if len(odd):
                self._record(
                    index, f"{name} of {len(odd)} sample(s) are not finite, first of sample {odd[0]}"
                )
        if self.manifest.array == "moments" and (big[:, :, 1] < 0).any():
            self._record(index, "a standard deviation below 0")

    def _record(self, index: int, what: str) -> None:
        block = self.manifest.blocks[index]
        where = f"record {self.manifest.record(index)}, bytes {block.offset} to {block.offset + block.bytes}"
        self.block_faults.append(Damage(self.manifest.shards[self.number].name, where, what))


# --- all of them -------------------------------------------------------------------------------------------


def _ids(manifest: Manifest, shards: list[_Shard]) -> Iterator[Damage]:
    """An id is a line of the names file, and stands for one sample."""
    read = [(index, ids) for shard in shards for index, ids in zip(shard.records, shard.ids, strict=True)]
    if not read:
        return
    ids = np.concatenate([i for _, i in read])
    place = np.repeat([index for index, _ in read], [len(i) for _, i in read])
    order = np.argsort(ids, kind="stable")
    again = order[1:][ids[order][1:] == ids[order][:-1]]  # all but the first of each
    for kind, odd in (("occurs before", again), ("has no name", np.flatnonzero(ids >= manifest.names.count))):
        for i in odd[:SHOWN].tolist():
            name = manifest.shards[manifest.blocks[place[i]].shard].name
            yield Damage(name, f"record {manifest.record(int(place[i]))}", f"the id {ids[i]} {kind}")
        if len(odd) > SHOWN:
            yield Damage(FILE, "ids", f"and {len(odd) - SHOWN} more of which the id {kind}")


def _together(manifest: Manifest, shards: list[_Shard]) -> Iterator[Damage]:
    """Counts and statistics, which only all samples together can show."""
    labels = np.concatenate([part for shard in shards for part in shard.labels])
    counts = np.bincount(labels[labels >= 0], minlength=len(manifest.classes)).tolist()
    for name, found, said in zip(manifest.classes, counts, manifest.class_counts, strict=True):
        if found != said:
            yield Damage(FILE, "class_counts", f"{found} samples of class {name!r}, it says {said}")
    if (loose := int((labels < 0).sum())) != manifest.unlabelled:
        yield Damage(FILE, "unlabelled", f"{loose} samples without a label, it says {manifest.unlabelled}")
    stats, noise = ChannelStats(), ChannelStats()
    for shard in shards:
        stats.merge(shard.stats)
        noise.merge(shard.noise)
    std = noise.std if manifest.eps else stats.std
    if np.isfinite(std).all():  # else it has been said where they are not
        yield from _generated(noise) if manifest.eps else _statistics(manifest, stats)


def _statistics(manifest: Manifest, stats: ChannelStats) -> Iterator[Damage]:
    """That the manifest's mean and std are those of the latents."""
    std = np.array(manifest.std)
    for what, ours, theirs in (("mean", stats.mean, manifest.mean), ("std", stats.std, manifest.std)):
        if not np.all(np.abs(np.asarray(ours) - np.array(theirs)) <= STATISTICS_TOLERANCE * std):
            yield Damage(FILE, what, f"the latents have {np.asarray(ours).tolist()}, it says {list(theirs)}")


def _generated(noise: ChannelStats) -> Iterator[Damage]:
    """That the noise which latents were generated from is standard normal.

    The manifest's mean and std are not the latents', but the normalisation of the model that made them.
    """
    mean, std, error = np.asarray(noise.mean), noise.std, NOISE_TOLERANCE / np.sqrt(noise.count)
    if not np.all(np.abs(mean) <= error) or not np.all(np.abs(std - 1) <= error / np.sqrt(2)):
        found = f"mean {mean.tolist()} and std {std.tolist()}"
        yield Damage(FILE, "eps", f"stored noise of {found} is not standard normal")
