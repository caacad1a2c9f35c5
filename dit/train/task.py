"""What is trained: from a batch of stored samples to a loss. The loop knows nothing else of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dit.data.codecs.norm import LatentNorm
from dit.data.loading.stream import Batch
from dit.flow.couple import COST_DROP
from dit.flow.loss import FirstLoss, Loss
from dit.flow.objective import Objective
from dit.rng import Draws, Purpose, keyed


class Network(Protocol):
    """What a task has compute: an engine, or a bare module. Which tensors it takes and gives is the task's affair."""

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Compute a forward pass."""


@dataclass(frozen=True)
class Samples:
    """What a loss is made of: a rank's share of one step, or a micro-batch of it, on its device.

    A `Batch` is what the data give: the CPU's tensors as they are stored, a function of the step alone. Samples are
    that on the device with what training adds, the draws of the step and which labels are dropped; `batch_samples`
    is the only way from one to the other.

    moments: (B, 2 or 1, C, H, W) as stored. label: (B,) int64, -1 = none. drop: (B,) bool, True = null condition.
    eps: (B, C, H, W) the noise stored with each sample, or None. valid: (B,) bool, False where a sample is missing
    and its loss counts for nothing; None where none is missing.
    """

    moments: Tensor
    label: Tensor
    drop: Tensor
    draws: Draws
    eps: Tensor | None = None
    valid: Tensor | None = None

    def micro_batches(self, size: int) -> Iterator[Samples]:
        """Cut into micro-batches of `size` consecutive slots."""
        for start in range(0, len(self.label), size):
            cut = slice(start, start + size)
            eps, valid = (None if part is None else part[cut] for part in (self.eps, self.valid))
            yield Samples(
                self.moments[cut], self.label[cut], self.drop[cut], self.draws.select(cut), eps, valid
            )


class Task(Protocol):
    """Defines what a model is trained for on the stream."""

    @property
    def group(self) -> int:
        """How many consecutive slots must stay together in a micro-batch."""

    @property
    def compiled(self) -> bool:
        """Whether draws and losses are made by compiled functions, which is for batches of one size."""

    def uncoupled(self) -> Task:
        """Give the same task with samples that know nothing of each other: its loss takes any batch (the probe's)."""

    def drops(self, draws: Draws) -> Tensor:
        """Draw which labels are dropped: (B,) bool."""

    def loss(self, network: Network, samples: Samples) -> Loss:
        """Compute the loss of one micro-batch; every random number is a function of samples.draws alone."""

    def check_first_loss(self, losses: list[Loss], numel: int) -> str | None:
        """Say what is wrong with the first losses of a model from scratch, or None. numel: of one latent."""


class PlainTask:
    """Has the answers of a task whose samples know nothing of each other, which drops no label, and of whose first
    loss nothing is known."""

    @property
    def group(self) -> int:
        """Any micro-batch will do."""
        return 1

    @property
    def compiled(self) -> bool:
        """Nothing is."""
        return False

    def uncoupled(self) -> Self:
        """Itself."""
        return self

    def drops(self, draws: Draws) -> Tensor:
        """(B,) False."""
        return torch.zeros(len(draws.slots), dtype=torch.bool)

    def check_first_loss(self, losses: list[Loss], numel: int) -> str | None:
        """None: whatever it is."""
        return None


@dataclass(frozen=True)
class LatentTask:
    """Trains diffusion or flow matching on latents."""

    objective: Objective
    norm: LatentNorm
    label_drop: float
    has_unit_variance: bool  # whether `norm` makes it so, which is what the first loss is predicted for
    compiled: bool = field(default=False, repr=False)  # see Task: no part of what is trained

    @property
    def group(self) -> int:
        return self.objective.group

    def uncoupled(self) -> LatentTask:
        return replace(self, objective=self.objective.uncoupled)

    def drops(self, draws: Draws) -> Tensor:
        return draws.uniform(Purpose.DROP) < self.label_drop

    def loss(self, network: Network, samples: Samples) -> Loss:
        latents = self.norm.draw(samples.moments, samples.draws)
        cond = {"label": samples.label, "drop": samples.drop}
        return self.objective.loss(
            network, latents, cond, samples.draws, paired=samples.eps, compiled=self.compiled
        )

    def check_first_loss(self, losses: list[Loss], numel: int) -> str | None:
        """Compare each loss with what is expected at its own time: weights and times scatter far more than latents."""
        per_sample = torch.cat([loss.per_sample.detach().double().cpu() for loss in losses])
        times = torch.cat([loss.t.detach().double().cpu() for loss in losses if loss.t is not None])
        drops = [float(loss.metrics[COST_DROP]) for loss in losses if COST_DROP in loss.metrics]
        expected = self.objective.first_losses(times, correlation=sum(drops) / max(1, len(drops)))
        share = per_sample / expected
        share = share[torch.isfinite(share)]  # the others are skipped and reported as such, or have no weight
        if not self.has_unit_variance or len(share) < 8:
            return None
        off = FirstLoss(1.0, math.sqrt(2 / numel)).deviation(share)
        if abs(off) <= 6:
            return None
        return (
            f"the first losses are {float(share.mean()):.4g} times those that latents of unit variance must give, "
            f"{off:+.1f} standard errors from it: the latents do not fit the manifest's statistics (encode them "
            "again), or the wrong normalisation is set (latents.norm)"
        )


def batch_samples(batch: Batch, task: Task, draws: Draws, device: torch.device) -> tuple[Samples, Tensor]:
    """Put a stored batch on the device; give with it the (B,) fingerprints of its slots, on the CPU.

    draws: of the whole share, on the CPU, where the integers that the fingerprints record are made.
    """
    drop = task.drops(draws)
    fingerprints = draws.fingerprint(batch.id, batch.view, drop)

    def put(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    table = put(keyed(draws.seed, int(draws.step))) if task.compiled else None
    on_device = Draws(draws.seed, draws.step, put(draws.slots), draws.batch, table)
    eps = None if batch.eps is None else put(batch.eps)
    valid = None if batch.valid is None or batch.whole else put(batch.valid)
    return Samples(put(batch.moments), put(batch.label), put(drop), on_device, eps, valid), fingerprints


def loss_of(task: Task, network: Network, samples: Samples) -> Loss:
    """Compute the task's loss of a micro-batch; a missing sample's is 0, in a mean over all slots, missing or not."""
    loss = task.loss(network, samples)
    return loss if samples.valid is None else loss.where(samples.valid)


def guarded(loss: Loss, max_loss: float | None) -> Tensor:
    """Give the mean loss to go back through: NaN where a sample's loss is above `max_loss`. Waits for nothing."""
    if max_loss is None:
        return loss.mean
    is_too_large = (loss.per_sample.detach() > max_loss).any()
    return loss.mean * torch.where(is_too_large, math.nan, 1.0)


def synthetic_samples(
    shape: tuple[int, ...], num_classes: int, device: torch.device, count: int = 8
) -> Samples:
    """Make the probe's samples: a fixed batch of nothing but our own random numbers.

    shape: of one sample's stored moments, (2 or 1, C, H, W).
    """
    slots = torch.arange(count, device=device)
    draws = Draws(0, 0, slots, count)
    moments = draws.normal(Purpose.PROBE, shape)
    if shape[0] == 2:
        moments = torch.stack([moments[:, 0], 0.1 * moments[:, 1].abs()], dim=1)  # a std is not negative
    label = slots % num_classes if num_classes else torch.full_like(slots, -1)
    return Samples(moments, label, slots % 4 == 3, draws)
