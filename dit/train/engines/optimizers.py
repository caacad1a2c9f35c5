"""Which optimizer a run has: made from its configuration for one model, with what each keeps and can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit.train.engines.base import ADAM_STATE, MOMENTUM
from dit.train.engines.muon import Muon, hidden_matrices, matrix_groups
from dit.train.optim import GuardedAdamW, OptimConfig, adamw_arguments, parameter_groups


class GuardedMuon(GuardedAdamW, Muon):
    """Muon for unsharded gradients: clips and skips as GuardedAdamW does, whose step comes before Muon's."""


@dataclass(frozen=True)
class Kind:
    """One value of `optim.name`.

    make: (module, config, class) -> the optimizer, of that class. plain: behind ZeRO, which clips. guarded: by itself.
    state: what it keeps of parameters, not all of each. may_offload: whether its state can be in host memory. matrices:
    (module, config) -> numbers of which it keeps one number each in place of two.
    """

    make: Callable[[nn.Module, OptimConfig, Any], torch.optim.Optimizer]
    plain: Callable[..., torch.optim.Optimizer]
    guarded: Callable[..., GuardedAdamW]
    state: tuple[str, ...]
    may_offload: bool
    matrices: Callable[[nn.Module, OptimConfig], int]


def _adamw(module: nn.Module, cfg: OptimConfig, cls: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = cls(
        parameter_groups(module, cfg.weight_decay, cfg.eps), **adamw_arguments(cfg)
    )
    return made


def _muon(module: nn.Module, cfg: OptimConfig, cls: Any) -> torch.optim.Optimizer:
    matrices = hidden_matrices(module, cfg.muon.matrices).values()
    groups = parameter_groups(module, cfg.weight_decay, cfg.eps, apart=matrices)
    made: torch.optim.Optimizer = cls(
        [*groups, *matrix_groups(matrices, cfg.weight_decay)], settings=cfg.muon, **adamw_arguments(cfg)
    )
    return made


def _numbers(module: nn.Module, cfg: OptimConfig) -> int:
    return sum(p.numel() for p in hidden_matrices(module, cfg.muon.matrices).values())


OPTIMIZERS: dict[str, Kind] = {
    "adamw": Kind(_adamw, torch.optim.AdamW, GuardedAdamW, ADAM_STATE, True, lambda module, cfg: 0),
    "muon": Kind(_muon, Muon, GuardedMuon, (*ADAM_STATE, *MOMENTUM), False, _numbers),
}


def plain(module: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer behind ZeRO at stages 1 to 3, which clips and skips by itself."""
    kind = OPTIMIZERS[cfg.name]
    return kind.make(module, cfg, kind.plain)


def guarded(module: nn.Module, cfg: OptimConfig) -> GuardedAdamW:
    """The optimizer of unsharded gradients."""
    kind = OPTIMIZERS[cfg.name]

    def with_clip(groups: Any, **kwargs: Any) -> GuardedAdamW:
        return kind.guarded(groups, cfg.clip, **kwargs)

    made = kind.make(module, cfg, with_clip)
    assert isinstance(made, GuardedAdamW)
    return made
