"""Couplings: which noise goes with which data. A coupling chooses eps and never touches data."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dit.config import Registry, config
from dit.flow.predict import Cond
from dit.rng import Draws, Purpose

Metrics = dict[str, Tensor]  # scalars
COST_DROP = "pairing_cost_drop"


class Coupling:
    """A choice of eps for given data. Subclasses are frozen `@config` classes.

    stored: whether eps comes with the data instead of being drawn. All but `independent` log
    `pairing_cost_drop`, the fraction by which the mean |data − eps|² lies below that of independent pairs; for
    unit-variance data it is the correlation of data and eps. on_host: whether the CPU computes it, and waits for the
    device.
    """

    group: int = 1  # consecutive slots that are coupled with each other; it must divide the micro-batch
    stored: ClassVar[bool] = False
    on_host: ClassVar[bool] = False

    def __call__(self, data: Tensor, eps: Tensor, cond: Cond, draws: Draws) -> tuple[Tensor, Metrics]:
        """(eps for each data, scalars to log); data and eps (B, ...), in the order of their slots in `draws`."""
        raise NotImplementedError


COUPLINGS: Registry[Coupling] = Registry("coupling")


@COUPLINGS.register("independent")
@config
class Independent(Coupling):
    """Each data keeps the noise drawn for its slot."""

    def __call__(self, data: Tensor, eps: Tensor, cond: Cond, draws: Draws) -> tuple[Tensor, Metrics]:
        return eps, {}


@COUPLINGS.register("reflow")
@config
class Reflow(Coupling):
    """The noise stored with each sample, of which a sampler made it: 2-rectified flow (arXiv 2209.03003, §2.2).

    It needs a data set of pairs (tools/sample.py --save_pairs). Flips and posterior noise are off there, as the
    noise belongs to these very latents.
    """

    stored: ClassVar[bool] = True

    def __call__(self, data: Tensor, eps: Tensor, cond: Cond, draws: Draws) -> tuple[Tensor, Metrics]:
        apart = data.detach().flatten(1).square().sum(1) + eps.flatten(1).square().sum(
            1
        )  # were they independent
        return eps, {COST_DROP: _cost_drop(apart, _squared_distance(data, eps))}


@COUPLINGS.register("ot")
@config
class OptimalTransport(Coupling):
    """Minibatch optimal transport: permutes eps to the least total |data − eps|² (OT-CFM, arXiv 2302.00482).

    group: consecutive slots of the global batch within which eps is exchanged; it divides the micro-batch, so
        the result is the same on any number of ranks. More is nearer to optimal and costs CPU time, O(n³).
    within_label: exchange only among slots of one label (−1, no label, is one too). Across labels a class
        would see only the noise nearest to it, and samples of that class from other noise suffer.

    The assignment is solved in float64 on the CPU.
    """

    # slots within which eps is exchanged; divides the micro-batch; CPU time n^3
    group: Annotated[int, Field(ge=2)] = 64
    within_label: bool = True  # exchange among slots of one label only
    on_host = True

    @torch.no_grad()
    def __call__(self, data: Tensor, eps: Tensor, cond: Cond, draws: Draws) -> tuple[Tensor, Metrics]:
        """ValueError if data and eps differ in shape or the batch is no multiple of `group`."""
        labels = _labels(data, eps, cond, self.group, self.within_label).flatten().cpu().numpy()
        points, noises = (v.detach().flatten(1).cpu().double().numpy() for v in (data, eps))
        order = np.arange(len(data))
        for first in range(0, len(data), self.group):
            slots = slice(first, first + self.group)
            for label in np.unique(labels[slots]):
                members = first + np.flatnonzero(labels[slots] == label)
                order[members] = members[_assign(points[members], noises[members])]
        chosen = eps[torch.from_numpy(order).to(eps.device)]
        return chosen, {COST_DROP: _cost_drop(_squared_distance(data, eps), _squared_distance(data, chosen))}


def _assign(points: np.ndarray, noises: np.ndarray) -> np.ndarray:
    """(n,) index of the noise for each point, (n, D) float64 both, minimising the total squared distance."""
    cost = -points @ noises.T  # |p − d|² less the terms that no permutation changes, halved
    if not np.isfinite(cost).all():  # a faulty sample: pair nothing; the loss will show it
        return np.arange(len(points))
    columns: np.ndarray = linear_sum_assignment(cost)[1]
    return columns


@COUPLINGS.register("sinkhorn")
@config
class Sinkhorn(Coupling):
    """Entropic optimal transport on the data's device: each data draws its eps from its row of the plan.

    Sinkhorn's iterations in the log domain (Cuturi, arXiv 1306.0895, alg. 1), float64, never waiting for the
    device. Two data may draw the same eps; over many batches each eps is drawn equally often.

    group, within_label: as for `ot`.
    regularisation: of the entropy, in standard deviations of 2·data·eps over the pairs of a group, the part of
        |data − eps|² that a pairing can change: so it means the same in 2 dimensions and in 4096, where the
        mean cost says nothing. Towards 0 the plan is that of `ot`, towards infinity that of `independent`.
    iterations: more for less regularisation. `sinkhorn_marginal_error` tells how unevenly the plan uses eps: the
        largest |share − 1| of any one.
    """

    group: Annotated[int, Field(ge=2)] = 64  # slots within which eps is exchanged; divides the micro-batch
    within_label: bool = True  # exchange among slots of one label only
    # of the entropy, in stds of the cost; 0 = ot, inf = independent
    regularisation: Annotated[float, Field(gt=0)] = 0.1
    iterations: Annotated[int, Field(ge=1)] = 50  # of Sinkhorn; more for less regularisation

    @torch.no_grad()
    def __call__(self, data: Tensor, eps: Tensor, cond: Cond, draws: Draws) -> tuple[Tensor, Metrics]:
        """ValueError if data and eps differ in shape or the batch is no multiple of `group`."""
        labels = _labels(data, eps, cond, self.group, self.within_label)  # (G, n)
        points, noises = (v.flatten(1).double().view(*labels.shape, -1) for v in (data, eps))  # (G, n, D)
        plan = self.plan(points, noises, labels)  # (G, n, n)
        bounds = plan.cumsum(2)
        u = draws.uniform(Purpose.COUPLING).double().view(*labels.shape, 1)
        column = (bounds <= u * bounds[:, :, -1:]).sum(2)  # (G, n)
        first = torch.arange(0, len(data), self.group, device=data.device)[:, None]
        chosen = eps[(first + column).flatten()]
        return chosen, {
            COST_DROP: _cost_drop(_squared_distance(data, eps), _squared_distance(data, chosen)),
            "sinkhorn_marginal_error": (plan.sum(1) - 1.0).abs().amax().float(),
        }

    def plan(self, points: Tensor, noises: Tensor, labels: Tensor) -> Tensor:
        """(G, n, n) the share of each eps (column) in each data (row), from (G, n, D) both and labels (G, n).

        Rows sum to 1, columns too in the limit. Samples that are not finite keep their own eps, as the loss will
        show them.
        """
        finite = (points.isfinite() & noises.isfinite()).all(2)
        points, noises = (
            torch.where(finite[..., None], v, 0.0)
            - torch.where(finite[..., None], v, 0.0).mean(1, keepdim=True)
            for v in (points, noises)
        )
        alike = (labels[:, :, None] == labels[:, None, :]) & finite[:, :, None] & finite[:, None, :]
        allowed = alike | torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
        gain = 2.0 * points @ noises.mT  # −|p − d|² but for terms of a row or of a column
        log_kernel = gain / (self.regularisation * _masked_std(gain, allowed))
        log_kernel = log_kernel.masked_fill(~allowed, -torch.inf)
        of_columns = torch.zeros_like(log_kernel[:, :1, :])
        for _ in range(self.iterations):
            of_rows = -torch.logsumexp(log_kernel + of_columns, 2, keepdim=True)
            of_columns = -torch.logsumexp(log_kernel + of_rows, 1, keepdim=True)
        return torch.softmax(log_kernel + of_columns, 2)


def _masked_std(values: Tensor, mask: Tensor) -> Tensor:
    """(G, 1, 1) standard deviation of values (G, n, n) where the mask is True; a tiny number instead of 0."""
    share = mask / mask.sum((1, 2), keepdim=True)
    mean = (share * values).sum((1, 2), keepdim=True)
    return (share * (values - mean).square()).sum((1, 2), keepdim=True).sqrt().clamp(min=1e-30)


def _labels(data: Tensor, eps: Tensor, cond: Cond, group: int, within_label: bool) -> Tensor:
    """(B / group, group) int64: slots of a group whose numbers are the same may exchange eps.

    ValueError if data and eps differ in shape or the batch is no multiple of the group.
    """
    if data.shape != eps.shape:
        raise ValueError(f"data {tuple(data.shape)} and eps {tuple(eps.shape)} must have one shape")
    if len(data) % group:
        raise ValueError(
            f"a micro-batch of {len(data)} is no multiple of coupling.group = {group}; choose a group that divides it"
        )
    if within_label and "label" in cond:
        return cond["label"].view(-1, group)
    return torch.zeros(len(data), dtype=torch.long, device=data.device).view(-1, group)


def _squared_distance(data: Tensor, eps: Tensor) -> Tensor:
    """(B,) |data − eps|²."""
    return (data.detach() - eps.detach()).flatten(1).square().sum(1)


def _cost_drop(before: Tensor, after: Tensor) -> Tensor:
    """Scalar float32: the fraction by which the total of `after` (B,) lies below that of `before` (B,).

    Samples that are not finite do not count. In float64: the two are near.
    """
    finite = before.isfinite() & after.isfinite()
    was, now = (torch.where(finite, v.double(), 0.0).sum() for v in (before, after))
    return ((was - now) / was.clamp(min=1e-30)).float()
