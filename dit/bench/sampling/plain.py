"""Sampling as public code has it: what our sampler is measured beside.

A velocity network is called in a loop that is written out: with guidance the batch is doubled, its second half asked
with the null class, and both halves mixed, at every step (DiT's `forward_with_cfg`, Peebles & Xie, arXiv 2212.09748;
SiT's loop). Euler's or Heun's method on the linear path, in torch's own operations and noise.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, t (B,), label, drop (B,) bool -> dx/dt


class PlainSampler:
    """The loop, of a solver of so many uniform steps. scale: of the guidance; 1 = none, and no second half."""

    def __init__(self, velocity: Velocity, steps: int, scale: float, is_second_order: bool):
        self.velocity, self.steps, self.scale, self.is_second_order = velocity, steps, scale, is_second_order

    def guided(self, x: Tensor, t: float, label: Tensor) -> Tensor:
        """dx/dt (B, C, H, W) at a time that all share."""
        kept = torch.zeros_like(label, dtype=torch.bool)
        if self.scale == 1.0:
            return self.velocity(x, torch.full((len(x),), t, device=x.device), label, kept)
        times = torch.full((2 * len(x),), t, device=x.device)
        drop = torch.cat([kept, torch.ones_like(kept)])
        both = self.velocity(torch.cat([x, x]), times, torch.cat([label, label]), drop)
        conditional, null = both.chunk(2)
        return null + self.scale * (conditional - null)

    @torch.no_grad()
    def __call__(self, x: Tensor, label: Tensor) -> Tensor:
        """Latents from noise x (B, C, H, W), of classes (B,)."""
        times = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64).tolist()
        for now, after in pairwise(times):
            here = self.guided(x, now, label)
            end = x + (after - now) * here
            if self.is_second_order:
                end = x + (after - now) * 0.5 * (here + self.guided(end, after, label))
            x = end
        return x
