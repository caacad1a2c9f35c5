"""Multistep solvers: their order in the log-SNR, both infinite ends, one evaluation a step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, from_dict
from dit.flow.discrete import CosineDDPM
from dit.flow.path import PATHS, VE, Linear, NoisePath
from dit.flow.predict import Cond, Endpoints, V, Velocity
from dit.sample.grid import UniformGrid
from dit.sample.multistep import DPMSolver, UniPC
from dit.sample.solve import Euler, Solver, nodes
from tests.gaussian import ALL_PATHS, Gaussian, Mixture, normal

MULTISTEP: list[Solver] = [DPMSolver(), UniPC(order=1), UniPC(order=2), UniPC(order=3)]

every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
every_multistep = pytest.mark.parametrize("solver", MULTISTEP, ids=str)


def even_in_log_snr(path: NoisePath, num_steps: int, low: float = -3.0, high: float = 3.0) -> Tensor:
    return path.time_at(torch.linspace(low, high, num_steps + 1, dtype=torch.float64))


@every_multistep
@every_path
def test_order_in_even_steps_of_the_log_snr(solver: Solver, path: NoisePath) -> None:
    oracle, errors = Mixture(), []
    for num_steps in (120, 240):
        times = even_in_log_snr(path, num_steps)
        x = nodes(path, times)[0].scale * normal(4, 8)
        got = solver.integrate(oracle.denoise(path), x, times, path)
        errors.append(float((got - oracle.transport(path, x, float(times[0]), float(times[-1]))).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.convergence, abs=0.25)


@every_multistep
def test_data_that_grows_with_the_log_snr_has_a_closed_form(solver: Solver) -> None:
    """data(t) = lambda: x(t) = sigma_t/sigma_s·x(s) + alpha_t·∫ exp(lambda − lambda_t)·lambda dlambda."""
    path = Linear()

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        half = 0.5 * path.log_snr(t)
        data = half[:, None].expand_as(x)
        return Endpoints(data, (x - (1 - t[:, None]) * data) / t[:, None])

    errors, start = [], torch.zeros(1, 1, dtype=torch.float64)
    for num_steps in (20, 40):
        times = even_in_log_snr(path, num_steps)
        first, *_, last = nodes(path, times)
        lower, upper = 0.5 * first.log_snr, 0.5 * last.log_snr
        want = last.alpha * ((upper - 1) - math.exp(lower - upper) * (lower - 1))
        errors.append(abs(float(solver.integrate(denoise, start, times, path)) - want))
    # the first step, which knows one point, leaves an error of third order; on the mixture it has faded
    assert math.log2(errors[0] / errors[1]) == pytest.approx(min(solver.convergence, 3), abs=0.15)


# --- where the log-SNR is infinite -------------------------------------------------------------------------


@every_multistep
@pytest.mark.parametrize("path", [Linear(), PATHS["cosine"](), CosineDDPM(zero_terminal_snr=True)], ids=str)
def test_out_of_pure_noise_and_the_step_after_are_of_first_order(solver: Solver, path: NoisePath) -> None:
    oracle, x = Mixture(), normal(2, 3)
    denoise = oracle.denoise(path)
    times = torch.tensor([1.0, 0.8, 0.7, 0.5], dtype=torch.float64)
    assert nodes(path, times)[0].log_snr == -math.inf

    def run(solver: Solver, count: int) -> Tensor:
        return solver.integrate(denoise, x, times[: count + 1], path)

    torch.testing.assert_close(run(solver, 1), run(Euler(), 1))
    if isinstance(solver, DPMSolver):
        torch.testing.assert_close(run(solver, 2), run(Euler(), 2))
    assert float((run(solver, 3) - run(Euler(), 3)).abs().max()) > 1e-3
    exact = oracle.transport(path, x, 1.0, 0.5)
    assert float((run(solver, 3) - exact).norm()) < float((run(Euler(), 3) - exact).norm())


@every_multistep
def test_the_corrector_out_of_pure_noise_is_the_trapezoidal_rule(solver: Solver) -> None:
    """In u = 1/t, d(x/t)/du = data on the linear path; the corrected x meets the next evaluation."""
    if not isinstance(solver, UniPC):
        return
    path, oracle, x = Linear(), Mixture(), normal(2, 3)
    denoise = oracle.denoise(path)
    one, seen = torch.ones(2, dtype=torch.float64), list[Tensor]()

    def watched(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        seen.append(x)
        return denoise(x, t, cond)

    got = solver.integrate(watched, x, torch.tensor([1.0, 0.8, 0.7]).double(), path)
    first = denoise(x, one, {}).data
    second = denoise(0.8 * x + 0.2 * first, 0.8 * one, {}).data
    corrected = 0.8 * x + 0.2 * (first + second) / 2
    torch.testing.assert_close(seen[1], 0.8 * x + 0.2 * first)
    torch.testing.assert_close(got, 0.7 / 0.8 * corrected + (1 - 0.7 / 0.8) * second)


@every_multistep
def test_the_step_to_clean_data_returns_it(solver: Solver) -> None:
    path, x, seen = Linear(), normal(2, 3), list[Tensor]()
    denoise = Mixture().denoise(path)

    def watched(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        ends = denoise(x, t, cond)
        seen.append(ends.data)
        return ends

    got = solver(watched, x, UniformGrid()(5, path, Velocity()), path)
    assert len(seen) == 5
    torch.testing.assert_close(got, seen[-1])


@every_multistep
@every_path
def test_a_whole_run_beats_euler(solver: Solver, path: NoisePath) -> None:
    oracle = Gaussian()
    x, times = path.prior(normal(4, 4)), UniformGrid()(40, path, V())
    want = oracle.transport(path, x, float(times[0]), 0.0)
    ours, euler = (s(oracle.denoise(path), x, times, path) - want for s in (solver, Euler()))
    assert float(ours.norm()) < 0.7 * float(euler.norm())


# --- evaluations -------------------------------------------------------------------------------------------


@every_multistep
@pytest.mark.parametrize("path", [Linear(), VE()], ids=str)
def test_one_evaluation_a_step_each_at_its_time(solver: Solver, path: NoisePath) -> None:
    seen: list[float] = []

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        seen.append(float(t[0]))
        return Gaussian().endpoints(path, x, t)

    times = UniformGrid()(6, path, Velocity())
    solver(denoise, path.prior(normal(2, 3)), times, path)
    assert seen == times[:-1].tolist()
    assert solver.nfe(6) == solver.nfe(6, to_data=True) == 6


@pytest.mark.parametrize("order", [0, 4, 1.5])
def test_orders_that_there_are_none_of_are_refused(order: float) -> None:
    with pytest.raises(ConfigError, match="order"):
        from_dict(UniPC, {"order": order})


# --- other people's implementation -------------------------------------------------------------------------


@pytest.mark.parametrize("solver", MULTISTEP, ids=str)
def test_diffusers_takes_the_same_steps(solver: Solver) -> None:
    """Its schedulers on the linear path, whose sigmas they keep in float32; all but its step to sigma = 0."""
    diffusers = pytest.importorskip("diffusers")
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    options |= {"lower_order_final": False, "final_sigmas_type": "zero"}
    if isinstance(solver, UniPC):
        theirs = diffusers.UniPCMultistepScheduler(solver_order=solver.order, solver_type="bh2", **options)
    else:
        theirs = diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **options)
    theirs.set_timesteps(10)
    oracle, path, times = Mixture(), Linear(), theirs.sigmas.double()[:-1]
    x = want = normal(2, 3, 2, 2)
    for (now, _), step in zip(pairwise(times), theirs.timesteps, strict=False):
        ends = oracle.endpoints(path, want, now.repeat(2))
        want = theirs.step(ends.eps - ends.data, step, want).prev_sample
    got = solver.integrate(oracle.denoise(path), x, times, path)
    torch.testing.assert_close(got, want.double(), rtol=0, atol=2e-6)
