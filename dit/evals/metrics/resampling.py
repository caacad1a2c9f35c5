"""The bootstrap: how far a figure would lie off, had other samples of as many been drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dit.rng import Draws, Purpose

LEVEL = 0.95
GENERATED, REFERENCE = 0, 1


@dataclass(frozen=True)
class Resampling:
    """`count` resamples of each set, with replacement and of its own size, as a function of the seed alone."""

    count: int = 0
    seed: int = 0

    def counts(self, which: int, size: int) -> np.ndarray:
        """(1 + count, size) int32: how often each sample of a set is in each resample; in row 0 once, the set itself.

        which: GENERATED or REFERENCE, whose draws share nothing.
        """
        rows = np.ones((1 + self.count, size), np.int32)
        for row in range(1, 1 + self.count):
            bits = Draws(self.seed, row, torch.tensor([which]), 2).bits(Purpose.RESAMPLE, size)[0]
            rows[row] = np.bincount(((bits * size) >> 32).numpy(), minlength=size)
        return rows


@dataclass(frozen=True)
class Resampled:
    """values (1 + B,): a figure, and what it is of resamples. is_shifted: as `interval` has it."""

    values: np.ndarray
    is_shifted: bool

    @property
    def interval(self) -> tuple[float, float]:
        """(lower, upper) of LEVEL."""
        return interval(self.values, self.is_shifted)


def interval(values: np.ndarray, is_shifted: bool) -> tuple[float, float]:
    """(lower, upper) of LEVEL, from a figure and what it is of resamples, (1 + B,): their quantiles.

    is_shifted: resamples have each sample several times and others not at all, by which their figures are off as a
    whole. Quantiles are then moved so that the resamples' mean is the figure: an interval of what the figure is on
    average for as many samples as these, not of its limit for ever more of them.
    """
    drawn = values[1:]
    lower, upper = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    shift = drawn.mean() - values[0] if is_shifted else 0.0
    return float(lower - shift), float(upper - shift)
