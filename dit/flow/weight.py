"""How much each time counts: maps of (coefficients, row) to a factor on the prediction's own loss."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.config import Registry, config
from dit.flow.path import Coeffs
from dit.flow.predict import Row


def eps_factor(coeffs: Coeffs, row: Row) -> Tensor:
    """(B,) (alpha / det)²: the eps loss is this times the prediction's own loss, x being given.

    A weight stated on the eps loss is returned as w·eps_factor(coeffs, row). det = a·sigma − b·alpha.
    """
    a, b = row
    return (coeffs.alpha / (a * coeffs.sigma - b * coeffs.alpha)).square()


class Weight:
    """A weight of the loss in time. Subclasses are frozen `@config` classes."""

    def __call__(self, coeffs: Coeffs, row: Row) -> Tensor:
        """(B,) factor on the mean squared error of the prediction that `row` describes, finite and >= 0."""
        raise NotImplementedError


WEIGHTS: Registry[Weight] = Registry("weight")


@WEIGHTS.register("uniform")
@config
class UniformWeight(Weight):
    """1: the plain mean squared error of whatever is predicted."""

    def __call__(self, coeffs: Coeffs, row: Row) -> Tensor:
        return torch.ones_like(coeffs.alpha)
