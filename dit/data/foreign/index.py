"""An index of shards made elsewhere: the manifest and the names that make a data set of them, nothing copied.

Each shard is read once, from front to end, by tarwalk.py, which refuses tars that nobody should trust. What the
index has decoded then, foreign.py decodes again whenever a block is read.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dit.config import ConfigError, config, from_dict
from dit.data import DataError
from dit.data.codecs.autoencoders import unknown_vae
from dit.data.codecs.base import Codec
from dit.data.codecs.codec import parse_codec
from dit.data.foreign.probe import IndexOptions, probe
from dit.data.foreign.tape import Indexed, SampleFormat, ShardIndexer
from dit.data.shards.manifest import FILE, Block, Manifest, Names, Shard
from dit.data.shards.write import ChannelStats, write_names
from dit.data.sources.classes import Classes, LabelColumn, empty_classes_note
from dit.data.sources.source import listing
from dit.data.storage.remote import advised, is_remote, public
from dit.errors import Notice
from dit.files import expand


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
    layout, labels, classes = _labels(found, layout, options)
    _tell(layout, labels, classes)
    folder.mkdir(parents=True, exist_ok=True)
    names = write_names(folder, [key for shard in found for key in shard.keys])
    _manifest(found, layout, codec, options, classes, labels, names, folder).save(folder)
    return Manifest.load(folder)


def _labels(
    found: list[Indexed], layout: SampleFormat, options: IndexOptions
) -> tuple[SampleFormat, np.ndarray, Classes]:
    """The layout, as far as labels decide about it; the labels of all samples, (n,) int64; names of the classes."""
    column = LabelColumn(options.label_type)
    for shard in found:
        column.merge(shard.labels)

    def where(sample: int) -> str:
        key, shard = next(islice(((key, s) for s in found for key in s.keys), sample, None))
        return f"{public(shard.location)}: the sample {key!r}"

    head = public(found[0].location) + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    if not column.has_labels:
        layout = replace(layout, foreign=replace(layout.foreign, label=None))
        return layout, np.full(len(column), -1, np.int64), options.classes or ()
    way_out = "leave the labels out with --label=none"
    if options.classes is not None:
        way_out = f"name all classes with --classes, or {way_out}"
    labels, classes = column.numbered(head, where, options.classes, way_out=way_out)
    return replace(layout, foreign=replace(layout.foreign, named=column.is_named)), labels, classes


def _tell(layout: SampleFormat, labels: np.ndarray, classes: Classes) -> None:
    """What whoever indexes should know of the labels."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    odd = empty_classes_note(classes, counts)
    if layout.keys:
        odd = f"no labels: KEY.json has the keys {layout.keys}; --label_key=KEY takes the labels from one"
    if odd:
        warnings.warn(odd, Notice, stacklevel=3)


def _manifest(
    found: list[Indexed],
    layout: SampleFormat,
    codec: Codec | UnknownCodec,
    options: IndexOptions,
    classes: Classes,
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
