"""Weights: positive and finite wherever a prediction is used; statements on the eps loss."""

from __future__ import annotations

import pytest
import torch

from dit.flow.path import Path
from dit.flow.predict import Prediction, usable
from dit.flow.weight import WEIGHTS, UniformWeight, eps_factor
from tests.gaussian import PAIR_IDS, PAIRS, normal

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)


@every_pair
@pytest.mark.parametrize("name", WEIGHTS.names())
def test_weights_are_finite_and_not_negative(path: Path, prediction: Prediction, name: str) -> None:
    t = torch.linspace(*usable(path, prediction), 101, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        c = path.coeffs(t[1:-1].to(dtype))
        weight = WEIGHTS[name]()(c, prediction.row(c))
        assert weight.shape == c.alpha.shape
        assert weight.dtype == dtype
        assert bool(torch.isfinite(weight).all())
        assert bool((weight >= 0).all())


@every_pair
def test_eps_factor_turns_the_loss_into_the_eps_loss(path: Path, prediction: Prediction) -> None:
    """A wrong prediction's error, seen in eps, is the factor times the error seen in the prediction."""
    lo, hi = usable(path, prediction)
    t = torch.linspace(max(lo, 0.05), min(hi, 0.95), 21, dtype=torch.float64)
    c = path.coeffs(t)
    data, eps, wrong = (normal(21, 4, seed=i) for i in range(3))
    target = prediction.target(c, data, eps)
    found = prediction.endpoints(c, c.mix(data, eps), target + wrong).eps
    want = (found - eps).square().mean(1)
    torch.testing.assert_close(eps_factor(c, prediction.row(c)) * wrong.square().mean(1), want)


def test_the_uniform_weight_is_one() -> None:
    (path, prediction), *_ = PAIRS
    c = path.coeffs(torch.tensor([0.2, 0.8]))
    assert UniformWeight()(c, prediction.row(c)).tolist() == [1.0, 1.0]
