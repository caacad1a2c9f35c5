"""Paths: coefficients against closed forms and reference numbers, derivatives, small times, discrete steps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ConfigError, to_dict
from dit.flow.discrete import CosineDDPM, DiscretePath, DiscreteVP
from dit.flow.path import (
    PATHS,
    VE,
    VP,
    Coeffs,
    ContinuousPath,
    Cosine,
    Linear,
    NoisePath,
    broadcast,
    check_time,
)
from tests.gaussian import ALL_PATHS, golden, normal

VARIANTS = {
    **{PATHS.name_of(path): path for path in ALL_PATHS},
    "linear-sit": Linear(model_time_data=1.0, model_time_noise=0.0),
    "vp-steep": VP(beta_max=150.0),
    "vp-falling": VP(beta_min=20.0, beta_max=0.5),
    "vp-even": VP(beta_min=10.0, beta_max=10.0),
    "ve-ncsn": VE(sigma_min=0.01, sigma_max=348.0),
    "ddpm-terminal": DiscreteVP(zero_terminal_snr=True),
    "iddpm-terminal": CosineDDPM(zero_terminal_snr=True),
    "ddpm-8000": DiscreteVP(num_steps=8000),
    "iddpm-7": CosineDDPM(num_steps=7),
}
every_path = pytest.mark.parametrize("path", VARIANTS.values(), ids=VARIANTS.keys())
float_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
T = torch.cat([torch.logspace(-7, -2, 11), torch.linspace(0.02, 0.9995, 41)]).double()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error relative to the value; 0 for 0."""
    error, size = (got.double() - want.double()).abs(), want.double().abs()
    return float(torch.where(error == 0, 0.0, error / size).max())


@every_path
def test_closed_forms_agree_with_forward_differentiation(path: NoisePath) -> None:
    given_, derived = path.coeffs(T), NoisePath.coeffs(path, T)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(given_, name), getattr(derived, name), rtol=1e-10, atol=1e-12)


@every_path
def test_derivatives_agree_with_differences(path: NoisePath) -> None:
    steps = path.num_steps or 1000
    last = torch.tensor([steps - 1.0], dtype=torch.float64)
    pieces = torch.cat([torch.arange(1, steps, 37 if steps > 37 else 1, dtype=torch.float64), last])
    t = (pieces + 0.5) / steps  # inside the pieces of a discrete path
    h = 1e-6
    c, up, down = path.coeffs(t), path.coeffs(t + h), path.coeffs(t - h)
    torch.testing.assert_close(c.d_alpha, (up.alpha - down.alpha) / (2 * h), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(c.d_sigma, (up.sigma - down.sigma) / (2 * h), rtol=1e-5, atol=1e-7)


@every_path
def test_snr_falls(path: NoisePath) -> None:
    """More time is more noise: alpha/sigma falls strictly from 0 to 1."""
    alpha, sigma = path.alpha_sigma(torch.linspace(0, 1, 3001, dtype=torch.float64))
    assert bool(((alpha.log() - sigma.log()).diff() < 0).all())


@every_path
def test_float32_is_accurate_to_float32_rounding(path: NoisePath) -> None:
    """At small t too, where sigma from sqrt(1 − alpha²) would be 9% wrong; of a discrete path, at its steps."""
    steps = path.num_steps
    t = T.float() if steps is None else (torch.arange(steps) + 1).float() / steps
    exact = t.double() if steps is None else (torch.arange(steps).double() + 1) / steps
    low, high = path.coeffs(t), path.coeffs(exact)
    assert float(high.alpha[:-1].min()) > 1e-32  # float32 holds it
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
    c = NoisePath.coeffs(path, T)
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


def test_cosine_coefficients() -> None:
    c = Cosine().coeffs(T)
    half = math.pi / 2
    want = [torch.cos(half * T), torch.sin(half * T), -half * torch.sin(half * T), half * torch.cos(half * T)]
    torch.testing.assert_close([c.alpha, c.sigma, c.d_alpha, c.d_sigma], want)


@float_types
def test_cosine_ends_in_pure_noise_exactly(dtype: torch.dtype) -> None:
    c = Cosine().coeffs(torch.tensor([0.0, 1.0], dtype=dtype))
    assert (c.alpha.tolist(), c.sigma.tolist()) == ([1.0, 0.0], [0.0, 1.0])


def test_ve_is_geometric_and_gives_the_network_what_edm_does() -> None:
    path = VE(sigma_min=0.02, sigma_max=50.0, sigma_data=0.5)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    sigma = torch.tensor([0.02, 0.02 * 2500**0.25, 1.0, 50.0], dtype=torch.float64)
    c = path.coeffs(t)
    torch.testing.assert_close(c.sigma, sigma)
    torch.testing.assert_close(c.d_sigma, sigma * math.log(2500))
    assert torch.equal(c.alpha, torch.ones_like(t))
    assert torch.equal(c.d_alpha, torch.zeros_like(t))
    torch.testing.assert_close(path.model_time(t), sigma.log() / 4)
    torch.testing.assert_close(path.input_scale(t), (sigma**2 + 0.25).rsqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "path"), [("linear", Linear()), ("gvp", Cosine()), ("vp", VP())])
def test_sit_interpolants(name: str, path: NoisePath, dtype: torch.dtype) -> None:
    """SiT runs from noise to data: t = 1 − t, derivatives change sign."""
    ref = {k: torch.from_numpy(v).to(dtype) for k, v in golden("interpolants").items()}
    c = path.coeffs(1 - ref["t"])
    got = {
        "alpha": c.alpha,
        "sigma": c.sigma,
        "d_alpha": -c.d_alpha,
        "d_sigma": -c.d_sigma,
        "x_t": c.mix(ref["data"], ref["noise"]),
    }
    for key, value in got.items():
        torch.testing.assert_close(value, ref[f"{name}/{key}"], rtol=1e-5, atol=1e-6)


# --- log-SNR and its inverse -------------------------------------------------------------------------------

BETWEEN = torch.cat([T, 1 - T]).float().unique().double()  # dense at both ends, and a float32


@every_path
@float_types
def test_log_snr_is_that_of_the_coefficients_and_falls(path: NoisePath, dtype: torch.dtype) -> None:
    t = BETWEEN.to(dtype)
    got = path.log_snr(t)
    assert got.dtype == dtype
    assert bool((got.diff() <= 0).all())
    assert dtype == torch.float32 or bool((got.diff() < 0).all())
    alpha, sigma = path.alpha_sigma(t.double())
    want = 2 * (alpha.log() - sigma.log())
    # in float32 a time between steps is known to 1e-4 of a step, over which log alpha of iDDPM's last falls 3e-4
    accuracy = 1e-6 if path.num_steps is None else 3e-5
    torch.testing.assert_close(
        got.double(), want, rtol=1e-12 if dtype == torch.float64 else accuracy, atol=accuracy
    )


@every_path
@float_types
def test_log_snr_at_the_ends(path: NoisePath, dtype: torch.dtype) -> None:
    """inf where there is no noise, −inf where there is no data, and the end itself back from either."""
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    alpha, sigma = path.alpha_sigma(ends)
    first, last = path.log_snr(ends).tolist()
    assert (first == math.inf) == (float(sigma[0]) == 0)
    assert (last == -math.inf) == (float(alpha[1]) == 0)
    inf = torch.tensor([math.inf, -math.inf], dtype=dtype)
    beyond = torch.tensor([2000.0, -2000.0], dtype=dtype)
    for time_at in (path.time_at, lambda value: NoisePath.time_at(path, value)):
        assert torch.equal(time_at(inf), ends)
        torch.testing.assert_close(time_at(beyond), ends, rtol=0, atol=1e-6)
        assert float(time_at(beyond).min()) >= 0
        assert float(time_at(beyond).max()) <= 1


@every_path
@float_types
def test_time_at_inverts_log_snr_over_the_whole_range(path: NoisePath, dtype: torch.dtype) -> None:
    """To rounding, relative to t where the log-SNR grows without bound; the fallback by bisection too."""
    t = BETWEEN.to(dtype)
    log_snr = path.log_snr(t)
    c, rounding = path.coeffs(t), torch.finfo(dtype).eps
    slope = (
        2 * (c.d_sigma / c.sigma - c.d_alpha / c.alpha).abs()
    )  # of the log-SNR: where it is small t is vague
    allowed = 4 * rounding * (t + log_snr.abs() / slope) + 1e-16
    allowed = torch.where(log_snr.isfinite(), allowed, 2 * rounding)  # a float32 that is as good as t = 1
    for inverse in (path.time_at(log_snr), NoisePath.time_at(path, log_snr)):
        assert inverse.dtype == dtype
        excess = (inverse - t).abs() / allowed
        assert float(excess.max()) <= 1


@every_path
@settings(max_examples=50, deadline=None)
@given(st.floats(-30, 30))
def test_log_snr_inverts_time_at(path: NoisePath, value: float) -> None:
    wanted = torch.tensor([value], dtype=torch.float64)
    ends = path.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    got = path.log_snr(path.time_at(wanted))
    # a t near 1 is known to 1e-16, 1 − t then relatively to less
    torch.testing.assert_close(got, wanted.clamp(float(ends[1]), float(ends[0])), rtol=1e-6, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 50), st.floats(0.01, 50))
def test_vp_ends_exactly_at_1_whatever_its_betas(beta_min: float, beta_max: float) -> None:
    path = VP(beta_min=beta_min, beta_max=beta_max)
    last = path.log_snr(torch.ones(1, dtype=torch.float64))
    near = last + torch.tensor([-math.inf, -1.0, -1e-15, 0.0, 1e-15, 1e-14], dtype=torch.float64)
    t = path.time_at(near)
    assert t[:2].tolist() == [1.0, 1.0]
    assert float(t.max()) <= 1.0
    torch.testing.assert_close(path.log_snr(t), near.clamp(min=float(last)), rtol=1e-12, atol=1e-12)


@every_path
def test_time_at_keeps_the_shape_and_lies_within_the_path(path: NoisePath) -> None:
    wanted = torch.linspace(-90, 90, 24).reshape(2, 3, 4)
    t = path.time_at(wanted)
    assert t.shape == wanted.shape
    assert bool((t.flatten().diff() <= 0).all())
    torch.testing.assert_close(t, NoisePath.time_at(path, wanted), rtol=1e-5, atol=2e-7)
    assert path.time_at(wanted[:0]).shape == (0, 3, 4)


# --- what every path promises ------------------------------------------------------------------------------


@every_path
def test_model_time_and_scale_keep_the_dtype(path: NoisePath) -> None:
    for dtype in (torch.float32, torch.float64):
        t = T.to(dtype)
        assert path.model_time(t).dtype == dtype
        assert path.input_scale(t).dtype == dtype
        assert path.input_scale(t).shape == t.shape
        assert path.snap(t).dtype == dtype


@every_path
def test_input_scale_keeps_the_network_input_near_unit_size(path: NoisePath) -> None:
    """For unit-variance data; a path that is not variance preserving may shrink it, never blow it up."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(t)
    size = path.input_scale(t) * torch.hypot(alpha, sigma)
    assert float(path.input_scale(t[:1])) == 1.0 or isinstance(path, VE)
    assert float(size.min()) >= 0.5
    assert float(size.max()) <= 2.0


@every_path
@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1))
def test_snap_is_idempotent_and_near(path: NoisePath, t: float) -> None:
    once = path.snap(torch.tensor([t], dtype=torch.float64))
    assert torch.equal(path.snap(once), once)
    assert abs(float(once) - t) <= (1.002 / path.num_steps if path.num_steps else 0.0)


@every_path
def test_prior_has_the_spread_of_pure_noise(path: NoisePath) -> None:
    eps = normal(3, 2, dtype=torch.float32)
    for t in (1.0, 0.5):
        start = path.prior(eps) if t == 1.0 else path.prior(eps, t)
        sigma = float(path.alpha_sigma(torch.tensor([t], dtype=torch.float64))[1])
        assert start.dtype == eps.dtype
        if isinstance(path, DiscretePath):  # as DDPM samples
            assert start is eps
        else:
            torch.testing.assert_close(start, eps * sigma, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [Linear, Cosine, VP])
def test_the_network_may_be_given_any_straight_function_of_time(kind: type[ContinuousPath]) -> None:
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kind().model_time(t), 1000 * t)
    assert torch.equal(kind(model_time_data=1.0, model_time_noise=0.0).model_time(t), 1 - t)
    torch.testing.assert_close(
        kind(model_time_data=-3.0, model_time_noise=5.0).model_time(t), 8 * t - 3, rtol=1e-6, atol=1e-6
    )
    with pytest.raises(ConfigError, match="would not see the time"):
        kind(model_time_data=1.0, model_time_noise=1.0)


@every_path
def test_autocast_and_inference_mode_leave_coefficients_alone(path: NoisePath) -> None:
    t = T.float()
    plain = path.coeffs(t)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        cast, derived = path.coeffs(t), NoisePath.coeffs(path, t)
    assert torch.equal(cast.sigma, plain.sigma)
    assert cast.sigma.dtype == torch.float32
    torch.testing.assert_close(derived.d_sigma, plain.d_sigma, rtol=1e-3, atol=1e-4)


@every_path
def test_a_path_is_its_own_configuration(path: NoisePath) -> None:
    assert PATHS.parse(to_dict(path)) == path
    assert hash(PATHS.parse(to_dict(path))) == hash(path)


# --- what is refused ---------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_low_precision_times_are_refused(path: NoisePath, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="float32"):
        path.coeffs(torch.tensor([1], dtype=dtype))
    with pytest.raises(ValueError, match="float32"):
        NoisePath.coeffs(path, torch.tensor([1], dtype=dtype))


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
    "fields", [{"sigma_min": 0.0}, {"sigma_min": 80.0}, {"sigma_max": 0.001}, {"sigma_data": 0.0}]
)
def test_impossible_noise_levels_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        VE(**fields)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("end", ["model_time_data", "model_time_noise"])
def test_times_that_are_not_finite_are_refused(end: str, bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        Linear(**{end: bad})
