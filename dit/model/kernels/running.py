"""Where Triton's kernels run: on a GPU, or on the CPU by Triton's interpreter, which is for tests."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels read and write; they count in float32


def interpreted() -> bool:
    """Tell whether Triton interprets its kernels (TRITON_INTERPRET=1, set before Triton was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_triton(x: Tensor) -> bool:
    """Tell whether the operations take their kernels for this tensor, and not their plain reference."""
    return x.is_cuda or interpreted()


def refusal(device: torch.device) -> str | None:
    """Say why Triton's kernels cannot run on a device; None where they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install triton; it comes with torch for CUDA on Linux)"
    if device.type != "cuda" and not interpreted():
        return f"the device is {device.type}, and Triton's kernels need a GPU"
    return None
