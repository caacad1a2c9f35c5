"""What the mean of many first losses must be, over the times that are trained on: the integral, by quadrature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit.flow.loss import FirstLoss
from dit.flow.objective import Objective


def first_loss(objective: Objective, numel: int, correlation: float = 0.0) -> FirstLoss:
    """`first_losses` over the distribution of training times, for latents of `numel` elements per sample."""
    u, share = _quadrature()
    loss = objective.first_losses(objective.time(u), correlation)
    mean = float((share * loss).sum())
    second = float((share * loss.square()).sum()) * (1 + 2 / numel)  # chi-squared with `numel` degrees
    return FirstLoss(mean, math.sqrt(max(second - mean**2, 0.0)))


def _quadrature(points: int = 512, octaves: int = 28) -> tuple[Tensor, Tensor]:
    """Nodes u in (0, 1) and their shares, float64: midpoints, finer by halves towards both ends.

    Targets may grow like 1/t (VP's velocity), which an even rule would miss.
    """
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 ** torch.arange(octaves, 0, -1).double()])
    width = edges.diff().unsqueeze(1) / points
    half = (edges[:-1].unsqueeze(1) + width * (torch.arange(points) + 0.5)).flatten()
    share = width.expand(-1, points).flatten()
    return torch.cat([half, 1 - half]), torch.cat([share, share])
