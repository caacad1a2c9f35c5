"""The adaptive solver: exact to its tolerance, each sample for itself, and honest when it cannot be done."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor

from dit.config import ConfigError, from_dict
from dit.flow.discrete import DiscreteVP
from dit.flow.path import PATHS, VE, Linear, NoisePath
from dit.flow.predict import Cond, Endpoints, Eps, V, Velocity
from dit.sample.adaptive import DormandPrince
from dit.sample.denoise import DenoiseFn
from dit.sample.grid import UniformGrid
from tests.gaussian import ALL_PATHS, Gaussian, Mixture, normal

every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())


def counted(denoise: DenoiseFn, calls: list[Tensor]) -> DenoiseFn:
    """`denoise`, keeping the times (B,) of every call."""

    def call(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        calls.append(t.clone())
        return denoise(x, t, cond)

    return call


def ends(start: float, stop: float) -> Tensor:
    return torch.tensor([start, stop], dtype=torch.float64)


@every_path
def test_the_error_falls_with_the_tolerance(path: NoisePath) -> None:
    oracle, errors, work = Mixture(), [], []
    x = path.prior(normal(16, 6))
    want = oracle.transport(path, x, 0.99, 0.05)
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        calls: list[Tensor] = []
        solver = DormandPrince(rtol=tolerance, atol=tolerance)
        got = solver.integrate(counted(oracle.denoise(path), calls), x, ends(0.99, 0.05), path)
        errors.append(float((got - want).square().mean(1).sqrt().max()))
        work.append(len(calls))
    for tolerance, error in zip((1e-3, 1e-5, 1e-7, 1e-9), errors, strict=True):
        assert error < 50 * tolerance  # a tolerance is of one step
    assert errors == sorted(errors, reverse=True)
    assert work == sorted(work)
    assert 1.6 < work[3] / work[2] < 3.5  # tolerance^(−1/5) is 2.5 for two decades


@pytest.mark.parametrize(("fine", "rough"), [((1e-7, 1e-9), (1e-3, 1e-9)), ((1e-9, 1e-7), (1e-9, 1e-3))])
def test_both_tolerances_count(fine: tuple[float, float], rough: tuple[float, float]) -> None:
    path, oracle, x, work = Linear(), Mixture(), normal(4, 5), []
    for rtol, atol in (fine, rough):
        calls: list[Tensor] = []
        solver = DormandPrince(rtol=rtol, atol=atol)
        solver.integrate(counted(oracle.denoise(path), calls), x, ends(0.99, 0.05), path)
        work.append(len(calls))
    assert work[0] > 1.5 * work[1]


@every_path
def test_the_end_of_the_path_is_exact(path: NoisePath) -> None:
    """From noise to data, network row and last step included."""
    oracle, solver = Gaussian(), DormandPrince(rtol=1e-8, atol=1e-8)
    x = path.prior(normal(3, 4))
    times = UniformGrid()(1, path, V())
    got = solver(oracle.denoise(path), x, times, path)
    start = float(times[0])
    stop = float(path.snap(times[-1:]))
    data = oracle.endpoints(path, oracle.transport(path, x, start, stop), ends(stop, stop)[:1].expand(3)).data
    torch.testing.assert_close(got, data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_it_agrees_with_scipy(tolerance: float) -> None:
    """scipy's RK45 is the same method with another control of the step."""
    path, oracle, x = Linear(), Mixture(), normal(1, 5)
    calls: list[Tensor] = []
    denoise = oracle.denoise(path)

    def slope(t: float, y: object) -> object:
        at = denoise(torch.as_tensor(y).reshape(1, -1), torch.tensor([t], dtype=torch.float64), {})
        return (at.eps - at.data).flatten().numpy()

    known = solve_ivp(slope, (0.95, 0.05), x[0].numpy(), "RK45", rtol=tolerance, atol=tolerance)
    solver = DormandPrince(rtol=tolerance, atol=tolerance)
    got = solver.integrate(counted(denoise, calls), x, ends(0.95, 0.05), path)
    want = oracle.transport(path, x, 0.95, 0.05)[0]
    ours, theirs = (got[0] - want).norm(), (torch.from_numpy(known.y[:, -1]) - want).norm()
    assert float(ours) < max(3 * float(theirs), 10 * tolerance)
    assert len(calls) < 1.5 * known.nfev


def test_the_steps_are_chosen_well() -> None:
    """A change of the controller shows here: without the error before it 61 calls are needed."""
    path, calls = Linear(), list[Tensor]()
    solver = DormandPrince(rtol=1e-4, atol=1e-4)
    got = solver(counted(Mixture(std=0.1).denoise(path), calls), normal(1, 64), ends(1.0, 0.0), path)
    error = (got - Mixture(std=0.1).transport(path, normal(1, 64), 1.0, 0.0)).square().mean().sqrt()
    assert len(calls) <= 49
    assert float(error) < 5e-4


# --- each sample for itself (I7) ---------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_an_image_does_not_depend_on_its_neighbours(seed: int, dtype: torch.dtype) -> None:
    """Bitwise: neighbours that are harder, at another place in the batch, where the CPU rounds otherwise."""
    path, oracle, solver = Linear(), Mixture(std=0.05), DormandPrince()
    mine, first, second = (normal(n, 8, 8, seed=seed + n, dtype=dtype) for n in (2, 17, 18))
    times = UniformGrid()(4, path, Velocity())
    one = solver(oracle.denoise(path), torch.cat([mine, first]), times, path)
    other = solver(oracle.denoise(path), torch.cat([5 * second[:17], mine]), times, path)
    assert torch.equal(one[:2], other[17:])


def test_samples_have_their_own_steps_and_the_whole_batch_is_evaluated() -> None:
    path, calls = Linear(), list[Tensor]()

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        """An easy sample and a hard one."""
        easy, hard = (oracle.endpoints(path, x, t) for oracle in (Gaussian(std=1.0), Mixture(std=0.02)))
        return Endpoints(torch.stack([easy.data[0], hard.data[1]]), torch.stack([easy.eps[0], hard.eps[1]]))

    DormandPrince()(counted(denoise, calls), normal(2, 64), UniformGrid()(1, path, Velocity()), path)
    times = torch.stack(calls)
    assert times.shape[1] == 2
    last = [int((times[:, i] > 0).nonzero().max()) for i in range(2)]
    assert last[0] < last[1] - 12  # from there on the first waits where it is


def test_one_image_takes_steps_as_short_as_it_needs() -> None:
    calls: list[Tensor] = []
    path, oracle = Linear(), Mixture(std=0.02)
    DormandPrince()(
        counted(oracle.denoise(path), calls), normal(1, 1), UniformGrid()(1, path, Velocity()), path
    )
    assert (len(calls) - 1) % 6 == 0  # one slope, then six for each try


# --- times -------------------------------------------------------------------------------------------------


@every_path
def test_only_the_first_and_the_last_time_count(path: NoisePath) -> None:
    x, oracle = path.prior(normal(2, 3)), Mixture()
    few, many = (DormandPrince()(oracle.denoise(path), x, UniformGrid()(n, path, V()), path) for n in (1, 30))
    assert torch.equal(few, many)


def test_a_discrete_path_is_left_at_its_first_step() -> None:
    path, calls = DiscreteVP(), list[Tensor]()
    denoise = counted(Gaussian().denoise(path), calls)
    DormandPrince()(denoise, normal(2, 3), UniformGrid()(5, path, Eps()), path)
    assert float(torch.stack(calls).min()) == pytest.approx(1 / 1000)
    assert path.model_time(calls[-1]).tolist() == [0.0, 0.0]


def test_sigma_min_is_visited_where_the_path_ends_there() -> None:
    path, calls = VE(), list[Tensor]()
    denoise = counted(Gaussian().denoise(path), calls)
    DormandPrince()(denoise, 80 * normal(2, 3), UniformGrid()(5, path, V()), path)
    assert float(calls[-1].max()) == 0.0


def test_nothing_to_do_leaves_x_alone() -> None:
    path, calls = Linear(), list[Tensor]()
    x = normal(2, 3)
    times = ends(1.0, 1e-12)
    got = DormandPrince().integrate(counted(Gaussian().denoise(path), calls), x, times, path)
    torch.testing.assert_close(got, Gaussian().transport(path, x, 1.0, 0.0), rtol=0, atol=1e-3)
    assert DormandPrince().nfe(10) is DormandPrince().nfe(1, to_data=True) is None


def test_max_steps_are_enough_when_they_are_just_enough() -> None:
    path, oracle, calls = Linear(), Mixture(), list[Tensor]()
    x = normal(2, 3)
    want = DormandPrince()(counted(oracle.denoise(path), calls), x, ends(1.0, 0.0), path)
    tries = (len(calls) - 1) // 6
    assert torch.equal(DormandPrince(max_steps=tries)(oracle.denoise(path), x, ends(1.0, 0.0), path), want)
    with pytest.raises(ConfigError, match="raise rtol"):
        DormandPrince(max_steps=tries - 1)(oracle.denoise(path), x, ends(1.0, 0.0), path)


# --- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_too_many_steps_are_an_error(value: float) -> None:
    """One sample of two whose network breaks down below t = 0.5."""

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        at = Gaussian().endpoints(Linear(), x, t)
        broken = (t < 0.5) & (torch.arange(len(t)) == 1)
        return Endpoints(torch.where(broken[:, None], value, at.data), at.eps)

    with pytest.raises(
        ConfigError, match=r"1 of 2 samples were not done after 40 steps, the last stands at .*="
    ) as error:
        DormandPrince(max_steps=40)(denoise, normal(2, 3), ends(1.0, 0.0), Linear())
    assert "= 0.5" in str(error.value)
    assert "raise rtol" in str(error.value)


def test_a_tolerance_out_of_reach_is_an_error() -> None:
    def noisy(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        at = Gaussian().endpoints(Linear(), x, t)
        return Endpoints(at.data + 1e-2 * torch.sin(1e6 * t)[:, None], at.eps)

    with pytest.raises(ConfigError, match="max_steps"):
        DormandPrince(rtol=1e-10, atol=1e-10, max_steps=50)(noisy, normal(2, 3), ends(1.0, 0.0), Linear())
    rough = DormandPrince(rtol=1e-2, atol=1e-2)(noisy, normal(2, 3), ends(1.0, 0.0), Linear())
    torch.testing.assert_close(
        rough, Gaussian().transport(Linear(), normal(2, 3), 1.0, 0.0), rtol=0, atol=0.05
    )


@pytest.mark.parametrize("fields", [{"rtol": 0}, {"rtol": 1.0}, {"atol": 0}, {"max_steps": 0}, {"order": 4}])
def test_bad_fields_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        from_dict(DormandPrince, fields)
