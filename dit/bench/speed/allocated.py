"""The most bytes that torch's allocator had given out: by its own counter on a GPU, by its profiler on a CPU.

On a CPU every allocation and every release is an event of the profiler, those inside of kernels too; what is live is
their sum, as `torch.cuda.max_memory_allocated` counts it on a GPU. Neither counts what the allocator keeps for later
(fragments), nor the libraries' own memory. What lives as the work begins is counted from the tensors themselves: the
profiler misses a release in a thread of gloo's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "allocated: what is measured"


def peak_bytes(device: torch.device, build: Callable[[], Any], work: Callable[[Any], object]) -> int:
    """Measure the most bytes that live during `work(build())`, of what has been allocated since `build` began.

    Nothing that was allocated before may be released meanwhile.
    """
    gc.collect()
    return _on_gpu(device, build, work) if device.type == "cuda" else _on_cpu(build, work)


def live_bytes() -> int:
    """Sum up the storages of all tensors on the CPU that Python knows, and of their gradients."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not issubclass(
            type(thing), FakeTensor
        ):  # which a compiler leaves
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _on_gpu(device: torch.device, build: Callable[[], Any], work: Callable[[Any], object]) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    built = build()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work(built)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _on_cpu(build: Callable[[], Any], work: Callable[[Any], object]) -> int:
    before = live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        built = build()
        gc.collect()
        base = live_bytes() - before
        with record_function(MARK):
            work(built)
    events = profiler.profiler.kineto_results.events()
    [mark] = [event for event in events if event.name() == MARK]
    begun, ended = mark.start_ns(), mark.start_ns() + mark.duration_ns()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and begun <= event.start_ns() <= ended
    )
    live = most = 0
    for _, size in changes:
        live += size
        most = max(most, live)
    return base + most
