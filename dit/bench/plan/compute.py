"""Seconds of one rank's own work in a step, as a roofline: matrix products, memory traffic, launches.

For XL/2 at 256 tokens on an H100, compiled: 0.89 ms an image of matrix products at 800 TFLOP/s, 0.07 of attention and
1.17 GB of traffic that no product hides, together about 1.3 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit.bench.plan.devices import DeviceFacts
from dit.bench.plan.job import Job
from dit.model.recompute import Recompute

# Bytes of memory traffic outside matrix products, forward and backward, for each token, block and channel: norms,
# modulations, gates and residuals in float32, GELU on four times the width. Eager: counted operation by operation.
TRAFFIC = {
    ("bf16", True): 142.0,
    ("bf16", False): 290.0,
    ("fp32", True): 227.0,
    ("fp32", False): 312.0,
}
# Bytes for each parameter and pass outside the products: casts of weights, gradients added up in float32.
PER_PASS = {"bf16": 14.0, "fp32": 8.0}
ATTENTION_SHARE = 0.35  # of the peak, that attention's products reach on a GPU
ADAM, AVERAGE, MASTER = (
    30.0,
    12.0,
    8.0,
)  # bytes a parameter: norm and fused AdamW; an average; copy of the master
LAUNCHES = {True: 25, False: 75}  # operations of a block, forward and backward, compiled and eager
DRAWS = 730  # small operations of a step's stateless random numbers, eager


@dataclass(frozen=True)
class Work:
    """What one rank does in a step. share: of the optimizer's state that it holds."""

    micro: int
    accumulation: int
    stage: int
    share: float


def pass_seconds(job: Job, micro: int, device: DeviceFacts, recompute: Recompute | None = None) -> float:
    """Forward and backward pass of `micro` images, gradients added up. recompute: in place of the configuration's."""
    cost, dims = job.cost, job.cost.dims
    again = 1 + (recompute or cost.recompute).work(len(cost.blocks)) / 3  # a forward pass is a third
    attention = 6 * 2 * dims.depth * dims.tokens**2 * dims.width
    peak = device.products(job.precision)
    products = (cost.training_flops - attention) / (peak * device.gemm_share)
    own = device.gemm_share if device.on_host else ATTENTION_SHARE
    inside = attention / (peak * own)
    rate = device.memory_rate * device.memory_share
    moved = TRAFFIC[job.precision, job.compiled] * dims.depth * dims.tokens * dims.width / rate
    weights = PER_PASS[job.precision] * cost.parameters.trainable / rate
    return again * micro * (products + inside + moved) + weights


def update_seconds(job: Job, work: Work, device: DeviceFacts) -> float:
    """Clipping, AdamW and the averages of this rank's share; from stage 1 the model's weights are a copy."""
    held = job.cost.parameters.trainable * work.share
    rate = device.memory_rate * device.memory_share
    numbers = ADAM + AVERAGE * job.averages
    copied = MASTER * job.cost.parameters.trainable if work.stage in (1, 2) else 0.0
    if job.zero.offload == "none" or device.on_host:
        return (numbers * held + copied) / rate
    return (
        numbers + 8
    ) * held / device.host + copied / rate  # gradients and weights cross to the host and back


def launch_seconds(job: Job, work: Work, device: DeviceFacts) -> float:
    """How long the host takes to launch a step: no step is shorter, however quick the device."""
    blocks = job.cost.dims.depth * LAUNCHES[job.compiled]
    return (work.accumulation * blocks + DRAWS) * device.launch


def step_seconds(job: Job, work: Work, device: DeviceFacts) -> float:
    """The device's own work of a step, by the roofline alone."""
    passes = work.accumulation * pass_seconds(job, work.micro, device)
    return passes + update_seconds(job, work, device)


def words(job: Job) -> dict[str, str]:
    """What is assumed of the work, by name."""
    how = "compiled blocks" if job.compiled else "eager"
    return {
        "memory traffic": f"{TRAFFIC[job.precision, job.compiled]:.0f} bytes a token, block and channel outside matrix "
        f"products ({job.precision}, {how}), {PER_PASS[job.precision]:.0f} a parameter and pass; AdamW {ADAM:.0f} and "
        f"each average {AVERAGE:.0f} bytes a parameter",
    }
