"""One part of an encode: its images, decoded ahead by threads, through the codec into a shard."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dit.data import DataError
from dit.data.encoding.job import Job
from dit.data.encoding.parts import Done, Part, Unreadable
from dit.data.shards.manifest import Shard
from dit.data.shards.write import BlockCutter, ChannelStats, ShardFile
from dit.data.sources.decode import in_order
from dit.data.sources.source import BadImage, Loaded
from dit.ranks import group
from dit.rng import Draws, Purpose

Found = Loaded | BadImage


class _Stopwatch(dict[str, float]):
    """Seconds by name."""

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + time.perf_counter() - start


@dataclass
class _Batch:
    """Consecutive images of a part. An unreadable one is black, and left out again after the codec.

    So the size of a batch, and with it the last bits of the latents, do not depend on which images can be read.
    """

    ids: np.ndarray  # (n,) int64
    images: np.ndarray  # (n, S, S, 3) uint8
    good: np.ndarray  # (n,) bool
    enlarged: int  # images of it
    counted: Counter[str]  # the same, by what was done to them


class _Gathered:
    """What of a part is in its shard so far."""

    def __init__(self, shard: ShardFile, block: int):
        self.shard, self._cutter = shard, BlockCutter(block)
        self.stats = ChannelStats()
        self.enlarged = 0  # images
        self.counted: Counter[str] = Counter()  # images, by what was done to them
        self.labels: list[np.ndarray] = [np.empty(0, np.int64)]

    def add(self, arrays: dict[str, np.ndarray], batch: _Batch) -> None:
        """Take in what is stored of a batch."""
        self.enlarged += batch.enlarged
        self.counted += batch.counted
        if len(arrays["id"]):
            for block in self._cutter.full(arrays):
                self._write(block)

    def finish(self) -> Shard | None:
        """End the shard; None where nothing is in it."""
        for block in self._cutter.rest():
            self._write(block)
        return self.shard.finish() if self.shard.blocks else None

    def counts(self, classes: int) -> dict[str, Any]:
        """What `Done` says of the samples taken in."""
        labels = np.concatenate(self.labels)
        return {
            "stats": self.stats.to_plain(),
            "label_counts": tuple(np.bincount(labels[labels >= 0], minlength=classes).tolist()),
            "unlabelled": int((labels < 0).sum()),
            "enlarged": self.enlarged,
            "counted": in_order(self.counted),
        }

    def _write(self, arrays: dict[str, np.ndarray]) -> None:
        self.shard.add(arrays)
        big = next(iter(arrays.values()))
        self.stats.add(big if "moments" in arrays else big[:, :, None])
        self.labels.append(arrays["label"])


class PartEncoder:
    """Writes parts of a job into `folder`. As a context it ends its threads.

    The bytes depend on (job, part) alone, on one kind of device and the same number of threads in torch.
    """

    def __init__(self, job: Job, folder: Path, tag: str):
        """tag: as ShardFile has it."""
        self.job, self.folder, self.tag = job, folder, tag
        workers = job.options.workers or min(16, group.cores())
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="dit-decode")
        self._early: dict[int, Future[Found]] = {}  # images of what is likely to be the next part

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def load(self, index: int) -> Found:
        """An image, or why it cannot be read."""
        options = self.job.options
        try:
            how = options.image_size, options.crop, options.seed, options.decode
            return self.job.source.load_and_tell(index, *how)
        except BadImage as bad:
            return bad

    def write(
        self,
        part: Part,
        after: Part | None,
        rank: int,
        progress: Callable[[int], object],
        on_bad: Callable[[list[Unreadable]], object],
    ) -> Done:
        """Encode a part and give its shard its name.

        after: what is likely to be next, so that the threads go on with it. progress: called with the images done
        since the last call. on_bad: with the unreadable images so far. Raises DataError where latents are not finite.
        """
        clock, bad = _Stopwatch(), list[Unreadable]()

        def found(image: BadImage, index: int) -> None:
            bad.append(Unreadable(id=index, why=str(image).removeprefix(f"{image.name}: ")))
            on_bad(bad)

        with clock.of("whole"), ShardFile(self.folder, part.shard, part.number, self.tag) as shard:
            gathered = _Gathered(shard, self.job.options.block)
            loaded = self._decoded(self._ids(part), self._ids(after) if after else [])
            for batch, latents in self._encoded(self._batches(part, loaded, found, clock), clock):
                with clock.of("codec"):
                    arrays = self._arrays(batch, latents)
                with clock.of("writing"):
                    gathered.add(arrays, batch)
                progress(len(batch.ids))
            with clock.of("writing"):
                finished = gathered.finish()
        return Done(
            shard=finished,
            blocks=tuple(shard.blocks),
            bad=tuple(bad),
            images=len(part),
            seconds=dict(clock),
            rank=rank,
            ended=time.time(),
            **gathered.counts(len(self.job.source.classes)),
        )

    def _encoded(self, batches: Iterator[_Batch], clock: _Stopwatch) -> Iterator[tuple[_Batch, Tensor]]:
        """Batches and their latents (n, views, 2 or 1, C, h, w), one behind: a GPU is never without work."""
        before: tuple[_Batch, Tensor] | None = None
        for batch in batches:
            with clock.of("codec"):
                now = batch, self._encode(batch.images)
            if before is not None:
                yield before
            before = now
        if before is not None:
            yield before

    def _ids(self, part: Part) -> list[int]:
        return [int(i) for i in self.job.order[part.start : part.stop]]

    def _batches(
        self,
        part: Part,
        loaded: Iterator[Found],
        on_bad: Callable[[BadImage, int], object],
        clock: _Stopwatch,
    ) -> Iterator[_Batch]:
        """The part's images in the order of writing, batch_size at a time."""
        ids = self.job.order[part.start : part.stop]
        size, side = self.job.options.batch_size, self.job.options.image_size
        for start in range(0, len(ids), size):
            chosen = ids[start : start + size]
            with clock.of("decoding"):
                images = np.zeros((len(chosen), side, side, 3), np.uint8)
                good, enlarged, counted = np.ones(len(chosen), bool), 0, Counter[str]()
                for place, (index, image) in enumerate(zip(chosen.tolist(), loaded, strict=False)):
                    if isinstance(image, BadImage):
                        good[place] = False
                        on_bad(image, index)
                    else:
                        images[place] = image.pixels
                        enlarged += image.enlarged
                        counted.update(image.told)
            yield _Batch(chosen, images, good, enlarged, counted)

    def _decoded(self, ids: list[int], after: list[int]) -> Iterator[Found]:
        """The images of `ids`, two batches ahead; at their end the first of `after` are begun with."""
        early, self._early = self._early, {}
        pending: deque[Future[Found]] = deque()
        ahead = 2 * self.job.options.batch_size
        for index in ids:
            pending.append(early.pop(index) if index in early else self._pool.submit(self.load, index))
            if len(pending) > ahead:
                yield pending.popleft().result()
        for future in early.values():  # of a part that another rank took
            future.cancel()
        upcoming = iter(after)
        while pending:
            for index in itertools.islice(upcoming, ahead + 1 - len(pending) - len(self._early)):
                self._early[index] = self._pool.submit(self.load, index)
            yield pending.popleft().result()

    def _encode(self, images: np.ndarray) -> Tensor:
        """(n, S, S, 3) uint8 to (n, views, 2 or 1, C, h, w), on the codec's device."""
        codec, x = self.job.codec, torch.from_numpy(images)
        if codec.device.type == "cuda":
            x = x.pin_memory().to(codec.device, non_blocking=True)
        x = x.permute(0, 3, 1, 2).float() / 127.5 - 1.0  # (n, 3, S, S) in [-1, 1]
        return torch.stack([codec.encode(x.flip(-1) if v == "flipped" else x) for v in self.job.views], dim=1)

    def _arrays(self, batch: _Batch, latents: Tensor) -> dict[str, np.ndarray]:
        """What is stored of the readable images of a batch."""
        job, moments = self.job, latents.cpu()
        if job.array == "latents":
            moments = self._sample(moments, batch.ids) if job.codec.has_posterior else moments[:, :, 0]
        if moments.shape[1:] != job.shape:
            raise DataError(
                f"the codec gives {tuple(moments.shape[1:])} an image, not {job.shape} as it promised"
            )
        array = moments.to(getattr(torch, job.options.dtype)).numpy()[batch.good]
        ids = batch.ids[batch.good]
        finite = np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
        if not finite.all():
            place = int(np.argmin(finite))
            given = moments[torch.from_numpy(batch.good)][place]
            raise DataError(f"{job.source.names[ids[place]]}: {self._why_not_finite(given)}")
        labels = job.source.labels[ids].astype(np.int64)
        return {job.array: array, "label": labels, "id": ids.astype(np.uint64)}

    def _why_not_finite(self, moments: Tensor) -> str:
        """What is wrong with an image whose latents, as the codec gave them, cannot be stored, and what to try."""
        if bool(torch.isfinite(moments).all()):
            reach, dtype = float(moments.abs().max()), self.job.options.dtype
            return f"its latents reach {reach:.3g} and are not finite in {dtype}; try --dtype=float32"
        advice = self.job.codec.advice or "take another codec, or leave the image out"
        return f"the codec gives latents that are not finite; {advice}"

    def _sample(self, moments: Tensor, ids: np.ndarray) -> Tensor:
        """One draw of each posterior, (n, views, C, h, w), from (n, views, 2, C, h, w); whatever the batches."""
        drawn = []
        for view in range(moments.shape[1]):
            draws = Draws(self.job.options.seed, 1 + view, torch.from_numpy(ids), 1)
            mean, std = moments[:, view].unbind(1)  # (n, C, h, w)
            drawn.append(mean + std * draws.normal(Purpose.ENCODE, mean.shape[1:]))
        return torch.stack(drawn, dim=1)
