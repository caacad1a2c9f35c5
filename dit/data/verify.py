"""Checking a data set on disk against its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dit.data import DataError
from dit.data.blocks import BlockError, BlockReader, record_key
from dit.data.manifest import Manifest
from dit.data.write import ChannelStats

STATISTICS_TOLERANCE = 1e-6  # relative to the std; they come from the same float16 values
NOISE_TOLERANCE = 6.0  # standard errors of the mean and the std of standard normal numbers


@dataclass(frozen=True)
class Fault:
    """Something broken: in which file, which part of it ("" = the whole), and what is wrong."""

    file: str
    part: str
    what: str


def verify(manifest: Manifest) -> Iterator[Fault | None]:
    """Read everything; yields a Fault for each thing that is broken, and None at each block (for progress)."""
    for shard in range(len(manifest.shards)):
        yield from _shard(manifest, shard)
    names = 0
    try:
        names = len(manifest.read_names())
        if names != manifest.names.count:
            yield Fault(manifest.names.file, "", f"{names} names, the manifest says {manifest.names.count}")
    except DataError as error:
        yield Fault(manifest.names.file, "", str(error))
    yield from _blocks(manifest)


def _shard(manifest: Manifest, number: int) -> Iterator[Fault]:
    """The whole file: size and sha256 (which also covers what lies between and after the blocks)."""
    shard, path = manifest.shards[number], manifest.path(number)
    if not path.is_file():
        yield Fault(shard.name, "", "missing")
        return
    size = path.stat().st_size
    if size != shard.bytes:
        yield Fault(shard.name, "", f"{size} bytes, the manifest says {shard.bytes}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        yield Fault(shard.name, "", f"sha256 {found[:16]}..., the manifest says {shard.sha256[:16]}...")


def _blocks(manifest: Manifest) -> Iterator[Fault | None]:
    """Every block by its own checksum, then what only all of them together can show."""
    reader, stats, noise = BlockReader(manifest, verify="always"), ChannelStats(), ChannelStats()
    ids, labels = [], []
    whole = True
    for index, block in enumerate(manifest.blocks):
        yield None
        try:
            arrays = reader.read(index)
        except BlockError as error:
            whole = False
            where = f"record {record_key(index)}, bytes {block.offset} to {block.offset + block.bytes}"
            yield Fault(manifest.shards[block.shard].name, where, error.what)
            continue
        big = arrays[manifest.array]
        stats.add(big if manifest.array == "moments" else big[:, :, None])
        if manifest.eps:
            noise.add(arrays["eps"][:, :, None])
        ids.append(arrays["id"])
        labels.append(arrays["label"])
    if whole:
        yield from _together(manifest, np.concatenate(ids), np.concatenate(labels))
        yield from _generated(stats, noise) if manifest.eps else _statistics(manifest, stats)


def _together(manifest: Manifest, ids: np.ndarray, labels: np.ndarray) -> Iterator[Fault]:
    """Labels and ids over the data set."""
    counts = np.bincount(labels[labels >= 0], minlength=len(manifest.classes))
    if tuple(counts.tolist()) != manifest.class_counts:
        yield Fault("manifest.json", "class_counts", f"labels count {counts.tolist()[:8]}...")
    if len(np.unique(ids)) != len(ids) or int(ids.max()) >= manifest.names.count:
        yield Fault("manifest.json", "ids", "an id occurs twice or has no name")


def _statistics(manifest: Manifest, stats: ChannelStats) -> Iterator[Fault]:
    """That the manifest's mean and std are those of the latents."""
    std = np.array(manifest.std)
    for what, ours, theirs in (("mean", stats.mean, manifest.mean), ("std", stats.std, manifest.std)):
        if not np.all(np.abs(np.asarray(ours) - np.array(theirs)) <= STATISTICS_TOLERANCE * std):
            yield Fault(
                "manifest.json", what, f"the latents have {np.asarray(ours).tolist()}, it says {list(theirs)}"
            )


def _generated(latents: ChannelStats, noise: ChannelStats) -> Iterator[Fault]:
    """That generated latents are finite, and the noise they came from standard normal.

    The manifest's mean and std are not theirs, but the normalisation of the model that made them.
    """
    if not np.isfinite(latents.std).all():
        yield Fault("manifest.json", "latents", "some of them are not finite")
    mean, std, error = np.asarray(noise.mean), noise.std, NOISE_TOLERANCE / np.sqrt(noise.count)
    if not np.all(np.abs(mean) <= error) or not np.all(np.abs(std - 1) <= error / np.sqrt(2)):
        found = f"mean {mean.tolist()} and std {std.tolist()}"
        yield Fault("manifest.json", "eps", f"stored noise of {found} is not standard normal")
