"""An index of shards made elsewhere: the manifest and the names that make a data set of them, nothing copied.

Each shard is read once, from front to end, by tarwalk.py, which refuses tars that nobody should trust. What the
index has decoded then, foreign.py decodes again whenever a block is read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from dit.config import ConfigError, config, from_dict
from dit.data import DataError
from dit.data.codecs.autoencoders import unknown_vae
from dit.data.codecs.base import Codec
from dit.data.codecs.codec import parse_codec
from dit.data.foreign.reader import ARRAYS, json_label, read_array, split_path
from dit.data.foreign.tape import (
    MAX_LABEL,
    MAX_SAMPLE,
    Beginning,
    Indexed,
    SampleFormat,
    ShardIndexer,
    groups,
)
from dit.data.shards.manifest import FILE, ITEMSIZE, MAX_BLOCK_BYTES, Block, Foreign, Manifest, Names, Shard
from dit.data.shards.write import ChannelStats, write_names
from dit.data.sources.source import listing
from dit.data.sources.tarwalk import Member
from dit.data.storage.remote import advised, is_remote, public
from dit.files import expand


@config
class IndexOptions:
    """How the samples are stored, where the shards do not say it themselves.

    array: latents (C, H, W), or moments (2C, H, W) or (2, C, H, W); a leading axis of 1 may stand before. spread: what
    the second half of moments is. extension, label: of the members; found in the first sample by default. flipped:
    extension of the flipped view. scale: stored = latents * scale. dtype: of the samples when they are read.
    classes: their names; the numbers that were found by default. image_size: pixels a side; the latents' times the
    codec's factor by default. block: samples a block at most. threads: shards at a time.
    """

    # latents (C, H, W), or moments (2C, H, W) or (2, C, H, W)
    array: Literal["latents", "moments"] = "latents"
    spread: Literal["std", "logvar"] = "std"  # what the second half of moments is
    extension: str | None = None  # of the members that hold arrays; null = as in the first sample
    flipped: str | None = None  # extension of the flipped view; null = there is none
    # how labels are stored; auto = as in the first sample
    label: Literal["auto", "cls", "json", "none"] = "auto"
    scale: float = 1.0  # stored = latents * scale
    dtype: Literal["float16", "float32"] = "float16"  # of the samples when they are read
    classes: tuple[str, ...] | None = None  # their names; null = the numbers that are found
    image_size: int | None = None  # pixels a side; null = the latents' times the codec's factor
    block: int = 256  # samples a block at most
    threads: int = 4  # shards that are read at a time

    def __post_init__(self) -> None:
        for name in ("block", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.scale < float("inf"):
            raise ConfigError(
                f"scale is {self.scale}, expected a finite number above 0 (stored = latents * scale)"
            )
        for name in ("extension", "flipped"):
            given = getattr(self, name)
            if given is not None and given.lower().rpartition(".")[2] not in ARRAYS:
                raise ConfigError(f"{name} is {given!r}, expected one that ends in {', '.join(ARRAYS)}")


@config
class UnknownCodec:
    """A codec of which no more is known. scaling_factor: its own normalisation; factor: pixels to a latent, a side."""

    has_posterior: ClassVar[bool] = True
    channels: int
    scaling_factor: float | None = None
    factor: int = 8

    def identity(self) -> dict[str, Any]:
        return unknown_vae(self.channels, self.scaling_factor)


def codec_of(name: str, keys: Mapping[str, str], scale: float = 1.0) -> Codec | UnknownCodec:
    """Build the codec that made latents: one of CODECS, or "unknown", whose scaling_factor is `scale` by default."""
    if name != "unknown":
        return parse_codec({"name": name}, keys).build("cpu")
    known = {} if scale == 1.0 else {"scaling_factor": scale}
    return from_dict(UnknownCodec, {**known, **{re.sub(r"^codec[._]", "", k): v for k, v in keys.items()}})


# --- how samples are stored ----------------------------------------------------------------------------------


def probe(location: str, options: IndexOptions, channels: int) -> SampleFormat:
    """Find out how samples are stored, from a shard's first one. Raises DataError where that is not clear."""
    file = Beginning(location)
    key, members = _first_sample(file, options)
    where = f"{public(location)}: the sample {key!r}"
    extension = options.extension or next(e for e in members if _is_array(e, options))
    arrays = [e for e in members if _is_array(e, options)]
    if extension not in members or (options.extension is None and len(arrays) > 1):
        have = ", ".join(arrays)
        raise DataError(f"{where} has the arrays {have}: choose one with --extension (and --flipped)")
    label = options.label if options.label != "auto" else _found_label(where, file, members)
    try:
        dtype, array = read_array(extension, memoryview(file.member(members[extension], MAX_SAMPLE)))
        shape = codec_shape(options.array, array.shape)
        if shape[-3] != channels:
            twice = options.array == "latents" and shape[-3] == 2 * channels
            more = ": are these mean and std? --array=moments" if twice else ""
            raise ValueError(f"{array.shape} has {shape[-3]} channels, the codec has {channels}{more}")
    except ValueError as error:
        raise DataError(f"{where}: .{extension}: {error}") from None
    values: dict[str, Any] = {
        "array": extension,
        "flipped": options.flipped,
        "label": None if label == "none" else label,
    }
    values |= {"shape": array.shape, "dtype": dtype, "spread": options.spread, "scale": options.scale}
    whole = (1 if options.flipped is None else 2, *shape)
    most = MAX_BLOCK_BYTES // (math.prod(whole) * ITEMSIZE[options.dtype])
    no_labels = options.label == "auto" and label == "none"
    block = max(1, min(options.block, most))
    return SampleFormat(from_dict(Foreign, values), whole, options.dtype, block, no_labels)


def _first_sample(file: Beginning, options: IndexOptions) -> tuple[str, dict[str, Member]]:
    """(key, members by extension) of the first sample that has an array."""
    for key, group in groups(file, file.name):
        members = {split_path(m.path.encode())[1]: m for m in group}
        if any(_is_array(extension, options) for extension in members):
            return key, members
    raise DataError(f"{public(file.name)}: no member ends in one of {', '.join(ARRAYS)}")


def _is_array(extension: str, options: IndexOptions) -> bool:
    return extension.rpartition(".")[2] in ARRAYS and extension != options.flipped


def _found_label(where: str, file: Beginning, members: dict[str, Member]) -> str:
    """Which file beside an array is the label: any .cls, or a .json with a number; both may turn out bad ones."""
    if "cls" in members:
        return "cls"
    try:
        labelled = "json" in members and type(json_label(file.member(members["json"], MAX_LABEL))) is int
    except ValueError as error:
        raise DataError(f"{where}: .json: {error}; --label=none if it is no label") from None
    return "json" if labelled else "none"


def codec_shape(array: Literal["latents", "moments"], stored: tuple[int, ...]) -> tuple[int, ...]:
    """Return (C, H, W), or (2, C, H, W) of moments, for one stored array. ValueError for a shape that is neither."""
    inner = stored[1:] if len(stored) > 3 and stored[0] == 1 else stored
    if array == "latents" and len(inner) == 3:
        return inner
    if array == "moments" and len(inner) == 3 and inner[0] % 2 == 0:
        return 2, inner[0] // 2, *inner[1:]
    if array == "moments" and len(inner) == 4 and inner[0] == 2:
        return inner
    expected = "(C, H, W)" if array == "latents" else "(2C, H, W) or (2, C, H, W)"
    raise ValueError(f"an array {stored} for {array}, expected {expected}, maybe with a leading 1")


# --- all of them -------------------------------------------------------------------------------------------


def index(
    shards: list[str],
    out: str | os.PathLike[str],
    codec: Codec | UnknownCodec,
    options: IndexOptions,
    progress: Callable[[int], object] = lambda n: None,
) -> Manifest:
    """Write manifest.json and names.txt of these shards in the folder `out`; raises DataError, and writes nothing then.

    codec: that made the latents. progress: called with the number of bytes read since the last call.
    """
    folder = Path(expand(str(out))).resolve()
    if (folder / FILE).exists():
        raise DataError(f"{folder / FILE} exists already: remove it or choose another folder")
    if options.array == "moments" and not codec.has_posterior:
        raise ConfigError("array is moments, but this codec has no posterior: expected latents")
    with _reading(shards[0]):
        layout = probe(shards[0], options, codec.channels)
    found = _all(shards, layout, options.threads, progress)
    _refuse_twice(found)
    classes, labels = _classes(found, options)
    folder.mkdir(parents=True, exist_ok=True)
    names = write_names(folder, [key for shard in found for key in shard.keys])
    _manifest(found, layout, codec, options, classes, labels, names, folder).save(folder)
    return Manifest.load(folder)


def _classes(found: list[Indexed], options: IndexOptions) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of classes, and the labels of all samples, (n,) int64."""
    labels = np.concatenate([part for shard in found for part in shard.labels])
    classes = options.classes
    if classes is None:
        classes = tuple(str(i) for i in range(int(labels.max()) + 1))
    if labels.max() >= len(classes):
        raise DataError(_without_class(found, labels, len(classes)))
    return classes, labels


def _without_class(found: list[Indexed], labels: np.ndarray, classes: int) -> str:
    odd = int(np.argmax(labels >= classes))
    key, shard = next(islice(((key, s) for s in found for key in s.keys), odd, None))
    what = f"the sample {key!r} has the label {labels[odd]}, with {classes} classes"
    return f"{public(shard.location)}: {what}: name all of them with --classes"


def _manifest(
    found: list[Indexed],
    layout: SampleFormat,
    codec: Codec | UnknownCodec,
    options: IndexOptions,
    classes: tuple[str, ...],
    labels: np.ndarray,
    names: Names,
    folder: Path,
) -> Manifest:
    stats = ChannelStats()
    for shard in found:
        stats.merge(shard.stats)
    blocks = [(i, *block) for i, shard in enumerate(found) for block in shard.blocks]
    return Manifest(
        format="dit-samples/1",
        samples=len(labels),
        array=options.array,
        shape=layout.shape,
        dtype=options.dtype,
        views=("original",) if layout.foreign.flipped is None else ("original", "flipped"),
        posterior="moments" if options.array == "moments" else "sample" if codec.has_posterior else "none",
        image_size=options.image_size or codec.factor * max(layout.shape[-2:]),
        transform="unknown: made elsewhere",
        classes=classes,
        class_counts=tuple(np.bincount(labels[labels >= 0], minlength=len(classes)).tolist()),
        unlabelled=int((labels < 0).sum()),
        mean=tuple(np.asarray(stats.mean).tolist()),
        std=tuple(stats.std.tolist()),
        codec=codec.identity(),
        seed=0,
        block=layout.block,
        names=names,
        shards=tuple(
            Shard(name=shard_name(s.location, folder), bytes=s.bytes, sha256=s.sha256) for s in found
        ),
        blocks=tuple(Block(shard=i, offset=o, bytes=b, samples=n, xxh3=x) for i, o, b, n, x in blocks),
        foreign=layout.foreign,
    )


def _all(
    shards: list[str], layout: SampleFormat, threads: int, progress: Callable[[int], object]
) -> list[Indexed]:
    """Every shard, in order. The first fault ends all."""

    def one(location: str) -> Indexed:
        with _reading(location):
            return ShardIndexer(location, layout, progress).run()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="dit-index")
    try:
        return list(pool.map(one, shards))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _reading(location: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        what = advised(error) if isinstance(error, OSError) else str(error)
        raise DataError(f"{public(location)}: cannot be read: {what}") from None


def _refuse_twice(found: list[Indexed]) -> None:
    first: dict[str, str] = {}
    twice = []
    for shard in found:
        for key in shard.keys:
            if key in first:
                twice.append(f"{key!r} in {public(first[key])} and {public(shard.location)}")
            first[key] = shard.location
    if twice:
        raise DataError(listing(f"{len(twice)} key(s) that stand for two samples", twice))


def shard_name(location: str, folder: Path) -> str:
    """Name a shard: relative to the manifest's folder where it lies inside, so that both can be moved together."""
    if is_remote(location) or not Path(location).is_relative_to(folder):
        return location
    return str(Path(location).relative_to(folder))
