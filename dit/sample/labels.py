"""Which class image i is of: a function of the seed and i, never of how many images there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dit.config import ConfigError
from dit.rng import Draws, Purpose
from dit.sample.generate import labels_for

LabelOrder = Literal["balanced", "random"]


@dataclass(frozen=True)
class Labels:
    """The classes of images. classes: those that are drawn, -1 being no class. order: one of ORDERS. seed: of `random`.

    Called with image numbers (B,) int64, it gives their classes (B,) int64.
    """

    classes: Sequence[int]
    order: LabelOrder = "balanced"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in get_args(LabelOrder):
            raise ConfigError(f"label_order is {self.order!r}, expected {' or '.join(get_args(LabelOrder))}")

    def __call__(self, index: Tensor) -> Tensor:
        return ORDERS[self.order](self, index)


def _balanced(labels: Labels, index: Tensor) -> Tensor:
    """classes[i mod n]: every class equally often, which lowers the FID of few images."""
    return labels_for(index, labels.classes)


def _random(labels: Labels, index: Tensor) -> Tensor:
    """classes[⌊u·n⌋] with u uniform, keyed by (seed, i): as the classes of independent samples are."""
    place = Draws(labels.seed, 0, index, 1).integers(Purpose.LABEL, len(labels.classes))
    return torch.tensor(list(labels.classes), dtype=torch.int64)[place]


ORDERS: Mapping[LabelOrder, Callable[[Labels, Tensor], Tensor]] = {"balanced": _balanced, "random": _random}
