"""Batches from shards: step -> batch, at any step, without state.

    stream = Stream(Manifest.load("data/latents"), seed=0, global_batch=256, rank=rank, size=size)
    for batch in stream.iterate(start_step): ...

Memory: the lanes a rank holds x window x block bytes (64 lanes, window 2, blocks of 8 MiB: 1 GiB on one rank),
for a moment up to twice that where all lanes pass into their next window in the same step.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dit.data.blocks import BlockReader
from dit.data.cache import BlockCache
from dit.data.manifest import Manifest
from dit.data.order import Order, Window, rank_slots
from dit.rng import Draws, Purpose


@dataclass(frozen=True)
class Batch:
    """One rank's slots of one step's global batch.

    moments: (B, 2, C, H, W), mean and std of the chosen view, in the manifest's dtype; (B, 1, C, H, W) where latents
    are stored.
    label: (B,) int64, -1 = none. id: (B,) int64, line in the names file. view: (B,) int64, index into the
    manifest's views. slots: (B,) int64, positions in the global batch. eps: (B, C, H, W) float32, the noise that the
    samples were generated from, where the data set stores it.
    """

    moments: Tensor
    label: Tensor
    id: Tensor
    view: Tensor
    slots: Tensor
    step: int
    eps: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device (not waiting for the copy where the memory is pinned)."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("moments", "label", "id", "view", "slots", "eps")
            if getattr(self, name) is not None
        }
        return replace(self, **moved)


class _Lanes:
    """The lanes that a rank's slots lie in, the windows of them that are open, and where their samples are.

    A lane's samples from base[lane] on stand at the cache's rows `table[lane]`.
    """

    def __init__(self, order: Order, cache: BlockCache, first: int, last: int):
        k = order.per_lane
        self.order, self.cache = order, cache
        self.indices = list(range(first // k, -(-last // k)))
        self.low = np.array([max(first - i * k, 0) for i in self.indices])  # slots [low, high) of a lane's k
        self.high = np.array([min(last - i * k, k) for i in self.indices])
        slots = np.arange(first, last)
        self._lane, self._offset = slots // k - self.indices[0], slots % k  # (B,)
        self._opened: list[deque[Window]] = [deque() for _ in self.indices]
        self._table = np.zeros((len(self.indices), 0), np.int64)
        self.forget()

    def forget(self) -> None:
        """Close all windows. Their blocks stay in memory until the place is needed."""
        for opened in self._opened:
            self.cache.release(b for window in opened for b in window.pieces)
            opened.clear()
        self._position = 0
        # positions of each lane: first of those it holds, end of its first window, of the last, of those read
        self._base, self._leave, self._reach, self._ready = (np.full(len(self.indices), -1) for _ in range(4))

    def cover(self, step: int, ahead: int) -> None:
        """Open the windows of steps [step, step + ahead], close those before, and start reading what is new."""
        position, last = step * self.order.per_lane, (step + ahead) * self.order.per_lane
        if position < self._position:
            self.forget()  # a jump back
        self._position = position
        moving = np.flatnonzero(
            (self._leave <= position + self.low) | (self._reach < last + self.high)
        ).tolist()
        for i in moving:
            opened = self._opened[i]
            while opened and opened[0].stop <= position + self.low[i]:
                self.cache.release(opened.popleft().pieces)
        for i in moving:
            opened = self._opened[i]
            while not opened or opened[-1].stop < last + self.high[i]:
                start = opened[-1].stop if opened else int(position + self.low[i])
                opened.append(self.order.window_at(self.indices[i], start))
                self.cache.acquire(opened[-1].pieces)
            self._base[i], self._leave[i], self._reach[i] = opened[0].start, opened[0].stop, opened[-1].stop
            self._tabulate(i)

    def _tabulate(self, i: int) -> None:
        width = self._reach[i] - self._base[i]
        if width > self._table.shape[1]:
            self._table = np.pad(self._table, ((0, 0), (0, width - self._table.shape[1])))
        rows = [self.cache.rows(window.block, window.row) for window in self._opened[i]]
        np.concatenate(rows, out=self._table[i, :width])

    def rows(self, step: int) -> np.ndarray:
        """Where in the cache the samples of the rank's slots are, (B,) int64, once they are there."""
        position = step * self.order.per_lane
        for i in np.flatnonzero(self._ready < position + self.high).tolist():
            for window in self._opened[i]:
                if window.start < position + self.high[i]:
                    self.cache.wait(window.pieces)
                    self._ready[i] = window.stop
        rows: np.ndarray = self._table[self._lane, position + self._offset - self._base[self._lane]]
        return rows


class Stream:
    """A rank's batches of a data set; a batch is a pure function of the step.

    Steps count on through the epochs. Every sample occurs at most once an epoch, and at most global_batch - 1 of
    them not at all, whatever the ranks. Nothing is shared between ranks: each reads the blocks of its own lanes.

    readers: threads that read ahead. verify: see BlockReader. pin: batches in page-locked memory, for GPUs.
    Raises ConfigError for sizes that do not fit and, when reading, DataError naming the place of the fault.
    """

    def __init__(
        self,
        manifest: Manifest,
        seed: int,
        global_batch: int,
        rank: int = 0,
        size: int = 1,
        lanes: int = 64,
        window: int = 2,
        *,
        readers: int = 2,
        verify: Literal["first", "always"] = "first",
        pin: bool = False,
    ):
        self.manifest, self.seed, self.global_batch, self.pin = manifest, seed, global_batch, pin
        self.order = Order([b.samples for b in manifest.blocks], seed, global_batch, lanes, window)
        first, last = rank_slots(global_batch, rank, size)
        self.reader = BlockReader(manifest, verify)
        k = self.order.per_lane
        self.lanes_held = -(-last // k) - first // k
        self._cache = BlockCache(self.reader, self.lanes_held * window + 2, readers)
        self._lanes = _Lanes(self.order, self._cache, first, last)
        self.slots = torch.arange(first, last)
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch: samples // global batch, on every rank."""
        return self.order.steps_per_epoch

    @property
    def reads(self) -> int:
        """Blocks read so far."""
        return self.reader.reads

    @property
    def memory_bytes(self) -> int:
        """What the blocks of the current windows take at most: lanes held x window x block bytes."""
        blocks = min(self.lanes_held * self.order.window, len(self.manifest.blocks))
        return blocks * self.reader.block_bytes

    def close(self) -> None:
        """End the reading threads; the stream is of no use afterwards."""
        self._cache.close()

    # --- one batch -----------------------------------------------------------------------------------------

    def batch(self, step: int, ahead: int = 0) -> Batch:
        """The batch of any step. ahead: steps after it whose blocks begin to be read meanwhile."""
        with self._lock:
            try:
                self._lanes.cover(step, ahead)
                return self._assemble(step, self._lanes.rows(step))
            except BaseException:
                self._lanes.forget()  # whatever was half done, the next call starts from nothing
                self._cache.clear()
                raise

    def _assemble(self, step: int, rows: np.ndarray) -> Batch:
        cache, views = self._cache, len(self.manifest.views)
        view = torch.zeros_like(self.slots)
        if views > 1:
            draws = Draws(self.seed, step, self.slots, self.global_batch)
            view = draws.integers(Purpose.VIEW, views)
        chosen = rows * views + view.numpy()
        moments = self._take(cache.big[self.manifest.array].reshape(-1, *self.manifest.shape[1:]), chosen)
        if self.manifest.array == "latents":
            moments = moments[:, None]  # (B, 1, C, H, W)
        eps = self._take(cache.big["eps"][:, 0], rows) if self.manifest.eps else None  # (B, C, H, W)
        label, identity = torch.from_numpy(cache.label[rows]), torch.from_numpy(cache.id[rows])
        return Batch(moments, label, identity, view, self.slots, step, eps)

    def _take(self, array: np.ndarray, rows: np.ndarray) -> Tensor:
        """array[rows]"""
        dtype = torch.from_numpy(array[:0]).dtype
        taken = torch.empty((len(rows), *array.shape[1:]), dtype=dtype, pin_memory=self.pin)
        # "clip" lets numpy write straight into the tensor; the rows are in range by construction
        np.take(array, rows, axis=0, out=taken.numpy(), mode="clip")
        return taken

    # --- many batches --------------------------------------------------------------------------------------

    def iterate(self, start_step: int, stop_step: int | None = None, prefetch: int = 4) -> Iterator[Batch]:
        """Batches from `start_step` on, without end or up to `stop_step`, made by a thread up to `prefetch` ahead.

        An error in the thread is raised here, after the batches before it. Closing the iterator ends the thread.
        """
        steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
        made: queue.Queue[Batch | BaseException | None] = queue.Queue(prefetch)
        stopped = threading.Event()

        def work() -> None:
            try:
                for step in steps:
                    batch = self.batch(step, ahead=prefetch)
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
