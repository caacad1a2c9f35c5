"""The auxiliary term that trains guidance into the network, so that sampling needs none."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, config
from dit.flow.auxiliary import AUXILIARIES, Auxiliary, Context
from dit.flow.predict import split_channels


@AUXILIARIES.register("model_guidance")
@config
class ModelGuidance(Auxiliary):
    """Moves the target by (scale − 1)·(conditional − unconditional), the network's own (arXiv 2502.12154, eq. 9).

    With the loss on the plain target this term adds up to that on the moved one. No gradient goes through what moves
    it. Samples whose condition is dropped, or which have none, keep their target, and teach the unconditional answer.
    It takes another forward pass of each step. Draw from such a network without guidance.
    """

    scale: Annotated[float, Field(gt=1)] = 1.45  # as cfg_scale: 1 is none
    since: Annotated[float, Field(ge=0, lt=1)] = 0.0  # time from which the target is moved
    until: Annotated[float, Field(gt=0, le=1)] = 1.0  # time up to which it is
    metric: ClassVar[str] = "model_guidance"
    forwards: ClassVar[int] = 1
    needs_drop: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.since >= self.until:
            raise ConfigError(
                f"since is {self.since:g} and until {self.until:g}: no target would be moved; set since below until"
            )

    def term(self, context: Context) -> Tensor:
        is_moved = (context.t >= self.since) & (context.t <= self.until) & told(context)
        with torch.no_grad():
            dropped = {**context.cond, "drop": torch.ones_like(is_moved)}
            without = split_channels(context.call(context.x, context.t, dropped), context.x)[0]
            move = (self.scale - 1) * (context.pred - without.to(context.output.dtype))
            move = torch.where(is_moved.reshape(-1, *[1] * (move.ndim - 1)), move, 0)
            target = context.prediction.target(context.coeffs, context.data, context.eps)
        error = context.pred - target
        moved = (error - move).square().flatten(1).mean(1) - error.square().flatten(1).mean(1)
        return context.weight * moved


def told(context: Context) -> Tensor:
    """(B,) bool: whether a sample's condition is there and not dropped."""
    label, drop = context.cond.get("label"), context.cond.get("drop")
    there = torch.ones_like(context.t, dtype=torch.bool) if label is None else label >= 0
    return there if drop is None else there & ~drop
