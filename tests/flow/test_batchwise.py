"""Terms of several samples: closed forms, and groups that know nothing of each other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dit.flow.batchwise import Contrastive, Dispersive
from dit.flow.objective import Objective
from dit.flow.path import Linear
from dit.flow.predict import Eps, Velocity
from tests.flow.test_auxiliary import context
from tests.flow.test_objective import draws, says
from tests.gaussian import normal


def dispersed(hidden: torch.Tensor, term: Dispersive) -> torch.Tensor:
    t = torch.full((len(hidden),), 0.5)
    at = context(Linear(), Velocity(), t, torch.zeros(len(hidden), 1, 2, 2))
    return term.term(replace(at, taps={term.layer: hidden}))


def test_dispersive_of_two_is_known() -> None:
    """Two samples at distance d: four pairs, of which two are of a sample with itself."""
    hidden = torch.zeros(2, 3, 4)
    hidden[1] = 1.5  # a mean squared distance of 2.25
    found = dispersed(hidden, Dispersive(weight=0.5, temperature=0.5, group=2))
    expected = 0.5 * math.log((2 + 2 * math.exp(-2.25 / 0.5)) / 4)
    assert found.tolist() == pytest.approx([expected] * 2)


def test_dispersive_is_0_of_samples_alike_and_drives_others_apart() -> None:
    alike = normal(1, 3, 4).float().expand(4, 3, 4)
    assert dispersed(alike, Dispersive(group=4)).tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    hidden = normal(4, 3, 4).float().requires_grad_()
    before = dispersed(hidden, Dispersive(group=4))
    before.mean().backward()
    assert hidden.grad is not None
    after = dispersed(hidden.detach() - 0.5 * hidden.grad, Dispersive(group=4))
    assert float(after[0]) < float(before[0])


@pytest.mark.parametrize("term", [Dispersive(group=4, layer=1), Contrastive(group=4)], ids=str)
def test_groups_know_nothing_of_each_other(term: Dispersive | Contrastive) -> None:
    """The same on any number of ranks, whose micro-batches are multiples of a group."""
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    output, tokens = normal(8, 3, 2, 2), normal(8, 3, 6)
    whole = replace(context(Linear(), Velocity(), t, output), taps={1: tokens})
    data, eps = whole.data, whole.eps
    for part in (slice(0, 4), slice(4, 8)):
        half = context(Linear(), Velocity(), t[part], output[part])
        half = replace(half, data=data[part], eps=eps[part], x=whole.x[part], taps={1: tokens[part]})
        assert torch.equal(term.term(half), term.term(whole)[part])


def test_contrastive_is_known() -> None:
    """Of a network that says the other sample's target it is 0; of one that says its own, the distance of the two."""
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    at = context(Linear(), Velocity(), t, torch.zeros(2, 3, 2, 2, dtype=torch.float64))
    target = at.eps - at.data
    term = Contrastive(weight=0.25)
    assert term.term(replace(at, output=target.flip(0))).tolist() == [0.0, 0.0]
    apart = (target - target.flip(0)).square().flatten(1).mean(1)
    torch.testing.assert_close(term.term(replace(at, output=target)), -0.25 * at.weight * apart)


def test_the_other_s_target_is_taken_at_the_sample_s_own_time() -> None:
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    at = context(Linear(), Eps(), t, torch.zeros(2, 3, 2, 2, dtype=torch.float64))
    found = Contrastive(weight=0.5).term(at)
    torch.testing.assert_close(found, -0.5 * at.weight * at.eps.flip(0).square().flatten(1).mean(1))


@pytest.mark.parametrize("term", [Dispersive(layer=1, group=4), Contrastive(group=4)], ids=str)
def test_a_batch_of_no_whole_groups_is_refused(term: Dispersive | Contrastive) -> None:
    t = torch.full((6,), 0.5, dtype=torch.float64)
    at = replace(context(Linear(), Velocity(), t, normal(6, 3, 2, 2)), taps={1: normal(6, 3, 6)})
    with pytest.raises(ValueError, match="a batch of 6 samples is no multiple of the group of 4"):
        term.term(at)


def test_an_objective_s_group_is_that_of_all_its_parts() -> None:
    objective = Objective(auxiliary=(Dispersive(group=6), Contrastive(group=4)))
    assert objective.group == 12
    assert objective.uncoupled == Objective()
    model, data = says(normal(4, 3, 2, 2)), normal(4, 3, 2, 2)
    assert objective.uncoupled.loss(model, data, {}, draws(4)).auxiliary is None
