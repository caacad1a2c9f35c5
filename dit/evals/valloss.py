"""Losses by time, and the loss on held-out data at draws fixed by each sample's place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dit.flow.loss import Loss
from dit.ranks import group

QUARTERS = 4


def sums_by_quarter(loss: Loss) -> Tensor:
    """(2, 4) float32: sums and counts of the losses with t in [0, 1/4), [1/4, 1/2), ..., [3/4, 1].

    A loss without times counts in the first. Does not wait for the device.
    """
    each = loss.per_sample.detach().float()
    t = torch.zeros_like(each) if loss.t is None else loss.t.detach()
    quarter = (t * QUARTERS).long().clamp(max=QUARTERS - 1)
    found = torch.zeros(2, QUARTERS, device=each.device)
    found[0].index_add_(0, quarter, each)
    found[1].index_add_(0, quarter, torch.ones_like(each) if loss.valid is None else loss.valid.float())
    return found


def held_out_loss(losses: Iterable[Loss]) -> dict[str, float]:
    """Means over all ranks: "loss", "loss_q1".."loss_q4" over quarters of t (left out where none fell there), and
    the losses' metrics by their names.

    losses: of this rank's share; every rank calls this, with as many forward passes as the others.
    """
    total, has_times = torch.zeros(2, QUARTERS, dtype=torch.float64), False
    metrics: dict[str, float] = {}
    for loss in losses:
        total += sums_by_quarter(loss).double().cpu()
        has_times = has_times or loss.t is not None
        for name, value in loss.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + len(loss.per_sample) * float(value)
    shares = group.gather_objects((total, metrics))
    sums = torch.stack([share for share, _ in shares]).sum(0)
    count = float(sums[1].sum())
    if not count:
        raise ValueError("held-out loss of no data")
    values = {"loss": float(sums[0].sum()) / count}
    if has_times:
        values |= {f"loss_q{i + 1}": float(sums[0, i] / n) for i, n in enumerate(sums[1]) if n > 0}
    names = {
        name: None for _, found in shares for name in found
    }  # in the order of the first rank that has them
    return values | {name: sum(found.get(name, 0.0) for _, found in shares) / count for name in names}
