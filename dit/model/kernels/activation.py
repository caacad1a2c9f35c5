"""What stands between the two layers of an MLP: bias and GELU, or bias and SwiGLU's gate, in one pass.

    a = gelu(h + bias), or silu(first half of h + bias)·(second half)

`activated_linear` is that and the second layer. It keeps h for the backward pass and computes a again, in the pass that
makes h's gradient and its bias's; plain torch keeps both, which of a DiT's MLP are half of what a block keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.model.kernels.running import on_triton


@dataclass(frozen=True)
class Activation:
    """What stands between an MLP's layers. gated: whether the first half of the channels gates the second."""

    gated: bool
    plain: Callable[[Tensor], Tensor]  # in torch: (..., M), or (..., 2·M) where it is gated -> (..., M)


def swiglu(h: Tensor) -> Tensor:
    """Give silu(first half)·(second half): (..., 2·M) -> (..., M) (arXiv 2002.05202)."""
    gate, value = h.chunk(2, dim=-1)  # each (..., M)
    return F.silu(gate) * value


GELU = Activation(gated=False, plain=partial(F.gelu, approximate="tanh"))
SWIGLU = Activation(gated=True, plain=swiglu)
SCHEMA = "(Tensor h, Tensor? bias, bool gated) -> Tensor"
SCHEMA_BACKWARD = "(Tensor given, Tensor h, Tensor? bias, bool gated) -> (Tensor, Tensor, Tensor)"


def reference(h: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    """Compute the activation in plain torch: h (..., M), or (..., 2·M) where it is gated -> (..., M)."""
    v = h.float() if bias is None else h.float() + bias.float()
    if not gated:
        return F.gelu(v, approximate="tanh").to(h.dtype)
    gate, value = v.chunk(2, -1)
    return (F.silu(gate) * value).to(h.dtype)


def reference_backward(given: Tensor, h: Tensor, bias: Tensor | None, gated: bool) -> tuple[Tensor, Tensor]:
    """Compute by torch's own formulas the gradient of h before it is rounded (float32), and the activation again."""
    v, d = h.float() if bias is None else h.float() + bias.float(), given.float()
    said = reference(h, bias, gated)
    if not gated:
        return torch.ops.aten.gelu_backward(d, v, approximate="tanh"), said
    gate, value = v.chunk(2, -1)
    of_gate = torch.ops.aten.silu_backward(d * value, gate)
    return torch.cat([of_gate, d * F.silu(gate)], -1), said


def _out(h: Tensor, gated: bool) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2 if gated else h.shape[1])


@torch.library.custom_op("dit::activation", mutates_args=(), schema=SCHEMA)
def activation(h: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    """Give the activation: h (R, M), or (R, 2·M) where it is gated, bias (M,) or (2·M,) -> (R, M) in h's dtype."""
    if not on_triton(h):
        return reference(h, bias, gated)
    from dit.model.kernels import activation_triton as kernels

    out = _out(h, gated)
    kernels.forward(h.contiguous(), bias, out, gated)
    return out


@activation.register_fake
def _activation_fake(h: Tensor, bias: Tensor | None, gated: bool) -> Tensor:
    return _out(h, gated)


@torch.library.custom_op("dit::activation_backward", mutates_args=(), schema=SCHEMA_BACKWARD)
def activation_backward(
    given: Tensor, h: Tensor, bias: Tensor | None, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradient of h, the activation once more, and the gradient of the bias (float32; empty without one)."""
    if not on_triton(h):
        dh, said = reference_backward(given, h, bias, gated)
        return dh.to(h.dtype), said, dh.sum(0) if bias is not None else dh.new_empty(0)
    from dit.model.kernels import activation_triton as kernels

    h, given = h.contiguous(), given.contiguous()
    dh, said = torch.empty_like(h), _out(h, gated)
    return dh, said, kernels.backward(given, h, bias, dh, said, gated)


@activation_backward.register_fake
def _activation_backward_fake(
    given: Tensor, h: Tensor, bias: Tensor | None, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sums = h.new_empty(0 if bias is None else h.shape[1], dtype=torch.float32)
    return h.new_empty(h.shape), _out(h, gated), sums


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, bias, ctx.gated = inputs
    ctx.save_for_backward(h, bias)


def _gradients(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
    h, bias = ctx.saved_tensors
    dh, _, sums = activation_backward(given, h, bias, ctx.gated)
    return dh, None if bias is None else sums.to(bias.dtype), None


activation.register_autograd(_gradients, setup_context=_keep)


class ActivatedLinear(torch.autograd.Function):
    """The activation and the second layer, of which only the activation's input is kept."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, bias: Tensor | None, weight: Tensor, offset: Tensor | None, gated: bool
    ) -> Tensor:
        """h (R, M or 2·M), bias, weight (D, M), offset (D,) -> (R, D)."""
        ctx.gated = gated
        ctx.save_for_backward(h, bias, weight)
        ctx.offset = None if offset is None else offset.dtype
        return F.linear(activation(h, bias, gated), weight, offset)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Give the gradients of h, bias, weight and offset."""
        h, bias, weight = ctx.saved_tensors
        (given,) = grad_outputs
        dh, said, sums = activation_backward(given @ weight, h, bias, ctx.gated)
        return (
            dh,
            None if bias is None else sums.to(bias.dtype),
            given.t() @ said,
            None if ctx.offset is None else given.sum(0, dtype=torch.float32).to(ctx.offset),
            None,
        )


def activated_linear(
    h: Tensor, bias: Tensor | None, weight: Tensor, offset: Tensor | None, *, gated: bool = False
) -> Tensor:
    """Give linear(activation(h + bias)): h (..., M or 2·M), weight (D, M), offset (D,) -> (..., D), in h's dtype.

    The weight is cast to it. gated: SwiGLU's product in place of GELU.
    """
    rows = h.reshape(-1, h.shape[-1])  # (R, M)
    offset = None if offset is None else offset.to(h.dtype)
    out: Tensor = ActivatedLinear.apply(rows, bias, weight.to(h.dtype), offset, gated)
    return out.view(*h.shape[:-1], out.shape[-1])
