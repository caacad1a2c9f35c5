"""Couplings: which noise goes with which data. A coupling chooses eps and never touches data."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dit.config import Registry, config
from dit.flow.predict import Cond

Metrics = dict[str, Tensor]  # scalars


class Coupling:
    """A choice of eps for given data. Subclasses are frozen `@config` classes."""

    group: int = 1  # consecutive slots that are coupled with each other; it must divide the micro-batch

    def __call__(self, data: Tensor, eps: Tensor, cond: Cond) -> tuple[Tensor, Metrics]:
        """(eps for each data, scalars to log); data and eps (B, ...), in the order of their slots."""
        raise NotImplementedError


COUPLINGS: Registry[Coupling] = Registry("coupling")


@COUPLINGS.register("independent")
@config
class Independent(Coupling):
    """Each data keeps the noise drawn for its slot."""

    def __call__(self, data: Tensor, eps: Tensor, cond: Cond) -> tuple[Tensor, Metrics]:
        return eps, {}


@COUPLINGS.register("ot")
@config
class OptimalTransport(Coupling):
    """Minibatch optimal transport: permutes eps to the least total |data − eps|² (OT-CFM, arXiv 2302.00482).

    group: consecutive slots of the global batch within which eps is exchanged; it divides the micro-batch, so
        the result is the same on any number of ranks. More is nearer to optimal and costs CPU time, O(n³).
    within_label: exchange only among slots of one label (−1, no label, is one too). Across labels a class
        would see only the noise nearest to it, and samples of that class from other noise suffer.

    The assignment is solved in float64 on the CPU. Logged: `ot_cost_drop`, the fraction by which it lowered
    the mean |data − eps|²; for unit-variance data this is the correlation of data and eps that it made.
    """

    group: Annotated[int, Field(ge=2)] = 64
    within_label: bool = True

    @torch.no_grad()
    def __call__(self, data: Tensor, eps: Tensor, cond: Cond) -> tuple[Tensor, Metrics]:
        """ValueError if data and eps differ in shape or the batch is no multiple of `group`."""
        if data.shape != eps.shape:
            raise ValueError(f"data {tuple(data.shape)} and eps {tuple(eps.shape)} must have one shape")
        if len(data) % self.group:
            raise ValueError(
                f"a micro-batch of {len(data)} is no multiple of coupling.group = {self.group}; "
                "choose a group that divides it"
            )
        points, draws = (v.detach().flatten(1).cpu().double().numpy() for v in (data, eps))
        labels = cond["label"].cpu().numpy() if self.within_label and "label" in cond else np.zeros(len(data))
        order = np.arange(len(data))
        for first in range(0, len(data), self.group):
            slots = slice(first, first + self.group)
            for label in np.unique(labels[slots]):
                members = first + np.flatnonzero(labels[slots] == label)
                order[members] = members[_assign(points[members], draws[members])]
        before, after = np.square(points - draws).sum(), np.square(points - draws[order]).sum()
        drop = torch.tensor((before - after) / before if before > 0 else 0.0, dtype=torch.float32)
        return eps[torch.from_numpy(order).to(eps.device)], {"ot_cost_drop": drop.to(eps.device)}


def _assign(points: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(n,) index of the draw for each point, (n, D) float64 both, minimising the total squared distance."""
    cost = -points @ draws.T  # |p − d|² less the terms that no permutation changes, halved
    if not np.isfinite(cost).all():  # a faulty sample: pair nothing; the loss will show it
        return np.arange(len(points))
    columns: np.ndarray = linear_sum_assignment(cost)[1]
    return columns
