"""The optimizer, its parameter groups, and learning-rate schedules as pure functions of updates applied."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from dit.config import ConfigError, Registry, config, did_you_mean


class Schedule:
    """Gives the factor of the learning rate after warm-up, from the share of training done."""

    def factor(self, done: float) -> float:
        """Give the factor of `optim.lr`.

        done: updates after warm-up over all updates after warm-up, in [0, 1].
        """
        raise NotImplementedError


SCHEDULES: Registry[Schedule] = Registry("schedule")


@SCHEDULES.register("constant")
@config
class ConstantRate(Schedule):
    """Keeps the peak learning rate throughout, however long the run is."""

    def factor(self, done: float) -> float:
        """1."""
        return 1.0


@SCHEDULES.register("cosine")
@config
class CosineDecay(Schedule):
    """Falls along half a cosine from 1 to `final` at train.steps (arXiv 1608.03983, eq. 5, without restarts)."""

    final: float = 0.0  # factor of optim.lr at the end

    def __post_init__(self) -> None:
        if not 0 <= self.final < math.inf:
            raise ConfigError(f"cosine.final must be finite and at least 0, got {self.final}")

    def factor(self, done: float) -> float:
        """From 1 at 0 to `final` at 1."""
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@config
class OptimConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with gradient clipping."""

    lr: float = 1e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # decay of Adam's first and second moments, per update
    eps: float = 1e-8  # added to the root of Adam's second moment
    weight_decay: float = 0.0  # on matrices only: biases, norms and embeddings' gains have one dimension
    clip: float | None = 1.0  # norm of the whole gradient; null = no clipping
    warmup: int = 0  # updates of linear warm-up from lr / warmup
    schedule: Annotated[Schedule, SCHEDULES] = ConstantRate()  # of the learning rate after warm-up

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or self.warmup < 0 or not (self.clip is None or self.clip > 0):
            raise ConfigError(
                f"lr must be finite and above 0, clip above 0 or null, warmup at least 0; got lr {self.lr}, "
                f"clip {self.clip}, warmup {self.warmup}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be at least 0 and below 1, got {list(self.betas)}")
        if not 0 <= self.eps < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"eps and weight_decay must be finite and at least 0, got eps {self.eps}, "
                f"weight_decay {self.weight_decay}"
            )

    def lr_at(self, updates: int, total: int) -> float:
        """Give the learning rate of the update that follows `updates` applied ones, of `total` planned."""
        if updates < self.warmup:
            return self.lr * (updates + 1) / self.warmup
        return self.lr * self.schedule.factor((updates - self.warmup) / max(1, total - self.warmup))


def freeze(module: nn.Module, patterns: tuple[str, ...]) -> int:
    """Stop training the parameters whose names fit a pattern; returns how many numbers they hold.

    ConfigError where a pattern fits none, or nothing is left to train.
    """
    named = dict(module.named_parameters())
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(named, pattern)
        if not fitting:
            raise ConfigError(f"train.freeze: no parameter fits '{pattern}'{_nearest(pattern, named)}")
        chosen.update(fitting)
    if chosen and not any(p.requires_grad for name, p in named.items() if name not in chosen):
        raise ConfigError(f"train.freeze: {list(patterns)} fit every parameter, and nothing is left to train")
    for name in chosen:
        named[name].requires_grad_(False)
    return sum(named[name].numel() for name in chosen)


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """What a pattern may have meant: a name, or the modules that there are."""
    modules = {name[: dot.start()] + ".*" for name in names for dot in re.finditer(r"\.", name)}
    near = difflib.get_close_matches(pattern, [*names, *sorted(modules)], n=1, cutoff=0.6)
    return did_you_mean(pattern, near or {name.partition(".")[0] + ".*" for name in names})


def parameter_groups(
    module: nn.Module, weight_decay: float, eps: float = OptimConfig.eps
) -> list[dict[str, Any]]:
    """Split into decayed matrices and undecayed vectors, by the whole parameters' shapes, also under ZeRO-3.

    Parameters that have an attribute lr_factor, decay_factor or eps_factor are in groups of their own, which train at
    that times the rate, the decay and Adam's eps. A decay factor is of `weight_decay`, which AdamW multiplies by the
    group's rate.
    """
    groups: dict[tuple[bool, float, float, float], list[nn.Parameter]] = {}
    for p in module.parameters():
        if p.requires_grad:
            plain = not weight_decay or len(getattr(p, "ds_shape", p.shape)) <= 1
            lr, decay, own_eps = (getattr(p, f"{name}_factor", 1.0) for name in ("lr", "decay", "eps"))
            groups.setdefault((plain, lr, 0.0 if plain else decay, own_eps), []).append(p)
    return [
        {
            "params": groups[key],
            "weight_decay": weight_decay * decay,
            "name": "plain" if plain else "decayed",
            "lr_factor": lr,
            **({"eps": eps * own_eps} if own_eps != 1.0 else {}),
        }
        for key in sorted(groups)
        for plain, lr, decay, own_eps in (key,)
    ]


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group: `lr` times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def adamw_arguments(cfg: OptimConfig) -> dict[str, Any]:
    """AdamW's keyword arguments; the fused kernel, which goes over its tensors once and not a dozen times."""
    return {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps, "fused": True}


class GuardedAdamW(torch.optim.AdamW):
    """AdamW for unsharded gradients: clips, and skips the update where the gradient's norm is not finite.

    `overflow` and `_global_grad_norm` are the names under which DeepSpeed looks for the outcome at ZeRO stage 0,
    where it has no check of its own: a NaN would go straight into the weights.
    """

    def __init__(self, params: Any, clip: float | None, **kwargs: Any):
        super().__init__(params, **kwargs)
        self.clip = clip
        self.overflow = False
        self._global_grad_norm = float("nan")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update, or none (then `overflow` is True). `closure` is not used."""
        grads: list[Tensor] = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return
        limit = math.inf if self.clip is None else self.clip
        if self._global_grad_norm + 1e-6 > 0.999 * limit:  # else the factor is 1
            torch._foreach_mul_(grads, torch.clamp(limit / (norm + 1e-6), max=1.0))
        super().step()
