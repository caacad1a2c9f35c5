"""A plain single-process engine behind the same interface: the reference that the ZeRO stages are tested against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit.config import ConfigError
from dit.ranks.group import World
from dit.train.engines.base import (
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
from dit.train.optim import OptimConfig, set_lr


def check_alone(world: World) -> None:
    """ConfigError where there are several ranks."""
    if world.size != 1:
        raise ConfigError(f"the local engine runs on one rank, not {world.size}: set engine: deepspeed")


class LocalEngine:
    """Plain torch: one process, fp32 parameters, optionally bf16 autocast in the forward pass."""

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
        check_alone(world)
        self.world, self.device = world, world.device
        keep_freed_memory(self.device)
        self.module = module.to(world.device)
        self.updates = self.skipped = 0
        self.accumulation = accumulation
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.optimizer = guarded(self.module, optim)
        if isinstance(self.optimizer, Muon):
            places = whole_places(self.module, self.optimizer)
            self.optimizer.lay_out(whole_bundles(self.optimizer), places, world)

    @property
    def about(self) -> str:
        return f"plain torch: {named(self.optimizer)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.autocast:
            return self.module(*args, **kwargs)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self, lr: float) -> bool:
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        applied = not self.optimizer.overflow
        self.updates += applied
        self.skipped += not applied
        return applied

    def grad_norm(self) -> float:
        return self.optimizer._global_grad_norm

    def fragments(self) -> list[Fragment]:
        return whole_parameters(self.module, self.optimizer)

    def sync_weights(self) -> None:
        """Nothing to do: the fragments are the model's own weights."""

    def set_updates(self, updates: int) -> None:
        self.updates = updates
        set_adam_step(self.optimizer, updates)

    def close(self) -> None:
        """Nothing to do: nobody else knows of it."""
