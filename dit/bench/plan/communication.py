"""Seconds that ranks spend sending: rings and trees over stated links (Thakur et al., 2005; arXiv 1910.02054, 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dit.bench.plan.devices import DeviceFacts
from dit.train.engines.zero_config import BUCKET

# Share of the computation behind which DeepSpeed hides what it sends: stage 3 fetches ahead; stage 0 sends when the
# backward pass is over, and 1 and 2 wait for each bucket, as overlap_comm is off there by default.
OVERLAP = {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.8}


@dataclass(frozen=True)
class Traffic:
    """What a training step sends. parameters: numbers. pieces: units that stage 3 gathers, one by one.

    gradient, weight, gathered: bytes a number, of gradients, of updated weights, of weights that stage 3 gathers.
    """

    parameters: int
    pieces: int
    gradient: int
    weight: int
    gathered: int


def traffic(parameters: int, depth: int, stage: int, precision: str, communication: str) -> Traffic:
    """Bytes as DeepSpeedEngine sends them. communication: zero.communication."""
    half = precision == "bf16"
    gradient = {"fp32": 4, "bf16": 2, "auto": 2 if half and stage else 4}[communication]
    gathered = 2 if half and communication != "fp32" else 4  # the blocks' matrices; the rest is small
    return Traffic(parameters, depth + 2, gradient, 4, gathered)


def leg_seconds(size: float, messages: int, ranks: int, device: DeviceFacts) -> float:
    """Time half an all-reduce (a reduce-scatter or an all-gather) of `size` bytes in so many messages.

    By a ring, or by a tree where that is quicker: a ring sends (n - 1)/n of the bytes in n - 1 turns, a tree all of
    them in log2 n. In a machine a rank sends over its link; over several each machine's rings leave it through all of
    its adapters together.
    """
    if ranks == 1:
        return 0.0
    is_near = ranks <= device.node
    rate = device.link if is_near else min(device.link, device.node * device.network)
    latency = device.latency if is_near else device.network_latency
    bandwidth = rate * device.wire_share
    ring = (ranks - 1) / ranks * size / bandwidth + messages * (ranks - 1) * latency
    tree = size / bandwidth + messages * math.ceil(math.log2(ranks)) * latency
    return min(ring, tree)


def step_seconds(stage: int, sent: Traffic, accumulation: int, ranks: int, device: DeviceFacts) -> float:
    """Time all that a step sends at a ZeRO stage: 2 psi bytes at stages 0 to 2, 3 psi at 3, for psi bytes once.

    Stage 2 sends gradients, and stage 3 everything, for each of `accumulation` micro-batches.
    """
    buckets = sent.pieces if stage == 3 else -(-sent.parameters // BUCKET)

    def leg(each: int) -> float:
        return leg_seconds(each * sent.parameters, buckets, ranks, device)

    reduced = leg(sent.gradient)
    return {
        0: 2 * reduced,
        1: reduced + leg(sent.weight),
        2: accumulation * reduced + leg(sent.weight),
        3: accumulation * (reduced + 2 * leg(sent.gathered)),
    }[stage]
