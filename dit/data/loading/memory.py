"""Memory for batches, used again once a batch is let go of: fresh pages would cost more than what is read to them."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

CHUNK = 32 << 20  # bytes asked of the system at a time, so that small batches get large pages too
ALIGNED = 4096  # bytes that each tensor starts at a multiple of


class Memory:
    """Tensors in memory that comes back when neither they nor views of them are held any more. Threads may share one.

    pin: page-locked memory, for GPUs, which torch itself uses again. Else large pages where the system has them
    (Linux: transparent_hugepage is madvise or always): samples go to hundreds of batches in turn, and each step to
    another small page costs a look-up of its address.
    """

    def __init__(self, pin: bool = False):
        self.pin = pin
        self.bytes = 0  # asked of the system so far
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(
            list
        )  # by bytes; last, what was used last

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with anything in it."""
        if self.pin:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // ALIGNED) * ALIGNED
        free = self._free[size]
        try:
            held = free.pop()
        except IndexError:
            self._more(size)
            held = free.pop()
        lent = held[:]  # torch holds this object until the last tensor over it is gone
        weakref.finalize(lent, free.append, held).atexit = False
        return torch.from_numpy(lent).view(dtype)[:count].view(shape)

    def _more(self, size: int) -> None:
        """Several pieces of so many bytes."""
        count = max(1, CHUNK // max(size, 1))
        pages = mmap.mmap(-1, max(count * size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        self.bytes += count * size
        for piece in np.frombuffer(pages, np.uint8)[: count * size].reshape(count, size):
            self._free[size].append(piece)
