"""The C library's heap on a CPU, where a step's gradients and activations come from it and go back to it."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)
KEPT = 1 << 30  # bytes: so much free memory stays with the process, and blocks up to this come from the heap
KEPT_BEFORE = 1 << 25  # the largest blocks that glibc before 2.35 lets come from the heap


@functools.cache
def keep_freed_memory(device: torch.device) -> bool:
    """Have glibc keep what is freed for the next step, on a CPU; tells whether it does.

    By itself it gives large blocks back to the kernel, which clears each page again when the next step asks for it: a
    tenth of a step of a small model. The process then stays as large as its largest step. Other C libraries, and
    allocators that are preloaded, are left as they are.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    return keep_with(ctypes.CDLL(None).mallopt)


def keep_with(mallopt: Callable[[int, int], int]) -> bool:
    """The same by a mallopt: (parameter, bytes) -> 0 where it is refused.

    Blocks come first. Either call ends glibc's own adapting, and with the other one alone all blocks above 128 KiB
    would go back to the kernel for good.
    """
    if not any(mallopt(MMAP_THRESHOLD, size) for size in (KEPT, KEPT_BEFORE)):
        return False
    return bool(mallopt(TRIM_THRESHOLD, KEPT))
