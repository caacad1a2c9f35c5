"""Transformer blocks and the output layer, modulated by the condition (adaLN-Zero; arXiv 2212.09748).

A block is one unit for ZeRO-3 (a leaf whose parameters are gathered together) and for torch.compile (one
graph). The residual stream, the norms and the modulation are in float32; the matrix products take autocast's
dtype, or that of the parameters where there is no autocast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from dit.config import Registry, config
from dit.model.dims import Dims
from dit.model.embed import WideLinear, wide

EPSILON = 1e-6  # of every norm, as in the reference


@dataclass(frozen=True)
class BlockCost:
    """What one block costs. Multiply-adds are those of matrix products; one is 2 FLOPs."""

    parameters: int
    linear_parameters: int  # those of them that autocast copies to half precision
    multiply_adds: int  # of the forward pass, per image
    saved_narrow: int  # numbers kept for the backward pass, per image, in the dtype of the matrix products
    saved_wide: int  # the same in float32


class BlockConfig(ABC):
    """A kind of block: builds it and knows its cost."""

    reads_tokens = False  # whether forward takes the conditioners' tokens as a third argument

    @abstractmethod
    def build(self, dims: Dims) -> nn.Module:
        """A block: (x (B, T, D), c (B, D)) -> (B, T, D). Layers it lists in `zero_layers()` start at zero."""

    @abstractmethod
    def cost(self, dims: Dims) -> BlockCost:
        """The cost of one such block."""


BLOCKS: Registry[BlockConfig] = Registry("block")


@BLOCKS.register("adaln_zero")
@config
class AdaLNZero(BlockConfig):
    """Attention and MLP with shift, scale and gate from the condition, the gates starting at zero."""

    qk_norm: bool = False  # RMSNorm with a gain on queries and keys (arXiv 2302.05442): keeps logits bounded
    # added to the variance in the norm before the MLP; diffusers' DiT has 1e-5
    mlp_epsilon: Annotated[float, Field(gt=0)] = EPSILON

    def build(self, dims: Dims) -> nn.Module:
        """The block for these shapes."""
        return AdaLNZeroBlock(
            dims.width, dims.heads, dims.mlp_width, self.qk_norm, self.mlp_epsilon, dims.attention_scale
        )

    def cost(self, dims: Dims) -> BlockCost:
        """The cost of one block."""
        d, m, t = dims.width, dims.mlp_width, dims.tokens
        linear = (3 * d * d + 3 * d) + (d * d + d) + (2 * d * m + m + d) + (6 * d * d + 6 * d)
        # narrow: inputs and outputs of qkv, proj, fc1 and fc2 (GELU's input and output), and c
        # wide: two residuals, their norms with their statistics, attention's log-sum-exp, the modulation
        narrow = t * (8 * d + 2 * m) + d
        wide_ = t * (4 * d + dims.heads + 4) + 8 * d
        if self.qk_norm:  # queries and keys given out; their float32 copies and root mean squares
            narrow += t * 2 * d
            wide_ += t * (2 * d + 2 * dims.heads)
        return BlockCost(
            parameters=linear + (2 * dims.head_width if self.qk_norm else 0),
            linear_parameters=linear,
            multiply_adds=t * (4 * d * d + 2 * d * m) + 2 * t * t * d + 6 * d * d,
            saved_narrow=narrow,
            saved_wide=wide_,
        )


class AdaLNZeroBlock(nn.Module):
    """x + gate·attention(modulated norm of x), then the same with the MLP."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        qk_norm: bool = False,
        mlp_epsilon: float = EPSILON,
        attention_scale: float | None = None,
    ):
        super().__init__()
        self.mlp_epsilon = mlp_epsilon
        self.attention = Attention(width, heads, qk_norm, attention_scale)
        self.mlp = Mlp(width, mlp_width)
        self.modulation = nn.Linear(width, 6 * width)

    def zero_layers(self) -> list[nn.Linear]:
        """Layers that start at zero: with them the block is the identity."""
        return [self.modulation]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D) in at least float32, c (B, D) after its SiLU -> (B, T, D)."""
        rows = modulation(self.modulation, c, 6)  # each (B, 1, D)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = rows
        h: Tensor = self.attention(modulate(x, shift_attention, scale_attention))  # (B, T, D)
        x = x + gate_attention * h  # (B, T, D), float32 by promotion
        h = self.mlp(modulate(x, shift_mlp, scale_mlp, self.mlp_epsilon))  # (B, T, D)
        return x + gate_mlp * h  # (B, T, D)


class OutputLayer(nn.Module):
    """Modulated norm and a linear layer to patches, which starts at zero and computes in at least float32."""

    def __init__(self, dims: Dims):
        super().__init__()
        self.modulation = nn.Linear(dims.width, 2 * dims.width)
        self.proj = WideLinear(dims.width, dims.patch**2 * dims.out_channels)

    def zero_layers(self) -> list[nn.Linear]:
        """Layers that start at zero: with them the network's output is exactly zero."""
        return [self.modulation, self.proj]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D), c (B, D) after its SiLU -> (B, T, p·p·C)."""
        shift, scale = modulation(self.modulation, c, 2)  # each (B, 1, D)
        out: Tensor = self.proj(modulate(x, shift, scale))  # (B, T, p·p·C)
        return out


def modulation(linear: nn.Linear, c: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, D) -> `count` tensors (B, 1, D) in at least float32: 1 + scale must not be rounded to bfloat16."""
    rows = linear(c.to(linear.weight.dtype))  # (B, count·D)
    return wide(rows).unsqueeze(1).chunk(count, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, epsilon: float = EPSILON) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift over the last axis: (B, T, D) with (B, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=epsilon), 1 + scale)


class Attention(nn.Module):
    """Multi-head self-attention. Rows of `qkv` are (3, heads, head width), as in timm.

    scale: the factor of the logits; None is 1/√(head width).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, scale: float | None = None):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        qkv = self.qkv(x.to(self.qkv.weight.dtype))  # (B, T, 3·D)
        # split before the heads move: the gradient is then one copy and not two
        q, k, v = rearrange(qkv, "b t (n h d) -> b t n h d", n=3, h=self.heads).unbind(2)  # (B, T, heads, d)
        q, k, v = (a.transpose(1, 2) for a in (self.q_norm(q), self.k_norm(k), v))  # (B, heads, T, d)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # (B, heads, T, d)
        mixed: Tensor = self.proj(rearrange(out, "b h t d -> b t (h d)"))  # (B, T, D)
        return mixed


class RMSNorm(nn.Module):
    """x / rms(x) · gain over the last axis, computed in at least float32, given back in x's dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain one."""
        nn.init.ones_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        full = wide(x)
        return F.rms_norm(full, x.shape[-1:], self.gain.to(full.dtype), EPSILON).to(x.dtype)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        h = self.fc1(x.to(self.fc1.weight.dtype))  # (B, T, hidden)
        out: Tensor = self.fc2(F.gelu(h, approximate="tanh"))  # (B, T, D)
        return out
