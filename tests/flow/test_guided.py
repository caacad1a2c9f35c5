"""Guidance trained into the network: the term moves the target, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, from_dict
from dit.experiments.diffusion import Experiment
from dit.flow.guided import ModelGuidance
from dit.flow.objective import Objective
from dit.flow.predict import Cond
from dit.flow.weight import VelocityWeight
from dit.rng import Purpose
from tests.flow.test_objective import draws
from tests.gaussian import normal

COUNT = 8
LABEL = torch.tensor([0, 1, 2, -1, 0, 1, 2, 0])
DROP = torch.tensor([False, True, False, False, False, False, True, False])
TOLD = torch.tensor([True, False, True, False, True, True, False, True])


class Told:
    """A network whose answer to a condition lies `apart` from that to none."""

    def __init__(self) -> None:
        self.base = normal(COUNT, 3, 2, 2, seed=4).requires_grad_()
        self.apart = normal(COUNT, 3, 2, 2, seed=5).requires_grad_()
        self.calls = 0

    def __call__(self, x: Tensor, model_time: Tensor, cond: Cond) -> Any:
        self.calls += 1
        drop: Any = cond["drop"]
        told = ((LABEL >= 0) & ~drop).reshape(-1, 1, 1, 1)
        return self.base + torch.where(told, self.apart, 0.0)


def losses(objective: Objective, model: Told) -> Tensor:
    cond: Any = {"label": LABEL, "drop": DROP}
    loss = objective.loss(model, normal(COUNT, 3, 2, 2), cond, draws(COUNT))
    return loss.per_sample + (0 if loss.auxiliary is None else loss.auxiliary)


@pytest.mark.parametrize("since", [0.0, 0.5])
def test_the_loss_is_that_on_the_moved_target_and_so_is_its_gradient(since: float) -> None:
    model, term = Told(), ModelGuidance(scale=1.5, since=since)
    objective = Objective(weight=VelocityWeight(), auxiliary=term)
    found = losses(objective, model)
    assert model.calls == 2
    alone = replace(objective, auxiliary=None)
    data = normal(COUNT, 3, 2, 2)
    at = alone.loss(model, data, {"label": LABEL, "drop": DROP}, draws(COUNT))
    assert at.t is not None
    eps = draws(COUNT).normal(Purpose.EPS, data.shape[1:]).to(data.dtype)
    coeffs = alone.path.coeffs(at.t)
    target = alone.prediction.target(coeffs, data, eps)
    is_moved = (TOLD & (at.t >= since)).reshape(-1, 1, 1, 1)
    moved = target + torch.where(is_moved, 0.5 * model.apart.detach(), 0.0)
    said = model.base + torch.where(TOLD.reshape(-1, 1, 1, 1), model.apart, 0.0)
    weight = alone.weight(coeffs, alone.prediction.row(coeffs))
    expected = weight * (said - moved).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), [model.base, model.apart]),
        torch.autograd.grad(expected.sum(), [model.base, model.apart]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_it_needs_a_network_that_knows_the_dropped_condition_and_counts_its_pass() -> None:
    given = {"run_dir": "x", "data": {"path": "y"}, "objective": {"auxiliary": "model_guidance"}}
    assert from_dict(Experiment, given).objective.forwards == 1
    with pytest.raises(ConfigError, match=r"train\.label_drop is 0"):
        from_dict(Experiment, given | {"train": {"label_drop": 0}})
    with pytest.raises(ConfigError, match=r"needs a condition, and model\.cond is empty"):
        from_dict(Experiment, given | {"model": {"cond": []}})
    with pytest.raises(ConfigError, match="set since below until"):
        ModelGuidance(since=0.8, until=0.2)
