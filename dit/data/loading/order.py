"""Which sample stands in which slot of which step: pure functions, no input or output.

An epoch permutes the blocks and rotates each (it begins at a random row, so that what is left out at the end is not
the same every epoch even in one block); of their concatenation the first S * B samples are used (S = N // B steps of
B slots) and cut into `lanes` stretches, in proportion to the lanes' slots: B/L each, or one more. A lane fills its
slots of every step in the order of its stretch, with the samples of every `window` consecutive block pieces mixed.
Ranks do not occur: a rank reads the lanes, or the part of one, that its slots belong to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from dit.config import ConfigError
from dit.rng import Draws, Purpose, permutation

T = TypeVar("T")
_KEY_CHUNK = 4096  # sort keys are made this many at a time: one call costs the same for 10 and for 1000


def lane_slots(global_batch: int, lanes: int) -> list[int]:
    """Return where each lane's slots begin in the global batch, and where the last one's end.

    As many lanes as there are slots at most; their sizes differ by one slot at most, the larger ones first.
    """
    lanes = min(lanes, global_batch)
    size, more = divmod(global_batch, lanes)
    return [lane * size + min(lane, more) for lane in range(lanes + 1)]


def rank_slots(global_batch: int, rank: int, size: int) -> tuple[int, int]:
    """Return the slots [first, last) of the global batch that are a rank's."""
    if not 0 <= rank < size:
        raise ConfigError(f"rank {rank} of {size} ranks does not exist")
    if global_batch % size:
        below = global_batch // size * size
        raise ConfigError(
            f"a global batch of {global_batch} does not divide among {size} ranks; take "
            + (f"{below} or {below + size}" if below else f"{size}")
        )
    share = global_batch // size
    return rank * share, (rank + 1) * share


@dataclass(frozen=True, eq=False)
class Window:
    """Positions [start, stop) of a lane, counted over all epochs: block and row in it of each sample, in order."""

    start: int
    stop: int
    block: np.ndarray  # (stop - start,) int64
    row: np.ndarray  # (stop - start,) int64
    pieces: tuple[int, ...]  # the blocks it touches


class Order:
    """The order of samples in blocks of `sizes`, as a pure function of (seed, epoch, lanes, global batch).

    Keeps what it computed last, so that neighbouring steps are cheap; no result depends on that.
    """

    def __init__(self, sizes: Sequence[int], seed: int, global_batch: int, lanes: int = 64, window: int = 2):
        for name, value in (("global_batch", global_batch), ("lanes", lanes), ("window", window)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        self.sizes = np.asarray(sizes, np.int64)
        self.most, self.samples = int(self.sizes.max()), int(self.sizes.sum())
        if global_batch > self.samples:
            raise ConfigError(
                f"a global batch of {global_batch} is larger than the data set of {self.samples} samples: "
                f"an epoch would have no step; take at most {self.samples}"
            )
        self.seed, self.global_batch, self.window = seed, global_batch, window
        self.slots = lane_slots(global_batch, lanes)  # where each lane's begin
        self.lanes = len(self.slots) - 1
        self.steps_per_epoch = self.samples // global_batch
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()
        self._keys: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def epoch(self, step: int) -> int:
        """Return the epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def per_lane(self, lane: int) -> int:
        """Count the slots of a step that a lane fills."""
        return self.slots[lane + 1] - self.slots[lane]

    def lane_length(self, lane: int) -> int:
        """Count the samples of a lane in an epoch."""
        return self.steps_per_epoch * self.per_lane(lane)

    def locate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (block, row) of every slot of a step, (B,) int64 each."""
        found = [
            self._take(lane, step * self.per_lane(lane), (step + 1) * self.per_lane(lane))
            for lane in range(self.lanes)
        ]
        block, row = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return block, row

    def _take(self, lane: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        blocks, rows = [], []
        while start < stop:
            w = self.window_at(lane, start)
            part = slice(start - w.start, min(stop, w.stop) - w.start)
            blocks.append(w.block[part])
            rows.append(w.row[part])
            start = w.stop
        return np.concatenate(blocks), np.concatenate(rows)

    def window_at(self, lane: int, position: int) -> Window:
        """Return the window that holds a lane's position; positions count on through the epochs."""
        epoch, inside = divmod(position, self.lane_length(lane))
        order, ends, shift = self._blocks(epoch)
        low, high = (self.steps_per_epoch * slot for slot in self.slots[lane : lane + 2])  # its stretch
        first = _piece(ends, low)
        piece = first + (_piece(ends, low + inside) - first) // self.window * self.window
        last = min(piece + self.window, len(order))
        start, stop = max(low, int(ends[piece])), min(high, int(ends[last]))
        mixed = start + np.argsort(self._sort_keys(epoch, start, stop), kind="stable")  # (n,)
        which = np.searchsorted(ends, mixed, side="right") - 1  # (n,) place of the block in the epoch
        moved = epoch * self.lane_length(lane) - low
        pieces = tuple(order[piece : _piece(ends, stop - 1) + 1].tolist())
        block = order[which]
        row = (mixed - ends[which] + shift[block]) % self.sizes[block]
        return Window(start + moved, stop + moved, block, row, pieces)

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of the blocks, (n,); where each begins in the concatenation and where the last ends, (n + 1,); the
        row that each block, by its number, begins at, (n,)."""

        def make() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            order = permutation(self.seed, Purpose.BLOCKS, epoch, len(self.sizes))
            bits = Draws(self.seed, epoch, torch.arange(len(order)), 1).bits(Purpose.ROTATION, 1)
            shift = (bits[:, 0].numpy() * self.sizes) >> 32
            return order, np.concatenate([[0], np.cumsum(self.sizes[order])]), shift

        return _remember(self._epochs, epoch, make, 4)

    def _sort_keys(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Random numbers of places [start, stop) of an epoch's concatenation: sorting by them mixes a window.

        Place p has word p % 4 of slot p // 4, so that no word of a Philox call is thrown away.
        """

        def chunk(number: int) -> np.ndarray:
            """Numbers in [0, 2^32)."""
            slots = torch.arange(number * _KEY_CHUNK // 4, (number + 1) * _KEY_CHUNK // 4)
            return Draws(self.seed, epoch, slots, 1).bits(Purpose.SAMPLES, 4).flatten().numpy()

        first, last = start // _KEY_CHUNK, (stop - 1) // _KEY_CHUNK
        parts = [
            _remember(self._keys, (epoch, i), lambda i=i: chunk(i), 2 * self.lanes + 8)  # type: ignore[misc]
            for i in range(first, last + 1)
        ]
        keys = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return keys[start - first * _KEY_CHUNK : stop - first * _KEY_CHUNK]


def _piece(ends: np.ndarray, place: int) -> int:
    """Which block, counted in the epoch's order, holds a place of the concatenation."""
    return int(np.searchsorted(ends, place, side="right")) - 1


K = TypeVar("K", bound=Hashable)


def _remember(cache: OrderedDict[K, T], key: K, make: Callable[[], T], limit: int) -> T:
    """cache[key], made where it is missing; the one unused for longest makes room."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    cache[key] = make()
    if len(cache) > limit:
        cache.popitem(last=False)
    return cache[key]
