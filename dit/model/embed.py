"""The ends of the network, which run in at least float32 whatever the autocast: time, patches, positions.

bfloat16 keeps 8 bits: near the data end, rounding the input or the time to it is larger than the noise that
is to be predicted. These layers do about 1% of a small model's multiply-adds and 0.01% of a large one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit.model.dims import Dims

FREQUENCIES = 256  # features of the time embedding: half cosines, half sines
MAX_PERIOD = 10_000.0
Spacing = Literal["adm", "ddpm"]
# Logarithms of the frequencies from their range, i and n: those of ADM, which DiT took, and of DDPM, as diffusers has
# them; each in its authors' order, as in float32 another one is another angle, by 1e-4 at t = 1000.
_EXPONENTS: dict[Spacing, Callable[[float, Tensor, int], Tensor]] = {
    "adm": lambda log, i, n: log / n * i,
    "ddpm": lambda log, i, n: log * i / (n - 1),
}


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32: bfloat16 and float16 become float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Give the dtype in which a matrix product of `x` with `weight` is computed: autocast's, or the weight's."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def suited(x: Tensor, weight: Tensor) -> Tensor:
    """`x` as a layer takes it: in its weight's dtype, or as it is where that is the product's already."""
    return x if x.dtype == product_dtype(x, weight) else x.to(weight.dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off. The meta device has no autocast to switch off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class WideLinear(nn.Linear):
    """A linear layer that computes in at least float32, whatever the autocast and its parameters' dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), float32 or float64."""
        weight = wide(self.weight)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        with without_autocast(input.device):
            return F.linear(input.to(weight.dtype), weight, bias)


def sinusoid(
    t: Tensor, count: int = FREQUENCIES, max_period: float = MAX_PERIOD, spacing: Spacing = "adm"
) -> Tensor:
    """(B,) -> (B, count): cosines, then sines, of t · max_period^(-i / (count/2)), or / (count/2 - 1) with "ddpm".

    In float32, or float64 if t is. Frequencies fall from 1 to (nearly, with "adm") 1/max_period radians per unit of
    t, so t is expected to run over about 0..1000 (Vaswani et al., arXiv 1706.03762, section 3.5; order as in ADM).

    Raises ValueError for a t of less than float32: its precision is lost already.
    """
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the time must reach the network as float32 or float64, got {t.dtype}; "
            "compute it in float32 and leave it out of any cast to half precision"
        )
    half = count // 2
    steps = torch.arange(half, dtype=t.dtype, device=t.device)
    exponent = _EXPONENTS[spacing](-math.log(max_period), steps, half)
    angles = t[:, None] * torch.exp(exponent)  # (B, count/2)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)  # (B, count)


class TimeEmbed(nn.Module):
    """Time as a vector: a sinusoid and a two-layer MLP, all in at least float32 (I8, docs/guarantees.md)."""

    def __init__(
        self,
        width: int,
        frequencies: int = FREQUENCIES,
        max_period: float = MAX_PERIOD,
        spacing: Spacing = "adm",
        scale: float = 1.0,
    ):
        super().__init__()
        if frequencies % 2:
            raise ValueError(f"frequencies must be even (cosines and sines), got {frequencies}")
        self.frequencies, self.max_period, self.spacing, self.scale = frequencies, max_period, spacing, scale
        self.fc1 = WideLinear(frequencies, width)
        self.fc2 = WideLinear(width, width)

    def forward(self, model_time: Tensor) -> Tensor:
        """(B,) float32 or float64 -> (B, D) in at least float32."""
        with without_autocast(model_time.device):
            scaled = model_time if self.scale == 1.0 else self.scale * model_time
            features = sinusoid(scaled, self.frequencies, self.max_period, self.spacing)
        out: Tensor = self.fc2(F.silu(self.fc1(features)))  # (B, D)
        return out


class PatchEmbed(nn.Module):
    """Patches as tokens by one linear layer: the reference's strided convolution, its weight flattened.

    `weight[:, (c p q)]` is the convolution's `weight[:, c, p, q]`. Further channels, given by conditioners,
    have a matrix of their own that starts at zero, so a model without them continues unchanged with them.
    bottleneck: numbers that a patch is first pressed into (arXiv 2511.13720, section 4.3); None: it is not.
    """

    def __init__(self, dims: Dims, extra_channels: int = 0, bottleneck: int | None = None):
        super().__init__()
        self.patch, self.channels, self.size = dims.patch, dims.channels, dims.image_size
        numbers = dims.channels * dims.patch**2
        self.down = None if bottleneck is None else WideLinear(numbers, bottleneck, bias=False)
        self.proj = WideLinear(bottleneck or numbers, dims.width)
        extra = extra_channels * dims.patch**2
        self.extra = WideLinear(extra, dims.width, bias=False) if extra else None

    def zero_layers(self) -> list[nn.Linear]:
        """Layers that start at zero."""
        return [] if self.extra is None else [self.extra]

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """(B, C, H, W), and (B, C', H, W) from conditioners -> (B, T, D) in at least float32."""
        if x.shape[1:] != (self.channels, *self.size):
            raise ValueError(
                f"expected an input of shape (B, {self.channels}, {self.size[0]}, {self.size[1]}), "
                f"got {tuple(x.shape)}; the model was built for that size"
            )
        patches = patchify(x, self.patch)  # (B, T, C·p·p)
        tokens: Tensor = self.proj(patches if self.down is None else self.down(patches))  # (B, T, D)
        if (self.extra is None) != (extra is None):
            built = "no" if self.extra is None else self.extra.in_features // self.patch**2
            given = "none" if extra is None else extra.shape[1]
            raise ValueError(
                f"the model was built for {built} further input channels, conditioners gave {given}; "
                "their configs' `extra_channels` must say how many they give"
            )
        if self.extra is None or extra is None:
            return tokens
        more: Tensor = self.extra(patchify(extra, self.patch))  # (B, T, D)
        return tokens + more


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, T, C·p·p): tokens in raster order; channels outermost, as in a convolution."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """(B, T, p·p·C) -> (B, C, H, W): channels innermost, as the reference's output layer has them.

    Not the inverse of `patchify`, whose channels are outermost.
    """
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)


def position_table(width: int, grid: tuple[int, int]) -> Tensor:
    """(T, D) float64: sines, then cosines, of the column; then the same of the row; each D/4 channels.

    Frequencies 10000^(-i / (D/4)): the table of MAE (arXiv 2111.06377), which DiT takes.
    """
    quarter = width // 4
    steps = torch.arange(quarter, dtype=torch.float64, device="cpu")
    omega = 10_000.0 ** (-steps / quarter)  # (D/4,)
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64, device="cpu"),
        torch.arange(grid[1], dtype=torch.float64, device="cpu"),
        indexing="ij",
    )  # each (h, w)
    halves = []
    for place in (columns, rows):
        angle = place.reshape(-1, 1) * omega  # (T, D/4)
        halves += [torch.sin(angle), torch.cos(angle)]
    return torch.cat(halves, dim=1)  # (T, D)
