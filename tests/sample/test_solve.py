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
from dit.flow.discrete import CosineDDPM, DiscreteVP
from dit.flow.path import PATHS, VE, VP, Cosine, Linear, NoisePath
from dit.flow.predict import Cond, Endpoints, Eps, Prediction, V, Velocity
from dit.rng import Draws, Purpose
from dit.sample.denoise import DenoiseFn, Denoiser
from dit.sample.grid import LogSNRGrid, RespacedGrid, UniformGrid
from dit.sample.multistep import UniPC
from dit.sample.solve import SOLVERS, At, Euler, Heun, Node, Noise, Solver, nodes
from tests.gaussian import ALL_PATHS, PAIR_IDS, PAIRS, Gaussian, Mixture, golden, normal
from tests.ulps import assert_within

ODE = [name for name in SOLVERS.names() if not SOLVERS[name]().stochastic]
FIXED = [SOLVERS[name]() for name in ODE if SOLVERS[name]().nfe(1) is not None] + [UniPC(order=3)]

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
every_solver = pytest.mark.parametrize("name", SOLVERS.names())
every_ode_solver = pytest.mark.parametrize("name", ODE)
every_fixed_solver = pytest.mark.parametrize("solver", FIXED, ids=str)


def noise(x: Tensor, step: int) -> Tensor:
    return Draws(0, step, torch.arange(len(x)), len(x)).normal(Purpose.SOLVER, x.shape[1:]).to(x.dtype)


def with_variance(denoise: DenoiseFn) -> DenoiseFn:
    """`denoise` with the learned-variance channels that one solver wants."""

    def call(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        ends = denoise(x, t, cond)
        return Endpoints(ends.data, ends.eps, torch.zeros_like(x))

    return call


def watched(denoise: DenoiseFn, times: list[float]) -> DenoiseFn:
    """`denoise`, noting the times at which it is called."""

    def call(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        times.append(float(t[0]))
        return denoise(x, t, cond)

    return call


# --- convergence -------------------------------------------------------------------------------------------


@every_fixed_solver
@every_path
def test_order_of_convergence(solver: Solver, path: NoisePath) -> None:
    """Against the exact transport of a mixture of Gaussians, in float64, halving the step."""
    oracle, errors, start, stop = Mixture(), [], 0.95, 0.15
    x = float(nodes(path, torch.tensor([start, stop]))[0].sigma) * normal(4, 8)
    want = oracle.transport(path, x, start, stop)
    few = 160 if solver.evaluations == 1 else 40  # those with a memory show their order late
    for num_steps in (few, 2 * few):
        times = torch.linspace(start, stop, num_steps + 1, dtype=torch.float64)
        got = solver.integrate(oracle.denoise(path), x, times, path)
        errors.append(float((got - want).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.convergence, abs=0.25)
    assert errors[1] < errors[0] < 0.3


@every_ode_solver
@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=str)
def test_the_distance_to_the_data_falls_as_the_order_says(name: str, path: NoisePath) -> None:
    """W2 to N(mean, std²) from pure noise to clean data, in closed form: on Gaussian data a solver is affine in x."""
    solver, oracle, distances = SOLVERS[name](), Gaussian(), []
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for num_steps in (16, 32, 64):
        got = solver(oracle.denoise(path), x, LogSNRGrid()(num_steps, path, Velocity()), path).flatten()
        mean, std = float(got[0]), float(got[1] - got[0])
        distances.append(math.hypot(mean - oracle.mean, std - oracle.std))
    if solver.nfe(1) is None:
        assert max(distances) < 1e-3
        return
    assert math.log2(distances[1] / distances[2]) > solver.convergence - 0.1
    assert distances[2] < distances[1] < distances[0] < 0.07


@every_ode_solver
@every_path
def test_a_network_s_samples_are_the_data(path: NoisePath, name: str) -> None:
    """Prior to data through network, row, grid and last step, for every path × solver (I5)."""
    solver, oracle, prediction, errors = SOLVERS[name](), Mixture(), V(), []
    denoise = Denoiser(oracle.network(path, prediction), path, prediction)
    x = path.prior(normal(2, 8))
    for num_steps in (10, 40):
        times = UniformGrid()(num_steps, path, prediction)
        got = solver(denoise, x, times, path)
        errors.append(float((got - oracle.transport(path, x, float(times[0]), 0.0)).square().mean().sqrt()))
    assert errors[1] < 0.05
    assert errors[1] < 0.5 * errors[0] or solver.nfe(1) is None


@every_pair
def test_every_prediction_leads_to_the_data(path: NoisePath, prediction: Prediction) -> None:
    oracle, errors = Gaussian(), []
    denoise, x = Denoiser(oracle.network(path, prediction), path, prediction), path.prior(normal(2, 3))
    for num_steps in (15, 60):
        times = UniformGrid()(num_steps, path, prediction)
        got = Heun()(denoise, x, times, path)
        errors.append(float((got - oracle.transport(path, x, float(times[0]), 0.0)).abs().max()))
    assert errors[1] < min(0.05, 0.4 * errors[0])


# --- evaluations -------------------------------------------------------------------------------------------


@every_path
@every_solver
def test_evaluations_are_as_many_as_said_and_inside_the_interval(path: NoisePath, name: str) -> None:
    solver, seen, prediction = SOLVERS[name](), list[float](), Eps()
    denoise, x = watched(with_variance(Gaussian().denoise(path)), seen), path.prior(normal(1, 3))
    for num_steps in (1, 2, 6):
        seen.clear()
        times = UniformGrid()(num_steps, path, prediction)
        to_data = float(path.alpha_sigma(times[-1:])[1]) > 0
        result = solver(denoise, x, times, path, lambda i: noise(x, i), {})
        assert bool(torch.isfinite(result).all())
        assert max(seen) <= float(times[0]) * (1 + 1e-12)
        assert solver.stochastic or max(seen) == pytest.approx(float(times[0]), rel=1e-12)
        expected = solver.nfe(num_steps, to_data)
        if expected is None:  # the solver looks where it likes, but never where no network was trained
            assert min(seen) >= float(path.snap(times[-1:])) * (1 - 1e-12)
            continue
        assert len(seen) == expected
        # where the interval ends above the data nothing is evaluated at its end, or beyond the step before
        assert min(seen) >= float(times[-2] if to_data else times[-1])


def test_heun_keeps_away_from_the_singularity_of_vp() -> None:
    seen: list[float] = []
    path, prediction = VP(), Eps()
    x = normal(1, 3)
    times = UniformGrid()(10, path, prediction)
    assert 0 < float(times[-1]) < 1e-6
    got = Heun()(watched(Gaussian().denoise(path), seen), x, times, path)
    assert min(seen) == pytest.approx(0.1, abs=1e-6)
    assert seen.count(min(seen)) == 2  # Heun's second look, then the last step
    before = Heun().integrate(Gaussian().denoise(path), x, times[:-1], path)
    torch.testing.assert_close(got, Gaussian().endpoints(path, before, times[-2:-1]).data)


def test_heun_reaches_clean_data_where_the_path_lets_it() -> None:
    seen: list[float] = []
    path = Linear()
    times = UniformGrid()(4, path, Velocity())
    Heun()(watched(Gaussian().denoise(path), seen), normal(1, 3), times, path)
    assert seen == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0]


@every_ode_solver
def test_an_end_given_twice_is_visited(name: str) -> None:
    """As EDM's grid has it: an evaluation at sigma_min, then its data."""
    seen: list[float] = []
    path, oracle = VE(), Gaussian()
    denoise, x = watched(oracle.denoise(path), seen), 80 * normal(1, 3)
    once = torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    times = torch.tensor([1.0, 0.5, 0.2, 0.0, 0.0], dtype=torch.float64)
    solver = SOLVERS[name]()
    got = solver(denoise, x, times, path)
    assert min(seen) == 0.0
    assert solver.nfe(4, to_data=True) in (len(seen), None)
    before = solver.integrate(oracle.denoise(path), x, once, path)
    expected = oracle.endpoints(path, before, torch.zeros(1, dtype=torch.float64)).data
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- nodes -------------------------------------------------------------------------------------------------


@every_path
def test_a_node_is_found_by_its_ratio(path: NoisePath) -> None:
    at = At(Gaussian().denoise(path), path, {})
    for node in nodes(path, torch.linspace(1.0, 0.0, 12, dtype=torch.float64)):
        found = at.node(node.ratio)
        assert found.t == pytest.approx(node.t, abs=1e-12)
        assert found.alpha == pytest.approx(node.alpha, abs=1e-12)
        assert found.sigma == pytest.approx(node.sigma, abs=1e-12 * node.scale)
        assert node.scale * (1 - node.ratio) == pytest.approx(node.alpha, abs=1e-12 * node.scale)


def test_nodes_know_their_noise() -> None:
    half, clean, pure = Node(0.3, 0.6, 0.2), Node(0.0, 1.0, 0.0), Node(1.0, 0.0, 1.0)
    assert half.ratio == pytest.approx(0.25)
    assert half.log_snr == pytest.approx(math.log(9))
    assert (clean.ratio, clean.log_snr) == (0.0, math.inf)
    assert (pure.ratio, pure.log_snr) == (1.0, -math.inf)


# --- reference numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_steps", "key"),
    [
        ("euler", 25, "euler/25"),
        ("heun", 25, "heun2/25"),
        ("midpoint", 25, "midpoint/25"),
        ("rk4", 10, "rk4/10"),
    ],
)
def test_the_reference_ode(name: str, num_steps: int, key: str) -> None:
    """The textbook methods in t on the linear path, through a velocity network."""
    ref = golden("ode_gaussian")
    oracle, path, prediction = Gaussian(float(ref["mu"]), float(ref["std"])), Linear(), Velocity()
    denoise = Denoiser(oracle.network(path, prediction), path, prediction)
    z, times = torch.from_numpy(ref["z"]), UniformGrid()(num_steps, path, prediction)
    for x, atol in ((z, 1e-5), (z.double(), 3e-6)):
        got = SOLVERS[name]()(denoise, x, times, path)
        torch.testing.assert_close(got.float(), torch.from_numpy(ref[key]), rtol=0, atol=atol)
    torch.testing.assert_close(
        oracle.transport(path, z, 1.0, 0.0), torch.from_numpy(ref["exact"]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("stride", "num_steps", "key"), [("even", 50, "50"), ("ddim", 25, "ddim25")])
def test_euler_on_ddpm_is_ddim(stride: str, num_steps: int, key: str) -> None:
    """The reference's DDIM, eta 0, on its own respaced steps."""
    ref = golden("ddpm")
    oracle, path = Gaussian(float(ref["mu"]), float(ref["std"])), DiscreteVP()
    times = RespacedGrid(stride=stride)(num_steps, path, Eps())
    assert path.model_time(times[:-1]).flip(0).tolist() == ref[f"respace/{key}"].tolist()
    denoise = Denoiser(oracle.network(path, Eps()), path, Eps())
    z, want = (torch.from_numpy(ref[f"respace/{key}/{what}"]) for what in ("z", "ddim_eta0"))
    for x in (z, z.double()):
        torch.testing.assert_close(Euler()(denoise, x, times, path).float(), want, rtol=0, atol=1e-5)


def test_heun_on_a_variance_exploding_path_is_edm_s() -> None:
    """EDM, algorithm 1: dx/dsigma = (x − data)/sigma, Heun in sigma, Euler to sigma = 0."""
    oracle, path, x = Gaussian(), VE(), 80 * normal(1, 4)
    times = torch.tensor([1.0, 0.8, 0.5, 0.3], dtype=torch.float64)
    denoise, sigmas = oracle.denoise(path), [*path.alpha_sigma(times)[1].tolist(), 0.0]
    want = x
    for (now, after), t, t_after in zip(pairwise(sigmas), times, [*times[1:], None], strict=True):
        at_now = (want - denoise(want, t.reshape(1), {}).data) / now
        moved = want + (after - now) * at_now
        if t_after is not None:
            at_after = (moved - denoise(moved, t_after.reshape(1), {}).data) / after
            moved = want + (after - now) * 0.5 * (at_now + at_after)
        want = moved
    never = torch.zeros(1, dtype=torch.float64)  # not clean, so not visited: the last step returns data
    torch.testing.assert_close(Heun()(denoise, x, torch.cat([times, never]), path), want)


# --- what every solver promises ----------------------------------------------------------------------------


@every_ode_solver
@every_path
@settings(max_examples=4, deadline=None)
@given(num_steps=st.integers(1, 9), shift=st.floats(0.2, 5), seed=st.integers(0, 100))
def test_a_single_image_is_found_exactly(
    name: str, path: NoisePath, num_steps: int, shift: float, seed: int
) -> None:
    """With one possible data point (data, eps) are constant along the ODE, and any steps solve it."""
    point = normal(1, 3, seed=seed)

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        c = path.coeffs(t)
        return Endpoints(point, (x - c.alpha[:, None] * point) / c.sigma[:, None])

    times = UniformGrid(shift=shift)(num_steps, path, Eps())
    if float(times[-1]) == 0.0:  # eps is undetermined at clean data
        times[-1] = 1e-3
    got = SOLVERS[name]()(denoise, normal(1, 3, seed=seed + 1), times, path)
    torch.testing.assert_close(got, point, rtol=1e-6, atol=1e-6)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_do_not_depend_on_their_batch(name: str, dtype: torch.dtype) -> None:
    """But for rounding (I7): 67 elements fill no vector registers, nor do four times as many."""
    path, x, solver = VP(), normal(4, 67, dtype=dtype), SOLVERS[name]()
    times, denoise = UniformGrid()(5, path, Eps()), with_variance(Mixture().denoise(path))
    whole = solver(denoise, x, times, path, lambda i: noise(x, i), {})
    limit = (
        16 if solver.nfe(5) is not None else 1024
    )  # rounding changes the error, which decides about the steps
    for i in range(4):
        alone = solver(denoise, x[i : i + 1], times, path, lambda s, i=i: noise(x, s)[i : i + 1], {})
        assert_within(alone, whole[i : i + 1], limit)
    again = solver(denoise, x.clone(), times, path, lambda i: noise(x, i), {})
    assert torch.equal(again, whole)  # at the same batch size to the bit


@every_solver
@pytest.mark.parametrize("path", [Linear(), CosineDDPM()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_and_conditions_reach_the_denoiser(name: str, path: NoisePath, dtype: torch.dtype) -> None:
    cond = {"label": torch.tensor([1, 2])}

    def denoise(x: Tensor, t: Tensor, given_: Cond) -> Endpoints:
        assert given_ is cond
        assert t.dtype == x.dtype == dtype
        assert t.shape == (2,)
        return Gaussian().endpoints(path, x, t)

    times = UniformGrid()(3, path, V())
    with torch.inference_mode():
        x = normal(2, 3, dtype=dtype)
        got = SOLVERS[name]()(with_variance(denoise), x, times, path, lambda i: noise(x, i), cond)
    assert got.dtype == dtype
    assert bool(torch.isfinite(got).all())


@every_ode_solver
def test_half_precision_latents_meet_a_float32_time(name: str) -> None:
    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        assert t.dtype == torch.float32
        ends = Gaussian().endpoints(Linear(), x.float(), t)
        return Endpoints(ends.data.to(x.dtype), ends.eps.to(x.dtype))

    x = normal(2, 3).bfloat16()
    times = UniformGrid()(3, Linear(), Velocity())
    got = (
        Euler()(denoise, x, times, Linear())
        if name == "dopri5"
        else SOLVERS[name]()(denoise, x, times, Linear())
    )
    assert bool(torch.isfinite(got).all())


@every_solver
@pytest.mark.parametrize(
    "times",
    [
        [0.0, 1.0],
        [1.0, 1.0, 0.0],
        [1.0, 0.0, 0.0],
        [1.0],
        [1.2, 0.5],
        [0.5, -0.1],
        [math.nan, 0.0],
        [1.0, math.nan],
        [[1.0, 0.0]],
    ],
)
def test_times_that_do_not_fall_within_the_path_are_refused(name: str, times: list[float]) -> None:
    x = normal(1, 3)
    with pytest.raises(ValueError, match="fall strictly"):
        SOLVERS[name]()(Gaussian().denoise(Linear()), x, torch.tensor(times), Linear(), lambda i: noise(x, i))


@every_ode_solver
def test_no_time_is_given_twice_where_noise_is_left(name: str) -> None:
    with pytest.raises(ValueError, match=r"0\.5 is given twice"):
        SOLVERS[name]().integrate(
            Gaussian().denoise(Linear()), normal(1, 3), torch.tensor([1.0, 0.5, 0.5]), Linear()
        )


@every_solver
def test_a_solver_is_its_own_configuration(name: str) -> None:
    assert SOLVERS.parse(to_dict(SOLVERS[name]())) == SOLVERS[name]()


# --- noise -------------------------------------------------------------------------------------------------


class Noisy(Euler):
    """Euler with a little noise at every step, twice, and in the last."""

    stochastic = True
    draws = 2

    def step(self, at: At, x: Tensor, now: Node, after: Node, noise: Noise | None) -> Tensor:
        assert noise is not None
        return super().step(at, x, now, after, None) + 0.1 * noise(0) - 0.1 * noise(1)

    def final(self, at: At, x: Tensor, now: Node, end: Node, noise: Noise | None) -> Tensor:
        assert noise is not None
        return at(x, now).data + 0.01 * noise(0)


def test_noise_is_drawn_for_stochastic_solvers_only() -> None:
    drawn: list[int] = []

    def drawing(index: int) -> Tensor:
        drawn.append(index)
        return noise(x, index)

    x, times = normal(2, 3), torch.tensor([1.0, 0.6, 0.3, 0.0])
    denoise = Gaussian().denoise(Linear())
    plain = Euler()(denoise, x, times, Linear(), drawing, {})
    assert drawn == []
    noisy = Noisy()(denoise, x, times, Linear(), drawing, {})
    assert drawn == [0, 1, 2, 3, 4, 5]
    assert not torch.equal(plain, noisy)
    drawn.clear()
    Noisy()(denoise, x, times + 0.0 - torch.tensor([0.0, 0.0, 0.0, -0.1]), Linear(), drawing, {})
    assert drawn == [0, 1, 2, 3, 4]  # the last step has its own draws too
    with pytest.raises(ValueError, match="needs noise"):
        Noisy()(denoise, x, times, Linear(), None, {})


@every_solver
@pytest.mark.parametrize("path", [Linear(), VP()], ids=str)
def test_no_draw_is_used_twice(name: str, path: NoisePath) -> None:
    solver, drawn, x = SOLVERS[name](), list[int](), normal(2, 3)

    def drawing(index: int) -> Tensor:
        drawn.append(index)
        return noise(x, index)

    times = UniformGrid()(5, path, V())
    solver(with_variance(Gaussian().denoise(path)), x, times, path, drawing, {})
    assert len(drawn) == len(set(drawn))
    assert bool(drawn) == solver.stochastic
    assert all(0 <= index < 5 * solver.draws for index in drawn)
