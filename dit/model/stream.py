"""The dtype in which tokens go from block to block: the residual stream, in float32 or bfloat16.

Each block adds two small updates to it. bfloat16 keeps 8 bits, so that an update of less than 1/512 of what is there
is lost; it saves half of the bytes of the stream that norms, gates and sums read and write.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Residual = Literal["float32", "bfloat16"]


def product_dtype(device: torch.device, parameters: torch.dtype) -> torch.dtype:
    """The dtype of matrix products on `device`: autocast's where that is on, else the parameters'."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return parameters


def as_stream(tokens: Tensor, residual: Residual, parameters: torch.dtype) -> Tensor:
    """(B, T, D) in at least float32 -> (B, T, D) in the dtype of the stream, which blocks keep.

    bfloat16 where that is asked for and matrix products are in bfloat16 too; where they are exact nothing is rounded.
    """
    if residual == "bfloat16" and product_dtype(tokens.device, parameters) == torch.bfloat16:
        return tokens.to(torch.bfloat16)
    return tokens
