"""The plain engine on a single process: the reference that the ZeRO stages are tested against."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit.config import ConfigError
from dit.ranks.group import World
from dit.train.engines.plain import PlainEngine
from dit.train.optim import OptimConfig


def check_alone(world: World) -> None:
    """ConfigError where there are several ranks."""
    if world.size != 1:
        raise ConfigError(
            f"the local engine runs on one rank, not {world.size}: set engine: deepspeed, or engine: plain"
        )


class LocalEngine(PlainEngine):
    """Plain torch on one rank."""

    def __init__(self, module: nn.Module, optim: OptimConfig, world: World, **choices: Any):
        """choices: as PlainEngine's."""
        check_alone(world)
        super().__init__(module, optim, world, **choices)
