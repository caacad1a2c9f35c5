"""Moving averages of the weights, sharded as the engine shards them, in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dit.config import ConfigError, config
from dit.train.engines.base import Engine
from dit.train.posthoc import WIDEST, power_of, power_share

MAIN = "ema"  # the average that is sampled from while training and unless another is asked for


@config
class EmaConfig:
    """Averaging follows updates: a skipped update leaves every average as it is."""

    decay: float = 0.9999  # of the average, per update, from 0 to less than 1
    also: tuple[float, ...] = ()  # more decays: each is an average more, "ema_0.999" for 0.999
    power: tuple[float, ...] = ()  # widths (sigma_rel) of power-function averages; EDM2 takes 0.05, 0.1
    snapshot_every: int = 0  # steps; keep the power-function averages in RUN/snapshots for good; 0 = never

    def __post_init__(self) -> None:
        for decay in (self.decay, *self.also):
            if not 0 <= decay < 1:
                raise ConfigError(f"ema.decay and ema.also must be in [0, 1), got {decay}")
        for width in self.power:
            if not 0 < width < WIDEST:
                raise ConfigError(f"ema.power: a width is above 0 and below {WIDEST:.3f}, got {width}")
        if self.decay in self.also:
            raise ConfigError(f"ema.also has {self.decay}, which is ema.decay: that average is there already")
        for name in ("also", "power"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ConfigError(f"ema.{name} has a value twice: {getattr(self, name)}")
        if self.snapshot_every < 0:
            raise ConfigError(f"ema.snapshot_every must be at least 0, got {self.snapshot_every}")
        if self.snapshot_every and len(self.power) < 2:
            raise ConfigError(
                "ema.snapshot_every keeps power-function averages for post-hoc reconstruction, which needs at least "
                "two widths: set ema.power: [0.05, 0.1]"
            )

    @property
    def count(self) -> int:
        """Averages that are kept up, each 4 bytes a parameter."""
        return 1 + len(self.also) + len(self.power)


class Ema:
    """Averages over an engine's fragments: 4 bytes per parameter each, over the number of ranks that share it.

    averages: name -> a tensor beside each fragment.
    """

    def __init__(self, engine: Engine, cfg: EmaConfig):
        self.engine, self.cfg = engine, cfg
        self._live = [f.weight for f in engine.fragments()]
        decays = {MAIN: cfg.decay, **{f"ema_{decay}": decay for decay in cfg.also}}
        self._shares = {name: 1 - decay for name, decay in decays.items()}  # of the new weights
        self._powers = {f"power_{width}": power_of(width) for width in cfg.power}
        names = (*self._shares, *self._powers)
        self.averages: dict[str, list[Tensor]] = {n: [w.clone() for w in self._live] for n in names}

    @property
    def pieces(self) -> list[Tensor]:
        """Of the main average."""
        return self.averages[MAIN]

    @property
    def powers(self) -> dict[str, list[Tensor]]:
        """The power-function averages."""
        return {name: self.averages[name] for name in self._powers}

    @torch.no_grad()
    def update(self) -> None:
        """average <- average + share * (weights - average). Call it after an update that was applied."""
        shares = {n: power_share(power, self.engine.updates) for n, power in self._powers.items()}
        for name, share in (self._shares | shares).items():
            torch._foreach_lerp_(self.averages[name], self._live, share)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the main average inside, and with the live weights, bit for bit, after."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for piece, live in zip(self.pieces, self._live, strict=True):
            held = live.clone()
            live.copy_(piece)
            piece.copy_(held)
        self.engine.sync_weights()
