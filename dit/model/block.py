"""Transformer blocks and the output layer, modulated by the condition (adaLN-Zero; arXiv 2212.09748).

A block is one unit for ZeRO-3 (a leaf whose parameters are gathered together) and for torch.compile (one
graph). Norms and modulation are in float32, and so is the residual stream, unless it comes in bfloat16
(`dit.model.stream`); the matrix products take autocast's dtype, or that of the parameters where there is no autocast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, NamedTuple, cast

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from dit.config import Registry, config
from dit.model.dims import Dims
from dit.model.embed import WideLinear, suited
from dit.model.kernels.choice import Kerneled
from dit.model.mlp import MLPS, GeluMlp, MlpConfig
from dit.model.modulation import MODULATIONS, FullModulation, FullRows, Modulation, cut, modulate
from dit.model.norms import EPSILON, NORMS, QK_NORMS, LayerNorm, NoNorm, Norm
from dit.model.recompute import Keep, may_keep_products, run_kept
from dit.model.rope import ROPES, Rope
from dit.model.sdpa import Backend, attend
from dit.model.stacked import stacked


@dataclass(frozen=True)
class BlockCost:
    """What one block costs. Multiply-adds are those of matrix products; one is 2 FLOPs."""

    parameters: int
    linear_parameters: int  # those of them that autocast copies to half precision
    multiply_adds: int  # of the forward pass, per image
    saved_narrow: int  # numbers kept for the backward pass, per image, in the dtype of the matrix products
    saved_wide: int  # the same in float32
    input: int  # numbers it is given, per image, in float32
    products: int = 0  # numbers of `saved_narrow` that matrix products and attention gave out
    working_narrow: int = (
        0  # gradients of activations that its backward pass holds at a time, an image, narrow
    )
    working_wide: int = 0  # the same in float32
    shared_parameters: int = 0  # of what all blocks share, once
    shared_multiply_adds: int = 0


class OutputCost(NamedTuple):
    """What comes after a network's blocks costs, and the blocks that it has of its own."""

    parameters: int
    multiply_adds: int  # an image
    saved: int  # numbers kept for the backward pass, per image, in float32
    blocks: tuple[BlockCost, ...] = ()


class BlockConfig(ABC):
    """A kind of block: builds it and knows its cost."""

    reads_tokens = False  # whether forward takes the conditioners' tokens as a third argument
    shared_rows = 0  # of D numbers that all blocks get of one modulation layer, as the keyword `shared`
    carries_value = False  # whether forward takes and gives the first block's values, as the keyword `value`
    rope: Rope | None = None  # whose table forward takes as the keyword `rotation`
    norm: Norm = LayerNorm()  # of the tokens, also before the output

    @abstractmethod
    def build(self, dims: Dims) -> nn.Module:
        """A block: (x (B, T, D), c (B, D)) -> (B, T, D). Layers it lists in `zero_layers()` start at zero."""

    @abstractmethod
    def cost(self, dims: Dims) -> BlockCost:
        """The cost of one such block."""


BLOCKS: Registry[BlockConfig] = Registry("block", default="adaln_zero")


@BLOCKS.register("adaln_zero")
@config
class AdaLNZero(BlockConfig):
    """Attention and MLP with shift, scale and gate from the condition, the gates starting at zero."""

    norm: Annotated[Norm, NORMS] = LayerNorm()  # of the tokens, before attention, MLP and output
    # of queries and keys (arXiv 2302.05442): keeps logits bounded; true = rms, false = none
    qk_norm: Annotated[Norm, QK_NORMS] = NoNorm()
    # added to the variance in the norm before the MLP; diffusers' DiT has 1e-5
    mlp_epsilon: Annotated[float, Field(gt=0)] = EPSILON
    mlp: Annotated[MlpConfig, MLPS] = GeluMlp()  # between the tokens' channels
    rope: Annotated[Rope, ROPES] | None = (
        None  # positions by which queries and keys turn; null = the table alone
    )
    shift: bool = True  # modulate by a shift too, beside scale and gate
    modulation: Annotated[Modulation, MODULATIONS] = FullModulation()  # how the condition reaches the blocks
    qkv_bias: bool = True  # learn biases of queries, keys and values
    # mix the first block's values into those of each (arXiv 2410.17897), by two learned numbers a block
    value_residual: bool = False

    @property
    def rows(self) -> int:
        """Rows of D numbers that modulate a block."""
        return 6 if self.shift else 4

    @property
    def shared_rows(self) -> int:  # type: ignore[override]
        """Those of them that one layer of the network gives to all blocks."""
        return self.rows if self.modulation.is_shared else 0

    @property
    def carries_value(self) -> bool:  # type: ignore[override]
        """Whether the first block's values go to the others."""
        return self.value_residual

    def build(self, dims: Dims) -> nn.Module:
        """The block for these shapes."""
        return AdaLNZeroBlock(self, dims)

    def cost(self, dims: Dims) -> BlockCost:
        """The cost of one block."""
        d, t, h = dims.width, dims.sequence, dims.head_width
        mlp, rows = self.mlp.cost(dims), self.modulation.cost(d, self.rows)
        linear = (3 * d * d + 3 * d * self.qkv_bias) + (d * d + d) + mlp.parameters + rows.linear_parameters
        # narrow: inputs and outputs of qkv and proj, what the MLP keeps, and c
        # wide: two residuals, their norms with their statistics, attention's log-sum-exp, the modulation
        narrow = t * (6 * d + mlp.saved) + dims.modulated * d
        wide_ = t * (4 * d + dims.heads + 2 * self.norm.statistics) + dims.modulated * (self.rows + 2) * d
        if self.qk_norm.statistics:  # queries and keys given out; their float32 copies and statistics
            narrow += t * 2 * d
            wide_ += t * (2 * d + 2 * self.qk_norm.statistics * dims.heads)
        if self.rope is not None:  # queries and keys given out, and turned in float32
            narrow += t * 2 * d
        learned = 2 * self.norm.parameters(d) + 2 * self.qk_norm.parameters(h) + 2 * self.value_residual
        return BlockCost(
            parameters=linear + learned + rows.parameters - rows.linear_parameters,
            linear_parameters=linear,
            multiply_adds=t * (4 * d * d + mlp.multiply_adds)
            + 2 * t * t * d
            + dims.modulated * rows.multiply_adds,
            saved_narrow=narrow,
            saved_wide=wide_,
            input=t * d,
            # of qkv, attention, proj and the MLP's layers; the modulation
            products=t * (5 * d + mlp.products) + dims.modulated * self.rows * d,
            # behind proj or the MLP, and inside the MLP; the residual's, before and behind the addition
            working_narrow=t * (d + (mlp.saved - 2 * d) // 2),
            working_wide=t * 2 * d,
            shared_parameters=rows.shared_parameters,
            shared_multiply_adds=rows.shared_multiply_adds,
        )


class AdaLNZeroBlock(Kerneled):
    """x + gate·attention(modulated norm of x), then the same with the MLP."""

    def __init__(self, cfg: AdaLNZero, dims: Dims):
        super().__init__()
        self.cfg = cfg
        self.norm1 = cfg.norm.build(dims.width)
        self.attention = Attention(
            dims.width,
            dims.heads,
            cfg.qk_norm,
            cfg.qkv_bias,
            cfg.value_residual,
            dims.attention_scale,
            dims.attention,
        )
        self.norm2 = cfg.norm.build(dims.width, cfg.mlp_epsilon)
        self.mlp = cfg.mlp.build(dims)
        self.modulation = cfg.modulation.build(dims.width, cfg.rows)

    def zero_layers(self) -> list[nn.Module]:
        """Layers that start at zero: with them the block is the identity."""
        layers: list[nn.Module] = self.modulation.zero_layers()  # type: ignore[operator]
        return layers

    @may_keep_products
    def forward(
        self,
        x: Tensor,
        c: Tensor,
        *,
        shared: Tensor | None = None,
        rotation: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, T, D), c (B, D) or (B, T, D) after its SiLU -> (B, T, D) in x's dtype; sums are in at least float32.

        shared: (B, rows·D) of the modulation that all blocks share. rotation: (2, T, d/2) the table of `rope`. value:
        (B, heads, T, d) the first block's values, None in the first, which gives its own out: (tokens, values).
        """
        rows = cut(self.modulation(c, shared), self.cfg.rows)  # each (B, 1 or T, D)
        if self.cfg.shift:
            shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = rows
        else:
            (scale_attention, gate_attention, scale_mlp, gate_mlp), shift_attention, shift_mlp = (
                rows,
                None,
                None,
            )
        kernels, weight = self.kernels, self.attention.qkv.weight  # y is to be in the dtype of its products
        x, y = kernels.normed(x, self.norm1, shift_attention, scale_attention, weight)
        h, value = self.attention(y, rotation, value)  # (B, T, D)
        x, y = kernels.added_normed(x, gate_attention, h, self.norm2, shift_mlp, scale_mlp, weight)
        x = kernels.added(x, gate_mlp, self.mlp(y))  # (B, T, D)
        return (x, value) if self.cfg.value_residual else x


class OutputLayer(nn.Module):
    """Modulated norm and a linear layer to patches, which starts at zero and computes in at least float32."""

    def __init__(self, dims: Dims, norm: Norm):
        super().__init__()
        self.norm = norm.build(dims.width)
        self.modulation = FullRows(dims.width, 2 * dims.width)
        self.proj = WideLinear(dims.width, dims.patch**2 * dims.out_channels)

    def zero_layers(self) -> list[nn.Module]:
        """Layers that start at zero: with them the network's output is exactly zero."""
        return [self.modulation, self.proj]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D), c (B, D) or (B, T, D) after its SiLU -> (B, T, p·p·C)."""
        shift, scale = cut(self.modulation(c), 2)  # each (B, 1 or T, D)
        out: Tensor = self.proj(modulate(self.norm(x), shift, scale))  # (B, T, p·p·C)
        return out


def run_block(block: nn.Module, keep: Keep | None, carried: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """Run one block: (B, T, D), ... -> (B, T, D).

    keep: what it keeps for the backward pass; None = everything. carried: what goes from block to block by name; takes
    the first block's values.
    """
    out = run_kept(block, keep, carried, *inputs)
    if isinstance(out, tuple):
        out, carried["value"] = out
    return cast(Tensor, out)


def output_cost(dims: Dims, norm: Norm) -> OutputCost:
    """The cost of an `OutputLayer`."""
    d, t = dims.width, dims.tokens
    patch = dims.out_channels * dims.patch**2
    return OutputCost(
        parameters=(d + 1) * 2 * d + (d + 1) * patch + norm.parameters(d),
        multiply_adds=dims.modulated * 2 * d * d + t * d * patch,
        # its input, the norm with its statistics, the modulated norm; the modulation
        saved=t * (3 * d + norm.statistics) + dims.modulated * 4 * d,
    )


class Attention(Kerneled):
    """Multi-head self-attention. Rows of `qkv` are (3, heads, head width), as in timm.

    scale: the factor of the logits; None is 1/√(head width). backend: which of torch's kernels (`dit.model.sdpa`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: Norm,
        qkv_bias: bool = True,
        value_residual: bool = False,
        scale: float | None = None,
        backend: Backend = "auto",
    ):
        super().__init__()
        self.heads, self.scale, self.backend = heads, scale, backend
        self.qkv = stacked(nn.Linear(width, 3 * width, qkv_bias), 3)
        self.proj = nn.Linear(width, width)
        self.q_norm = qk_norm.build(width // heads)
        self.k_norm = qk_norm.build(width // heads)
        self.mix = ValueMix() if value_residual else None

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D), the table of a rope, the first block's values -> (B, T, D) and the values that others get."""
        qkv = self.qkv(suited(x, self.qkv.weight))  # (B, T, 3·D)
        q, k, v = self.kernels.heads(qkv, self.heads, self.q_norm, self.k_norm, rotation)  # (B, heads, T, d)
        first = v if first is None else first
        if self.mix is not None:
            v = self.mix(v, first)
        out = attend(q, k, v, self.scale, self.backend)  # (B, heads, T, d)
        mixed: Tensor = self.proj(rearrange(out, "b h t d -> b t (h d)"))  # (B, T, D)
        return mixed, first


class ValueMix(nn.Module):
    """A block's values and the first one's, added with learned shares that start at one half each."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """One half each."""
        nn.init.constant_(self.shares, 0.5)

    def forward(self, own: Tensor, first: Tensor) -> Tensor:
        """(B, heads, T, d) twice -> the same, in its dtype."""
        a, b = self.shares.to(own.dtype)
        mixed: Tensor = a * own + b * first.to(own.dtype)
        return mixed
