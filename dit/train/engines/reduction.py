"""The mean of gradients over ranks, in flat buckets that are sent while the backward pass goes on.

Torch's DistributedDataParallel does the same, but makes its buckets anew after the first step, in the order in which
gradients came: with more than two ranks a run that resumes then adds in another order than one that never stopped. Here
the buckets are a function of the model alone, any number of forward passes may come before a backward pass, and nothing
is decided by the host that a CUDA graph could not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

BUCKET = 25 << 20  # bytes of gradients that are sent at once, at least: torch's own figure for its buckets


@dataclass
class Bucket:
    """Parameters whose gradients are views of `flat`. waiting: how many of those the last pass still owes."""

    flat: Tensor
    parameters: list[nn.Parameter]
    waiting: int = 0
    work: Any = None  # the all-reduce under way


@dataclass
class GradientBuckets:
    """Gradients of some parameters, and their mean over all ranks. Every method is collective.

    ranks: how many there are. bucket: bytes, see BUCKET.
    """

    parameters: Sequence[nn.Parameter]
    ranks: int
    bucket: int = BUCKET
    _buckets: list[Bucket] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)
    _next: int | None = None  # bucket that is sent next; None outside a step's last backward pass

    def __post_init__(self) -> None:
        chosen: list[nn.Parameter] = []
        for p in reversed(self.parameters):  # about as the backward pass comes to them
            chosen.append(p)
            if sum(q.numel() * q.element_size() for q in chosen) >= self.bucket:
                self._add(chosen)
                chosen = []
        if chosen:
            self._add(chosen)

    def _add(self, chosen: list[nn.Parameter]) -> None:
        first = chosen[0]
        flat = torch.zeros(sum(p.numel() for p in chosen), dtype=first.dtype, device=first.device)
        made = Bucket(flat, chosen)
        for p, piece in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
            p.grad = piece.view(p.shape)
            self._hooks.append(p.register_post_accumulate_grad_hook(self._arrival(made)))
        self._buckets.append(made)

    def _arrival(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            if self._next is None:
                return
            if bucket.work is not None:
                raise RuntimeError("a gradient came twice in a step's last backward pass, after it was sent")
            bucket.waiting -= 1
            self._send(lambda due: due.waiting == 0)

        return arrived

    def _send(self, is_due: Callable[[Bucket], bool]) -> None:
        """Send the buckets that are due, in one order on all ranks, up to the first that is not."""
        while self._next is not None and self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if not is_due(bucket):
                return
            bucket.work = td.all_reduce(bucket.flat, async_op=True)
            self._next += 1

    def expect_last(self) -> None:
        """Have the next backward pass, the step's last one, send what is complete."""
        self._next = 0
        for bucket in self._buckets:
            bucket.waiting, bucket.work = len(bucket.parameters), None

    def finish(self) -> None:
        """Send the rest (what the loss did not depend on is 0) and make every gradient the mean over ranks."""
        if self._next is None:
            self.expect_last()
        self._send(lambda due: True)
        for bucket in self._buckets:
            bucket.work.wait()
            bucket.flat.mul_(1.0 / self.ranks)
            bucket.work = None
        self._next = None

    def clear(self) -> None:
        """Make every gradient 0."""
        torch._foreach_zero_([bucket.flat for bucket in self._buckets])

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()
        for bucket in self._buckets:
            for p in bucket.parameters:
                p.grad = None
        self._buckets, self._hooks, self.parameters = [], [], ()
