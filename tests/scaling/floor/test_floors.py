"""The irreducible loss against closed forms, brute integration, best networks and trained ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dit.config import ConfigError
from dit.evals import plane
from dit.flow.couple import OptimalTransport
from dit.flow.objective import Objective
from dit.flow.path import Linear, broadcast
from dit.flow.predict import Data, Eps, Velocity, usable
from dit.flow.times import TIMES, LogitNormal
from dit.flow.weight import WEIGHTS
from dit.rng import Draws, Purpose
from dit.scaling.floor.floors import PLANE, eight_gaussians, even, floor, floor_of_classes
from dit.scaling.floor.known import Boxes, Mixture, truncated_normal
from tests.gaussian import PAIR_IDS, PAIRS, Gaussian
from tests.gaussian import Mixture as TwoGaussians

# Edges of cells of (0, 1) that shrink towards both ends, where losses may grow as 1 / t: their middles and widths.
HALF = torch.logspace(-10, math.log10(0.5), 20_001, dtype=torch.float64)
EDGES = torch.cat([HALF, 1 - HALF[:-1].flip(0)])
U, WIDTHS = (EDGES[1:] + EDGES[:-1]) / 2, EDGES.diff()


@pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
def test_a_gaussian_has_the_closed_form(path, prediction) -> None:
    objective, known = Objective(path=path, prediction=prediction), Gaussian(1.5, 0.4)
    t = objective.time(U)
    expected = float(known.best_loss(path, prediction, t) @ WIDTHS)
    got = floor(objective, Mixture.gaussian(3, 1.5, 0.4), samples=2**12)
    assert got.loss == pytest.approx(expected, abs=5 * got.error + 1e-4 * expected)
    assert got.error < 0.02 * expected


@pytest.mark.parametrize("axis", ["times", "weight"])
def test_every_weight_and_distribution_of_times(axis) -> None:
    for _, part in {"times": TIMES, "weight": WEIGHTS}[axis].items():
        objective = Objective(**{axis: part()})
        t, known = objective.time(U), Gaussian(0.0, 0.6)
        coeffs = objective.path.coeffs(t)
        weight = objective.weight(coeffs, objective.prediction.row(coeffs))
        expected = float((weight * known.best_loss(objective.path, objective.prediction, t)) @ WIDTHS)
        got = floor(objective, Mixture.gaussian(2, 0.0, 0.6))
        assert got.loss == pytest.approx(expected, abs=5 * got.error + 1e-3 * expected)


@pytest.mark.parametrize("prediction", [Data(), Eps(), Velocity()], ids=["data", "eps", "velocity"])
def test_a_mixture_against_integration_on_a_grid(prediction) -> None:
    """Of var(target | x) by plain sums over data for each x, knowing nothing of posteriors in closed form."""
    path, data = Linear(), torch.linspace(-3, 3, 701, dtype=torch.float64)
    density = 0.7 * torch.exp(-0.5 * ((data - 0.9) / 0.3) ** 2) + 0.3 * torch.exp(
        -0.5 * ((data + 0.9) / 0.3) ** 2
    )
    objective = Objective(path=path, prediction=prediction, times=LogitNormal())
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    total = 0.0
    for t in objective.time(u):
        coeffs = path.coeffs(t[None])
        alpha, sigma = float(coeffs.alpha), float(coeffs.sigma)
        x = torch.linspace(-3 * alpha - 6 * sigma, 3 * alpha + 6 * sigma, 701, dtype=torch.float64)
        eps = (x[:, None] - alpha * data) / sigma
        joint = density * torch.exp(-0.5 * eps**2)  # (x, data)
        a, b = (float(v) for v in prediction.row(coeffs))
        target = a * data + b * eps
        mass = joint.sum(1)
        mean = (joint * target).sum(1) / mass.clamp(min=1e-300)
        total += float((joint * (target - mean[:, None]) ** 2).sum() / mass.sum()) / 100
    known = Mixture.of(torch.tensor([[0.9], [-0.9]]), 0.3, torch.tensor([0.7, 0.3]))
    got = floor(objective, known)
    assert got.loss == pytest.approx(total, rel=2e-3)
    assert got.error < 2e-3 * got.loss


def test_the_best_network_has_the_floor_as_its_loss() -> None:
    """By the objective itself, for a mixture whose components differ in std."""
    objective, oracle = Objective(), TwoGaussians()
    known = Mixture.of(torch.tensor([[0.9], [-0.9]]), torch.tensor([0.3, 0.3]), torch.tensor([0.7, 0.3]))
    data = oracle.draw(2**17, 1, dtype=torch.float32)
    loss = objective.loss(
        oracle.network(objective.path, objective.prediction),
        data,
        {},
        Draws(0, 0, torch.arange(2**17), 2**17),
    )
    error = float(loss.per_sample.std()) / math.sqrt(2**17)
    got = floor(objective, known)
    assert abs(float(loss.mean) - got.loss) < 4 * error
    for q, expected in enumerate(got.quarters):
        mine = loss.per_sample[(loss.t * 4).long() == q]
        assert abs(float(mine.mean()) - expected) < 5 * float(mine.std()) / math.sqrt(len(mine))


@pytest.mark.parametrize("elements", [1, 8])
def test_points_have_a_softmax_for_a_posterior(elements) -> None:
    """var(target | x) of the N points by its definition, and the loss of the network that knows them all."""
    points = torch.randn(20, elements, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective = Objective(prediction=Eps())
    u = even(elements, 2**14, 9)
    t = objective.time(u[:, 0].contiguous())
    coeffs = objective.path.coeffs(t)
    chosen = (u[:, 1] * 20).long()
    eps = torch.special.ndtri(u[:, 3 + elements :])
    x = coeffs.mix(points[chosen], eps)
    apart = (x[:, None] - broadcast(coeffs.alpha, x)[:, None] * points).square().sum(2)
    p = torch.softmax(-apart / (2 * coeffs.sigma[:, None] ** 2), 1)
    of_data = p @ points
    best = (x - broadcast(coeffs.alpha, x) * of_data) / broadcast(coeffs.sigma, x)
    losses = (best - eps).square().mean(1)
    got = floor(objective, Mixture.points(points))
    assert abs(float(losses.mean()) - got.loss) < 4 * float(losses.std()) / math.sqrt(2**14)


def test_of_one_point_everything_is_known() -> None:
    for prediction in (Data(), Eps(), Velocity()):
        got = floor(Objective(prediction=prediction), Mixture.points(torch.ones(1, 2, 3)))
        assert got.loss == pytest.approx(0, abs=1e-9)


def test_more_points_know_less_up_to_their_distribution() -> None:
    drawn = Mixture.gaussian(2).draw(even(2, 512, 3)[:, :3])
    few, many = (floor(Objective(), Mixture.points(drawn[:n]), samples=2**11).loss for n in (16, 256))
    assert few < many < floor(Objective(), Mixture.gaussian(2)).loss


def test_a_told_class_lowers_the_floor() -> None:
    parts = [(0.5, Mixture.gaussian(2, -1.0, 0.3)), (0.5, Mixture.gaussian(2, 1.0, 0.3))]
    told = floor_of_classes(Objective(), parts)
    alone = floor(Objective(), Mixture.gaussian(2, 1.0, 0.3)).loss
    both = Mixture.of(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), 0.3)
    untold = floor(Objective(), both).loss
    assert told == pytest.approx(alone, rel=1e-3)
    assert untold > 1.2 * told
    assert floor_of_classes(Objective(), parts, 0.1) == pytest.approx(0.9 * told + 0.1 * untold, rel=1e-3)


def test_a_truncated_normal_against_sums() -> None:
    low = torch.tensor([-1.0, 0.5, 4.0, -30.0, -1e-4, 2.0, -40.0], dtype=torch.float64)
    high = torch.tensor([2.0, 0.6, 9.0, -29.0, 1e-3, 2.0029, 40.0], dtype=torch.float64)
    log_mass, mean, variance = truncated_normal(low, high)
    for i in range(len(low)):
        lo, hi = float(low[i].clamp(min=-10)) if i == 6 else float(low[i]), float(high[i].clamp(max=10))
        z = torch.linspace(lo, hi, 400_001, dtype=torch.float64)
        top = float((-0.5 * z.square()).max())
        density = torch.exp(-0.5 * z.square() - top)
        density[0], density[-1] = density[0] / 2, density[-1] / 2
        mass = float(density.sum()) * (hi - lo) / 400_000
        middle = float((density * z).sum() / density.sum())
        spread = float((density * (z - middle).square()).sum() / density.sum())
        assert float(log_mass[i]) == pytest.approx(
            top + math.log(mass) - 0.5 * math.log(2 * math.pi), abs=1e-5
        )
        assert float(mean[i]) == pytest.approx(middle, abs=1e-6, rel=1e-6)
        assert float(variance[i]) == pytest.approx(spread, rel=1e-3)


def test_boxes_at_hardly_any_noise_leave_the_noise_unknown() -> None:
    """There data are known to within sigma, and eps is as unknown as ever."""
    data, _ = PLANE["checkerboard"]
    u = even(2, 2**10, 1)
    for sigma in (1e-12, 1e-6, 1e-3):
        coeffs = Linear().coeffs(torch.full((2**10,), sigma, dtype=torch.float64))
        x = coeffs.mix(data.draw(u[:, 1:4]), torch.special.ndtri(u[:, 5:]))
        found = data.target_variance(Mixture.gaussian(2), coeffs, Eps().row(coeffs), x)
        assert float(found.mean()) == pytest.approx(1, abs=0.01)


def test_boxes_are_like_the_points_that_fill_them() -> None:
    """At noise that is wider than the points' distance."""
    corners = torch.tensor([[-1.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
    grid = (torch.arange(24, dtype=torch.float64) + 0.5) / 24
    filled = torch.cat([torch.cartesian_prod(grid, grid) + corner for corner in corners])
    objective = Objective(times=LogitNormal(mean=1.5, std=0.7))
    exact, near = (
        floor(objective, Boxes(corners, 1.0)),
        floor(objective, Mixture.points(filled), samples=2**11),
    )
    assert exact.loss == pytest.approx(near.loss, rel=5e-3)


@pytest.mark.parametrize("name", plane.PROBLEMS)
def test_the_plane_is_drawn_alike(name) -> None:
    """Moments of what is drawn by the one and by the other, and no trained flow is below its floor."""
    problem, (data, eps) = plane.PROBLEMS[name], PLANE[name]
    u = plane.uniform(0, Purpose.VAL, 0, 40_000)
    for known, draw in ((data, problem.target), (eps, problem.source)):
        mine, theirs = known.draw(even(2, 2**14, 1)[:, :3]), draw(u)
        for power in (1, 2, 4):
            ours, other = (v.pow(power).mean(0) for v in (mine, theirs))
            noise = theirs.pow(power).std(0) / 200
            assert bool(((ours - other).abs() < 5 * noise + 1e-3).all())
        assert float((mine[:, 0] * mine[:, 1]).mean() - (theirs[:, 0] * theirs[:, 1]).mean()) < 0.1


@pytest.mark.slow  # trains one
def test_a_trained_network_is_near_and_not_below() -> None:
    problem, budget = plane.PROBLEMS["moons"], plane.Budget(steps=300, width=64)
    data, eps = PLANE["moons"]
    flow = plane.fit(plane.drawn(problem, plane.COUPLINGS["independent"], budget), budget, lambda: None)
    objective, u = Objective(), even(2, 2**14, 5)
    t = objective.time(u[:, 0].contiguous())
    with torch.no_grad():
        losses = objective.per_sample(
            flow.model, data.draw(u[:, 1:4]).float(), eps.draw(u[:, 4:]).float(), t.float(), {}
        )
    known = floor(objective, data, eps)
    noise = float(losses.std()) / math.sqrt(len(losses))
    assert known.loss - 3 * noise < float(losses.mean()) < 2 * known.loss


def test_what_has_no_known_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match="independent"):
        floor(Objective(coupling=OptimalTransport()), eight_gaussians())
    with pytest.raises(ConfigError, match="standard normal noise alone"):
        floor(Objective(), PLANE["checkerboard"][0], eight_gaussians())
    with pytest.raises(ConfigError, match="2 elements a sample and eps 3"):
        floor(Objective(), eight_gaussians(), Mixture.gaussian(3))
    with pytest.raises(ConfigError, match="a power of 2"):
        floor(Objective(), eight_gaussians(), samples=1000)
    for given, message in [
        ((torch.zeros(0, 2),), "takes means"),
        ((torch.zeros(2, 2), -1.0), "stds of at least 0"),
        ((torch.full((1, 1), math.nan),), "finite means"),
        ((torch.zeros(2, 1), 1.0, torch.zeros(2)), "not all 0"),
        ((torch.zeros(2, 1), 1.0, torch.ones(3)), "one share for each"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Mixture.of(*given)


def test_usable_times_alone_are_counted() -> None:
    """The floor clamps t as training does: eps on the linear path is not asked for at t = 1, where it is infinite."""
    objective = Objective(prediction=Data())
    assert usable(objective.path, objective.prediction)[0] > 0
    assert np.isfinite(floor(objective, eight_gaussians()).loss)
