"""The same bits at every place in every batch, for what is computed of each sample's number alone.

On the CPU a loop takes a whole vector register of elements at a time and the last few one by one, and the two
may round otherwise: with or without a fused multiply-add, or by another exp. So what is promised to depend on
a sample alone may not be computed at the end of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_VECTOR = 64  # elements: a multiple of what any processor's loop takes at a time
_PIECE = 2**14  # elements that one thread takes: threads cut longer tensors anywhere


def everywhere_alike(function: Callable[..., tuple[Tensor, ...]], *values: Tensor) -> tuple[Tensor, ...]:
    """function(*values) with the same bits for the same numbers, wherever they stand in however long a batch.

    function: elementwise, from tensors (n,) to a tuple of tensors (n,), defined at 0.5. values: (B,) each.
    """
    size = len(values[0])
    if size > _PIECE:
        parts = zip(*(value.split(_PIECE) for value in values), strict=True)
        results = zip(*(everywhere_alike(function, *part) for part in parts), strict=True)
        return tuple(torch.cat(result) for result in results)
    padded = [torch.nn.functional.pad(value, (0, _VECTOR - size % _VECTOR), value=0.5) for value in values]
    return tuple(result[:size] for result in function(*padded))
