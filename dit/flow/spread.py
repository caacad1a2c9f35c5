"""How the uniform numbers behind the training times are spread over the global batch.

Even coverage lowers the noise of the loss and of its gradient: a batch of independent times leaves gaps. All
are functions of the step and of the slot in the global batch alone, so neither ranks nor micro-batches matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit.config import Registry, config
from dit.rng import Draws, Purpose

_CELLS = 2**23  # u is the middle of one of so many cells of (0, 1), which is exact in float32


class Spread:
    """A way to draw u for every slot of the global batch, each uniform by itself. Subclasses are `@config` classes."""

    def __call__(self, draws: Draws) -> Tensor:
        """(B,) float32 in the open interval (0, 1), odd multiples of 2^-24; draws.slots in [0, draws.batch)."""
        raise NotImplementedError


SPREADS: Registry[Spread] = Registry("spread")


@SPREADS.register("independent")
@config
class IndependentDraws(Spread):
    """Every slot by itself."""

    def __call__(self, draws: Draws) -> Tensor:
        return draws.uniform(Purpose.TIME)


@SPREADS.register("stratified")
@config
class Stratified(Spread):
    """One u in each of `batch` equal strata, at a place of its own: u = (p(slot) + U(slot)) / batch."""

    def __call__(self, draws: Draws) -> Tensor:
        return _in_stratum(_deal(draws), draws.bits(Purpose.TIME, 1)[:, 0], draws.batch)


@SPREADS.register("low_discrepancy")
@config
class LowDiscrepancy(Spread):
    """A comb shifted by one number a step: u = (p(slot) + U) / batch (VDM, arXiv 2107.00630, app. I.1).

    VDM's frac(p / batch + U) with U on all of (0, 1) is the same comb, p being a random permutation.
    """

    def __call__(self, draws: Draws) -> Tensor:
        shared = draws.of(torch.zeros_like(draws.slots))
        return _in_stratum(_deal(draws), shared.bits(Purpose.TIME, 1)[:, 0], draws.batch)


def _deal(draws: Draws) -> Tensor:
    """(B,) int64: the stratum of each slot, by a permutation of the global batch that is new in every step.

    Without it a slot's time would be tied to its lane of the data. Made from integers on the draws' device: the
    same on all devices, and nothing waits.
    """
    everyone = torch.arange(draws.batch, device=draws.device)
    words = draws.of(everyone).bits(Purpose.STRATA, 2)
    keys = (words[:, 0] << 31) ^ words[:, 1]
    return keys.argsort(stable=True)[draws.slots]


def _in_stratum(stratum: Tensor, bits: Tensor, batch: int) -> Tensor:
    """(B,) float32: the middle of a random cell among those whose middle lies in the stratum.

    stratum: (B,) in [0, batch). bits: (B,) in [0, 2^32). All in integers: in floating point u could round into
    the next stratum, or to 1, and division differs between devices.
    """
    first, last = (_first_cell(s, batch) for s in (stratum, stratum + 1))
    return (first + ((bits * (last - first)) >> 32) + 0.5).float() * (1.0 / _CELLS)


def _first_cell(stratum: Tensor, batch: int) -> Tensor:
    """(B,) int64: the first cell whose middle is at or above stratum / batch: ceil(stratum·cells/batch − 1/2)."""
    return (2 * _CELLS * stratum + batch - 1) // (2 * batch)
