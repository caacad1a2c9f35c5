"""Euler–Maruyama against its own exact recursion, SiT's diffusions, and EDM's churn against algorithm 2."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.config import to_dict
from dit.flow.path import PATHS, VE, VP, Cosine, Linear, NoisePath
from dit.flow.predict import Cond, Endpoints, V
from dit.sample.denoise import DenoiseFn
from dit.sample.grid import UniformGrid
from dit.sample.sde import (
    DIFFUSIONS,
    SBDM,
    ConstantDiffusion,
    Decreasing,
    Diffusion,
    EulerMaruyama,
    IncreasingDecreasing,
    LinearDiffusion,
    Sigma,
    StochasticHeun,
)
from dit.sample.solve import SOLVERS, Euler, Heun
from tests.gaussian import ALL_PATHS, Gaussian, golden, normal
from tests.moments import exact_moments, marginal, standard

every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
every_diffusion = pytest.mark.parametrize("name", DIFFUSIONS.names())


# --- diffusions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [("linear", Linear()), ("gvp", Cosine()), ("vp", VP())])
@pytest.mark.parametrize(
    ("key", "diffusion"), [("SBDM", SBDM()), ("sigma", Sigma()), ("linear", LinearDiffusion())]
)
def test_the_reference_s_diffusions(name: str, path: NoisePath, key: str, diffusion: Diffusion) -> None:
    ref = golden("interpolants")
    want = torch.from_numpy(ref[f"{name}/diffusion_{key}"])
    for dtype in (torch.float32, torch.float64):
        t = 1 - torch.from_numpy(ref["t"].astype(np.float64)).to(dtype)
        got = diffusion(t, path.coeffs(t))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [0.5, 1.0, 2.0])
def test_the_other_diffusions_are_sit_s_in_its_time(norm: float) -> None:
    reverse = torch.linspace(0, 1, 9, dtype=torch.float64)[1:]
    t = 1 - reverse + 0.0
    coeffs = Cosine().coeffs(t)
    torch.testing.assert_close(
        Decreasing(norm=norm)(t, coeffs), 0.25 * (norm * torch.cos(math.pi * reverse) + 1) ** 2
    )
    torch.testing.assert_close(
        IncreasingDecreasing(norm=norm)(t, coeffs), norm * torch.sin(math.pi * reverse) ** 2
    )
    assert ConstantDiffusion(norm=norm)(t, coeffs).tolist() == [norm] * 8


@every_path
def test_sbdm_is_half_the_forward_sde_s_noise(path: NoisePath) -> None:
    """g² = d(sigma²)/dt − 2·(ln alpha)'·sigma² = alpha²·d(sigma²/alpha²)/dt, here by differences within a step."""
    t, h = torch.tensor([0.2005, 0.5005, 0.9005], dtype=torch.float64), 1e-6
    (a, s), (a2, s2) = path.alpha_sigma(t - h), path.alpha_sigma(t + h)
    slope = ((s2 / a2) ** 2 - (s / a) ** 2) / (2 * h)
    coeffs = path.coeffs(t)
    torch.testing.assert_close(SBDM()(t, coeffs), 0.5 * coeffs.alpha**2 * slope, rtol=1e-6, atol=0)
    torch.testing.assert_close(SBDM(norm=3.0)(t, coeffs), 3 * SBDM()(t, coeffs))


# --- Euler–Maruyama ----------------------------------------------------------------------------------------


def recursion(diffusion: Diffusion, oracle: Gaussian, times: list[float]) -> tuple[float, float]:
    """Mean and variance of textbook Euler–Maruyama on the linear path, from the marginal at times[0]."""
    mean = (1 - times[0]) * oracle.mean
    variance = (1 - times[0]) ** 2 * oracle.std**2 + times[0] ** 2
    for now, after in pairwise(times):
        h, t = now - after, torch.tensor([now], dtype=torch.float64)
        strength = float(diffusion(t, Linear().coeffs(t)))
        spread = (1 - now) ** 2 * oracle.std**2 + now**2
        slope = (now - (1 - now) * oracle.std**2 + strength) / spread  # of velocity − D·score
        mean = mean - h * (-oracle.mean + slope * (mean - (1 - now) * oracle.mean))
        variance = (1 - h * slope) ** 2 * variance + 2 * strength * h
    return mean, variance


@every_diffusion
def test_euler_maruyama_is_the_textbook_s_on_the_linear_path(name: str) -> None:
    solver, oracle = EulerMaruyama(diffusion=DIFFUSIONS[name]()), Gaussian()
    times = torch.linspace(0.95, 0.2, 31, dtype=torch.float64)
    got = exact_moments(solver, oracle, Linear(), times, to_data=False)
    assert (got.mean, got.variance) == pytest.approx(
        recursion(solver.diffusion, oracle, times.tolist()), rel=1e-9
    )


@every_diffusion
@every_path
def test_weak_order_1(name: str, path: NoisePath) -> None:
    """The errors of mean and variance halve with the step, where the cap on the noise is out of play."""
    oracle, stop = Gaussian(mean=0.8, std=0.5), 0.3
    solver, want = EulerMaruyama(diffusion=DIFFUSIONS[name](norm=0.5)), marginal(oracle, path, stop)
    errors = []
    for num_steps in (30, 60, 120):
        times = torch.linspace(0.9, stop, num_steps + 1, dtype=torch.float64)
        got = exact_moments(solver, oracle, path, times, to_data=False)
        errors.append((got.mean - want.mean, got.variance - want.variance))
    for coarse, fine in pairwise(errors):
        for e, f in zip(coarse, fine, strict=True):
            assert abs(f) < 0.62 * abs(e) or abs(f) < 2e-4
    assert max(map(abs, errors[-1])) < 0.02
    assert max(map(abs, errors[-1])) > 1e-6


def test_without_diffusion_it_is_euler() -> None:
    path, x = VP(), normal(2, 5)
    times, denoise = UniformGrid()(6, path, V()), Gaussian().denoise(path)
    for name in set(DIFFUSIONS) - {"decreasing"}:
        solver = EulerMaruyama(diffusion=DIFFUSIONS[name](norm=0.0))
        got = solver(denoise, x, times, path, lambda i: standard(x, i), {})
        torch.testing.assert_close(got, Euler()(denoise, x, times, path, None, {}), rtol=1e-12, atol=1e-12)


@every_diffusion
@pytest.mark.parametrize("last", ["mean", "euler"])
def test_without_a_limit_it_takes_the_reference_s_steps(name: str, last: str) -> None:
    """SiT's: all of D at every step, and a longer last one, at any size of the step."""
    oracle, path, x = Gaussian(), Linear(), normal(3, 4)
    solver = EulerMaruyama(diffusion=DIFFUSIONS[name](norm=3.0), last=last, limit=False)  # type: ignore[arg-type]
    times = torch.tensor([0.97, 0.6, 0.3, 0.04, 0.0], dtype=torch.float64)
    got = solver(oracle.denoise(path), x, times, path, lambda i: standard(x, i), {})
    for i, (now, after) in enumerate(pairwise(times.tolist())):
        t = torch.tensor([now], dtype=torch.float64)
        d, ends = float(solver.diffusion(t, path.coeffs(t))), oracle.endpoints(path, x, t.expand(3))
        drift = ends.eps - ends.data + (0.0 if i == 3 and last == "euler" else d) * ends.eps / now
        x = x - (now - after) * drift
        x = x + (math.sqrt(2 * d * (now - after)) * standard(x, i) if i < 3 else 0.0)
    torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-10)
    limited = EulerMaruyama(diffusion=DIFFUSIONS[name](norm=3.0))
    assert limited != solver


@every_path
def test_last_steps(path: NoisePath) -> None:
    """None takes noise; `mean` is a step's mean, `tweedie` the data, `euler` the ODE's step to the grid's end."""
    x = normal(2, 5)
    times, denoise = UniformGrid()(6, path, V()), Gaussian().denoise(path)
    now, end = float(times[-2]), float(times[-1])
    (alpha, alpha_end), (sigma, sigma_end) = path.alpha_sigma(times[-2:])
    t = times[-2:-1]
    strength = min(float(Sigma()(t, path.coeffs(t))) * (now - end), float(sigma) ** 2)
    got = {}
    for last in ("mean", "tweedie", "euler"):
        solver = EulerMaruyama(diffusion=Sigma(), last=last)  # type: ignore[arg-type]
        drawn: list[int] = []
        got[last] = solver(denoise, x, times, path, lambda i, d=drawn: [d.append(i), standard(x, i)][1], {})
        assert drawn == list(range(5))
    before = EulerMaruyama(diffusion=Sigma()).integrate(
        denoise, x, times[:-1], path, lambda i: standard(x, i), {}
    )
    ends = Gaussian().endpoints(path, before, t.expand(2))
    ode = before + (alpha_end - alpha) * ends.data + (sigma_end - sigma) * ends.eps
    torch.testing.assert_close(got["tweedie"], ends.data)
    torch.testing.assert_close(got["euler"], ode)
    torch.testing.assert_close(got["mean"], ode - strength / sigma * ends.eps)
    assert not torch.allclose(got["mean"], got["euler"])


@pytest.mark.parametrize("num_steps", [2, 5, 20])
@every_diffusion
@every_path
def test_few_steps_stay_bounded(name: str, path: NoisePath, num_steps: int) -> None:
    """From alpha = 0, where sbdm is infinite, to sigma ≈ 0, where a constant noise would swamp the data."""
    oracle, solver = Gaussian(), EulerMaruyama(diffusion=DIFFUSIONS[name](norm=3.0))
    got = exact_moments(solver, oracle, path, UniformGrid()(num_steps, path, V()))
    assert got.distance(oracle.mean, oracle.std) < {2: 1.0, 5: 0.8, 20: 0.25}[num_steps]


def test_a_diffusion_is_read_from_a_name() -> None:
    solver = SOLVERS.parse({"name": "euler_maruyama", "diffusion": "sigma", "last": "mean"})
    assert solver == EulerMaruyama(diffusion=Sigma(), last="mean")
    assert SOLVERS.parse(to_dict(solver)) == solver


# --- Heun with churn ---------------------------------------------------------------------------------------


@every_path
def test_without_churn_it_is_heun(path: NoisePath) -> None:
    x, times = path.prior(normal(2, 5)), UniformGrid()(5, path, V())
    denoise = Gaussian().denoise(path)
    want = Heun()(denoise, x, times, path, None, {})
    assert torch.equal(StochasticHeun(s_churn=0.0)(denoise, x, times, path, None, {}), want)
    outside = StochasticHeun(s_min=1e6, s_max=2e6)
    assert torch.equal(outside(denoise, x, times, path, lambda i: standard(x, i), {}), want)


@pytest.mark.parametrize(("s_churn", "s_min", "s_noise"), [(0.9, 0.0, 1.0), (40.0, 0.3, 1.003)])
def test_it_is_algorithm_2_on_a_variance_exploding_path(s_churn: float, s_min: float, s_noise: float) -> None:
    """In EDM's letters, from sigma = 80 over 8 steps to 0; no churn at 80, where nothing is noisier."""
    oracle, path, s_max = Gaussian(), VE(), 50.0
    x = 80 * normal(1, 6)
    sigmas = torch.tensor([80.0, 40.0, 12.0, 4.0, 1.0, 0.25, 0.05, 0.01], dtype=torch.float64)

    def data(x: Tensor, sigma: float) -> Tensor:
        gain = oracle.std**2 / (oracle.std**2 + sigma**2)
        return oracle.mean + gain * (x - oracle.mean)

    want, gamma = x, min(s_churn / 8, math.sqrt(2) - 1)
    for i, (now, after) in enumerate(pairwise([*sigmas.tolist(), 0.0])):
        raised = now * (1 + gamma) if s_min <= now <= s_max and after > 0 else now
        want = want + math.sqrt(raised**2 - now**2) * s_noise * standard(x, i)
        slope = (want - data(want, raised)) / raised
        moved = want + (after - raised) * slope
        if after > 0:
            moved = want + (after - raised) * 0.5 * (slope + (moved - data(moved, after)) / after)
        want = moved
    times = torch.cat([path.time_at(-2 * sigmas.log()), torch.zeros(1, dtype=torch.float64)])
    solver = StochasticHeun(s_churn=s_churn, s_min=s_min, s_max=s_max, s_noise=s_noise)
    got = solver(oracle.denoise(path), x, times, path, lambda i: standard(x, i), {})
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def looks(path: NoisePath, solver: StochasticHeun, times: Tensor) -> list[float]:
    """The times at which the denoiser is called."""
    seen: list[float] = []

    def watched(denoise: DenoiseFn) -> DenoiseFn:
        def call(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            seen.append(float(t[0]))
            return denoise(x, t, cond)

        return call

    x = normal(1, 3)
    solver(watched(Gaussian().denoise(path)), x, times, path, lambda i: standard(x, i), {})
    return seen


@every_path
@pytest.mark.parametrize("start", [1.0, 0.6])
def test_churn_rises_within_the_sampled_times(path: NoisePath, start: float) -> None:
    """Above each step's time (else it would be Heun), never above the first, on a discrete path at steps."""
    times = start * UniformGrid()(20, path, V())
    seen, firsts = looks(path, StochasticHeun(s_min=0.0, s_max=math.inf), times), times[:-1].tolist()
    raised = seen[0:38:2]
    assert max(seen) == firsts[0]
    assert seen[38] == firsts[-1]  # none before the step to data
    assert all(high >= t for high, t in zip(raised, firsts, strict=False))
    assert sum(high > t for high, t in zip(raised, firsts, strict=False)) >= 15
    if path.num_steps is not None:
        steps = torch.tensor(seen, dtype=torch.float64) * path.num_steps
        assert float((steps - steps.round()).abs().max()) < 1e-6


@every_path
def test_the_noise_rises_by_gamma(path: NoisePath) -> None:
    """To the time of (1 + gamma) times the ratio sigma / alpha; on a discrete path to the nearest step."""
    times, gamma = UniformGrid()(40, path, V()), 0.1
    solver = StochasticHeun(s_churn=40 * gamma, s_min=0.1, s_max=3.0)
    raised = torch.tensor(looks(path, solver, times)[0:80:2], dtype=torch.float64)
    times = times[: len(raised)]
    alpha, sigma = path.alpha_sigma(times)
    inside = (sigma / alpha >= 0.1) & (sigma / alpha <= 3.0)
    assert int(inside.sum()) > 5
    wanted = path.time_at(-2 * ((1 + gamma) * sigma / alpha).log())
    slack = 1e-9 + (0.5 / path.num_steps if path.num_steps else 0.0)
    assert float((raised - wanted)[inside].abs().max()) < slack
    assert float((raised - times)[~inside].abs().max()) == 0.0


def test_gamma_is_at_most_root_2_less_1() -> None:
    times = UniformGrid()(10, Linear(), V())
    seen = looks(Linear(), StochasticHeun(s_churn=1e6, s_min=0.5, s_max=1.5), times)
    raised = [t for t in seen if not any(abs(t - u) < 1e-9 for u in times.tolist())]
    want = [math.sqrt(2) * t / (1 - t) for t in (0.6, 0.5, 0.4)]
    assert [t / (1 - t) for t in raised] == pytest.approx(want)


@every_path
def test_churn_keeps_the_marginals(path: NoisePath) -> None:
    """More churn is no bias: with small steps mean and variance stay right."""
    oracle, times = Gaussian(), torch.linspace(0.9, 0.4, 101, dtype=torch.float64)
    want = marginal(oracle, path, 0.4)
    got = exact_moments(StochasticHeun(s_churn=5.0, s_min=0.0), oracle, path, times, to_data=False)
    assert got.mean == pytest.approx(want.mean, rel=3e-3)
    assert got.variance == pytest.approx(want.variance, rel=3e-3)
