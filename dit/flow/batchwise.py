"""Auxiliary terms that compare samples with each other: what the batch repels.

A term of this kind sees groups of consecutive slots, as a coupling does: the groups divide the micro-batch, so that it
is the same on any number of ranks and with any accumulation.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dit.config import config
from dit.flow.auxiliary import AUXILIARIES, Auxiliary, Context


class Groupwise(Auxiliary):
    """A term of `group` consecutive slots. Subclasses are frozen `@config` classes with that field."""

    group: int

    @property
    def slots(self) -> int:
        return self.group


@AUXILIARIES.register("dispersive")
@config
class Dispersive(Groupwise):
    """log of the mean, over all pairs of a group, of exp(−|h_i − h_j|² / (D·temperature)) (arXiv 2506.09027, eq. 6).

    h: all tokens behind one block as one vector of D numbers, in float32. Each sample has its group's value; the
    pairs of a sample with itself count, as in its authors' code, so that the term is 0 where all are alike, and lower
    the further apart they are.
    """

    weight: Annotated[float, Field(gt=0)] = 0.5  # of the term
    temperature: Annotated[float, Field(gt=0)] = 0.5  # of the squared distances, a mean over numbers
    layer: Annotated[int, Field(ge=1)] = 7  # block, counted from 1; a quarter of XL's depth, as in the paper
    # consecutive slots that repel each other; divides the micro-batch
    group: Annotated[int, Field(ge=2)] = 32
    metric: ClassVar[str] = "dispersive"
    places: ClassVar[str] = "layer"

    @property
    def taps(self) -> tuple[int, ...]:
        return (self.layer,)

    def term(self, context: Context) -> Tensor:
        """ValueError if the batch is no multiple of `group`."""
        hidden = grouped(
            context.taps[self.layer].to(context.output.dtype).flatten(1), self.group
        )  # (G, n, D)
        squares = hidden.square().sum(2)
        inner = hidden @ hidden.transpose(1, 2)
        apart = (squares[:, :, None] + squares[:, None, :] - 2 * inner).clamp(min=0) / hidden.shape[2]
        own = torch.eye(self.group, dtype=torch.bool, device=apart.device)
        apart = apart.masked_fill(own, 0.0)  # exactly, whatever rounding made of it
        pairs = (-apart / self.temperature).flatten(1)
        value = torch.logsumexp(pairs, 1) - 2 * math.log(self.group)
        return self.weight * value.repeat_interleave(self.group)


@AUXILIARIES.register("contrastive")
@config
class Contrastive(Groupwise):
    """−weight · |prediction − another sample's target|², a mean over elements (contrastive flow matching, 2506.05350).

    The other is the next slot of the group, whose data and noise are as independent of this one's as any; its target is
    taken at this sample's time. The term has no lower bound where the weight is not below 1.
    """

    weight: Annotated[float, Field(gt=0, lt=1)] = 0.05  # of the term; 0.05 is the paper's
    # consecutive slots that are held against each other; divides the micro-batch
    group: Annotated[int, Field(ge=2)] = 2
    metric: ClassVar[str] = "contrastive"

    def term(self, context: Context) -> Tensor:
        """ValueError if the batch is no multiple of `group`."""
        data, eps = (
            grouped(part, self.group).roll(-1, 1).flatten(0, 1) for part in (context.data, context.eps)
        )
        other = context.prediction.target(context.coeffs, data, eps)
        return -self.weight * context.weight * (context.pred - other).square().flatten(1).mean(1)


def grouped(values: Tensor, group: int) -> Tensor:
    """(G, group, ...) of (B, ...); ValueError if B is no multiple of `group`."""
    if len(values) % group:
        raise ValueError(f"a batch of {len(values)} samples is no multiple of the group of {group}")
    return values.reshape(-1, group, *values.shape[1:])
