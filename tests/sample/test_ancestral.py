"""Ancestral steps: the papers' formulas, the reference's numbers, and data for which a step is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit.flow.discrete import DiscreteVP
from dit.flow.path import PATHS, VP, Cosine, Linear, NoisePath
from dit.flow.predict import Cond, Endpoints, Eps, V
from dit.sample.ancestral import DDIM, DDPM
from dit.sample.denoise import DenoiseFn, Denoiser
from dit.sample.grid import UniformGrid
from dit.sample.solve import Euler, Solver
from tests.gaussian import ALL_PATHS, Gaussian, golden, normal
from tests.moments import exact_moments, marginal, standard

every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())


def with_variance(denoise: DenoiseFn, channels: Tensor) -> DenoiseFn:
    """`denoise` with these variance channels."""

    def call(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        ends = denoise(x, t, cond)
        return Endpoints(ends.data, ends.eps, channels)

    return call


def one_step(
    solver: Solver, denoise: DenoiseFn, x: Tensor, times: list[float], path: NoisePath, z: Tensor
) -> Tensor:
    return solver.integrate(denoise, x, torch.tensor(times, dtype=torch.float64), path, lambda i: z, {})


@every_path
def test_ddim_without_eta_is_euler_bit_for_bit(path: NoisePath) -> None:
    x, times = path.prior(normal(2, 5)), UniformGrid()(7, path, V())
    denoise = Gaussian().denoise(path)
    got = DDIM()(denoise, x, times, path, None, {})
    assert torch.equal(got, Euler()(denoise, x, times, path, None, {}))


@every_path
def test_ddim_with_full_eta_is_ddpm(path: NoisePath) -> None:
    x, times = path.prior(normal(2, 5)), UniformGrid()(7, path, V())
    runs = [
        solver(Gaussian().denoise(path), x, times, path, lambda i: standard(x, i), {})
        for solver in (DDIM(eta=1.0), DDPM(variance="small"))
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_equation_12_with_the_noise_of_16(eta: float) -> None:
    """In DDIM's own letters: its alpha is our alpha²."""
    path, x, z = DiscreteVP(), normal(2, 5), normal(2, 5, seed=3)
    now, before = path.betas()[:700].neg().log1p().sum().exp(), path.betas()[:640].neg().log1p().sum().exp()
    eps = Gaussian().endpoints(path, x, torch.full((2,), 0.7, dtype=torch.float64)).eps
    noise = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    want = before.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt()
    want = want + (1 - before - noise**2).sqrt() * eps + noise * z
    got = one_step(DDIM(eta=eta), Gaussian().denoise(path), x, [0.7, 0.64], path, z)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_ddpm_step_is_algorithm_2(variance: str) -> None:
    path, x, z, k = DiscreteVP(), normal(2, 5), normal(2, 5, seed=3), 300
    betas = path.betas()
    products = torch.cumprod(1 - betas, 0)
    eps = Gaussian().endpoints(path, x, torch.full((2,), (k + 1) / 1000, dtype=torch.float64)).eps
    mean = (x - betas[k] / (1 - products[k]).sqrt() * eps) / (1 - betas[k]).sqrt()
    spread = {"small": betas[k] * (1 - products[k - 1]) / (1 - products[k]), "large": betas[k]}[variance]
    got = one_step(DDPM(variance=variance), Gaussian().denoise(path), x, [(k + 1) / 1000, k / 1000], path, z)  # type: ignore[arg-type]
    torch.testing.assert_close(got, mean + spread.sqrt() * z, rtol=1e-9, atol=1e-10)


def test_rounding_leaves_no_negative_variance() -> None:
    """Out of pure noise all of sigma² is fresh noise, and the difference may fall below 0 by rounding."""
    times, x = torch.tensor([1.0, 0.7738303575546754, 0.0], dtype=torch.float64), normal(2, 3)
    got = DDIM(eta=1.0)(Gaussian().denoise(Linear()), x, times, Linear(), lambda i: normal(2, 3, seed=i), {})
    assert bool(got.isfinite().all())


# --- reference numbers -------------------------------------------------------------------------------------


def test_the_reference_s_learned_variance() -> None:
    """Mean and variance of p(x_{k−1} | x_k) for a fixed output of 2C channels; at k = 0 the mean alone is used."""
    ref = golden("ddpm")
    path, x_t, out = DiscreteVP(), torch.from_numpy(ref["x_t"]), torch.from_numpy(ref["model_out"])
    for i, k in enumerate(ref["t"].tolist()):
        x, raw = x_t[i : i + 1], out[i : i + 1]
        denoise = Denoiser(lambda *_, raw=raw: raw, path, Eps())
        times, solver = [(k + 1) / 1000, k / 1000], DDPM(variance="learned")
        mean, shifted = (
            one_step(solver, denoise, x, times, path, z * torch.ones_like(x)) for z in (0.0, 1.0)
        )
        torch.testing.assert_close(mean, torch.from_numpy(ref["p/mean"][i : i + 1]), rtol=1e-5, atol=1e-5)
        variance = torch.from_numpy(ref["p/variance"][i : i + 1]) * (k > 0)
        torch.testing.assert_close((shifted - mean).square(), variance, rtol=1e-3, atol=1e-8)
        exact = one_step(solver, denoise, 0 * x.double(), times, path, torch.ones_like(x).double())
        still = one_step(solver, denoise, 0 * x.double(), times, path, torch.zeros_like(x).double())
        torch.testing.assert_close((exact - still).square().float(), variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("respacing", ["50", "ddim25"])
def test_the_reference_s_ddim(respacing: str) -> None:
    ref = golden("ddpm")
    oracle, path = Gaussian(float(ref["mu"]), float(ref["std"])), DiscreteVP()
    k = torch.from_numpy(ref[f"respace/{respacing}"]).double()
    times = torch.cat([(k.flip(0) + 1) / 1000, torch.zeros(1, dtype=torch.float64)])
    denoise = Denoiser(oracle.network(path, Eps()), path, Eps())
    z = torch.from_numpy(ref[f"respace/{respacing}/z"]).double()
    want = torch.from_numpy(ref[f"respace/{respacing}/ddim_eta0"])
    torch.testing.assert_close(DDIM()(denoise, z, times, path, None, {}).float(), want, rtol=0, atol=1e-5)


# --- where a few steps are exact ---------------------------------------------------------------------------

FEW = torch.tensor([0.9, 0.5, 0.3, 0.1], dtype=torch.float64)


@every_path
@pytest.mark.parametrize("solver", [DDPM(), DDIM(eta=0.4), DDIM()], ids=["ddpm", "ddim-0.4", "ddim"])
def test_the_small_variance_is_exact_for_one_point(solver: Solver, path: NoisePath) -> None:
    oracle = Gaussian(mean=0.7, std=0.0)
    got, want = exact_moments(solver, oracle, path, FEW, to_data=False), marginal(oracle, path, 0.1)
    assert (got.mean, got.variance) == pytest.approx((want.mean, want.variance), rel=1e-9)


@pytest.mark.parametrize("path", [VP(), Cosine(), DiscreteVP()], ids=["vp", "cosine", "ddpm"])
def test_the_large_variance_is_exact_for_standard_normal_data(path: NoisePath) -> None:
    oracle = Gaussian(mean=0.0, std=1.0)
    got = exact_moments(DDPM(variance="large"), oracle, path, FEW, to_data=False)
    assert (got.mean, got.variance) == pytest.approx((0.0, 1.0), rel=1e-9)
    assert exact_moments(DDPM(), oracle, path, FEW, to_data=False).variance < 0.9


# --- learned variance, clean data --------------------------------------------------------------------------


def test_a_learned_variance_lies_between() -> None:
    """−1 is small, 1 is large, 0 their geometric mean, for each number alone."""
    path, x, z = Linear(), normal(2, 6), torch.ones(2, 6, dtype=torch.float64)
    denoise, times = Gaussian().denoise(path), [0.8, 0.5]

    def spread(solver: Solver, channels: float) -> Tensor:
        told = with_variance(denoise, torch.full_like(x, channels))
        return one_step(solver, told, x, times, path, z) - one_step(solver, told, x, times, path, 0 * z)

    small, large = spread(DDPM(), 0.3), spread(DDPM(variance="large"), 0.3)
    learned = DDPM(variance="learned")
    torch.testing.assert_close(spread(learned, -1.0), small)
    torch.testing.assert_close(spread(learned, 1.0), large)
    torch.testing.assert_close(spread(learned, 0.0), (small * large).sqrt())
    mixed = with_variance(denoise, torch.tensor([-1.0, 1.0]).double().repeat(2, 3))
    got = one_step(learned, mixed, x, times, path, z) - one_step(learned, mixed, x, times, path, 0 * z)
    torch.testing.assert_close(got[:, ::2], small[:, ::2])
    torch.testing.assert_close(got[:, 1::2], large[:, 1::2])


def test_a_learned_variance_must_be_learned() -> None:
    x = normal(1, 3)
    with pytest.raises(ValueError, match="twice the channels"):
        one_step(DDPM(variance="learned"), Gaussian().denoise(Linear()), x, [0.8, 0.5], Linear(), x)


@every_path
@pytest.mark.parametrize(
    "solver", [DDIM(eta=1.0), DDPM(), DDPM(variance="large")], ids=["ddim", "small", "large"]
)
def test_the_step_to_clean_data_takes_no_noise(solver: Solver, path: NoisePath) -> None:
    drawn: list[int] = []
    x, times = normal(2, 3), UniformGrid()(4, path, V())

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return standard(x, i)

    got = solver(Gaussian().denoise(path), x, times, path, noise, {})
    assert drawn == [0, 1, 2]
    before = solver.integrate(Gaussian().denoise(path), x, times[:-1], path, lambda i: standard(x, i), {})
    seen = Gaussian().endpoints(path, before, times[-2:-1].expand(2)).data
    torch.testing.assert_close(got, seen, rtol=1e-9, atol=1e-9)
    assert math.isfinite(float(got.sum()))
