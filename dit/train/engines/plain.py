"""Plain torch behind the `Engine` interface: whole parameters on every rank, gradients averaged over the ranks.

Precision is DeepSpeed's: fp32 parameters, gradients and moments throughout; "bf16" adds torch's autocast to the forward
pass. Gradients are sent in fp32, as DeepSpeed sends them at stage 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dit.ranks.group import World
from dit.train.engines.base import (
    ADAM_STATE,
    Fragment,
    named,
    set_adam_step,
    whole_bundles,
    whole_parameters,
    whole_places,
)
from dit.train.engines.heap import keep_freed_memory
from dit.train.engines.muon import Muon
from dit.train.engines.optimizers import guarded
from dit.train.engines.reduction import GradientBuckets
from dit.train.optim import GuardedAdamW, OptimConfig, set_lr


class PlainEngine:
    """Plain torch on any number of ranks. Every method is collective."""

    stage = 0  # nothing is sharded

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        world: World,
        *,
        accumulation: int = 1,
        precision: str = "fp32",
    ):
        self.world, self.device = world, world.device
        keep_freed_memory(self.device)
        self.module = module.to(world.device)
        self.updates = self.skipped = 0
        self.accumulation, self._passes = accumulation, 0  # backward passes a step; those of this one
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.optimizer = guarded(self.module, optim)
        self._buckets: GradientBuckets | None = None
        if world.size > 1:
            _take_rank_0s(self.module)
            trained = [p for p in self.module.parameters() if p.requires_grad]
            self._buckets = GradientBuckets(trained, world.size)
        if isinstance(self.optimizer, Muon):
            places = whole_places(self.module, self.optimizer)
            self.optimizer.lay_out(whole_bundles(self.optimizer), places, world)

    @property
    def about(self) -> str:
        ranks = f" on {self.world.size} ranks" if self._buckets is not None else ""
        return f"plain torch{ranks}: {named(self.optimizer)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.autocast:
            return self.module(*args, **kwargs)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        self._passes += 1
        if self._buckets is not None and self._passes == self.accumulation:
            self._buckets.expect_last()
        (loss / self.accumulation).backward()

    def step(self, lr: float) -> bool:
        set_lr(self.optimizer, lr)
        self._gather()
        self.optimizer.step()
        self._clear()
        return self._counted()

    def grad_norm(self) -> float:
        return self.optimizer._global_grad_norm

    def fragments(self) -> list[Fragment]:
        return whole_parameters(self.module, self.optimizer, is_owned=self.world.is_main)

    def sync_weights(self) -> None:
        """Nothing to do: the fragments are the model's own weights."""

    def set_updates(self, updates: int) -> None:
        self.updates = updates
        set_adam_step(self.optimizer, updates)

    def close(self) -> None:
        if self._buckets is not None:
            self._buckets.close()

    # --- the same step with nothing asked of the device, as a CUDA graph needs it ------------------------------

    def launch_step(self, rates: list[Tensor]) -> Tensor:
        """Do what `step` does up to its verdict; give the gradient's norm, a scalar on the device, for `conclude`.

        rates: learning rate of each of the optimizer's groups, scalars on the device. The states are there already
        (`fragments`).
        """
        self._gather()
        norm = launch_update(self.optimizer, rates)
        self._clear()
        return norm

    def conclude(self, norm: Tensor) -> bool:
        """Wait for `launch_step`; False where its update was skipped."""
        optimizer = self.optimizer
        optimizer._global_grad_norm = float(norm)
        optimizer.overflow = not math.isfinite(optimizer._global_grad_norm)
        return self._counted()

    # -----------------------------------------------------------------------------------------------------------

    def _gather(self) -> None:
        """End the accumulation: the gradients are then the whole step's, of all ranks."""
        self._passes = 0
        if self._buckets is not None:
            self._buckets.finish()

    def _clear(self) -> None:
        """Begin the next accumulation."""
        if self._buckets is not None:
            self._buckets.clear()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def _counted(self) -> bool:
        applied = not self.optimizer.overflow
        self.updates += applied
        self.skipped += not applied
        return applied


def _take_rank_0s(module: nn.Module) -> None:
    """Give all ranks rank 0's weights and buffers."""
    for tensor in (*module.parameters(), *module.buffers()):
        td.broadcast(tensor.detach(), 0)


@torch.no_grad()
def launch_update(optimizer: GuardedAdamW, rates: list[Tensor]) -> Tensor:
    """Do what `GuardedAdamW.step` does, by the same kernels, the skipping decided on the device; give the norm.

    The factor of the clipping is multiplied with also where it is 1, which changes no bit.
    """
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    is_bad = (~torch.isfinite(norm)).float()
    if optimizer.clip is not None:
        torch._foreach_mul_(grads, torch.clamp(optimizer.clip / (norm + 1e-6), max=1.0))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        params = [p for p in group["params"] if p.grad is not None]
        states = [optimizer.state[p] for p in params]
        exp_avgs, exp_avg_sqs, steps = ([state[key] for state in states] for key in (*ADAM_STATE, "step"))
        adamw(
            params,
            [p.grad for p in params],
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            found_inf=is_bad,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=rate,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
    return norm
