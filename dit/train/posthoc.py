"""Averages of any width after training, from snapshots of two (Karras et al., arXiv 2312.02696, section 3, appendix C).

A power-function average after n updates weighs the weights after update i by (i/n)^(g + 1) - ((i - 1)/n)^(g + 1): the
profile p(tau) = (g + 1) tau^g / n^(g + 1) on [0, n], integrated over that update. Its width sigma_rel is its standard
deviation over n.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDEST = 1 / math.sqrt(12)  # sigma_rel of an even average over all of training (g = 0)


@dataclass(frozen=True)
class Profile:
    """A power-function average: its power g and the updates it is taken after."""

    power: float
    updates: int


@functools.cache
def power_of(width: float) -> float:
    """g of a width sigma_rel in (0, WIDEST): sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3))."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots.real.max())


def power_share(power: float, updates: int, every: int = 1) -> float:
    """The share of the newest weights in the average after so many updates, at least 1, averaged every `every`."""
    return -math.expm1((power + 1) * math.log1p(-every / updates)) if updates > every else 1.0


def combination(snapshots: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """(len(snapshots),) factors of the snapshots whose sum is nearest to the wanted profile, and how far it is off.

    Nearest in the square of the difference of profiles, of those that sum to 1: else a number that never changed would
    come out changed, by far more than averages differ (the paper leaves the sum free). Off by the root of its integral
    over that of the wanted one (0: not at all, 1: nothing of it). Raises ValueError for a profile of no updates.
    """
    if not snapshots or min(s.updates for s in (*snapshots, wanted)) < 1:
        raise ValueError("snapshots are taken after at least one update, and there must be one")
    products = np.array([[_product(a, b, wanted.updates) for b in snapshots] for a in snapshots])
    right = np.array([_product(a, wanted, wanted.updates) for a in snapshots])
    ones = np.ones(len(snapshots))
    system = np.block([[products, ones[:, None]], [ones, 0.0]])  # with a multiplier for the sum
    factors: np.ndarray = np.linalg.lstsq(system, np.append(right, 1.0), rcond=None)[0][:-1]
    own = _product(wanted, wanted, wanted.updates)
    left = own - 2 * factors @ right + factors @ products @ factors
    return factors, math.sqrt(max(0.0, float(left / own)))


def _product(a: Profile, b: Profile, unit: int) -> float:
    """The integral of the product of two profiles, time in units of `unit` updates."""
    ta, tb = a.updates / unit, b.updates / unit
    shared = math.log(min(ta, tb)) * (a.power + b.power + 1)
    scale = math.exp(shared - (a.power + 1) * math.log(ta) - (b.power + 1) * math.log(tb))
    return (a.power + 1) * (b.power + 1) / (a.power + b.power + 1) * scale
