"""A network whose encoder speaks for several evaluations in a row (Wang et al., arXiv 2504.05741, section 3.3).

What the encoder says of a noisy image changes little from one step of a solver to the next, so that the decoder alone
has to see each of them. The decoder is told the time of the evaluation itself, as in the paper's v = D(x, t, z).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dit.config import ConfigError
from dit.flow.predict import Cond
from dit.model.cost import cost
from dit.model.dit import DiTConfig
from dit.model.embed import FREQUENCIES


@runtime_checkable
class Encoding(Protocol):
    """A network in two parts; the second after the first is the whole."""

    def encode(self, x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """What the encoder says of each token (B, T, D) of x (B, C, H, W)."""

    def decode(self, x: Tensor, model_time: Tensor, said: Tensor) -> Tensor:
        """The prediction (B, C, H, W), from what the encoder said of this x or of one nearby."""


@dataclass
class _Held:
    """What the encoder said. number: of the evaluation that it was asked in."""

    number: int
    cond: Cond
    said: Tensor


@dataclass
class EncoderSharing:
    """The network as (x, model_time, cond) -> prediction, its encoder asked in every `every`-th evaluation alone.

    A batch is begun by `begin`, and each evaluation by `next`; in it the network may be called several times, for
    branches of guidance. What is shared is of the same conditions of as many samples: where guidance's interval begins
    or ends the encoder is asked anew. Comparing conditions waits for the device. asked, encoded: samples through the
    network, and through its encoder.
    """

    model: Encoding
    every: int
    asked: int = 0
    encoded: int = 0
    _number: int = -1
    _held: list[_Held] = field(default_factory=list)

    def begin(self) -> None:
        """Begin another batch, which shares nothing with the one before."""
        self._number, self._held = -1, []

    def next(self) -> None:
        """Begin the next evaluation."""
        self._number += 1
        self._held = [held for held in self._held if self._number - held.number < self.every]

    def __call__(self, x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        self.asked += len(x)
        for held in self._held:
            if _is_same(held.cond, cond):
                return self.model.decode(x, model_time, held.said)
        self.encoded += len(x)
        said = self.model.encode(x, model_time, cond)
        if self._number >= 0:
            self._held.append(_Held(self._number, cond, said))
        return self.model.decode(x, model_time, said)


def _is_same(a: Cond, b: Cond) -> bool:
    """Whether conditions are of as many samples, and the same."""
    return a.keys() == b.keys() and all(a[key] is b[key] or torch.equal(a[key], b[key]) for key in a)


def share_encoder(model: object, every: int) -> EncoderSharing:
    """A model that shares what its encoder says. ConfigError for a model without an encoder."""
    if not isinstance(model, Encoding):
        raise ConfigError(
            f"share_encoder is {every}, and this model has no encoder to share (model.name: ddt has one): leave it out"
        )
    return EncoderSharing(model, every)


def encoder_share(
    cfg: DiTConfig, input_size: int | tuple[int, int], channels: int, num_classes: int
) -> float:
    """The share of an evaluation's FLOPs that are the encoder's: its blocks, and what goes into them."""
    whole = cost(cfg, input_size, channels, num_classes)
    output = cfg.output_cost(whole.dims)
    time = (FREQUENCIES + whole.dims.width) * whole.dims.width  # embedded for the decoder too
    decoder = output.multiply_adds + sum(block.multiply_adds for block in output.blocks) + time
    return 1.0 - decoder / whole.multiply_adds
