"""What a network keeps between evaluations of one batch, as a sampler sees it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dit.flow.predict import Cond, Endpoints
from dit.sample.denoise import DenoiseFn


class Sharing(Protocol):
    """A network that keeps something from one evaluation to the next is told when each begins."""

    def begin(self) -> None:
        """Begin another batch, which shares nothing with the one before."""

    def next(self) -> None:
        """Begin the next evaluation of the guided denoiser."""


def telling(denoise: DenoiseFn, sharing: Sharing) -> DenoiseFn:
    """`denoise`, each call of which is told to a network that shares."""

    def told(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        sharing.next()
        return denoise(x, t, cond)

    return told
