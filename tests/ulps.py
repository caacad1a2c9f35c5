"""How far two tensors are apart in units in the last place: for what is promised to be the same but for rounding.

What is promised to the bit is compared by `torch.equal`; docs/guarantees.md says which is which. A processor's loop
over a whole vector register rounds otherwise than its loop over single elements, so that results depend in their
last places on the shape, the batch, the number of threads and the processor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ulps(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units in the last place of the largest element of its sample (row of the first axis).

    Not of each element by itself: where terms cancel, the rounding is that of the terms. Elements that are not finite
    must be the same in both; AssertionError where they, the shapes or the dtypes differ.
    """
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if not found.numel():
        return 0.0
    finite = expected.isfinite()
    torch.testing.assert_close(found[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    a, b = (torch.where(finite, v, 0.0).reshape(len(v) if v.ndim else 1, -1) for v in (found, expected))
    size = torch.maximum(a.abs(), b.abs()).amax(1, keepdim=True)
    unit = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    return float(((a.double() - b.double()).abs() / unit.double()).max())


def assert_within(found: Tensor, expected: Tensor, limit: int) -> None:
    """AssertionError where they are more than `limit` units in the last place apart."""
    off = ulps(found, expected)
    assert off <= limit, f"{off:g} units in the last place apart, expected at most {limit}"
