"""Norm of queries and keys, and their rotary positions, in one pass over the attention's first product.

The backward pass writes the gradient of queries, keys and values where that product's gradient is to be, which plain
torch puts together by a copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.model.kernels.running import on_triton

SCHEMA = (
    "(Tensor qkv, Tensor? gain, Tensor? bias, Tensor? rotation, float epsilon, bool normed, bool centred) "
    "-> (Tensor, Tensor)"
)
SCHEMA_BACKWARD = (
    "(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor? gain, Tensor? rotation, float epsilon, bool normed, "
    "bool centred) -> (Tensor, Tensor)"
)


def _turned(v: Tensor, rotation: Tensor | None, back: bool = False) -> Tensor:
    """Turn pairs of neighbours: v (B, T, heads, d), rotation (2, T, d/2)."""
    if rotation is None:
        return v
    cos, sin = rotation.float().unsqueeze(-2)  # each (T, 1, d/2)
    sin = -sin if back else sin
    even, odd = v.unflatten(-1, (-1, 2)).unbind(-1)  # each (B, T, heads, d/2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def reference(
    qkv: Tensor, gain: Tensor | None, bias: Tensor | None, rotation: Tensor | None, epsilon: float,
    normed: bool, centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute queries and keys in plain torch: qkv (B, T, 3, heads, d) -> (B, T, heads, d) twice."""
    found = []
    for kind in range(2):
        v = qkv[:, :, kind].float()  # (B, T, heads, d)
        if normed:
            norm = F.layer_norm if centred else F.rms_norm
            v = norm(v, v.shape[-1:], eps=epsilon)
        v = v if gain is None else v * gain[kind].float()
        v = v if bias is None else v + bias[kind].float()
        found.append(_turned(v, rotation).to(qkv.dtype))
    return found[0], found[1]


def reference_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor | None, rotation: Tensor | None, epsilon: float,
    normed: bool, centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the gradients by their formulas: of qkv, and of gains and biases (2, 2, d), empty without a gain."""
    found, sums = [], []
    for kind, given in enumerate((dq, dk)):
        d = _turned(given.float(), rotation, back=True)
        if normed:
            v = qkv[:, :, kind].float()
            v = v - v.mean(-1, keepdim=True) if centred else v
            inverse = (v.square().mean(-1, keepdim=True) + epsilon).rsqrt()
            v = v * inverse
            if gain is not None:
                sums += [(d * v).sum((0, 1, 2)), d.sum((0, 1, 2))]
                d = d * gain[kind].float()
            slope = d - v * (d * v).mean(-1, keepdim=True)
            d = (slope - d.mean(-1, keepdim=True) if centred else slope) * inverse
        found.append(d.to(qkv.dtype))
    of_gain = torch.stack(sums).unflatten(0, (2, 2)) if sums else _no_sums(qkv)
    return torch.stack([*found, dv.to(qkv.dtype)], 2), of_gain


def _no_sums(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("dit::queries_keys", mutates_args=(), schema=SCHEMA)
def queries_keys(
    qkv: Tensor, gain: Tensor | None, bias: Tensor | None, rotation: Tensor | None, epsilon: float,
    normed: bool, centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Give queries and keys, normed and turned: as `reference`."""
    if not on_triton(qkv):
        return tuple(  # type: ignore[return-value]
            a.contiguous() for a in reference(qkv, gain, bias, rotation, epsilon, normed, centred)
        )
    from dit.model.kernels import heads_triton as kernels

    q, k = _queries_keys_fake(qkv, gain, bias, rotation, epsilon, normed, centred)
    gain, bias, rotation = (None if a is None else a.contiguous() for a in (gain, bias, rotation))
    kernels.forward(qkv.contiguous(), gain, bias, rotation, q, k, epsilon, normed, centred)
    return q, k


@queries_keys.register_fake
def _queries_keys_fake(
    qkv: Tensor, gain: Tensor | None, bias: Tensor | None, rotation: Tensor | None, epsilon: float,
    normed: bool, centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, tokens, _, heads, width = qkv.shape
    return tuple(qkv.new_empty(batch, tokens, heads, width) for _ in range(2))  # type: ignore[return-value]


@torch.library.custom_op("dit::queries_keys_backward", mutates_args=(), schema=SCHEMA_BACKWARD)
def queries_keys_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor | None, rotation: Tensor | None, epsilon: float,
    normed: bool, centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Give the gradients of qkv, and of gains and biases: as `reference_backward`."""
    if not on_triton(qkv):
        return reference_backward(dq, dk, dv, qkv, gain, rotation, epsilon, normed, centred)
    from dit.model.kernels import heads_triton as kernels

    dqkv = qkv.new_empty(qkv.shape)
    dq, dk, dv, qkv = (a.contiguous() for a in (dq, dk, dv, qkv))
    gain, rotation = (None if a is None else a.contiguous() for a in (gain, rotation))
    sums = kernels.backward(dq, dk, dv, qkv, gain, rotation, dqkv, epsilon, normed, centred)
    return dqkv, sums


@queries_keys_backward.register_fake
def _queries_keys_backward_fake(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, gain: Tensor | None, rotation: Tensor | None, epsilon: float,
    normed: bool, centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sums = _no_sums(qkv) if gain is None else qkv.new_empty(2, 2, qkv.shape[-1], dtype=torch.float32)
    return qkv.new_empty(qkv.shape), sums


class Heads(torch.autograd.Function):
    """Queries, keys and values of one product, whose gradient is written once."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, gain: Tensor | None, bias: Tensor | None, rotation: Tensor | None, epsilon: float,
        normed: bool, centred: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """qkv (B, T, 3, heads, d), gain and bias (2, d), rotation (2, T, d/2) -> q, k, v (B, T, heads, d)."""
        ctx.save_for_backward(qkv, gain, rotation)
        ctx.bias = None if bias is None else bias.dtype
        ctx.norm = epsilon, normed, centred
        q, k = queries_keys(qkv, gain, bias, rotation, epsilon, normed, centred)
        return q, k, qkv[:, :, 2]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Give the gradients of qkv, gain and bias."""
        qkv, gain, rotation = ctx.saved_tensors
        dqkv, sums = queries_keys_backward(*grad_outputs, qkv, gain, rotation, *ctx.norm)
        of_gain = None if gain is None else sums[:, 0].to(gain.dtype)
        of_bias = None if ctx.bias is None else sums[:, 1].to(ctx.bias)
        return dqkv, of_gain, of_bias, None, None, None, None


def normed_turned_heads(
    qkv: Tensor,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    rotation: Tensor | None = None,
    *,
    epsilon: float = 1e-6,
    normed: bool = True,
    centred: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give queries and keys, normed over a head's channels and turned, and values: (B, T, heads, d) each.

    qkv: (B, T, 3, heads, d). gain, bias: (2, d) of queries and keys; a bias needs a gain. rotation: (2, T, d/2) cosines
    and sines. centred: whether the mean is taken off (LayerNorm), or not (RMSNorm); normed: whether there is a norm.
    """
    out: tuple[Tensor, Tensor, Tensor] = Heads.apply(qkv, gain, bias, rotation, epsilon, normed, centred)
    return out
