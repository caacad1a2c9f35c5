"""Encoding: image sets to data sets of latents.

Samples are written in a seeded random order: shards in the order of class folders would give batches of few
classes. The same images, codec, seed and options give the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dit.config import ConfigError, config
from dit.data import DataError
from dit.data.codec import Codec
from dit.data.images import TRANSFORM, BadImage, ImageSource
from dit.data.manifest import DTYPE, Manifest, Names
from dit.data.write import BlockCutter, ChannelStats, ShardWriter, folder_beside, write_names
from dit.rng import Draws, Purpose, permutation


@config
class EncodeOptions:
    """How to encode. block: samples a block at most. shard_mb: MB (10^6 bytes) a shard at most.

    batch_size: images at a time through the codec. max_bad: unreadable images to leave out before giving up.
    posterior: keep the codec's moments, or one sample drawn now. workers: threads that decode images.
    """

    image_size: int
    flip: bool = True
    block: int = 256
    shard_mb: float = 512.0
    seed: int = 0
    batch_size: int = 64
    max_bad: int = 0
    posterior: Literal["moments", "sample"] = "moments"
    workers: int = 0  # 0: as many as there are cores, 16 at most

    def __post_init__(self) -> None:
        for name in ("image_size", "block", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.shard_mb <= 0 or self.max_bad < 0 or self.workers < 0:
            raise ConfigError("shard_mb must be above 0, max_bad and workers at least 0")
        if self.posterior not in ("moments", "sample"):
            raise ConfigError(f"posterior is {self.posterior!r}, expected moments or sample")


@dataclass
class Report:
    """What an encode did. Seconds: waiting for decoded images, in the codec, writing; the whole."""

    manifest: Manifest
    decoding: float = 0.0
    codec: float = 0.0
    writing: float = 0.0
    whole: float = 0.0

    def __str__(self) -> str:
        m, whole = self.manifest, max(self.whole, 1e-9)
        shares = ", ".join(f"{n} {getattr(self, n) / whole:.0%}" for n in ("decoding", "codec", "writing"))
        left_out = f"; {len(m.bad)} unreadable left out: {', '.join(m.bad[:10])}" if m.bad else ""
        return (
            f"{m.samples} images in {len(m.views)} view(s) -> {len(m.blocks)} block(s) in {len(m.shards)} shard(s): "
            f"{m.samples / whole:.1f} images/s in {whole:.1f} s ({shares}){left_out}"
        )


def encode(
    source: ImageSource,
    codec: Codec,
    out: str | os.PathLike[str],
    options: EncodeOptions,
    progress: Callable[[int], object] = lambda images: None,
) -> Report:
    """Write `source` as a data set in the folder `out`, which must not exist (or be empty).

    progress: called with the number of images done since the last call. Raises DataError where images cannot be
    read or latents are not finite; nothing that looks like a data set is left then.
    """
    if options.image_size % codec.factor:
        raise ConfigError(
            f"image_size {options.image_size} is not a multiple of the codec's factor {codec.factor}"
        )
    with folder_beside(Path(out).resolve()) as folder:
        return _Encoder(source, codec, folder, options).run(progress)


class _Clock(dict[str, float]):
    """Seconds by name."""

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + time.perf_counter() - start


class _Encoder:
    """One encode under way: images in random order -> batches -> latents -> blocks."""

    def __init__(self, source: ImageSource, codec: Codec, folder: Path, options: EncodeOptions):
        self.source, self.codec, self.folder, self.options = source, codec, folder, options
        self.views: tuple[Literal["original", "flipped"], ...]
        self.views = ("original", "flipped") if options.flip else ("original",)
        keep_moments = codec.has_posterior and options.posterior == "moments"
        self.array: Literal["moments", "latents"] = "moments" if keep_moments else "latents"
        self.bad: list[BadImage] = []
        self.stats = ChannelStats()
        self.cutter = BlockCutter(options.block)
        self.shape: tuple[int, ...] = ()  # of a stored sample
        self.labels: list[np.ndarray] = []

    def run(self, progress: Callable[[int], object]) -> Report:
        clock = _Clock()
        with clock.of("whole"), ShardWriter(self.folder, int(self.options.shard_mb * 1e6)) as writer:
            names = write_names(self.folder, self.source.names)
            batches = self._batches()
            while True:
                with clock.of("decoding"):
                    batch = next(batches, None)
                if batch is None:
                    break
                with clock.of("codec"):
                    arrays = self._encode(*batch)
                with clock.of("writing"):
                    self._store(writer, arrays)
                progress(len(batch[0]))
            with clock.of("writing"):
                self._finish(writer)
                manifest = self._manifest(writer, names)
                manifest.save(self.folder)
        return Report(manifest, **clock)

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids (n,) int64, images (n, S, S, 3) uint8) of readable images, in the order of writing."""
        order = permutation(self.options.seed, Purpose.ENCODE, 0, len(self.source))
        workers = self.options.workers or min(16, os.cpu_count() or 1)
        ids, images = [], []
        with ThreadPoolExecutor(workers, thread_name_prefix="dit-decode") as pool:
            for index, image in self._decoded(pool, order, ahead=2 * self.options.batch_size):
                if isinstance(image, BadImage):
                    self._count_bad(image)
                    continue
                ids.append(index)
                images.append(image)
                if len(ids) == self.options.batch_size:
                    yield np.array(ids), np.stack(images)
                    ids, images = [], []
        if ids:
            yield np.array(ids), np.stack(images)

    def _decoded(
        self, pool: ThreadPoolExecutor, order: np.ndarray, ahead: int
    ) -> Iterator[tuple[int, np.ndarray | BadImage]]:
        pending: deque[tuple[int, Future[np.ndarray | BadImage]]] = deque()
        try:
            for index in order.tolist():
                pending.append((index, pool.submit(self._load, index)))
                if len(pending) > ahead:
                    i, future = pending.popleft()
                    yield i, future.result()
            while pending:
                i, future = pending.popleft()
                yield i, future.result()
        finally:
            for _, future in pending:
                future.cancel()

    def _load(self, index: int) -> np.ndarray | BadImage:
        try:
            return self.source.load(index, self.options.image_size)
        except BadImage as bad:
            return bad

    def _count_bad(self, image: BadImage) -> None:
        self.bad.append(image)
        if len(self.bad) > self.options.max_bad:
            listing = "\n".join(f"  {b}" for b in self.bad[:20])
            raise DataError(
                f"{len(self.bad)} image(s) cannot be read, {self.options.max_bad} allowed; nothing was written. "
                f"Mend them, or leave up to N out with --max_bad=N:\n{listing}"
            )

    def _encode(self, ids: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # (n, 3, S, S) in [-1, 1]
        views = [self.codec.encode(x.flip(-1) if v == "flipped" else x).cpu() for v in self.views]
        if self.codec.has_posterior and self.array == "latents":
            views = [self._sample(view, ids, place) for place, view in enumerate(views)]
        stacked = torch.stack(views, dim=1)  # (n, views, 2 or 1, C, H, W)
        array = (stacked if self.array == "moments" else stacked[:, :, 0]).half().numpy()
        finite = np.isfinite(array).reshape(len(ids), -1).all(1)
        if not finite.all():
            odd = self.source.names[ids[int(np.argmin(finite))]]
            raise DataError(
                f"{odd}: the codec gives latents that are not finite in {DTYPE}; try --codec.dtype=float32"
            )
        return {
            self.array: array,
            "label": self.source.labels[ids].astype(np.int64),
            "id": ids.astype(np.uint64),
        }

    def _sample(self, moments: Tensor, ids: np.ndarray, view: int) -> Tensor:
        """One draw of each posterior, (n, 1, C, H, W): the same whatever the batches."""
        draws = Draws(self.options.seed, 1 + view, torch.from_numpy(ids), 1)
        noise = draws.normal(Purpose.ENCODE, moments.shape[2:])
        return (moments[:, 0] + moments[:, 1] * noise)[:, None]

    def _store(self, writer: ShardWriter, arrays: dict[str, np.ndarray]) -> None:
        """Take in a batch and write the blocks that are full."""
        self.shape = arrays[self.array].shape[1:]
        for block in self.cutter.full(arrays):
            self._add(writer, block)

    def _finish(self, writer: ShardWriter) -> None:
        if not self.shape:
            raise DataError(f"none of the {len(self.source)} images can be read, first {self.bad[0]}")
        for block in self.cutter.rest():
            self._add(writer, block)
        writer.finish()

    def _add(self, writer: ShardWriter, arrays: dict[str, np.ndarray]) -> None:
        writer.add(arrays)
        big = arrays[self.array]
        self.stats.add(big if self.array == "moments" else big[:, :, None])
        self.labels.append(arrays["label"])

    def _manifest(self, writer: ShardWriter, names: Names) -> Manifest:
        labels = np.concatenate(self.labels)
        counts = np.bincount(labels[labels >= 0], minlength=len(self.source.classes))
        return Manifest(
            samples=len(labels),
            array=self.array,
            shape=self.shape,
            views=self.views,
            posterior=self.options.posterior if self.codec.has_posterior else "none",
            image_size=self.options.image_size,
            transform=TRANSFORM,
            classes=self.source.classes,
            class_counts=tuple(counts.tolist()),
            unlabelled=int((labels < 0).sum()),
            mean=tuple(np.asarray(self.stats.mean).tolist()),
            std=tuple(self.stats.std.tolist()),
            codec=self.codec.identity(),
            seed=self.options.seed,
            block=self.cutter.block,
            names=names,
            bad=tuple(b.name for b in self.bad),
            shards=tuple(writer.shards),
            blocks=tuple(writer.blocks),
        )
