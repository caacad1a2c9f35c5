"""The optimizer, its parameter groups, and learning-rate schedules as pure functions of updates applied."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from dit.config import ConfigError, Registry, config, did_you_mean


class Schedule:
    """Gives the factor of the learning rate after warm-up, as a function of updates applied."""

    def factor(self, updates: int, warmup: int, total: int) -> float:
        """Give the factor of `optim.lr` of the update that follows `updates` applied ones, `warmup` of them at least.

        total: updates planned, those of the warm-up among them.
        """
        raise NotImplementedError

    def check(self, warmup: int, total: int) -> None:
        """Raise ConfigError where the schedule has no place in a run of `total` updates with that warm-up."""


SCHEDULES: Registry[Schedule] = Registry("schedule")


@SCHEDULES.register("constant")
@config
class ConstantRate(Schedule):
    """Keeps the peak learning rate throughout, however long the run is."""

    def factor(self, updates: int, warmup: int, total: int) -> float:
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

    def factor(self, updates: int, warmup: int, total: int) -> float:
        """From 1 at the end of the warm-up to `final` at `total`."""
        done = (updates - warmup) / max(1, total - warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


# What is left of the way down, from 1 to 0, when a share x of the decay is done.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "sqrt": lambda x: 1 - math.sqrt(x),
}


@SCHEDULES.register("wsd")
@config
class WarmupStableDecay(Schedule):
    """Keeps the peak learning rate, and falls over the last share of train.steps (WSD; arXiv 2404.06395, section 4).

    Until the decay the rate does not depend on train.steps: runs of several lengths can share their beginning
    (init.branch).
    """

    decay: float = 0.2  # share of train.steps, at its end, over which the rate falls; above 0, at most 1
    # how it falls: linear, half a cosine, or 1 - sqrt(share of the decay done) (arXiv 2405.18392, eq. 2)
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    final: float = 0.0  # factor of optim.lr at train.steps; 0 to 1

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ConfigError(f"wsd.decay must be a share above 0 and at most 1, got {self.decay}")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"wsd.final must be from 0 to 1, got {self.final}")

    def stable(self, total: int) -> int:
        """Count the updates before the decay, warm-up among them: (1 - decay) * total, rounded down."""
        return _stable(self.decay, total)

    def factor(self, updates: int, warmup: int, total: int) -> float:
        """Exactly 1 up to the decay, then by its shape to `final` at `total`."""
        stable = self.stable(total)
        if updates <= stable:
            return 1.0
        done = min(1.0, (updates - stable) / (total - stable))
        return self.final + (1 - self.final) * DECAYS[self.shape](done)

    def check(self, warmup: int, total: int) -> None:
        """ConfigError where the decay begins before the warm-up ends: the rate would leap."""
        stable = self.stable(total)
        if warmup > stable:
            raise ConfigError(
                f"optim.schedule.decay = {self.decay:g} of train.steps = {total} begins after {stable} updates, within "
                f"the warm-up of optim.warmup = {warmup}: take a smaller decay, a shorter warm-up or more steps"
            )


@functools.lru_cache(maxsize=64)
def _stable(decay: float, total: int) -> int:
    """(1 - decay) * total rounded down, of the decimal number that was written: 0.9 of 10 leaves 1, not 0.999..."""
    return min(total - 1, math.floor((1 - Fraction(repr(decay))) * total))


@config
class MuonConfig:
    """How hidden matrices are updated, with optim.name: muon."""

    # names of hidden matrices; queries, keys and values are one each, SwiGLU's gate and value too
    matrices: tuple[str, ...] = ("*.attention.*", "*.mlp.*")
    momentum: float = 0.95  # share of the momentum that is kept at an update
    nesterov: bool = True  # take the gradient once more into what is made orthogonal
    iterations: int = 5  # of Newton and Schulz
    dtype: Literal["bfloat16", "float32", "float64"] = (
        "bfloat16"  # of the iterations, and of what ranks send for them
    )

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optim.muon.momentum must be at least 0 and below 1, got {self.momentum}")
        if self.iterations < 1:
            raise ConfigError(f"optim.muon.iterations must be at least 1, got {self.iterations}")
        if not self.matrices:
            raise ConfigError("optim.muon.matrices is empty: name some, or take optim.name: adamw")


@config
class OptimConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with gradient clipping; or Muon for hidden matrices beside it."""

    # adamw; muon = hidden matrices by Muon, which makes their momentum orthogonal, and all others by AdamW
    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # decay of Adam's first and second moments, per update
    eps: float = 1e-8  # added to the root of Adam's second moment
    weight_decay: float = 0.0  # on matrices only: biases, norms and embeddings' gains have one dimension
    clip: float | None = 1.0  # norm of the whole gradient; null = no clipping
    warmup: int = 0  # updates of linear warm-up from lr / warmup
    schedule: Annotated[Schedule, SCHEDULES] = ConstantRate()  # of the learning rate after warm-up
    muon: MuonConfig = MuonConfig()  # how optim.name: muon updates matrices
    # clip, update and average in one pass over memory, compiled; the same up to rounding, adamw alone
    one_pass: bool = False

    def __post_init__(self) -> None:
        if self.name != "muon" and self.muon != MuonConfig():
            raise ConfigError(f"optim.muon is set, but optim.name is {self.name}: set optim.name: muon")
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
        return self.lr * self.schedule.factor(updates, self.warmup, total)


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
    module: nn.Module, weight_decay: float, eps: float = OptimConfig.eps, apart: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Split into decayed matrices and undecayed vectors, by the whole parameters' shapes, also under ZeRO-3.

    Parameters that have an attribute lr_factor, decay_factor or eps_factor are in groups of their own, which train at
    that times the rate, the decay and Adam's eps. A decay factor is of `weight_decay`, which AdamW multiplies by the
    group's rate. apart: parameters that are in none.
    """
    groups: dict[tuple[bool, float, float, float], list[nn.Parameter]] = {}
    elsewhere = {id(p) for p in apart}
    for p in module.parameters():
        if p.requires_grad and id(p) not in elsewhere:
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
            self.scale(grads, torch.clamp(limit / (norm + 1e-6), max=1.0))
        super().step()

    def scale(self, grads: list[Tensor], factor: Tensor) -> None:
        """Multiply the gradients by clipping's factor."""
        torch._foreach_mul_(grads, factor)
