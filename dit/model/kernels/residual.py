"""The end of one half of a block and the start of the next as one operation on the residual stream.

    x ← x + gate·h;  y = norm(x)·weight + shift

`weight` is 1 + scale, times the norm's gain where it has one. Either line may be left out. The statistics are in
float32 whatever the dtypes. Of a plain pass x, h and y are read and written some seven times; here each once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.model.kernels.running import on_triton

Rows = Tensor | None
SCHEMA = (
    "(Tensor x, Tensor? h, Tensor? gate, Tensor? weight, Tensor? shift, float epsilon, bool centred, "
    "ScalarType stream, ScalarType dtype) -> (Tensor, Tensor)"
)
SCHEMA_BACKWARD = (
    "(Tensor? dout, Tensor? dy, Tensor? x, Tensor? h, Tensor? gate, Tensor? weight, float epsilon, bool centred, "
    "ScalarType stream) -> (Tensor, Tensor, Tensor)"
)


def residual(
    x: Tensor,
    h: Tensor | None = None,
    gate: Rows = None,
    weight: Rows = None,
    shift: Rows = None,
    *,
    epsilon: float = 1e-6,
    centred: bool = True,
    stream: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add gate·h to the stream, and norm and modulate it: (x, y), each (N, T, D); empty where it is not asked for.

    x, h: (N, T, D). gate, weight, shift: (N, D). h with its gate, or weight, may be None, and shift. centred: whether
    the mean is taken off (LayerNorm), or not (RMSNorm). stream: dtype of x afterwards, by default as before.
    dtype: of y, by default float32.
    """
    stream, dtype = stream or x.dtype, dtype or torch.float32
    return _residual(x, h, gate, weight, shift, epsilon, centred, stream, dtype)  # type: ignore[no-any-return]


class _Normed(torch.autograd.Function):
    """The normed stream beside the stream itself, so that their gradients come back to one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, shift: Rows, epsilon: float, centred: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.norm, ctx.shift = (epsilon, centred), None if shift is None else shift.dtype
        return x.view_as(x), _residual(x, None, None, weight, shift, epsilon, centred, x.dtype, dtype)[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weight = ctx.saved_tensors
        dx, _, sums = _residual_backward(*grad_outputs, x, None, None, weight, *ctx.norm, x.dtype)
        shift = None if ctx.shift is None else sums[:, 1].to(ctx.shift)
        return dx, sums[:, 0].to(weight.dtype), shift, None, None, None


def normed(
    x: Tensor,
    weight: Tensor,
    shift: Rows = None,
    *,
    epsilon: float = 1e-6,
    centred: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm and modulate the stream: (x, y) as `residual`; the x that is given back is to be used in place of x."""
    out: tuple[Tensor, Tensor] = _Normed.apply(x, weight, shift, epsilon, centred, dtype or torch.float32)
    return out


def reference(
    x: Tensor, h: Tensor | None, gate: Rows, weight: Rows, shift: Rows, epsilon: float, centred: bool,
    stream: torch.dtype, dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the same in plain torch, which autograd differentiates; None for what is not asked for."""
    out = None if h is None or gate is None else (x + gate.unsqueeze(1) * h).to(stream)  # (N, T, D)
    if weight is None:
        return out, None
    full = (x if out is None else out).float()
    size = full.shape[-1:]
    normed = F.layer_norm(full, size, eps=epsilon) if centred else F.rms_norm(full, size, eps=epsilon)
    y = normed * weight.unsqueeze(1).float()
    return out, (y if shift is None else y + shift.unsqueeze(1).float()).to(dtype)


def reference_backward(
    dout: Tensor | None, dy: Tensor | None, x: Tensor | None, h: Tensor | None, gate: Rows, weight: Rows,
    epsilon: float, centred: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:  # fmt: skip
    """Compute the gradients by their formulas: of x (float32), of h, and those of gate, weight and shift, (N, D)."""
    d = None if dout is None else dout.float()
    sums: list[Tensor] = []
    if dy is not None and x is not None and weight is not None:
        given, v = dy.float(), x.float()
        v = v - v.mean(-1, keepdim=True) if centred else v
        inverse = (v.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        v = v * inverse
        sums = [(given * v).sum(1), given.sum(1)]
        given = given * weight.unsqueeze(1).float()
        slope = given - v * (given * v).mean(-1, keepdim=True)
        slope = (slope - given.mean(-1, keepdim=True) if centred else slope) * inverse
        d = slope if d is None else d + slope
    if h is None or gate is None or d is None:
        return d, None, sums
    return d, (d * gate.unsqueeze(1).float()).to(h.dtype), [(d * h.float()).sum(1), *sums]


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


@torch.library.custom_op("dit::residual", mutates_args=(), schema=SCHEMA)
def _residual(
    x: Tensor, h: Tensor | None, gate: Rows, weight: Rows, shift: Rows, epsilon: float, centred: bool,
    stream: torch.dtype, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not on_triton(x):
        out, y = reference(x, h, gate, weight, shift, epsilon, centred, stream, dtype)
        return _empty(x) if out is None else out, _empty(x) if y is None else y
    from dit.model.kernels import residual_triton as kernels

    said, normed = _residual_fake(x, h, gate, weight, shift, epsilon, centred, stream, dtype)
    kernels.forward(
        x.contiguous(), None if h is None else h.contiguous(), _lined(gate), _lined(weight), _lined(shift),
        None if h is None else said, None if weight is None else normed, epsilon, centred,
    )  # fmt: skip
    return said, normed


@_residual.register_fake
def _residual_fake(
    x: Tensor, h: Tensor | None, gate: Rows, weight: Rows, shift: Rows, epsilon: float, centred: bool,
    stream: torch.dtype, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        _empty(x) if h is None else x.new_empty(x.shape, dtype=stream),
        _empty(x) if weight is None else x.new_empty(x.shape, dtype=dtype),
    )


@torch.library.custom_op("dit::residual_backward", mutates_args=(), schema=SCHEMA_BACKWARD)
def _residual_backward(
    dout: Tensor | None, dy: Tensor | None, x: Tensor | None, h: Tensor | None, gate: Rows, weight: Rows,
    epsilon: float, centred: bool, stream: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given: Any = dout if dy is None else dy
    if not on_triton(given):
        of_x, of_h, found = reference_backward(dout, dy, x, h, gate, weight, epsilon, centred)
        return (
            _empty(given) if dy is None or of_x is None else of_x.to(stream),
            _empty(given) if of_h is None else of_h,
            torch.stack(found, 1),
        )
    from dit.model.kernels import residual_triton as kernels

    dx, dh, sums = _residual_backward_fake(dout, dy, x, h, gate, weight, epsilon, centred, stream)
    dout, dy, x, kept = (None if a is None else a.contiguous() for a in (dout, dy, x, h))
    sums = kernels.backward(
        dout, dy, x, kept, _lined(gate), _lined(weight), None if dy is None else dx, None if h is None else dh,
        sums, epsilon, centred,
    )  # fmt: skip
    return dx, dh, sums


@_residual_backward.register_fake
def _residual_backward_fake(
    dout: Tensor | None, dy: Tensor | None, x: Tensor | None, h: Tensor | None, gate: Rows, weight: Rows,
    epsilon: float, centred: bool, stream: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given: Any = dout if dy is None else dy
    kinds = (h is not None) + 2 * (dy is not None)
    return (
        _empty(given) if dy is None else given.new_empty(given.shape, dtype=stream),
        _empty(given) if h is None else h.new_empty(h.shape),
        given.new_empty(given.shape[0], kinds, given.shape[2], dtype=torch.float32),
    )


def _lined(rows: Rows) -> Rows:
    """The rows with their channels side by side; slices of one large row stay as they are."""
    return rows if rows is None or rows.stride(-1) == 1 else rows.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, h, gate, weight, shift, ctx.epsilon, ctx.centred, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.stream, ctx.shift = x.dtype, None if shift is None else shift.dtype
    normed = None if weight is None else x if h is None else output[0]
    ctx.save_for_backward(normed, h, gate, weight)


def _gradients(ctx: Any, dout: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    x, h, gate, weight = ctx.saved_tensors
    dout, dy = dout if h is not None else None, dy if weight is not None else None
    if dout is None and dy is None:
        return (None,) * 9
    dx, dh, sums = _residual_backward(dout, dy, x, h, gate, weight, ctx.epsilon, ctx.centred, ctx.stream)
    found: list[Tensor | None] = [None, None, None]
    if h is not None:
        found[0] = sums[:, 0].to(gate.dtype)
    if dy is not None:
        found[1] = sums[:, -2].to(weight.dtype)
        found[2] = None if ctx.shift is None else sums[:, -1].to(ctx.shift)
    of_x = dx if dy is not None else None if dout is None else dout.to(ctx.stream)
    return (of_x, dh if h is not None else None, *found, None, None, None, None)


_residual.register_autograd(_gradients, setup_context=_keep)
