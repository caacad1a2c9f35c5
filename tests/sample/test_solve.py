"""Solvers: order of convergence, reference numbers, the last step, and exactness where the ends are constant."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit.config import to_dict
from dit.flow.path import PATHS, VP, DiscreteVP, Linear, Path
from dit.flow.predict import Cond, Endpoints, Eps, Prediction, Velocity
from dit.rng import Draws, Purpose
from dit.sample.denoise import DenoiseFn, Denoiser
from dit.sample.grid import UniformGrid
from dit.sample.solve import SOLVERS, At, Euler, Heun, Node
from tests.gaussian import ALL_PATHS, PAIR_IDS, PAIRS, Gaussian, golden, normal

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
every_solver = pytest.mark.parametrize("name", SOLVERS.names())


def noise(x: Tensor, step: int) -> Tensor:
    return Draws(0, step, torch.arange(len(x)), len(x)).normal(Purpose.SOLVER, x.shape[1:]).to(x.dtype)


def watched(denoise: DenoiseFn, times: list[float]) -> DenoiseFn:
    """`denoise`, noting the times at which it is called."""

    def call(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        times.append(float(t[0]))
        return denoise(x, t, cond)

    return call


@every_solver
@every_path
def test_order_of_convergence(name: str, path: Path) -> None:
    """Against the exact solution for Gaussian data, in float64, halving the step."""
    solver, oracle, errors = SOLVERS[name](), Gaussian(mean=0.8, std=0.5), []
    x, start, stop = normal(2, 3), 0.95, 0.15
    for num_steps in (20, 40, 80):
        times = torch.linspace(start, stop, num_steps + 1, dtype=torch.float64)
        got = solver.integrate(oracle.denoise(path), x, times, path, lambda i: noise(x, i), {})
        errors.append(float((got - oracle.transport(path, x, start, stop)).norm()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.25)
    assert errors[-1] < 0.05


@every_pair
@every_solver
def test_a_network_s_samples_are_the_data(path: Path, prediction: Prediction, name: str) -> None:
    """Prior to data through network, row, grid and last step, for every path × prediction × solver (I5)."""
    solver, oracle, errors = SOLVERS[name](), Gaussian(), []
    denoise = Denoiser(oracle.network(path, prediction), path, prediction)
    x = path.prior(normal(2, 3))
    for num_steps in (25, 100):
        times = UniformGrid()(num_steps, path, prediction)
        got = solver(denoise, x, times, path, lambda i: noise(x, i), {})
        errors.append(float((got - oracle.transport(path, x, float(times[0]), 0.0)).abs().max()))
    assert errors[1] < min(0.05, 0.4 * errors[0])


@every_pair
@every_solver
def test_evaluations_are_as_many_as_said_and_inside_the_interval(
    path: Path, prediction: Prediction, name: str
) -> None:
    solver, seen = SOLVERS[name](), list[float]()
    denoise, x = watched(Gaussian().denoise(path), seen), normal(1, 3)
    for num_steps in (1, 6):
        seen.clear()
        times = UniformGrid()(num_steps, path, prediction)
        to_data = float(path.alpha_sigma(times[-1:])[1]) > 0
        result = solver(denoise, x, times, path, lambda i: noise(x, i), {})
        assert len(seen) == solver.nfe(num_steps, to_data)
        assert bool(torch.isfinite(result).all())
        assert max(seen) == float(times[0])
        # where the interval ends above the data nothing is evaluated at its end, or beyond the step before
        assert min(seen) >= float(times[-2] if to_data else times[-1])


def test_heun_keeps_away_from_the_singularity_of_vp() -> None:
    seen: list[float] = []
    path, prediction = VP(), Eps()
    x = normal(1, 3)
    times = UniformGrid()(10, path, prediction)
    assert 0 < float(times[-1]) < 1e-6
    got = Heun()(watched(Gaussian().denoise(path), seen), x, times, path, None, {})
    assert min(seen) == pytest.approx(0.1, abs=1e-6)
    assert seen.count(min(seen)) == 2  # Heun's second look, then the last step
    before = Heun().integrate(Gaussian().denoise(path), x, times[:-1], path, None, {})
    torch.testing.assert_close(got, Gaussian().endpoints(path, before, times[-2:-1]).data)


def test_heun_reaches_clean_data_where_the_path_lets_it() -> None:
    seen: list[float] = []
    path = Linear()
    Heun()(
        watched(Gaussian().denoise(path), seen),
        normal(1, 3),
        UniformGrid()(4, path, Velocity()),
        path,
        None,
        {},
    )
    assert seen == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0]


# --- reference numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "key"), [(Euler(), "euler/25"), (Heun(), "heun2/25")])
def test_the_reference_ode(solver: Euler | Heun, key: str) -> None:
    """Textbook Euler and Heun in t on the linear path, through a velocity network."""
    ref = golden("ode_gaussian")
    oracle, path, prediction = Gaussian(float(ref["mu"]), float(ref["std"])), Linear(), Velocity()
    denoise = Denoiser(oracle.network(path, prediction), path, prediction)
    z = torch.from_numpy(ref["z"])
    for x, atol in ((z, 1e-5), (z.double(), 3e-6)):
        got = solver(denoise, x, UniformGrid()(25, path, prediction), path, None, {})
        torch.testing.assert_close(got.float(), torch.from_numpy(ref[key]), rtol=0, atol=atol)
    torch.testing.assert_close(
        oracle.transport(path, z, 1.0, 0.0), torch.from_numpy(ref["exact"]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("respacing", ["50", "ddim25"])
def test_euler_on_ddpm_is_ddim(respacing: str) -> None:
    """The reference's DDIM, eta 0, on its own respaced steps."""
    ref = golden("ddpm")
    oracle, path = Gaussian(float(ref["mu"]), float(ref["std"])), DiscreteVP()
    k = torch.from_numpy(ref[f"respace/{respacing}"]).double()
    times = torch.cat([(k.flip(0) + 1) / 1000, torch.zeros(1, dtype=torch.float64)])
    denoise = Denoiser(oracle.network(path, Eps()), path, Eps())
    z = torch.from_numpy(ref[f"respace/{respacing}/z"])
    got = Euler()(denoise, z.double(), times, path, None, {})
    torch.testing.assert_close(
        got.float(), torch.from_numpy(ref[f"respace/{respacing}/ddim_eta0"]), rtol=0, atol=1e-4
    )


class Exploding(Path):
    """EDM's path up to scale: alpha = 1, sigma = 20·t."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), 20.0 * t


def test_heun_on_a_variance_exploding_path_is_edm_s() -> None:
    """EDM, algorithm 1: dx/dsigma = (x − data)/sigma, Heun in sigma, Euler to sigma = 0."""
    oracle, path, x = Gaussian(), Exploding(), 20 * normal(1, 4)
    times = torch.tensor([1.0, 0.4, 0.1, 0.01], dtype=torch.float64)
    denoise, sigmas = oracle.denoise(path), [*(20 * times).tolist(), 0.0]
    want = x
    for now, after in pairwise(sigmas):
        at_now = (want - denoise(want, torch.tensor([now / 20]).double(), {}).data) / now
        moved = want + (after - now) * at_now
        if after > 0:
            at_after = (moved - denoise(moved, torch.tensor([after / 20]).double(), {}).data) / after
            moved = want + (after - now) * 0.5 * (at_now + at_after)
        want = moved
    end = torch.tensor(
        [0.001], dtype=torch.float64
    )  # never visited: not clean, so the last step returns data
    torch.testing.assert_close(Heun()(denoise, x, torch.cat([times, end]), path, None, {}), want)


# --- what every solver promises ----------------------------------------------------------------------------


@every_solver
@every_path
@settings(max_examples=15, deadline=None)
@given(num_steps=st.integers(1, 9), shift=st.floats(0.2, 5), seed=st.integers(0, 100))
def test_a_single_image_is_found_exactly(
    name: str, path: Path, num_steps: int, shift: float, seed: int
) -> None:
    """With one possible data point (data, eps) are constant along the ODE, and any steps solve it."""
    point = normal(1, 3, seed=seed)

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        c = path.coeffs(t)
        ends = c.alpha[:, None], c.sigma[:, None]
        return Endpoints(point, (x - ends[0] * point) / ends[1])

    times = UniformGrid(shift=shift)(num_steps, path, Eps())
    if float(times[-1]) == 0.0:  # eps is undetermined at clean data
        times[-1] = 1e-3
    got = SOLVERS[name]()(denoise, normal(1, 3, seed=seed + 1), times, path, None, {})
    torch.testing.assert_close(got, point, rtol=1e-6, atol=1e-6)


@every_solver
def test_samples_do_not_depend_on_their_batch(name: str) -> None:
    path, x = VP(), normal(4, 3)
    times, denoise = UniformGrid()(5, path, Eps()), Gaussian().denoise(path)
    whole = SOLVERS[name]()(denoise, x, times, path, lambda i: noise(x, i), {})
    for i in range(4):
        alone = SOLVERS[name]()(denoise, x[i : i + 1], times, path, lambda s, i=i: noise(x, s)[i : i + 1], {})
        assert torch.equal(alone, whole[i : i + 1])


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_and_conditions_reach_the_denoiser(name: str, dtype: torch.dtype) -> None:
    cond = {"label": torch.tensor([1, 2])}

    def denoise(x: Tensor, t: Tensor, given_: Cond) -> Endpoints:
        assert given_ is cond
        assert t.dtype == dtype
        assert t.shape == (2,)
        return Gaussian().endpoints(Linear(), x, t)

    times = UniformGrid()(3, Linear(), Velocity())
    with torch.inference_mode():
        x = normal(2, 3, dtype=dtype)
        got = SOLVERS[name]()(denoise, x, times, Linear(), lambda i: noise(x, i), cond)
    assert got.dtype == dtype


@every_solver
@pytest.mark.parametrize(
    "times", [[0.0, 1.0], [1.0, 1.0], [1.2, 0.5], [0.5, -0.1], [math.nan, 0.0], [[1.0, 0.0]]]
)
def test_times_that_do_not_fall_within_the_path_are_refused(name: str, times: list[float]) -> None:
    with pytest.raises(ValueError, match="fall strictly"):
        SOLVERS[name]()(Gaussian().denoise(Linear()), normal(1, 3), torch.tensor(times), Linear(), None, {})


class Ancestral(Euler):
    """Euler with a little noise at every step."""

    stochastic = True

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Tensor | None) -> Tensor:
        assert noise is not None
        return super().step(at, x, now, after, None) + 0.1 * noise


def test_noise_is_drawn_for_stochastic_solvers_only() -> None:
    drawn: list[int] = []

    def drawing(step: int) -> Tensor:
        drawn.append(step)
        return noise(x, step)

    x, times = normal(2, 3), torch.tensor([1.0, 0.6, 0.3, 0.0])
    denoise = Gaussian().denoise(Linear())
    plain = Euler()(denoise, x, times, Linear(), drawing, {})
    assert drawn == []
    noisy = Ancestral()(denoise, x, times, Linear(), drawing, {})
    assert drawn == [0, 1, 2]
    assert not torch.equal(plain, noisy)
    with pytest.raises(ValueError, match="needs noise"):
        Ancestral()(denoise, x, times, Linear(), None, {})


@every_solver
def test_a_solver_is_its_own_configuration(name: str) -> None:
    assert SOLVERS.parse(to_dict(SOLVERS[name]())) == SOLVERS[name]()
