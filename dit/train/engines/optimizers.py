"""Which optimizer a run has: made from its configuration for one model, with what each keeps and can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit.config import ConfigError
from dit.train.engines.base import ADAM_STATE, MOMENTUM
from dit.train.engines.muon import Muon, hidden_matrices, matrix_groups
from dit.train.engines.one_pass import GuardedOnePass, OnePassAdamW
from dit.train.optim import GuardedAdamW, OptimConfig, adamw_arguments, parameter_groups


class GuardedMuon(GuardedAdamW, Muon):
    """Muon for unsharded gradients: clips and skips as GuardedAdamW does, whose step comes before Muon's."""


@dataclass(frozen=True)
class Kind:
    """One value of `optim.name`.

    make: (module, config, class) -> the optimizer, of that class. plain: behind ZeRO, which clips. guarded: by itself.
    in_one_pass: the two of optim.one_pass, or None. state: what it keeps of parameters, not all of each. may_offload:
    whether its state can be in host memory. matrices: (module, config) -> numbers of which it keeps one number each in
    place of two.
    """

    make: Callable[[nn.Module, OptimConfig, Any], torch.optim.Optimizer]
    plain: Callable[..., torch.optim.Optimizer]
    guarded: Callable[..., GuardedAdamW]
    in_one_pass: tuple[Callable[..., torch.optim.Optimizer], Callable[..., GuardedAdamW]] | None
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
    "adamw": Kind(
        _adamw,
        torch.optim.AdamW,
        GuardedAdamW,
        (OnePassAdamW, GuardedOnePass),
        ADAM_STATE,
        True,
        lambda module, cfg: 0,
    ),
    "muon": Kind(_muon, Muon, GuardedMuon, None, (*ADAM_STATE, *MOMENTUM), False, _numbers),
}


def check(cfg: OptimConfig) -> None:
    """ConfigError where the optimizer cannot do what other keys ask for."""
    if cfg.one_pass and OPTIMIZERS[cfg.name].in_one_pass is None:
        raise ConfigError(
            f"optim.one_pass is not there for optim.name {cfg.name}: leave it out, or take optim.name: adamw"
        )


def _classes(cfg: OptimConfig) -> tuple[Callable[..., torch.optim.Optimizer], Callable[..., GuardedAdamW]]:
    """The two classes of a configuration."""
    check(cfg)
    kind = OPTIMIZERS[cfg.name]
    return kind.in_one_pass if cfg.one_pass and kind.in_one_pass else (kind.plain, kind.guarded)


def plain(module: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer behind ZeRO at stages 1 to 3, which clips and skips by itself."""
    return OPTIMIZERS[cfg.name].make(module, cfg, _classes(cfg)[0])


def guarded(module: nn.Module, cfg: OptimConfig) -> GuardedAdamW:
    """The optimizer of unsharded gradients."""
    cls = _classes(cfg)[1]

    def with_clip(groups: Any, **kwargs: Any) -> GuardedAdamW:
        return cls(groups, cfg.clip, **kwargs)

    made = OPTIMIZERS[cfg.name].make(module, cfg, with_clip)
    assert isinstance(made, GuardedAdamW)
    return made
