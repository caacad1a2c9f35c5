"""Paths: coefficients against closed forms and reference numbers, derivatives, small times, discrete steps."""

from __future__ import annotations

import math

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import to_dict
from dit.flow.path import PATHS, VP, Coeffs, DiscreteVP, Linear, Path, broadcast, check_time
from tests.gaussian import ALL_PATHS, golden, normal

every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
T = torch.cat([torch.logspace(-7, -2, 11), torch.linspace(0.02, 0.999, 41)]).double()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got.double() - want.double()).abs() / want.double().abs()).max())


@every_path
def test_closed_forms_agree_with_forward_differentiation(path: Path) -> None:
    given_, derived = path.coeffs(T), Path.coeffs(path, T)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(given_, name), getattr(derived, name), rtol=1e-10, atol=1e-12)


@every_path
def test_derivatives_agree_with_differences(path: Path) -> None:
    steps = path.num_steps or 1000
    t = (
        torch.arange(1, steps, 37, dtype=torch.float64) + 0.5
    ) / steps  # inside the pieces of a discrete path
    h = 1e-6
    c, up, down = path.coeffs(t), path.coeffs(t + h), path.coeffs(t - h)
    torch.testing.assert_close(c.d_alpha, (up.alpha - down.alpha) / (2 * h), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(c.d_sigma, (up.sigma - down.sigma) / (2 * h), rtol=1e-5, atol=1e-7)


@every_path
def test_snr_falls(path: Path) -> None:
    """More time is more noise: alpha/sigma falls strictly from 0 to 1."""
    alpha, sigma = path.alpha_sigma(torch.linspace(0, 1, 3001, dtype=torch.float64))
    assert bool((torch.atan2(sigma, alpha).diff() > 0).all())


@every_path
def test_float32_is_accurate_to_float32_rounding(path: Path) -> None:
    """At small t too, where sigma from sqrt(1 − alpha²) would be 9% wrong."""
    t = T.float()
    low, high = path.coeffs(t), path.coeffs(t.double())
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        assert relative(getattr(low, name), getattr(high, name)) < 2e-5, name


def test_vp_sigma_at_small_times() -> None:
    t = 1e-6
    want = math.sqrt(-math.expm1(-0.5 * t * t * 19.9 - t * 0.1))
    assert float(VP().alpha_sigma(torch.tensor([t]))[1]) == pytest.approx(want, rel=1e-6)


def test_linear_coefficients() -> None:
    c = Linear().coeffs(T)
    torch.testing.assert_close([c.alpha, c.sigma, c.d_alpha, c.d_sigma], [1 - T, T, -T / T, T / T])


def test_vp_derivatives_in_closed_form() -> None:
    path = VP(beta_min=0.3, beta_max=12.0)
    c = Path.coeffs(path, T)
    beta = 0.3 + T * (12.0 - 0.3)
    alpha = torch.exp(-0.5 * (0.3 * T + 0.5 * T**2 * (12.0 - 0.3)))
    torch.testing.assert_close(c.alpha, alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(c.d_alpha, -0.5 * beta * alpha, rtol=1e-12, atol=0)
    # d/dt of alpha² + sigma² = 1
    torch.testing.assert_close(c.d_sigma * c.sigma, -c.alpha * c.d_alpha, rtol=1e-12, atol=0)


def test_vp_at_the_ends() -> None:
    c = VP().coeffs(torch.tensor([0.0, 1.0]))
    assert float(c.alpha[0]) == 1.0
    assert float(c.sigma[0]) == 0.0
    assert float(c.d_sigma[0]) == math.inf
    assert float(c.alpha[1]) == pytest.approx(math.exp(-0.25 * 19.9 - 0.05), rel=1e-6)


@pytest.mark.parametrize(("name", "path"), [("linear", Linear()), ("vp", VP())])
def test_sit_interpolants(name: str, path: Path) -> None:
    """SiT runs from noise to data: t = 1 − t, derivatives and velocity change sign."""
    ref = {k: torch.from_numpy(v) for k, v in golden("interpolants").items()}
    c = path.coeffs(1 - ref["t"].double())
    for key, got in {
        "alpha": c.alpha,
        "sigma": c.sigma,
        "d_alpha": -c.d_alpha,
        "d_sigma": -c.d_sigma,
    }.items():
        torch.testing.assert_close(got.float(), ref[f"{name}/{key}"], rtol=2e-5, atol=2e-6)
    x = c.mix(ref["data"].double(), ref["noise"].double())
    torch.testing.assert_close(x.float(), ref[f"{name}/x_t"], rtol=1e-5, atol=1e-5)


# --- DDPM --------------------------------------------------------------------------------------------------


def test_ddpm_steps_are_the_references() -> None:
    ref = golden("ddpm")
    path = DiscreteVP()
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    cumulative = torch.from_numpy(ref["linear/alphas_cumprod"])
    alpha, sigma = path.alpha_sigma(t)
    torch.testing.assert_close(alpha**2, cumulative, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma**2, 1 - cumulative, rtol=1e-11, atol=0)
    k = torch.from_numpy(ref["t"])
    c = path.coeffs((k + 1).float() / 1000)
    x = c.mix(torch.from_numpy(ref["x0"]), torch.from_numpy(ref["eps"]))
    torch.testing.assert_close(x, torch.from_numpy(ref["x_t"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000, 4000, 8000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddpm_model_time_is_exactly_k(steps: int, dtype: torch.dtype) -> None:
    path, k = DiscreteVP(num_steps=steps), torch.arange(steps)
    for t in (
        (k + 1).to(dtype) / steps,
        (k + 1).to(dtype) * (1.0 / steps),
        1 - (steps - 1 - k).to(dtype) / steps,
    ):
        assert torch.equal(path.model_time(t), k.to(dtype))
        assert torch.equal(path.snap(t), (k + 1).to(dtype) / steps)


def test_ddpm_between_steps() -> None:
    path = DiscreteVP()
    k = torch.arange(1, 1000, dtype=torch.float64)
    below, middle, above = (path.alpha_sigma((k + f) / 1000)[0].log() for f in (0.0, 0.25, 1.0))
    torch.testing.assert_close(middle, 0.75 * below + 0.25 * above, rtol=1e-9, atol=0)
    torch.testing.assert_close(path.model_time((k + 0.25) / 1000), k - 0.75)


def test_ddpm_slope_at_a_step_is_of_the_piece_below_in_both_precisions() -> None:
    path = DiscreteVP(num_steps=4000)
    t = (torch.arange(4000) + 1) / 4000
    want = 0.5 * torch.log1p(-path.betas()) * 4000
    for time in (t, t.double()):
        c = path.coeffs(time)
        torch.testing.assert_close((c.d_alpha / c.alpha).double(), want, rtol=1e-6, atol=0)


def test_ddpm_begins_clean_and_takes_other_betas() -> None:
    alpha, sigma = DiscreteVP().alpha_sigma(torch.zeros(1))
    assert (float(alpha), float(sigma)) == (1.0, 0.0)
    halved = DiscreteVP(num_steps=2, beta_start=0.5, beta_end=0.75)
    alpha, _ = halved.alpha_sigma(torch.tensor([0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(alpha**2, torch.tensor([0.5, 0.125], dtype=torch.float64))


def test_ddpm_tables_are_built_once_and_serve_gradients() -> None:
    path = DiscreteVP(num_steps=10)
    with torch.inference_mode():
        path.coeffs(torch.tensor([0.5]))
    t = torch.tensor([0.33], requires_grad=True)  # as a likelihood or a learned time may ask
    path.coeffs(t).alpha.sum().backward()
    assert float(t.grad) == pytest.approx(float(path.coeffs(t.detach()).d_alpha), rel=1e-5)


# --- what every path promises ------------------------------------------------------------------------------


@every_path
def test_model_time_and_scale_keep_the_dtype(path: Path) -> None:
    for dtype in (torch.float32, torch.float64):
        t = T.to(dtype)
        assert path.model_time(t).dtype == dtype
        assert path.input_scale(t).dtype == dtype
        assert path.input_scale(t).shape == t.shape
        assert path.snap(t).dtype == dtype


@every_path
def test_input_scale_keeps_the_network_input_near_unit_size(path: Path) -> None:
    """For unit-variance data; a path that is not variance preserving may shrink it, never blow it up."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(t)
    size = path.input_scale(t) * torch.hypot(alpha, sigma)
    assert float(size.min()) >= 0.5
    assert float(size.max()) <= 2.0


@every_path
@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1))
def test_snap_is_idempotent_and_near(path: Path, t: float) -> None:
    once = path.snap(torch.tensor([t], dtype=torch.float64))
    assert torch.equal(path.snap(once), once)
    assert abs(float(once) - t) <= (1.002 / path.num_steps if path.num_steps else 0.0)


def test_uniform_times_give_each_step_equally_often() -> None:
    u = (torch.arange(10_000) + 0.5) / 10_000
    counts = torch.bincount((DiscreteVP(num_steps=10).snap(u) * 10).round().long())
    assert counts.tolist() == pytest.approx([0, *[1000] * 10], abs=1)  # the slack is 1/1000 of a step


@every_path
def test_prior_has_the_spread_of_pure_noise(path: Path) -> None:
    eps = normal(3, 2, dtype=torch.float32)
    start = path.prior(eps)
    sigma = float(path.alpha_sigma(torch.ones(1, dtype=torch.float64))[1])
    assert start.dtype == eps.dtype
    torch.testing.assert_close(start, eps * sigma, rtol=1e-4, atol=0)


def test_ddpm_prior_is_standard_normal() -> None:
    eps = normal(3, 2)
    assert DiscreteVP().prior(eps) is eps


@every_path
def test_autocast_and_inference_mode_leave_coefficients_alone(path: Path) -> None:
    t = T.float()
    plain = path.coeffs(t)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        cast, derived = path.coeffs(t), Path.coeffs(path, t)
    assert torch.equal(cast.sigma, plain.sigma)
    assert cast.sigma.dtype == torch.float32
    torch.testing.assert_close(derived.d_sigma, plain.d_sigma, rtol=1e-4, atol=1e-5)


@every_path
def test_a_path_is_its_own_configuration(path: Path) -> None:
    assert PATHS.parse(to_dict(path)) == path
    assert hash(PATHS.parse(to_dict(path))) == hash(path)


# --- what is refused ---------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_low_precision_times_are_refused(path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="float32"):
        path.coeffs(torch.tensor([1], dtype=dtype))
    with pytest.raises(ValueError, match="float32"):
        Path.coeffs(path, torch.tensor([1], dtype=dtype))


@pytest.mark.parametrize("shape", [(), (3, 1), (3, 1, 1, 1)])
def test_times_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B,\)"):
        check_time(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(8,), (1,), (), (4, 1), (4, 1, 1, 1), (4, 8)])
def test_shapes_that_would_broadcast_silently_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one number per sample"):
        broadcast(torch.zeros(shape), torch.zeros(4, 8, 8, 8))


def test_mixing_refuses_other_shapes() -> None:
    one = torch.ones(4)
    coeffs = Coeffs(one, one, one, one)
    with pytest.raises(ValueError, match="one shape"):
        coeffs.mix(torch.zeros(4, 3, 8, 8), torch.zeros(4, 1, 8, 8))
    assert coeffs.mix(torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8)).shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    "fields",
    [{"num_steps": 0}, {"num_steps": 8001}, {"beta_start": 0.0}, {"beta_end": 1.0}, {"beta_stop": 0.1}],
)
def test_impossible_betas_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(pydantic.ValidationError):
        DiscreteVP(**fields)
