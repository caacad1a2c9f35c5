"""What an encode is: images, codec, options, and all that follows from them before a single image is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dit.config import ConfigError, config, to_dict
from dit.data import DataError
from dit.data.codecs.base import Codec
from dit.data.encoding.parts import Done, Part, cut
from dit.data.shards.manifest import Manifest, Names
from dit.data.shards.records import END, member_bytes
from dit.data.shards.write import ChannelStats, names_file, samples_per_block
from dit.data.sources.crops import CROPS, Centre, Crop
from dit.data.sources.decode import Decode, in_order
from dit.data.sources.images import ImageSource
from dit.rng import Purpose, permutation

OPERATIONAL = (
    "max_bad",
    "workers",
    "max_pixels",
)  # options that may change from one start to the next: no byte depends on them
MAX_BATCH_BYTES = 16 << 30  # of its pixels as float32


@config
class EncodeOptions:
    """How to encode. OPERATIONAL ones may change between starts; all the others decide about the bytes."""

    image_size: Annotated[int, Field(ge=1, le=8192)] = 256  # pixels a side, a multiple of the codec's factor
    flip: bool = True  # store a mirrored view beside each image; --no-flip for digits and text
    block: Annotated[int, Field(ge=1)] = 256  # samples a block at most
    # MB (10^6 bytes) a shard at most, but a block at least; smaller where there would be fewer than 64 to share out
    shard_mb: Annotated[float, Field(gt=0)] = 512.0
    seed: int = 0  # of the order of writing, random crops and drawn latents
    batch_size: Annotated[int, Field(ge=1)] = 64  # images at a time through the codec
    max_bad: Annotated[int, Field(ge=0)] = 0  # unreadable images to leave out before giving up
    posterior: Literal["moments", "sample"] = "moments"  # keep mean and std, or one draw
    workers: Annotated[int, Field(ge=0)] = 0  # threads a rank that decode images; 0: one a core, 16 at most
    dtype: Literal["float16", "float32"] = "float16"  # of the latents or pixels that are stored
    crop: Annotated[Crop, CROPS] = Centre()  # how a square is cut from an image
    decode: Decode | None = Decode()  # how files become pixels; None: as before there was a choice (older.py)

    @property
    def transform(self) -> str:
        """What is done to each image, for the manifest."""
        return self.crop.text if self.decode is None else f"{self.decode.text}; {self.crop.text}"

    def steps(self) -> list[str]:
        """What is done to each image, for whoever encodes, a line each."""
        side = f"{self.image_size} x {self.image_size}"
        flips = (
            "--flip: a mirrored copy of each is stored too; give --no-flip where left and right matter, as in digits "
            "and text"
        )
        return [
            f"each image: {self.transform}; to {side}",
            flips if self.flip else "--no-flip: no mirrored copies",
        ]


def check_fit(codec: Codec, options: EncodeOptions) -> None:
    """Before any image is looked at: ConfigError where codec and options do not go together."""
    batch, side = options.batch_size, options.image_size
    if side % codec.factor:
        below, above = side // codec.factor * codec.factor, -(-side // codec.factor) * codec.factor
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"image_size {side} is not a multiple of the codec's factor {codec.factor}; such as {near}"
        )
    if (taken := 12 * batch * side**2) > MAX_BATCH_BYTES:
        raise ConfigError(
            f"batch_size {batch} at image_size {side} takes {taken / 2**30:.0f} GiB a batch, expected at most "
            f"{MAX_BATCH_BYTES / 2**30:.0f}; lower batch_size"
        )


def planned(codec: Codec, options: EncodeOptions) -> dict[str, Any]:
    """What the bytes follow from beside the images, as JSON values."""
    kept = {k: v for k, v in to_dict(options).items() if k not in OPERATIONAL}
    if options.decode is None:
        del kept["decode"]
    else:
        kept["decode"] = {k: v for k, v in kept["decode"].items() if k not in OPERATIONAL}
    computes = {"device": codec.device.type, "dtype": str(codec.dtype), "tile": codec.tile}
    return {"options": kept, "codec": codec.identity(), "computes": computes}


def views(options: EncodeOptions) -> tuple[Literal["original", "flipped"], ...]:
    """What is stored of each image."""
    return ("original", "flipped") if options.flip else ("original",)


@dataclass(frozen=True)
class Job:
    """One encode, the same on every rank. Raises ConfigError where source, codec and options do not go together."""

    source: ImageSource
    codec: Codec
    options: EncodeOptions
    names: Names = field(init=False)
    names_bytes: bytes = field(init=False)

    def __post_init__(self) -> None:
        check_fit(self.codec, self.options)
        data, names = names_file(self.source.names)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "names_bytes", data)

    @property
    def views(self) -> tuple[Literal["original", "flipped"], ...]:
        """What is stored of each image."""
        return views(self.options)

    @property
    def array(self) -> Literal["moments", "latents"]:
        """What is stored of each view."""
        keep = self.codec.has_posterior and self.options.posterior == "moments"
        return "moments" if keep else "latents"

    @property
    def posterior(self) -> Literal["moments", "sample", "none"]:
        """What is kept of the codec's posterior."""
        return self.options.posterior if self.codec.has_posterior else "none"

    @property
    def shape(self) -> tuple[int, ...]:
        """Return that of a stored sample."""
        side = self.options.image_size // self.codec.factor
        moments = (2,) if self.array == "moments" else ()
        return (len(self.views), *moments, self.codec.channels, side, side)

    @cached_property
    def block(self) -> int:
        """Samples of a full block."""
        return samples_per_block(self.options.block, self._sample_bytes)

    @property
    def _sample_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.options.dtype).itemsize

    @cached_property
    def order(self) -> np.ndarray:
        """The order of writing: (N,) int64, a permutation of the images' ids."""
        return permutation(self.options.seed, Purpose.ENCODE, 0, len(self.source))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What the order is cut into."""
        record = member_bytes(self.block * self._sample_bytes) + 2 * member_bytes(8 * self.block)
        return cut(len(self.source), self.block, record, int(self.options.shard_mb * 1e6) - len(END))

    def plan(self) -> dict[str, Any]:
        """What the bytes follow from, as JSON values."""
        labels = hashlib.sha256(np.ascontiguousarray(self.source.labels, np.int64).tobytes())
        labels.update(json.dumps(self.source.classes).encode())
        images = {"count": self.names.count, "names": self.names.sha256, "labels": labels.hexdigest()}
        split = {} if self.source.split is None else {"split": to_dict(self.source.split)}
        return {**planned(self.codec, self.options), "images": images, **split}

    def as_before(self) -> Job | None:
        """The same with the classes in the order that versions before gave them; None where that is no other one."""
        before = self.source.classes_before
        return None if before is None else replace(self, source=self.source.numbered_by(before))

    def _kept(self, left_out: Collection[str]) -> np.ndarray:
        """Which images are not left out, by their names: (N,) bool."""
        if not left_out:
            return np.ones(len(self.source), bool)
        names = set(left_out)
        return np.array([name not in names for name in self.source.names], bool)

    def filled(self, left_out: Collection[str] = ()) -> dict[str, int]:
        """Samples of each shard without the images of these names."""
        kept = self._kept(left_out)[self.order]
        samples = {part.shard: int(kept[part.start : part.stop].sum()) for part in self.parts}
        return {name: count for name, count in samples.items() if count}

    def described(self, left_out: Collection[str] = ()) -> dict[str, Any]:
        """What the manifest will say, as far as that is known before: all but what the latents decide."""
        labels = self.source.labels[self._kept(left_out)]
        counts = np.bincount(labels[labels >= 0], minlength=len(self.source.classes))
        return {
            "samples": len(labels),
            "array": self.array,
            "shape": self.shape,
            "dtype": self.options.dtype,
            "views": self.views,
            "posterior": self.posterior,
            "image_size": self.options.image_size,
            "transform": self.options.transform,
            "classes": self.source.classes,
            "class_counts": tuple(counts.tolist()),
            "unlabelled": int((labels < 0).sum()),
            "codec": self.codec.identity(),
            "seed": self.options.seed,
            "block": self.block,
            "names": self.names,
            "split": self.source.split,
        }

    def manifest(self, parts: list[Done]) -> Manifest:
        """The manifest over all parts, in their order. DataError where none of the images can be read."""
        written = [d for d in parts if d.shard is not None]
        bad = [image for d in parts for image in d.bad]
        if not written:
            first = f"{self.source.names[bad[0].id]}: {bad[0].why}" if bad else "there are none"
            raise DataError(f"none of the {len(self.source)} images can be read, first {first}")
        stats = ChannelStats()
        for done in parts:
            stats.merge(ChannelStats.from_plain(done.stats))
        blocks = [replace(b, shard=i) for i, done in enumerate(written) for b in done.blocks]
        counted = {
            "samples": sum(b.samples for b in blocks),
            "class_counts": tuple(np.sum([d.label_counts for d in parts], axis=0, dtype=int).tolist()),
            "unlabelled": sum(d.unlabelled for d in parts),
        }
        return Manifest(
            **{**self.described(), **counted},
            mean=tuple(np.asarray(stats.mean).tolist()),
            std=tuple(stats.std.tolist()),
            bad=tuple(self.source.names[image.id] for image in bad),
            counted=in_order(sum((Counter(d.counted) for d in parts), Counter[str]())),
            shards=tuple(d.shard for d in written if d.shard),
            blocks=tuple(blocks),
        )


def filled(manifest: Manifest) -> dict[str, int]:
    """Samples of each shard, as Job.filled has them."""
    samples = dict.fromkeys((shard.name for shard in manifest.shards), 0)
    for block in manifest.blocks:
        samples[manifest.shards[block.shard].name] += block.samples
    return samples
