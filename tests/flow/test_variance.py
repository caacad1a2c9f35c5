"""Posteriors of a step, learned variances and the bound's terms: reference numbers, Bayes, and the minimiser."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit.config import ConfigError
from dit.flow.discrete import DiscreteVP
from dit.flow.path import PATHS, Linear, NoisePath, broadcast
from dit.flow.predict import Endpoints, Eps
from dit.flow.variance import (
    AUXILIARIES,
    DECODERS,
    VARIANCES,
    LearnedRange,
    density,
    discretised,
    gaussian_kl,
    posterior,
    range_log_variance,
)
from tests.gaussian import ALL_PATHS, Gaussian, golden, normal

every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
DISCRETE = [path for path in ALL_PATHS if path.num_steps is not None]
DISCRETE += [replace(path, zero_terminal_snr=True) for path in DISCRETE if isinstance(path, DiscreteVP)]
every_discrete = pytest.mark.parametrize("path", DISCRETE, ids=str)


def at(path: NoisePath, *times: float) -> list[tuple[Tensor, Tensor]]:
    """(alpha, sigma) at each time, (1,) float64."""
    return [path.alpha_sigma(torch.tensor([t], dtype=torch.float64)) for t in times]


# --- reference numbers -------------------------------------------------------------------------------------


def reference() -> tuple[dict[str, Tensor], NoisePath, Tensor, Endpoints]:
    """The file's tensors, the path, t (4,) and what the fixed model output says."""
    ref = {k: torch.from_numpy(v) for k, v in golden("ddpm").items()}
    path = DiscreteVP()
    t = (ref["t"] + 1).float() / 1000
    return ref, path, t, Eps().endpoints(path.coeffs(t), ref["x_t"], ref["model_out"])


def test_the_reference_variational_term() -> None:
    """Steps 0 (the decoder), 1, 500 and 999; guided diffusion adds it to the mean squared error as it is."""
    ref, path, t, ends = reference()
    for term in (
        LearnedRange()(path, t, ref["x_t"], ref["x0"], ends),
        LearnedRange(weight=0.25)(path, t, ref["x_t"], ref["x0"], ends) * 4,
        (ref["loss/loss"] - ref["loss/mse"]),
    ):
        torch.testing.assert_close(term, ref["loss/vb"], rtol=1e-5, atol=1e-6)


def test_the_reference_posterior() -> None:
    ref, path, _, ends = reference()
    k = ref["t"].double()
    step = posterior(path.alpha_sigma((k + 1) / 1000), path.alpha_sigma(k / 1000))
    second = posterior(*at(path, 2 / 1000, 1 / 1000))
    variance = torch.where(k == 0, second.variance, step.variance)  # the reference's clipping
    log_variance = range_log_variance(ends.log_variance, variance.log(), step.step_variance.log())
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ends.data, ref["p/pred_xstart"], **close)
    torch.testing.assert_close(step.mean(ref["x_t"], ends.data), ref["p/mean"], **close)
    torch.testing.assert_close(log_variance, ref["p/log_variance"], **close)
    torch.testing.assert_close(log_variance.exp(), ref["p/variance"], rtol=1e-5, atol=0)
    assert log_variance.dtype == torch.float32
    torch.testing.assert_close(step.step_variance, ref["linear/betas"][ref["t"]], rtol=1e-9, atol=0)


# --- posteriors --------------------------------------------------------------------------------------------


@every_path
@settings(max_examples=25, deadline=None)
@given(
    times=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)).filter(lambda p: abs(p[0] - p[1]) > 0.01)
)
def test_a_posterior_is_bayes(path: NoisePath, times: tuple[float, float]) -> None:
    """q(x_s | x_t, data)·q(x_t | data) = q(x_t | x_s)·q(x_s | data), for any pair of times and any values."""
    (alpha, sigma), (alpha_before, sigma_before) = at(path, max(times), min(times))
    data, x, before = normal(3, 1)
    step = posterior((alpha, sigma), (alpha_before, sigma_before))
    one = density(before, step.mean(x, data), step.variance.log()) + density(x, alpha * data, 2 * sigma.log())
    ratio = alpha / alpha_before
    other = density(x, ratio * before, step.step_variance.log())
    other = other + density(before, alpha_before * data, 2 * sigma_before.log())
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@every_path
def test_numbers_serve_as_well_as_tensors(path: NoisePath) -> None:
    now, before = at(path, 0.7, 0.4)
    many = posterior(now, before)
    one = posterior((float(now[0]), float(now[1])), (float(before[0]), float(before[1])))
    for name in ("on_x", "on_data", "variance", "step_variance"):
        assert getattr(one, name) == pytest.approx(float(getattr(many, name)), rel=1e-12)
    x, data = normal(2, 1, 3)
    torch.testing.assert_close(one.mean(x, data), many.mean(x, data))


@every_path
def test_the_last_step_is_the_data(path: NoisePath) -> None:
    ((alpha, sigma),) = at(path, 0.3)
    step = posterior((float(alpha), float(sigma)), (1.0, 0.0))
    assert (step.on_x, step.on_data, step.variance) == (0.0, 1.0, 0.0)
    assert step.step_variance == pytest.approx(float(sigma) ** 2)


def test_pure_noise_says_nothing_of_the_step() -> None:
    """Zero terminal SNR: x at alpha = 0 is no part of the mean."""
    step = posterior((0.0, 1.0), (0.6, 0.8))
    assert (step.on_x, step.on_data) == (0.0, 0.6)
    assert (step.variance, step.step_variance) == pytest.approx((0.64, 1.0))


def test_the_range_is_interpolated_in_the_logarithm() -> None:
    channels = torch.tensor([[-1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    for bounds in ((-4.0, -2.0), (torch.tensor([-4.0]).double(), torch.tensor([-2.0]).double())):
        assert range_log_variance(channels, *bounds).tolist() == [[-4.0, -3.0, -2.0, 0.0]]
    per_sample = range_log_variance(torch.zeros(2, 3), torch.tensor([-4.0, 0.0]), torch.tensor([-2.0, 2.0]))
    assert per_sample.tolist() == [[-3.0] * 3, [1.0] * 3]
    assert VARIANCES["small"](channels, -4.0, -2.0) == -4.0
    assert VARIANCES["large"](None, -4.0, -2.0) == -2.0
    with pytest.raises(ConfigError, match="learn_sigma"):
        VARIANCES["learned"](None, -4.0, -2.0)


# --- costs -------------------------------------------------------------------------------------------------


def test_the_divergence_of_gaussians() -> None:
    gap, ours, theirs = normal(3, 50)
    p, q = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((0 * gap, ours), (gap, theirs)))
    want = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(gaussian_kl(gap, ours, theirs), want)
    close = gaussian_kl(torch.zeros(1), 1e-4, 0.0)  # float32 holds a tiny divergence
    assert float(close) == pytest.approx(0.5 * (math.expm1(1e-4) - 1e-4), rel=1e-5)


@pytest.mark.parametrize(("mean", "log_variance"), [(0.1, -1.0), (0.98, -5.0), (-3.0, 1.0), (0.0, -9.0)])
def test_the_decoder_s_levels_are_all_there_is(mean: float, log_variance: float) -> None:
    """256 probabilities that add up to 1 whatever the mean, within 1e-3 of the true normal's."""
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    mass = discretised(levels, torch.full_like(levels, mean), log_variance).exp()[:, 0]
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-9)
    edges = torch.cat([torch.tensor([-1e9]), levels[:-1, 0] + 1 / 255, torch.tensor([1e9])]).double()
    true = torch.special.ndtr((edges - mean) * math.exp(-log_variance / 2)).diff()
    torch.testing.assert_close(mass, true, rtol=0, atol=1e-3)
    assert set(DECODERS) == {"density", "discretised"}


def test_impossible_data_cost_much_and_not_infinitely() -> None:
    far = discretised(torch.zeros(1, 1), torch.full((1, 1), 50.0), -10.0)
    assert float(far) == pytest.approx(math.log(1e-12))


def test_densities_are_the_normal_s() -> None:
    data, mean = normal(2, 4, 3)
    log_variance = normal(4, seed=3)
    want = torch.distributions.Normal(mean, (broadcast(log_variance, mean) / 2).exp()).log_prob(data)
    torch.testing.assert_close(density(data, mean, log_variance), want)


# --- the auxiliary term ------------------------------------------------------------------------------------


def seen(
    path: NoisePath, k: int, std: float, count: int = 6
) -> tuple[Tensor, Tensor, Tensor, Endpoints, float]:
    """(t, x, data, ends, variance of the data): one x, with the data at one std on either side of its mean.

    In the mean over the two every square is what it is over all data given x.
    """
    oracle = Gaussian(mean=0.2, std=std)
    t = torch.full((2,), (k + 1) / (path.num_steps or 1), dtype=torch.float64)
    x = normal(1, count).expand(2, count)
    c, ends = path.coeffs(t), oracle.endpoints(path, x, t)
    variance = float((std * c.sigma)[0] ** 2 / (c.alpha**2 * std**2 + c.sigma**2)[0])
    sides = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    return t, x, ends.data + sides * math.sqrt(variance), ends, variance


@every_discrete
@pytest.mark.parametrize("std", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("where", [0.01, 0.3, 0.9])
def test_the_minimiser_is_the_true_posterior_variance(path: NoisePath, std: float, where: float) -> None:
    """For Gaussian data p(x_s | x_t) is Gaussian, and its variance is where the term's gradient is 0."""
    assert path.num_steps is not None
    k = max(1, int(where * path.num_steps))
    t, x, data, ends, variance = seen(path, k, std)
    step = posterior(*at(path, (k + 1) / path.num_steps, k / path.num_steps))
    small, large = float(step.variance), float(step.step_variance)
    exact = small + float(step.on_data) ** 2 * variance
    assert small < exact <= large * (1 + 1e-6)
    best = 2 * math.log(exact / small) / math.log(large / small) - 1
    slopes = []
    for channel in (best - 0.05, best, best + 0.05):
        channels = torch.full_like(x, channel).requires_grad_()
        LearnedRange()(path, t, x, data, Endpoints(ends.data, ends.eps, channels)).sum().backward()
        assert channels.grad is not None
        slopes.append(float(channels.grad.sum()))
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 1e-6 * slopes[2]


def test_where_the_data_are_a_point_the_minimiser_is_the_small_end() -> None:
    path = DISCRETE[0]
    t, x, data, ends, _ = seen(path, 300, std=1e-6)
    channels = torch.full_like(x, -1.0).requires_grad_()
    LearnedRange()(path, t, x, data, Endpoints(ends.data, ends.eps, channels)).sum().backward()
    assert channels.grad is not None
    assert float(channels.grad.abs().max()) < 1e-9


@every_discrete
@pytest.mark.parametrize("k", [0, 1, 500])
def test_gradients_reach_the_variance_alone(path: NoisePath, k: int) -> None:
    t, x, data, ends, _ = seen(path, k, std=0.5)
    leaves = [v.clone().requires_grad_() for v in (ends.data, ends.eps, torch.zeros_like(x))]
    LearnedRange()(path, t, x, data, Endpoints(*leaves)).sum().backward()
    assert leaves[0].grad is None
    assert leaves[1].grad is None
    assert leaves[2].grad is not None
    assert bool(torch.isfinite(leaves[2].grad).all())
    assert bool((leaves[2].grad != 0).all())


@every_discrete
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_term_is_finite_and_accurate_at_every_step(path: NoisePath, dtype: torch.dtype) -> None:
    """The smallest of a learned range's steps cancel in float32; its numbers are made in float64."""
    assert path.num_steps is not None
    k = torch.arange(path.num_steps)
    t = (k + 1).double() / path.num_steps
    data, eps, guess, channels = normal(4, path.num_steps, 3)
    x = path.coeffs(t).mix(data, eps)
    whole = LearnedRange()(path, t, x, data, Endpoints(guess, eps, channels))
    parts = [v.to(dtype) for v in (t, x, data, guess, eps, channels)]
    got = LearnedRange()(path, parts[0], parts[1], parts[2], Endpoints(*parts[3:]))
    assert got.shape == t.shape
    assert got.dtype == dtype
    assert bool(torch.isfinite(got).all())
    torch.testing.assert_close(got.double(), whole, rtol=1e-4, atol=1e-5)


def test_what_the_term_needs() -> None:
    for path in (Linear(), DiscreteVP(num_steps=1)):
        with pytest.raises(ConfigError, match="at least 2 discrete steps"):
            LearnedRange().check(path)
    LearnedRange().check(DiscreteVP(num_steps=2))
    assert LearnedRange.uses_variance
    t, x, data, ends, _ = seen(DISCRETE[0], 5, std=0.5)
    with pytest.raises(ConfigError, match="twice the channels"):
        LearnedRange()(DISCRETE[0], t, x, data, ends)
    with pytest.raises(ConfigError):
        AUXILIARIES.parse({"name": "learned_range", "weight": 0})
