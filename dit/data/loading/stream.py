"""Batches from shards: step -> batch, at any step, without state.

    stream = Stream(Manifest.load("data/latents"), seed=0, global_batch=256, rank=rank, size=size)
    for batch in stream.iterate(start_step): ...

Memory: the batches that the open windows reach into (64 lanes, window 2, blocks of 256: the samples of 128 blocks on
one rank, in one view each), and a block a reading thread.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from dit.data.loading.filler import Filler, Source
from dit.data.loading.mixture import Mixture
from dit.data.loading.order import Order, rank_slots
from dit.data.loading.quarantine import Quarantine
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.data.shards.readers import open_reader
from dit.data.storage.nodecache import NodeCacheConfig


@dataclass(frozen=True)
class Batch:
    """One rank's slots of one step's global batch.

    moments: (B, 2, C, H, W), mean and std of the chosen view, in the manifest's dtype; (B, 1, C, H, W) where latents
    are stored.
    label: (B,) int64, -1 = none. id: (B,) int64, line in the names file. view: (B,) int64, index into the
    manifest's views. slots: (B,) int64, positions in the global batch. eps: (B, C, H, W) float32, the noise that the
    samples were generated from, where the data set stores it. valid: (B,) bool, False for a sample that could not be
    read: its latents are 0, its label and id -1, and its loss is to count for nothing.
    """

    moments: Tensor
    label: Tensor
    id: Tensor
    view: Tensor
    slots: Tensor
    step: int
    eps: Tensor | None = None
    valid: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether no sample is missing. Of a batch on the CPU."""
        return self.valid is None or bool(self.valid.all())


class Stream:
    """A rank's batches of a data set, or of a mixture of them; a batch is a pure function of the step.

    Steps count on through the epochs. Every sample occurs at most once an epoch, and at most global_batch - 1 of
    them not at all, whatever the ranks. Nothing is shared between ranks: each reads the blocks of its own lanes.

    readers: threads that read ahead. verify, cache: see BlockReader. pin: batches in page-locked memory, for GPUs.
    quarantine: takes in blocks that cannot be read; without one the first of them is an error.
    Raises ConfigError for sizes that do not fit and, when reading, DataError naming the place of the fault.
    """

    def __init__(
        self,
        data: Manifest | Mixture,
        seed: int,
        global_batch: int,
        rank: int = 0,
        size: int = 1,
        lanes: int = 64,
        window: int = 2,
        *,
        readers: int = 2,
        verify: Literal["first", "always"] = "first",
        cache: NodeCacheConfig | None = None,
        pin: bool = False,
        quarantine: Quarantine | None = None,
    ):
        self.seed, self.global_batch = seed, global_batch
        first, last = rank_slots(global_batch, rank, size)
        mixture = data if isinstance(data, Mixture) else Mixture.of(data)
        self.sources = _sources(
            mixture,
            seed,
            global_batch,
            lanes,
            window,
            lambda manifest: open_reader(manifest, verify, cache),
        )
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self._filler = Filler(
            self.sources,
            seed,
            (first, last),
            global_batch,
            threads=readers,
            pin=pin,
            quarantine=self.quarantine,
        )
        self.slots = self._filler.slots
        self._lock = threading.Lock()

    @property
    def order(self) -> Order:
        """The order of the only data set, or of the first one of a mixture."""
        return self.sources[0].order

    @property
    def steps_per_epoch(self) -> int:
        """Steps until the data set that is used up last begins anew, on every rank (one: samples // global batch)."""
        return max(source.order.steps_per_epoch for source in self.sources)

    @property
    def reads(self) -> int:
        """Blocks read so far."""
        return sum(source.reader.reads for source in self.sources)

    def memory_bytes(self, ahead: int = 0) -> int:
        """Return what the batches that are being filled take: steps that a window reaches into x samples a step."""
        return self._filler.depth(ahead) * len(self.slots) * self._filler.row_bytes

    def forget(self) -> None:
        """Let go of all batches that are being filled, and of the reads that wait; the next batch begins anew."""
        with self._lock:
            self._filler.forget()

    def close(self) -> None:
        """End the reading threads; the stream is of no use afterwards."""
        self._filler.close()

    # --- one batch -----------------------------------------------------------------------------------------

    def batch(self, step: int, ahead: int = 0) -> Batch:
        """Return the batch of any step. ahead: steps after it whose blocks begin to be read meanwhile."""
        with self._lock:
            try:
                self._filler.cover(step, ahead)
                big, small = self._filler.take(step)
            except BaseException:
                self._filler.forget()  # whatever was half done, the next call starts from nothing
                raise
        eps = big.pop("eps", None)
        (moments,) = big.values()
        return Batch(
            moments, small["label"], small["id"], small["view"], self.slots, step, eps, small["valid"]
        )

    # --- many batches --------------------------------------------------------------------------------------

    def iterate(self, start_step: int, stop_step: int | None = None, prefetch: int = 4) -> Generator[Batch]:
        """Yield batches from `start_step` on, endless or up to `stop_step`, made by a thread up to `prefetch` ahead.

        An error in the thread is raised here, after the batches before it. Closing the iterator ends the thread.
        """
        steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
        made: queue.Queue[Batch | BaseException | None] = queue.Queue(prefetch)
        stopped = threading.Event()

        def work() -> None:
            try:
                for step in steps:
                    ahead = prefetch if stop_step is None else min(prefetch, stop_step - 1 - step)
                    batch = self.batch(step, ahead)
                    if stopped.is_set():
                        return
                    made.put(batch)
                made.put(None)
            except BaseException as error:  # noqa: BLE001 (handed over, and raised by the consumer)
                made.put(error)

        thread = threading.Thread(target=work, name="dit-prefetch", daemon=True)
        thread.start()
        try:
            while (item := made.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            while thread.is_alive():  # it may be waiting for room in the queue
                with contextlib.suppress(queue.Empty):
                    made.get(timeout=0.01)
            thread.join()
            self.forget()


def _sources(
    mixture: Mixture,
    seed: int,
    global_batch: int,
    lanes: int,
    window: int,
    reader: Callable[[Manifest], BlockReader],
) -> list[Source]:
    """Each data set with the slots of the global batch that it fills."""
    found, offset, first_id = [], 0, 0
    for number, (manifest, share) in enumerate(mixture.shares(global_batch)):
        sizes = [b.samples for b in manifest.blocks]
        order = Order(
            sizes, seed + (number << 48), share, max(1, round(lanes * share / global_batch)), window
        )
        label_of = np.append(mixture.label_of(manifest), -1)
        found.append(Source(number, reader(manifest), order, offset, label_of, first_id))
        offset, first_id = offset + share, first_id + manifest.names.count
    return found
