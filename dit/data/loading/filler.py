"""Filling the batches to come: each block is read once, whole, and its rows are copied to their places in them.

A thread reads a block to memory of its own, which stays in the processor's cache, and copies its rows to the batches
of the steps that its window reaches into.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dit.data.loading.batches import BatchRing, Rows
from dit.data.loading.order import Order, Window
from dit.data.loading.quarantine import Quarantine
from dit.data.shards.blocks import BlockError, BlockReader
from dit.rng import Draws, Purpose

Reads: TypeAlias = "list[Future[None]]"
# what windows that open in one step need: (data set, epoch, block) -> rows, and the reads that a window waits for
Wanted: TypeAlias = "defaultdict[tuple[int, int, int], list[tuple[Rows, Reads]]]"


@dataclass(frozen=True, eq=False)
class Source:
    """One data set of a stream.

    number: its place among them. offset: its first slot in the global batch, of which it fills order.global_batch.
    label_of: (classes + 1,) int64, the stream's label of each of its own; the last is that of no label, -1.
    first_id: what is added to its ids.
    """

    number: int
    reader: BlockReader
    order: Order
    offset: int
    label_of: np.ndarray
    first_id: int = 0

    @property
    def views(self) -> int:
        """Views of each sample."""
        return len(self.reader.manifest.views)

    @property
    def window_steps(self) -> int:
        """Steps that a window reaches into at most."""
        order, last = self.order, self.order.lanes - 1  # which is not larger than the others
        samples = min(order.window * order.most, order.lane_length(0))
        return min(-(-samples // order.per_lane(last)), order.steps_per_epoch) + 1

    def lanes(self, first: int, last: int) -> list[Lane]:
        """Return its lanes that slots [first, last) of the global batch lie in."""
        found = []
        for index in range(self.order.lanes):
            start = self.offset + self.order.slots[index]
            low, high = max(first - start, 0), min(last - start, self.order.per_lane(index))
            if low < high:
                found.append(Lane(self, index, low, high, start - first))
        return found


@dataclass(eq=False)
class Lane:
    """The part of a lane that is a rank's: slots [low, high) of the lane's in each step, and what is open of it.

    slot: the rank's slot that the lane's first would be (below 0 where that is another rank's).
    """

    source: Source
    index: int
    low: int
    high: int
    slot: int
    opened: deque[tuple[Window, Reads]] = field(default_factory=deque)


class Filler:
    """Opens the windows of the lanes that a rank's slots lie in, and fills the coming batches from them.

    slots: [first, last) of the global batch that are the rank's. threads: that read blocks.
    """

    def __init__(
        self,
        sources: list[Source],
        seed: int,
        slots: tuple[int, int],
        global_batch: int,
        *,
        threads: int,
        pin: bool,
        quarantine: Quarantine,
    ):
        self.sources, self.seed, self.global_batch = sources, seed, global_batch
        self._pin, self._local = pin, threading.local()
        self.slots = torch.arange(*slots)
        self.quarantine = quarantine
        self.lanes = [lane for source in sources for lane in source.lanes(*slots)]
        # of each lane: slots a step, and which of them are this rank's; arrays, as there may be 64 lanes a step
        self._k = np.array([lane.source.order.per_lane(lane.index) for lane in self.lanes])
        self._low = np.array([lane.low for lane in self.lanes])
        self._high = np.array([lane.high for lane in self.lanes])
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dit-read")
        self._big = _big(sources[0].reader)
        self._ahead = 0
        self.forget()

    def depth(self, ahead: int) -> int:
        """Count the steps of which something may be in memory at once, with `ahead` covered after the asked one."""
        return ahead + 2 + max(source.window_steps for source in self.sources)

    @property
    def row_bytes(self) -> int:
        """Bytes of a sample in a batch."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._big.values())

    def forget(self) -> None:
        """Close all windows. Reads under way end in memory that nobody looks at any more."""
        for lane in self.lanes:
            for _, reads in lane.opened:
                for read in reads:
                    read.cancel()
            lane.opened.clear()
        self._step: int | None = None  # the only one that may come next
        self._made = -1  # last step that there is room for
        self._ring = BatchRing(self._big, len(self.slots), self.depth(self._ahead))
        # positions of each lane: where its first window ends, where its last does, up to where it has been read
        self._leave, self._reach, self._ready = (np.full(len(self.lanes), -1) for _ in range(3))

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- opening windows -----------------------------------------------------------------------------------

    def cover(self, step: int, ahead: int) -> None:
        """Open the windows of steps [step, step + ahead], close those before, and start reading what is new."""
        if step != self._step or ahead > self._ahead:
            self._ahead = max(ahead, self._ahead)
            self.forget()  # a jump, or further ahead than there is room for
        self._step = step
        first, last = step * self._k + self._low, (step + ahead) * self._k + self._high
        wanted: Wanted = defaultdict(list)
        for i in np.flatnonzero((self._leave <= first) | (self._reach < last)).tolist():
            lane = self.lanes[i]
            while lane.opened and lane.opened[0][0].stop <= first[i]:
                lane.opened.popleft()
            while not lane.opened or lane.opened[-1][0].stop < last[i]:
                start = lane.opened[-1][0].stop if lane.opened else int(first[i])
                self._open(lane, start, step, wanted)
            self._leave[i], self._reach[i] = lane.opened[0][0].stop, lane.opened[-1][0].stop
        self._start(step, wanted)

    def _open(self, lane: Lane, start: int, now: int, wanted: Wanted) -> None:
        """Open the window that holds a position of a lane; what steps from `now` on need of it goes to `wanted`."""
        order = lane.source.order
        reads: Reads = []
        window = order.window_at(lane.index, start)
        lane.opened.append((window, reads))
        k = order.per_lane(lane.index)
        places = np.argsort(window.block, kind="stable")
        step, slot = np.divmod(places + window.start, k)
        if lane.high - lane.low < k or window.start < now * k:  # only some of it
            mine = (slot >= lane.low) & (slot < lane.high) & (step >= now)
            places, step, slot = places[mine], step[mine], slot[mine]
        block, row, slot = window.block[places], window.row[places], slot + lane.slot
        epoch = window.start // order.lane_length(lane.index)
        cuts = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(block)] if len(block) else []
        for a, b in pairwise(cuts):
            rows = Rows(row[a:b], step[a:b], slot[a:b])
            wanted[lane.source.number, epoch, int(block[a])].append((rows, reads))

    def _start(self, now: int, wanted: Wanted) -> None:
        """Make room for the steps that are reached, and read: a block that several windows need once."""
        last = max((int(rows.step.max()) for parts in wanted.values() for rows, _ in parts), default=-1)
        for step in range(max(now, self._made + 1), last + 1):
            self._ring.add(step, self._views(step))
            self._made = step
        for (number, _, block), parts in wanted.items():
            rows = Rows.of([rows for rows, _ in parts])
            read = self._pool.submit(self._fill, self._ring, self.sources[number], block, rows)
            for _, reads in parts:
                reads.append(read)

    def _views(self, step: int) -> np.ndarray | int:
        """The view that each of the rank's slots takes in a step, (B,)."""
        if all(source.views == 1 for source in self.sources):
            return 0
        draws = Draws(self.seed, step, self.slots, self.global_batch)
        view = np.zeros(len(self.slots), np.int64)
        for source in self.sources:
            end = source.offset + source.order.global_batch
            inside = ((self.slots >= source.offset) & (self.slots < end)).numpy()
            view[inside] = draws.integers(Purpose.VIEW, source.views).numpy()[inside]
        return view

    # --- reading -------------------------------------------------------------------------------------------

    def _fill(self, ring: BatchRing, source: Source, block: int, rows: Rows) -> None:
        """Read a block and copy its rows to where they belong. Runs in a thread of the pool."""
        if self.quarantine.holds(source.number, block):
            ring.blank(rows)
            return
        try:
            arrays = source.reader.read(block, self._buffer(source.reader.manifest.blocks[block].bytes))
        except BlockError as error:
            self.quarantine.add(source.number, block, error)
            ring.blank(rows)
            return
        identity = arrays["id"].astype(np.int64) + source.first_id
        ring.put(rows, arrays, source.label_of[arrays["label"]], identity)

    def _buffer(self, size: int) -> memoryview:
        """This thread's memory for blocks, of at least `size` bytes."""
        held: memoryview | None = getattr(self._local, "buffer", None)
        if held is None or len(held) < size:
            held = self._local.buffer = memoryview(bytearray(size))
        return held

    def take(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the big and the small arrays of a covered step, once they are filled. Each step once."""
        needed = step * self._k + self._high
        for i in np.flatnonzero(self._ready < needed).tolist():
            for window, reads in self.lanes[i].opened:
                if window.start < needed[i]:
                    for read in reads:
                        read.result()
                    self._ready[i] = window.stop
        self._step = step + 1
        return self._ring.take(step, self._pin)


def _big(reader: BlockReader) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of a sample's big arrays in a batch: one view of it, moments first; noise without these."""
    one = reader.manifest.shape[1:]
    shapes = dict.fromkeys(reader.big, one) | ({"latents": (1, *one)} if "latents" in reader.big else {})
    return {name: (shapes[name], dtype) for name, dtype in reader.big.items()}
