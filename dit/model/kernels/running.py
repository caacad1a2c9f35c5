"""Where Triton's kernels run: on a GPU, or on the CPU by Triton's interpreter, which is for tests."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dit.config import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels read and write
# Of every launch: a multiplication and an addition are one operation, which Triton's newer releases do not default to.
FUSED = {"enable_fp_fusion": True}


def interpreted() -> bool:
    """Tell whether Triton interprets its kernels (TRITON_INTERPRET=1, set before Triton was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def installed() -> bool:
    """Tell whether there is a Triton to import."""
    return find_spec("triton") is not None


def on_triton(x: Tensor) -> bool:
    """Tell whether the operations take their kernels for this tensor, and not their plain reference.

    On a GPU and where Triton interprets; ConfigError where Triton is missing there.
    """
    if not (x.is_cuda or interpreted()):
        return False
    check(x.device)
    return True


def check(device: torch.device) -> None:
    """Refuse, by ConfigError, a device on which Triton's kernels cannot run."""
    reason = refusal(device)
    if reason is not None:
        raise ConfigError(f"model.kernels: triton cannot run here: {reason}; choose model.kernels: auto")


def refusal(device: torch.device) -> str | None:
    """Say why Triton's kernels cannot run on a device; None where they can."""
    if not installed():
        return "the package triton is not installed, which comes with torch for CUDA on Linux"
    if device.type != "cuda" and not interpreted():
        return f"the device is {device.type}, and Triton's kernels need a GPU"
    return None
