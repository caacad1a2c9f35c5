"""Distributions in the plane are what they are called, and flows between them are trained as they should be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dit.evals import plane
from dit.evals.plane import PROBLEMS, Budget, carry, drawn, even, fit, judge, regenerated, times, uniform
from dit.evals.transport import wasserstein2
from dit.flow.couple import Independent, OptimalTransport
from dit.flow.objective import Objective
from dit.flow.predict import Endpoints
from dit.rng import Purpose
from dit.sample.solve import Euler, Heun

SMALL = Budget(steps=20, batch=64, width=16)
MANY = uniform(0, Purpose.VAL, 0, 40_000)


def test_uniform_numbers_are_uniform_and_keyed() -> None:
    assert MANY.shape == (40_000, 4)
    assert 0 < float(MANY.min()) < 1e-3
    assert 1 - 1e-3 < float(MANY.max()) < 1
    assert float((MANY.mean(0) - 0.5).abs().max()) < 5 / math.sqrt(12 * 40_000)
    assert float(torch.corrcoef(MANY.T).triu(1).abs().max()) < 5 / math.sqrt(40_000)
    assert torch.equal(uniform(0, Purpose.VAL, 0, 10), MANY[:10])
    assert not torch.equal(uniform(0, Purpose.VAL, 1, 10), MANY[:10])
    assert not torch.equal(uniform(0, Purpose.EPS, 0, 10), MANY[:10])


def test_points_that_judge_are_spread_evenly() -> None:
    for column in even(3).T:
        counts = torch.histc(column, 64, 0, 1)
        assert bool((counts == plane.JUDGED / 64).all())
    assert not torch.equal(even(3), even(4))


def test_normal_points() -> None:
    points = plane.normal(MANY)
    assert float(points.mean(0).abs().max()) < 5 / 200
    torch.testing.assert_close(torch.cov(points.T), torch.eye(2, dtype=torch.float64), rtol=0, atol=0.05)
    assert float((points.norm(dim=1) < 1).double().mean()) == pytest.approx(1 - math.exp(-0.5), abs=0.01)


def test_eight_gaussians() -> None:
    points = plane.eight_gaussians(MANY)
    octant = (torch.atan2(points[:, 1], points[:, 0]) / (math.pi / 4)).round().long() % 8
    assert torch.bincount(octant).tolist() == pytest.approx([5000] * 8, rel=0.1)
    first = points[octant == 0]
    assert first.mean(0).tolist() == pytest.approx([4, 0], abs=0.03)
    assert first.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.02)


def test_moons_are_two_arcs() -> None:
    points = plane.moons(MANY)
    to_upper = ((points - torch.tensor([-1.0, -0.5])).norm(dim=1) - 2).abs()
    to_lower = ((points - torch.tensor([1.0, 0.5])).norm(dim=1) - 2).abs()
    assert float(torch.minimum(to_upper, to_lower).max()) < 6 * 0.15
    assert float((to_upper < to_lower).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(points.mean(0).abs().max()) < 0.05  # symmetric about 0
    assert points.abs().amax(0).tolist() == pytest.approx([3, 1.5], abs=0.8)


def test_the_checkerboard_has_points_on_its_dark_squares_alone() -> None:
    points = plane.checkerboard(MANY)
    assert bool(((points >= -2) & (points < 2)).all())
    square = (points + 2).floor().long()
    assert bool((square.sum(1) % 2 == 0).all())
    counts = torch.bincount(square[:, 0] * 4 + square[:, 1], minlength=16)
    assert counts[counts > 0].tolist() == pytest.approx([5000] * 8, rel=0.1)


def test_a_coupling_pairs_points_and_changes_none() -> None:
    problem = PROBLEMS["moons"]
    alone, coupled = (
        drawn(problem, Independent(), SMALL)(3),
        drawn(problem, OptimalTransport(group=32), SMALL)(3),
    )
    assert torch.equal(coupled[0], alone[0])
    assert not torch.equal(coupled[1], alone[1])
    for half in (slice(0, 32), slice(32, 64)):
        assert sorted(coupled[1][half].tolist()) == sorted(alone[1][half].tolist())
    assert (coupled[0] - coupled[1]).square().sum() < 0.6 * (alone[0] - alone[1]).square().sum()
    assert not torch.equal(drawn(problem, Independent(), SMALL)(4)[0], alone[0])


def test_pairs_are_what_the_flow_makes_of_its_source(monkeypatch) -> None:
    monkeypatch.setattr(plane, "PAIRS", 256)
    problem = PROBLEMS["checkerboard"]
    flow = fit(drawn(problem, Independent(), SMALL), SMALL, lambda: None)
    pairs = regenerated(problem, flow, SMALL)
    data, eps = pairs(0)
    torch.testing.assert_close(data, carry(flow, eps, 25, Heun()), rtol=1e-5, atol=1e-5)
    assert not torch.equal(pairs(1)[1], eps)
    known = problem.source(uniform(0, Purpose.PRIOR, 0, 256)).float()
    assert {tuple(p) for p in eps.tolist()} <= {tuple(p) for p in known.tolist()}


def test_training_is_deterministic_and_lowers_the_loss(monkeypatch) -> None:
    problem, steps = PROBLEMS["moons"], []
    first, again = (
        fit(drawn(problem, Independent(), SMALL), SMALL, lambda: steps.append(1)) for _ in range(2)
    )
    assert len(steps) == 40
    x = problem.source(even(1)).float()
    assert torch.equal(carry(first, x, 3, Euler()), carry(again, x, 3, Euler()))
    other = fit(drawn(problem, Independent(), replace(SMALL, seed=1)), replace(SMALL, seed=1), lambda: None)
    assert not torch.equal(carry(first, x, 3, Euler()), carry(other, x, 3, Euler()))
    monkeypatch.setattr(plane, "JUDGED", 256)
    longer = replace(SMALL, steps=200)
    trained = fit(drawn(problem, Independent(), longer), longer, lambda: None)
    assert judge(problem, trained, 0)["w2"][64] < 0.8 * judge(problem, first, 0)["w2"][64]


def test_every_step_has_points_and_times_of_its_own(monkeypatch) -> None:
    seen = []

    class Recording(plane.PlaneNetwork):
        def forward(self, x, model_time, cond):
            seen.append((x, model_time))
            return super().forward(x, model_time, cond)

    monkeypatch.setattr(plane, "PlaneNetwork", Recording)
    fit(drawn(PROBLEMS["moons"], Independent(), SMALL), SMALL, lambda: None)
    x, t = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(t.unique()) > 0.99 * 20 * 64
    assert len(x.unique(dim=0)) == 20 * 64
    assert float((t / 1000).mean()) == pytest.approx(0.5, abs=0.05)


def test_what_is_judged_is_what_it_says(monkeypatch) -> None:
    """A flow that moves nothing from a source that is the target is straight, and as near as the floor."""
    problem = replace(PROBLEMS["moons"], source=plane.moons)

    def still(x, t, cond):
        return Endpoints(x, x)

    still.path = Objective().path
    found = judge(problem, still, 0)
    assert max(found["energy"], found["straightness"], *found["error"].values()) < 1e-6
    other = wasserstein2(problem.source(even(1)).numpy(), problem.target(even(2)).numpy())
    assert list(found["w2"]) == [1, 2, 4, 8, 64]
    assert list(found["w2"].values()) == pytest.approx([other] * 5, rel=1e-5)
    known = plane.floor(problem, 0)
    assert known["energy"] == pytest.approx(other**2)
    assert 0 < known["w2"] < 0.2


def test_times_fall_from_noise_to_data() -> None:
    assert times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
