"""A plain DiT and its training loop: what our step is measured beside.

Both are as public code has them (Peebles & Xie, arXiv 2212.09748): timm's attention, MLP and patch embedding, a SiLU
and a modulation of its own in each block, written out operation by operation, torch's AdamW as it comes, an average
that is updated parameter by parameter. The weights have the reference's names, so that a test can load ours into it.
No clipping, no check of the gradients, numbers from torch's own generator: all that our step does besides is its cost.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]  # where timm 1.0.9 has it
from torch import Tensor, nn

from dit.model.dims import Dims

LABEL_DROP = 0.1  # share of labels that training replaces by the null class
DECAY = 0.9999  # of the average
LR = 1e-4
GELU: Any = partial(nn.GELU, approximate="tanh")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D), shift and scale (B, D) -> (B, T, D), one operation after the other."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainBlock(nn.Module):
    """Attention and MLP of timm, modulated by the condition."""

    def __init__(self, dims: Dims):
        super().__init__()
        d = dims.width
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(d, num_heads=dims.heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(d, dims.mlp_width, act_layer=GELU)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D), c (B, D) -> (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # each (B, D)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))  # (B, T, D)
        out: Tensor = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (B, T, D)
        return out


class PlainTime(nn.Module):
    """A sinusoid of the time and two layers."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) -> (B, D)."""
        half = self.frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10_000.0) * steps / half)  # (B, half)
        out: Tensor = self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))
        return out


class PlainLabels(nn.Module):
    """A table of classes; training drops some of the labels."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, label: Tensor) -> Tensor:
        """label (B,) -> (B, D)."""
        if self.training:
            dropped = torch.rand(len(label), device=label.device) < LABEL_DROP
            label = torch.where(dropped, self.num_classes, label)
        out: Tensor = self.embedding_table(label)
        return out


class PlainOutput(nn.Module):
    """A modulated norm and a linear layer to patches."""

    def __init__(self, dims: Dims):
        super().__init__()
        self.norm_final = nn.LayerNorm(dims.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dims.width, dims.patch**2 * dims.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dims.width, 2 * dims.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D), c (B, D) -> (B, T, p·p·C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class PlainDiT(nn.Module):
    """A DiT of these shapes; modulations and output start at zero, the rest as torch and timm leave it."""

    def __init__(self, dims: Dims, position: Tensor):
        """position: (T, D), the fixed table of positions."""
        super().__init__()
        self.dims = dims
        self.x_embedder = PatchEmbed(dims.image_size, dims.patch, dims.channels, dims.width, bias=True)
        self.t_embedder = PlainTime(dims.width)
        self.y_embedder = PlainLabels(dims.num_classes, dims.width)
        self.pos_embed = nn.Parameter(position.detach().clone().unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(PlainBlock(dims) for _ in range(dims.depth))
        self.final_layer = PlainOutput(dims)
        for block in [*self.blocks, self.final_layer]:
            for p in block.adaLN_modulation[-1].parameters():
                nn.init.zeros_(p)
        for p in self.final_layer.linear.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) in 0..1000, label (B,) -> (B, C, H, W)."""
        tokens = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(label)  # (B, D)
        for block in self.blocks:
            tokens = block(tokens, c)  # (B, T, D)
        out = self.final_layer(tokens, c)  # (B, T, p·p·C)
        (h, w), p, channels = self.dims.grid, self.dims.patch, self.dims.out_channels
        out = out.reshape(len(x), h, w, p, p, channels)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), channels, h * p, w * p)


class PlainLoop:
    """The training step of a plain DiT: flow matching, AdamW, a moving average."""

    def __init__(self, model: PlainDiT, bf16: bool, compiled: bool):
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.weights = model
        self.model = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0
        )
        device = next(model.parameters()).device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def loss(self, data: Tensor, label: Tensor) -> Tensor:
        """The mean loss of latents (B, C, H, W) and labels (B,)."""
        t = torch.rand(len(data), device=data.device)
        eps = torch.randn_like(data)
        at = t[:, None, None, None]
        with self.autocast:
            out = self.model((1 - at) * data + at * eps, 1000 * t, label)
        return F.mse_loss(out.float(), eps - data)

    def step(self, data: Tensor, label: Tensor, micro: int) -> None:
        """One update from a batch, in micro-batches of `micro` samples."""
        self.optimizer.zero_grad()
        parts = list(zip(data.split(micro), label.split(micro), strict=True))
        for some, labels in parts:
            (self.loss(some, labels) / len(parts)).backward()
        self.optimizer.step()
        self.update_average()

    @torch.no_grad()
    def update_average(self) -> None:
        """Parameter by parameter."""
        for mean, p in zip(self.average.parameters(), self.weights.parameters(), strict=True):
            mean.mul_(DECAY).add_(p.data, alpha=1 - DECAY)
