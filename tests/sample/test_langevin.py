"""Langevin solvers: the papers' algorithms written out, and the variance that a step size must leave."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit.flow.path import PATHS, VE, VP, Cosine, Linear, NoisePath
from dit.flow.predict import Cond, Endpoints, V
from dit.sample.denoise import DenoiseFn
from dit.sample.grid import UniformGrid
from dit.sample.langevin import AnnealedLangevin, PredictorCorrector
from dit.sample.solve import Solver
from tests.gaussian import ALL_PATHS, Gaussian, normal
from tests.moments import exact_moments, marginal, standard

every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())


def calls(solver: Solver, path: NoisePath, times: Tensor) -> tuple[list[float], list[int]]:
    """(times at which the denoiser was called, draws that were asked for)."""
    seen, drawn, oracle, x = list[float](), list[int](), Gaussian(), normal(2, 4)

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        seen.append(float(t[0]))
        return oracle.endpoints(path, x, t)

    solver(denoise, x, times, path, lambda i: [drawn.append(i), standard(x, i)][1], {})
    return seen, drawn


def score(denoise: DenoiseFn, path: NoisePath, x: Tensor, t: Tensor) -> Tensor:
    t = t.expand(len(x))
    return denoise(x, t, {}).score(path.coeffs(t))


# --- predictor–corrector -----------------------------------------------------------------------------------


def test_it_is_algorithm_4_on_ve() -> None:
    path, oracle, x, snr = VE(), Gaussian(), 80 * normal(3, 7), 0.2
    times = torch.tensor([1.0, 0.8, 0.6, 0.4], dtype=torch.float64)
    denoise, (_, sigma) = oracle.denoise(path), path.alpha_sigma(times)
    want = x
    for i in range(3):
        change = sigma[i] ** 2 - sigma[i + 1] ** 2
        want = (
            want + change * score(denoise, path, want, times[i : i + 1]) + change.sqrt() * standard(x, 3 * i)
        )
        for j in (1, 2):
            z, g = standard(x, 3 * i + j), score(denoise, path, want, times[i + 1 : i + 2])
            size = 2 * (snr * z.norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True)) ** 2
            want = want + size * g + (2 * size).sqrt() * z
    solver = PredictorCorrector(snr=snr, corrector_steps=2)
    got = solver.integrate(denoise, x, times, path, lambda i: standard(x, i), {})
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_predictor_is_algorithm_5_s_on_vp_to_first_order() -> None:
    """x ← (2 − sqrt(1 − beta))·x + beta·score + sqrt(beta)·z: the difference falls with beta²."""
    path, x, differences = VP(), normal(3, 7), []
    denoise = Gaussian().denoise(path)
    for h in (2e-3, 1e-3):
        times = torch.tensor([0.5, 0.5 - h], dtype=torch.float64)
        alpha, _ = path.alpha_sigma(times)
        beta = 1 - (alpha[0] / alpha[1]) ** 2
        g = score(denoise, path, x, times[:1])
        want = (2 - (1 - beta).sqrt()) * x + beta * g + beta.sqrt() * standard(x, 0)
        solver = PredictorCorrector(corrector_steps=0)
        got = solver.integrate(denoise, x, times, path, lambda i: standard(x, i), {})
        differences.append(float((got - want).norm()))
    assert differences[0] / differences[1] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("snr", [0.05, 0.3])
def test_the_corrector_leaves_the_variance_it_must(snr: float) -> None:
    """At one level: V·(1 + snr² + ...), for a·x + noise of step a = 2·snr² has variance V / (1 − snr²)."""
    path, oracle, level = Linear(), Gaussian(), torch.tensor([0.5, 0.5 - 1e-9], dtype=torch.float64)
    want = marginal(oracle, path, 0.5)
    x = want.mean + 1.2 * math.sqrt(want.variance) * normal(64, 512)
    solver = PredictorCorrector(snr=snr, corrector_steps=round(1.5 / snr**2))
    got = solver.integrate(oracle.denoise(path), x, level, path, lambda i: standard(x, i), {})
    assert float(got.mean()) == pytest.approx(want.mean, abs=0.02)
    assert float(got.var()) == pytest.approx(want.variance / (1 - snr**2), rel=0.03)


def test_a_score_of_zero_is_no_fault() -> None:
    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        return Endpoints(x, torch.zeros_like(x))

    x = torch.zeros(2, 4)
    got = PredictorCorrector()(
        denoise, x, torch.tensor([1.0, 0.5, 0.0]), Linear(), lambda i: torch.zeros_like(x), {}
    )
    assert bool(torch.isfinite(got).all())


@every_path
@pytest.mark.parametrize("corrector_steps", [0, 1, 3])
def test_what_predictor_corrector_costs(path: NoisePath, corrector_steps: int) -> None:
    """At each step one look to predict and then one a correction, at the last one alone and no noise."""
    times, solver = UniformGrid()(4, path, V()), PredictorCorrector(corrector_steps=corrector_steps)
    seen, drawn = calls(solver, path, times)
    want = [times[0]]
    for t in times[1:-1]:
        want += [t] * (corrector_steps + 1)
    assert seen == want
    assert len(seen) == solver.nfe(4) == solver.nfe(4, to_data=True) == 3 * (1 + corrector_steps) + 1
    assert drawn == list(range(3 * (1 + corrector_steps)))


# --- annealed Langevin -------------------------------------------------------------------------------------


def test_it_is_algorithm_1_on_ve() -> None:
    """In NCSN's letters: alpha_i = epsilon·sigma_i²/sigma_L², and a last look at the data."""
    path, oracle, x, epsilon = VE(), Gaussian(), normal(3, 7), 2e-5
    sigmas = torch.logspace(0, -2, 10, dtype=torch.float64)
    times = torch.cat([path.time_at(-2 * sigmas.log()), torch.zeros(1, dtype=torch.float64)])
    denoise, want, i = oracle.denoise(path), x, 0
    for level, sigma in zip(times, sigmas, strict=False):
        size = epsilon * sigma**2 / sigmas[-1] ** 2
        for _ in range(4):
            want = want + size / 2 * score(denoise, path, want, level[None]) + size.sqrt() * standard(x, i)
            i += 1
    want = denoise(want, times[-2:-1].expand(3), {}).data
    got = AnnealedLangevin(steps=4)(denoise, x, times, path, lambda i: standard(x, i), {})
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("step_size", [0.1, 1.0, 3.0])
def test_a_level_leaves_the_variance_it_must(step_size: float) -> None:
    """x ← (1 − a)·x + noise, a = step_size/2·sigma²/V, has variance V / (1 − a/2)."""
    path, oracle, level = Linear(), Gaussian(), torch.tensor([0.5, 0.5 - 1e-9], dtype=torch.float64)
    want = marginal(oracle, path, 0.5)
    solver = AnnealedLangevin(step_size=step_size, steps=round(20 / step_size) + 5)
    got = exact_moments(solver, oracle, path, level, to_data=False)
    a = 0.5 * step_size * 0.25 / want.variance
    assert got.mean == pytest.approx(want.mean, rel=1e-6)
    assert got.variance == pytest.approx(want.variance / (1 - a / 2), rel=1e-6)


def carried(path: NoisePath, times: list[float]) -> float:
    """The factor on x from level to level, Langevin steps aside."""

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        return Endpoints(x, torch.zeros_like(x))

    x = torch.ones(1, 2, dtype=torch.float64)
    levels = torch.tensor(times, dtype=torch.float64)
    got = AnnealedLangevin().integrate(denoise, x, levels, path, lambda i: torch.zeros_like(x), {})
    return float(got[0, 0])


def test_what_is_carried_from_level_to_level() -> None:
    """x / alpha, so the data in it stay; bounded where alpha rises from 0."""
    assert carried(VE(), [1.0, 0.95]) == carried(VE(), [0.3, 0.1]) == 1.0
    assert carried(Linear(), [0.4, 0.3]) == pytest.approx(0.7 / 0.6)
    assert carried(Cosine(), [1.0, 0.9]) == pytest.approx(2.0)
    assert carried(Linear(), [1.0, 0.9]) == pytest.approx(2 * math.hypot(0.1, 0.9))
    assert carried(Linear(), [0.999, 0.9]) == pytest.approx(
        2 * math.hypot(0.1, 0.9) / math.hypot(0.001, 0.999)
    )


@every_path
@pytest.mark.parametrize("steps", [1, 3])
def test_what_annealed_langevin_costs(path: NoisePath, steps: int) -> None:
    """Each level but the grid's end has its steps; the last look is at the last of them."""
    times, solver = UniformGrid()(4, path, V()), AnnealedLangevin(steps=steps)
    seen, drawn = calls(solver, path, times)
    assert seen == [*(float(t) for t in times[:-1] for _ in range(steps)), float(times[-2])]
    assert len(seen) == solver.nfe(4) == solver.nfe(4, to_data=True)
    assert drawn == list(range(4 * steps))


def test_more_steps_a_level_come_nearer() -> None:
    oracle, times = Gaussian(), UniformGrid()(25, Cosine(), V())
    errors = [
        exact_moments(AnnealedLangevin(steps=n), oracle, Cosine(), times).distance(oracle.mean, oracle.std)
        for n in (2, 8, 32)
    ]
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]
