"""Exponential moving average of the weights, sharded as the engine shards them, in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dit.config import ConfigError, config
from dit.train.fragments import Engine


@config
class EmaConfig:
    """Averaging follows updates: a skipped update leaves it as it is."""

    decay: float = 0.9999  # per update

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay must be in [0, 1), got {self.decay}")


class Ema:
    """EMA over an engine's fragments: 4 bytes per parameter over the number of ranks that share it."""

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self._live = [f.weight for f in engine.fragments()]
        self.pieces: list[Tensor] = [w.clone() for w in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """ema <- decay * ema + (1 - decay) * weights. Call it after an update that was applied."""
        torch._foreach_lerp_(self.pieces, self._live, 1 - self.decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the averaged weights inside, and with the live ones, bit for bit, after."""
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
