"""What every stochastic solver promises: the data's distribution, its draws, no hidden noise."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, to_dict
from dit.flow.discrete import CosineDDPM
from dit.flow.path import PATHS, VE, VP, Linear, NoisePath
from dit.flow.predict import V
from dit.sample.ancestral import DDIM, DDPM
from dit.sample.grid import UniformGrid
from dit.sample.langevin import PredictorCorrector
from dit.sample.sde import DIFFUSIONS, EulerMaruyama, StochasticHeun
from dit.sample.solve import SOLVERS, Solver
from tests.gaussian import ALL_PATHS, Gaussian, Mixture, normal
from tests.moments import exact_moments, marginal, standard
from tests.ulps import assert_within

STOCHASTIC: dict[str, Solver] = {
    **{name: solver() for name, solver in SOLVERS.items() if solver().stochastic},
    "ddim-0.5": DDIM(eta=0.5),
    "ddim-1": DDIM(eta=1.0),
    "ddpm-large": DDPM(variance="large"),
    "sde-mean": EulerMaruyama(last="mean"),
    "sde-euler": EulerMaruyama(last="euler"),
    **{f"sde-{name}": EulerMaruyama(diffusion=diffusion()) for name, diffusion in DIFFUSIONS.items()},
}
AFFINE = {name: s for name, s in STOCHASTIC.items() if not isinstance(s, PredictorCorrector)}
REGISTERED = {**{name: s for name, s in STOCHASTIC.items() if name in SOLVERS}, "ddim": DDIM(eta=1.0)}

every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
every_affine = pytest.mark.parametrize("solver", AFFINE.values(), ids=AFFINE)
every_stochastic = pytest.mark.parametrize("solver", STOCHASTIC.values(), ids=STOCHASTIC)
every_registered = pytest.mark.parametrize("solver", REGISTERED.values(), ids=REGISTERED)


def grid(num_steps: int, path: NoisePath) -> Tensor:
    return UniformGrid()(num_steps, path, V())


def test_all_that_take_noise_are_here() -> None:
    assert set(REGISTERED) >= {"ddim", "ddpm", "edm", "euler_maruyama", "predictor_corrector"}
    assert "annealed_langevin" in REGISTERED


@every_affine
@every_path
def test_the_distance_to_the_data_falls_with_the_steps(solver: Solver, path: NoisePath) -> None:
    """Wasserstein-2, without Monte-Carlo error: at least by half with four times the steps."""
    oracle = Gaussian()
    coarse, fine = (
        exact_moments(solver, oracle, path, grid(n, path)).distance(oracle.mean, oracle.std)
        for n in (25, 100)
    )
    assert fine < max(0.5 * coarse, 0.003)
    assert fine < 0.08


@every_registered
@every_path
def test_samples_have_the_data_s_moments(solver: Solver, path: NoisePath) -> None:
    """20,000 numbers from noise, within 4.5 standard errors and the steps' own error."""
    oracle, times = Gaussian(), grid(30, path)
    start = marginal(oracle, path, float(times[0]))
    x = start.mean + math.sqrt(start.variance) * normal(200, 100)
    got = solver(oracle.denoise(path), x, times, path, lambda i: standard(x, i), {})
    want, slack = (oracle.mean, oracle.std), 0.0
    if isinstance(solver, PredictorCorrector):
        slack = 0.04  # its error, not known exactly
    else:
        exact = exact_moments(solver, oracle, path, times)
        want = exact.mean, math.sqrt(exact.variance)
    error = 4.5 / math.sqrt(x.numel()) * oracle.std
    assert abs(float(got.mean()) - want[0]) < error + slack
    assert abs(float(got.std()) - want[1]) < error + slack


@every_registered
def test_samples_of_a_mixture_have_its_distribution(solver: Solver) -> None:
    """Kolmogorov–Smirnov: 1.95 / √n is exceeded once in a thousand times, and the steps err a little."""
    path = Linear()
    oracle, times = Mixture(), grid(60, path)
    t = times[:1].expand(100)
    x = path.coeffs(t).mix(oracle.draw(100, 64, seed=5), normal(100, 64, seed=8))
    got = solver(oracle.denoise(path), x, times, path, lambda i: standard(x, i), {}).flatten().sort().values
    below = oracle.distribution(Linear(), got, 0.0)
    ranks = (torch.arange(len(got)) + 0.5) / len(got)
    assert float((below - ranks).abs().max()) < 1.95 / math.sqrt(len(got)) + 0.03


@every_stochastic
def test_draws_are_used_as_declared(solver: Solver) -> None:
    """Step i asks for i·draws … i·draws + draws − 1 at most, each once; the last draws depend on the method."""
    drawn: list[int] = []
    x, path = normal(2, 8), VP()

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return standard(x, i)

    solver(Gaussian().denoise(path), x, grid(6, path), path, noise, {})
    assert len(set(drawn)) == len(drawn)
    assert min(drawn) >= 0
    assert max(drawn) < 6 * solver.draws
    per_step = Counter(i // solver.draws for i in drawn)
    first = 1 if isinstance(solver, StochasticHeun) else 0  # no noise beyond where sampling starts
    assert all(per_step[step] == solver.draws for step in range(first, 5))


@every_stochastic
def test_every_draw_matters(solver: Solver) -> None:
    x, path, times = normal(2, 8), VP(), grid(4, VP())

    def result(changed: int) -> Tensor:
        def noise(i: int) -> Tensor:
            return standard(x, i + 100 if i == changed else i)

        return solver(Gaussian().denoise(path), x, times, path, noise, {})

    asked: list[int] = []
    solver(Gaussian().denoise(path), x, times, path, lambda i: [asked.append(i), standard(x, i)][1], {})
    assert asked
    plain = result(-1)
    assert not any(torch.equal(plain, result(i)) for i in asked)


@every_stochastic
def test_noise_must_be_given(solver: Solver) -> None:
    with pytest.raises(ValueError, match="needs noise"):
        solver(Gaussian().denoise(Linear()), normal(1, 3), grid(3, Linear()), Linear(), None, {})


@every_stochastic
def test_images_do_not_depend_on_their_batch(solver: Solver) -> None:
    """But for rounding (I7): 67 elements fill no vector registers, nor do four times as many."""
    path, x = VP(), normal(4, 67)
    times, denoise = grid(5, path), Gaussian().denoise(path)
    whole = solver(denoise, x, times, path, lambda i: standard(x, i), {})
    for i in range(4):
        alone = solver(denoise, x[i : i + 1], times, path, lambda s, i=i: standard(x, s)[i : i + 1], {})
        assert_within(alone, whole[i : i + 1], 16)


@every_stochastic
@pytest.mark.parametrize(
    "path", [Linear(), VE(), CosineDDPM(zero_terminal_snr=True)], ids=["linear", "ve", "ztsnr"]
)
def test_float32_stays_float32_and_near(solver: Solver, path: NoisePath) -> None:
    """Also from where alpha is 0 and down to clean data."""
    times, denoise = grid(8, path), Gaussian().denoise(path)
    x = path.prior(normal(3, 16))
    want = solver(denoise, x, times, path, lambda i: standard(x, i), {})
    small = x.float()
    got = solver(denoise, small, times, path, lambda i: standard(small, i), {})
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


@every_stochastic
def test_a_solver_is_its_own_configuration(solver: Solver) -> None:
    assert SOLVERS.parse(to_dict(solver)) == solver


@pytest.mark.parametrize(
    ("options", "at_fault"),
    [
        ({"name": "ddim", "eta": 1.5}, "eta"),
        ({"name": "ddpm", "variance": "medium"}, "variance"),
        ({"name": "edm", "s_churn": -1}, "s_churn"),
        ({"name": "euler_maruyama", "diffusion": "sigmas"}, "sigma"),
        ({"name": "euler_maruyama", "diffusion": {"name": "constant", "norm": -1}}, "diffusion.norm"),
        ({"name": "euler_maruyama", "last": "none"}, "last"),
        ({"name": "predictor_corrector", "snr": -0.1}, "snr"),
        ({"name": "predictor_corrector", "corrector_steps": 1.5}, "corrector_steps"),
        ({"name": "annealed_langevin", "step_size": 4}, "step_size"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], at_fault: str) -> None:
    with pytest.raises(ConfigError, match=at_fault):
        SOLVERS.parse(options)
