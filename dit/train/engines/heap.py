"""The C library's heap on a CPU, where a step's gradients and activations come from it and go back to it."""

from __future__ import annotations

import ctypes
import functools
import platform

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)
KEPT = 1 << 30  # bytes: so much free memory stays with the process, and blocks up to this come from the heap


@functools.cache
def keep_freed_memory(device: torch.device) -> bool:
    """Have glibc keep what is freed for the next step, on a CPU; tells whether it does.

    By itself it gives large blocks back to the kernel, which clears each page again when the next step asks for it: a
    tenth of a step of a small model. The process then stays as large as its largest step. Other C libraries, and
    allocators that are preloaded, are left as they are.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(TRIM_THRESHOLD, KEPT) and mallopt(MMAP_THRESHOLD, KEPT))
