"""Which of torch's kernels computes attention: the one that torch chooses, or one that is named.

The choice is made where attention is called, so that it holds in compiled blocks (it becomes a part of the graph) and
where a checkpointed block is computed again; its backward pass is the kernel's own.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit.config import ConfigError

Backend = Literal["auto", "cudnn", "flash", "efficient", "math"]

BACKENDS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,  # cuDNN's fused kernels
    "flash": SDPBackend.FLASH_ATTENTION,  # FlashAttention-2 (arXiv 2307.08691); on a CPU torch's own blocked kernel
    "efficient": SDPBackend.EFFICIENT_ATTENTION,  # xFormers' (arXiv 2112.05682)
    "math": SDPBackend.MATH,  # two matrix products and a softmax, all logits kept
}


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: Backend = "auto") -> Tensor:
    """softmax(scale·q·kᵀ)·v: (B, heads, T, d) thrice -> (B, heads, T, d). scale: None is 1/√d.

    ConfigError where the backend cannot compute it, naming those that can; in compiled blocks torch's RuntimeError.
    """
    if backend == "auto":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if torch.compiler.is_compiling():
        return _on(backend, q, k, v, scale)
    try:
        return _on(backend, q, k, v, scale)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        check(backend, q.device, q.dtype, q.shape[-1], q.shape[-2])  # says what can
        raise


def check(backend: Backend, device: torch.device, dtype: torch.dtype, head_width: int, tokens: int) -> None:
    """Refuse, by ConfigError, a backend that cannot compute attention and its gradient there, and name those that can.

    dtype: of queries, keys and values. tokens: that attend to each other.
    """
    if backend == "auto" or can(backend, device, dtype, head_width, tokens):
        return
    others = [name for name in BACKENDS if name != backend and can(name, device, dtype, head_width, tokens)]
    raise ConfigError(
        f"model.attention: {backend} cannot compute attention on {device.type} in {str(dtype).removeprefix('torch.')} "
        f"with heads of {head_width} channels and {tokens} tokens; {' and '.join(others)} can: name one of these, or "
        "auto, which leaves it to torch"
    )


def can(backend: str, device: torch.device, dtype: torch.dtype, head_width: int, tokens: int) -> bool:
    """Whether a backend can compute attention and its gradient there: it is tried, with one head."""
    shape = (1, 1, tokens, head_width)
    q, k, v = (torch.zeros(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore", UserWarning)  # of each kernel why it is not possible
            out = _on(backend, q, k, v, None)
            torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torch's word for it: no kernel that is switched on takes these
        return False
    return True


def _on(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
