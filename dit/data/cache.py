"""The blocks that a stream has in memory."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from dit.data.blocks import BlockReader


class BlockCache:
    """Blocks in memory, in one array per field, so that a batch is one indexing of each.

    `acquire` starts reading the blocks that are not here yet, `wait` waits for some, `release` lets them go. A block
    that nobody wants any more stays until its place is needed: small data sets are read once. Holds `limit` blocks,
    more only while more are wanted at once.
    """

    def __init__(self, reader: BlockReader, limit: int, threads: int):
        manifest = reader.manifest
        self._reader, self._limit, self._block = reader, limit, manifest.block
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dit-read")
        self._loading: dict[int, Future[None]] = {}
        self._users: Counter[int] = Counter()
        self._idle: dict[int, None] = {}  # blocks without users, idle for longest first
        self._free: list[int] = []  # places, a heap
        self._capacity = 0
        self.place_of = np.full(len(manifest.blocks), -1, np.int64)
        self.big = {name: np.empty((0, *manifest.shape), dtype) for name, dtype in reader.big.items()}
        self.label, self.id = np.empty(0, np.int64), np.empty(0, np.int64)
        self._reserve(max(1, min(2 * limit, len(manifest.blocks))))

    def __len__(self) -> int:
        return len(self._users) + len(self._idle)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Keep these blocks until they are released as often as they were acquired."""
        for block in blocks:
            if self.place_of[block] < 0:
                place = self._room()
                self.place_of[block] = place
                self._loading[block] = self._pool.submit(self._load, block, place)
            self._idle.pop(block, None)
            self._users[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Let go of blocks that were acquired."""
        for block in blocks:
            self._users[block] -= 1
            if not self._users[block]:
                del self._users[block]
                self._idle[block] = None

    def wait(self, blocks: Iterable[int]) -> None:
        """Return when these blocks are there. Raises what reading them raised."""
        for block in blocks:
            if block in self._loading:
                self._loading[block].result()
                del self._loading[block]

    def rows(self, block: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Rows of the arrays where samples of acquired blocks are, or will be: (n,) from (n,), (n,)."""
        rows: np.ndarray = self.place_of[block] * self._block + row
        return rows

    def clear(self) -> None:
        """Forget all blocks (after an error)."""
        self._idle = dict.fromkeys([*self._idle, *self._users])
        self._users.clear()
        for block in list(self._idle):
            self._drop(block)

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _room(self) -> int:
        """A place for one block."""
        if len(self) >= self._limit and self._idle:
            self._drop(next(iter(self._idle)))
        if not self._free:
            self._reserve(2 * self._capacity)
        return heapq.heappop(self._free)

    def _drop(self, block: int) -> None:
        loading = self._loading.pop(block, None)
        if loading is not None and not loading.cancel():
            wait([loading])  # else it would write into a place that is another block's
        del self._idle[block]
        heapq.heappush(self._free, int(self.place_of[block]))
        self.place_of[block] = -1

    def _reserve(self, capacity: int) -> None:
        """Places for `capacity` blocks. np.empty takes no memory before it is written to."""
        wait(list(self._loading.values()))  # they write into the arrays that are to move
        rows = capacity * self._block
        self.big = {name: _grown(array, rows) for name, array in self.big.items()}
        self.label, self.id = _grown(self.label, rows), _grown(self.id, rows)
        for place in range(self._capacity, capacity):
            heapq.heappush(self._free, place)
        self._capacity = capacity

    def _load(self, block: int, place: int) -> None:
        start = place * self._block
        rows = slice(start, start + self._reader.manifest.blocks[block].samples)
        big = [array[rows] for array in self.big.values()]
        self.label[rows], self.id[rows] = self._reader.read_into(block, *big)


def _grown(array: np.ndarray, rows: int) -> np.ndarray:
    grown = np.empty((rows, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
