"""What ranks send each other: every collective that torch.distributed is asked for, and the bytes of its ring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Collective:
    """One kind of message: numel of the whole tensor, as one rank has it before or after."""

    op: str
    dtype: torch.dtype
    numel: int
    ranks: int

    @property
    def payload(self) -> int:
        """Bytes of the tensor."""
        return self.numel * self.dtype.itemsize

    @property
    def sent(self) -> float:
        """Bytes that each rank sends where the tensor goes round in a ring, as NCCL sends large ones."""
        return RING[self.op](self.ranks) * self.payload


def _once(ranks: int) -> float:
    return (ranks - 1) / ranks


# Of a tensor of one byte, by rank and on average (Thakur et al., 2005, "Optimization of Collective Communication").
RING: Mapping[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * _once(n),  # a reduce-scatter and an all-gather
    "reduce_scatter": _once,
    "all_gather": _once,
    "reduce": _once,  # to one rank, in a pipeline along the ring: all but the receiver send it on
    "broadcast": _once,
    "all_to_all": lambda n: 1.0,  # counted is what a rank sends to others
}

# c10d's operators: the name above, the argument that holds the whole tensor, and the one with the group.
OPERATORS = {
    "allreduce_": ("all_reduce", 0, 1),
    "allreduce_coalesced_": ("all_reduce", 0, 1),
    "reduce_": ("reduce", 0, 1),
    "broadcast_": ("broadcast", 0, 1),
    "allgather_": ("all_gather", 0, 2),
    "_allgather_base_": ("all_gather", 0, 2),
    "allgather_into_tensor_coalesced_": ("all_gather", 0, 2),
    "reduce_scatter_": ("reduce_scatter", 1, 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 2),
    "alltoall_base_": ("all_to_all", 1, 2),  # unevenly cut, with nothing to itself: as Muon's exchange is
}


class CollectiveCounter(TorchDispatchMode):
    """Counts, as a context, what this thread asks torch.distributed for, whoever asks (DeepSpeed, DDP's C++).

    On a GPU the backward pass runs in other threads, which it does not see: count on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Collective] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple[Any, ...]) -> None:
        if operator == "barrier":
            return
        if operator not in OPERATORS:
            raise NotImplementedError(f"c10d.{operator} is no collective that is known here")
        op, whole, group = OPERATORS[operator]
        ranks = torch.distributed.ProcessGroup.unbox(args[group]).size()
        for tensor in _tensors(args[whole]):
            self.found[Collective(op, tensor.dtype, tensor.numel(), ranks)] += 1

    def sent(self) -> float:
        """Return the bytes that each rank sent, by the ring's formula, on average over ranks."""
        return sum(kind.sent * times for kind, times in self.found.items())


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    else:
        for part in nested:
            yield from _tensors(part)


def formula(stage: int, psi: int, ranks: int, accumulation: int) -> float:
    """Return the bytes that a rank sends a step for `psi` bytes of gradients at a ZeRO stage (arXiv 1910.02054, 7).

    0: an all-reduce; 1: a reduce-scatter, and an all-gather of what the update made of it; 2: the same, gradients of
    each of `accumulation` micro-batches; 3: of each a reduce-scatter, and two all-gathers of the parameters.
    """
    return _once(ranks) * psi * (2, 2, accumulation + 1, 3 * accumulation)[stage]
