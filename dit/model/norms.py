"""Norms over the channels of a token, in at least float32: LayerNorm and RMSNorm, with gains or without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dit.config import Registry, config
from dit.model.embed import wide

EPSILON = 1e-6  # of every norm, as in the reference


class Norm(ABC):
    """A kind of norm: builds it and knows its cost."""

    statistics: int  # numbers a token that the backward pass keeps beside the normalised token

    @abstractmethod
    def build(self, width: int, epsilon: float = EPSILON) -> nn.Module:
        """A norm over the last axis: (..., width) -> (..., width), in at least float32.

        epsilon: added to the variance, where the config does not say another.
        """

    @abstractmethod
    def parameters(self, width: int) -> int:
        """Its parameters."""


NORMS: Registry[Norm] = Registry("norm")
QK_NORMS: Registry[Norm] = Registry("norm of queries and keys", switch=("none", "rms"))


@NORMS.register("layer")
@QK_NORMS.register("layer")
@config
class LayerNorm(Norm):
    """(x − mean) / deviation over the channels (arXiv 1607.06450)."""

    affine: bool = False  # learn a gain and a bias of each channel
    epsilon: Annotated[float, Field(gt=0)] | None = (
        None  # added to the variance; null = 1e-6, or as the block says
    )
    statistics = 2

    def build(self, width: int, epsilon: float = EPSILON) -> nn.Module:
        """The norm, its gains one and its biases zero."""
        return LayerNormed(width, self.affine, epsilon if self.epsilon is None else self.epsilon)

    def parameters(self, width: int) -> int:
        """A gain and a bias for each channel, or none."""
        return 2 * width if self.affine else 0


@NORMS.register("rms")
@QK_NORMS.register("rms")
@config
class RootMeanSquare(Norm):
    """x / rms(x) over the channels, which keeps their mean (arXiv 1910.07467)."""

    gain: bool = True  # learn a gain of each channel
    epsilon: Annotated[float, Field(gt=0)] | None = (
        None  # added to the mean square; null = 1e-6, or as the block says
    )
    statistics = 1

    def build(self, width: int, epsilon: float = EPSILON) -> nn.Module:
        """The norm, its gains one."""
        return RMSNorm(width, self.gain, epsilon if self.epsilon is None else self.epsilon)

    def parameters(self, width: int) -> int:
        """A gain for each channel, or none."""
        return width if self.gain else 0


@QK_NORMS.register("none")
@config
class NoNorm(Norm):
    """Queries and keys as they are."""

    statistics = 0

    def build(self, width: int, epsilon: float = EPSILON) -> nn.Module:
        """Nothing."""
        return nn.Identity()

    def parameters(self, width: int) -> int:
        """None."""
        return 0


class TokenNorm(nn.Module):
    """A norm over the last axis: (x − mean, where it is centred) / deviation · gain + bias."""

    is_centred: bool
    epsilon: float
    gain: nn.Parameter | None
    bias: nn.Parameter | None


class LayerNormed(TokenNorm):
    """LayerNorm over the last axis, computed and given back in at least float32."""

    is_centred = True

    def __init__(self, width: int, affine: bool = False, epsilon: float = EPSILON):
        super().__init__()
        self.epsilon = epsilon
        self.gain = nn.Parameter(torch.empty(width)) if affine else None
        self.bias = nn.Parameter(torch.empty(width)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain one, bias zero."""
        if self.gain is not None and self.bias is not None:
            nn.init.ones_(self.gain)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), float32 or float64."""
        full = wide(x)
        gain, bias = (None if p is None else p.to(full.dtype) for p in (self.gain, self.bias))
        return F.layer_norm(full, x.shape[-1:], gain, bias, self.epsilon)


class RMSNorm(TokenNorm):
    """x / rms(x), times a gain, over the last axis, computed and given back in at least float32."""

    is_centred = False
    bias = None

    def __init__(self, width: int, gain: bool = True, epsilon: float = EPSILON):
        super().__init__()
        self.epsilon = epsilon
        self.gain = nn.Parameter(torch.empty(width)) if gain else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain one."""
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), float32 or float64."""
        full = wide(x)
        gain = None if self.gain is None else self.gain.to(full.dtype)
        return F.rms_norm(full, x.shape[-1:], gain, self.epsilon)
