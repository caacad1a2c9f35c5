"""Straightness and Wasserstein distances against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from dit.evals.transport import path_cost, trajectory, wasserstein2
from dit.flow.path import Linear
from dit.sample.solve import Euler, Heun
from tests.gaussian import Gaussian, normal

DOWN = torch.linspace(1, 0, 41, dtype=torch.float64)


@pytest.mark.parametrize("times", [DOWN, DOWN.square(), 1 - DOWN.sqrt()], ids=["even", "uneven", "rising"])
def test_a_straight_path_at_even_speed_is_straight(times: torch.Tensor) -> None:
    start, end = normal(5, 2, 3), normal(5, 2, 3, seed=1)
    cost = path_cost(torch.stack([(1 - t) * end + t * start for t in times]), times)
    chord = float((start - end).square().sum((1, 2)).mean())
    assert cost.energy == pytest.approx(chord, rel=1e-12)
    assert cost.chord == pytest.approx(chord, rel=1e-12)
    assert abs(cost.straightness) < 1e-12 * chord


def test_uneven_speed_costs_energy() -> None:
    """x = s² along a line of length 3: the energy of (s²)' = 2s is 4/3 of the chord's, less the grid's error."""
    s = torch.linspace(0, 1, 201, dtype=torch.float64)
    course = 3 * s.square()[:, None, None].expand(-1, 4, 1)
    cost = path_cost(course, s)
    assert cost.chord == pytest.approx(9)
    assert cost.bend == pytest.approx(1 / 3, rel=1e-4)
    assert path_cost(course.flip(0), s.flip(0)).energy == pytest.approx(cost.energy)


def test_half_a_circle() -> None:
    """A polygon of n sides of length 2 sin(π / 2n), each passed in 1/n."""
    n = 64
    angle = torch.linspace(0, math.pi, n + 1, dtype=torch.float64)
    course = torch.stack([angle.cos(), angle.sin()], 1)[:, None].expand(-1, 3, 2)
    cost = path_cost(course, torch.linspace(1, 0, n + 1, dtype=torch.float64))
    assert cost.energy == pytest.approx((2 * n * math.sin(math.pi / (2 * n))) ** 2, rel=1e-12)
    assert cost.chord == pytest.approx(4)
    assert cost.straightness == pytest.approx(math.pi**2 - 4, rel=1e-3)


def test_the_flow_of_a_gaussian() -> None:
    """x(t) = (1 − t)·mean + spread(t)·z: chord and energy in closed form (one element, E z² = 1)."""
    data, path = Gaussian(mean=1.5, std=0.4), Linear()
    z = normal(4000, 1)
    z = (z - z.mean()) / z.std(correction=0)
    times = torch.linspace(1, 0, 401, dtype=torch.float64)
    course = trajectory(data.denoise(path), z, times, path, solver=Heun())
    assert course.shape == (401, 4000, 1)
    torch.testing.assert_close(course[-1], data.transport(path, z, 1.0, 0.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(course[200], data.transport(path, z, 1.0, 0.5), rtol=0, atol=1e-4)
    cost = path_cost(course, times)

    def rate(t: float) -> float:
        return (t - (1 - t) * 0.4**2) / math.hypot((1 - t) * 0.4, t)

    assert cost.chord == pytest.approx(1.5**2 + 0.6**2, rel=1e-3)
    assert cost.energy == pytest.approx(1.5**2 + quad(lambda t: rate(t) ** 2, 0, 1)[0], rel=1e-3)


def test_eulers_method_is_the_default() -> None:
    data, path, x = Gaussian(), Linear(), normal(7, 2)
    course = trajectory(data.denoise(path), x, DOWN, path)
    assert torch.equal(course[-1], Euler().integrate(data.denoise(path), x, DOWN, path))
    assert torch.equal(course[0], x)


def test_the_condition_reaches_the_denoiser() -> None:
    seen = []

    def denoise(x, t, cond):
        seen.append(cond)
        return Gaussian().endpoints(Linear(), x, t)

    trajectory(denoise, normal(2, 1), DOWN[:3], Linear(), cond={"label": torch.tensor([1, 2])})
    assert [c["label"].tolist() for c in seen] == [[1, 2]] * 2


def test_wasserstein_distances_that_are_known() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 3))
    assert wasserstein2(a, rng.permutation(a)) == pytest.approx(0, abs=1e-12)
    shift = np.array([3.0, 0, 4])
    assert wasserstein2(a, rng.permutation(a) + shift) == pytest.approx(5)  # a shift is the best transport
    line, other = rng.normal(size=50), 2 * rng.normal(size=50) + 1
    monotone = np.sqrt(np.square(np.sort(line) - np.sort(other)).mean())
    assert wasserstein2(line[:, None], other[:, None]) == pytest.approx(monotone)
    assert wasserstein2(a, a[::-1] ** 2) == pytest.approx(wasserstein2(a**2, a))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2)), "as many points"),
        (np.zeros(3), np.zeros(3), "as many points"),
        (np.zeros((3, 2)), np.array([[0, 0], [0, np.nan], [0, 0]]), "not finite"),
        (np.full((3, 2), np.inf), np.zeros((3, 2)), "not finite"),
    ],
)
def test_what_cannot_be_compared(a: np.ndarray, b: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wasserstein2(a, b)
