"""How well an order mixes: how far apart in training samples land that lie side by side in their shard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dit.data.loading.order import Order


@dataclass(frozen=True)
class Mixing:
    """Distances between neighbours, samples in consecutive rows of a block, in steps of one epoch.

    quartiles: of the distances. same_batch: share of neighbours in one batch. uniform: what both would be in a uniform
    permutation of the epoch: the median distance (0.293 of its steps) and the share (1 in so many steps).
    """

    quartiles: tuple[float, float, float]
    same_batch: float
    uniform: tuple[float, float]

    def __str__(self) -> str:
        low, middle, high = self.quartiles
        return (
            f"neighbours in a shard land {low:.0f} / {middle:.0f} / {high:.0f} steps apart (quartiles), "
            f"{self.same_batch:.2%} in one batch; a uniform permutation: {self.uniform[0]:.0f}, {self.uniform[1]:.2%}"
        )


def mixing(order: Order, epoch: int = 0) -> Mixing:
    """Measure how well an epoch mixes."""
    distance = neighbour_steps(order, epoch)
    low, middle, high = np.quantile(distance, [0.25, 0.5, 0.75]) if len(distance) else np.zeros(3)
    steps = order.steps_per_epoch
    same = float((distance == 0).mean()) if len(distance) else 0.0
    return Mixing((float(low), float(middle), float(high)), same, ((1 - np.sqrt(0.5)) * steps, 1 / steps))


def neighbour_steps(order: Order, epoch: int = 0) -> np.ndarray:
    """Return (M,) steps between samples in consecutive rows of a block, over the pairs of which none is left out."""
    ends = np.concatenate([[0], np.cumsum(order.sizes)])
    step = np.full(order.samples, -1)
    for lane in range(order.lanes):
        length = order.lane_length(lane)
        position, stop = epoch * length, (epoch + 1) * length
        while position < stop:
            window = order.window_at(lane, position)
            place = np.arange(window.start, window.stop)
            step[ends[window.block] + window.row] = place // order.per_lane(lane)
            position = window.stop
    there = (step[:-1] >= 0) & (step[1:] >= 0)
    there[ends[1:-1] - 1] = False  # the last row of a block and the first of the next
    return np.asarray(np.abs(np.diff(step))[there])
