"""Likelihoods: the ODE's and the bound's against closed forms for Gaussian data and mixtures, on every path."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from dit.config import ConfigError, to_dict
from dit.flow.discrete import DiscreteVP
from dit.flow.path import PATHS, VE, VP, Linear, NoisePath, broadcast
from dit.flow.predict import Cond, Endpoints, Eps, Prediction, V, Velocity
from dit.flow.variance import LearnedRange, posterior
from dit.sample.denoise import Denoiser
from dit.sample.likelihood import (
    DIVERGENCES,
    LIKELIHOODS,
    Bound,
    Exact,
    Hutchinson,
    Likelihood,
    Ode,
    Problem,
    bits_per_dim,
)
from dit.sample.solve import Node, nodes
from tests.gaussian import ALL_PATHS, PAIR_IDS, PAIRS, Gaussian, Mixture, Oracle, normal
from tests.ulps import assert_within, ulps

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
ODE = Ode(num_steps=8, power=1.0, divergence=Exact())
CLEAN = Node(0.0, 1.0, 0.0)


def problem(oracle: Oracle, path: NoisePath, prediction: Prediction, count: int) -> Problem:
    """That of the best network."""
    denoise = Denoiser(oracle.network(path, prediction), path, prediction)
    return Problem(denoise, path, prediction, {}, torch.arange(count))


def log_normal(x: Tensor, mean: float, std: float) -> Tensor:
    """log N(x; mean, std²), elementwise; torch's Normal takes numbers as float32."""
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


def log_density(oracle: Oracle, node: Node, x: Tensor) -> Tensor:
    """log p_t, elementwise: of N(alpha·mean, alpha²·std² + sigma²), or a mixture of two."""
    assert isinstance(oracle, Gaussian | Mixture)
    spread = math.hypot(node.alpha * oracle.std, node.sigma)
    one = log_normal(x, node.alpha * oracle.mean, spread)
    if isinstance(oracle, Gaussian):
        return one
    other = log_normal(x, -node.alpha * oracle.mean, spread)
    return torch.logaddexp(math.log(oracle.share) + one, math.log(1 - oracle.share) + other)


def ends(given: Problem) -> tuple[Node, Node]:
    """Where the ODE starts and ends."""
    visited: list[float] = []

    def noting(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        visited.append(float(t[0]))
        return given.denoise(x, t, cond)

    replace(ODE, num_steps=1)(replace(given, denoise=noting), torch.zeros(1, 1, dtype=torch.float64))
    last, first = nodes(given.path, torch.tensor([max(visited), min(visited)]).double())
    return first, last


def model_density(oracle: Gaussian | Mixture, given: Problem, data: Tensor) -> Tensor:
    """(B,) what the ODE must give: the prior's density where it takes the data, by the volume that it changes.

    In one dimension that change is the ratio of the true densities before and after.
    """
    first, last = ends(given)
    x = first.alpha * data
    after = oracle.transport(given.path, x, first.t, last.t)
    change = log_density(oracle, first, x) - log_density(oracle, last, after) + math.log(first.alpha)
    return (log_normal(after, 0.0, given.prior_std(last)) + change).flatten(1).sum(1)


# --- the ODE -----------------------------------------------------------------------------------------------


@every_pair
def test_the_ode_s_density_of_gaussian_data(path: NoisePath, prediction: Prediction) -> None:
    """What the model's density is, to the solver's error; and the data's, as far as the path's two ends allow.

    Where the path begins in clean data and ends in pure noise, and the prediction reaches both, that is the
    solver's error too. alpha(1) of 0.007 on VP, a sigma of no more than 80 on VE and eps, which says nothing in
    pure noise, cost 0.004 to 0.04; beginning at a sigma of 0.001 to 0.01 costs up to 0.001.
    """
    oracle, count = Gaussian(), 2
    data, given = oracle.draw(4, count), problem(oracle, path, prediction, 4)
    got = ODE(given, data)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, model_density(oracle, given, data), rtol=0, atol=2e-4)
    first, last = ends(given)
    loss = (
        last.alpha / last.sigma * (oracle.mean + oracle.std) + (first.sigma / first.alpha / oracle.std) ** 2
    )
    true = log_density(oracle, CLEAN, data).sum(1)
    torch.testing.assert_close(got, true, rtol=0, atol=2e-4 + 4 * count * loss)


@every_path
def test_the_ode_s_density_of_a_mixture(path: NoisePath) -> None:
    oracle = Mixture()
    data, given = oracle.draw(3, 2), problem(oracle, path, V(), 3)
    got = replace(ODE, num_steps=32)(given, data)
    torch.testing.assert_close(got, model_density(oracle, given, data), rtol=0, atol=1e-4)
    if isinstance(path, Linear):
        true = log_density(oracle, CLEAN, data).sum(1)
        torch.testing.assert_close(got, true, rtol=0, atol=1e-4)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_the_ode_is_of_fourth_order(power: float) -> None:
    oracle = Gaussian()
    data, given = oracle.draw(4, 2), problem(oracle, Linear(), Velocity(), 4)
    true = log_density(oracle, CLEAN, data).sum(1)
    errors = []
    for num_steps in (12, 24, 48):
        got = Ode(num_steps=num_steps, power=power, divergence=Exact())(given, data)
        errors.append(float((got - true).norm()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) > 3.6


def test_sharp_data_are_found_with_steps_near_the_data() -> None:
    """Data of a std of 0.01: even steps miss where it is told apart from a point."""
    oracle = Gaussian(mean=0.5, std=0.01)
    data, given = oracle.draw(2, 1), problem(oracle, Linear(), Velocity(), 2)
    true = log_density(oracle, CLEAN, data).sum(1)
    even, finer = (
        float((Ode(num_steps=64, power=p, divergence=Exact())(given, data) - true).abs().max())
        for p in (1.0, 3.0)
    )
    assert finer < 1e-3 < 0.2 * even


def turned(oracle: Oracle, path: NoisePath) -> tuple[Callable[[Tensor, Tensor, Cond], Endpoints], Tensor]:
    """(the denoiser of the data turned by an orthogonal matrix, that matrix): its Jacobian is not diagonal."""
    turn = torch.linalg.qr(normal(4, 4, seed=5)).Q

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        straight = oracle.endpoints(path, x @ turn, t)
        return Endpoints(straight.data @ turn.T, straight.eps @ turn.T)

    return denoise, turn


def test_hutchinson_is_unbiased_and_more_probes_are_surer() -> None:
    oracle, path, count = Mixture(), Linear(), 400
    denoise, turn = turned(oracle, path)
    straight = oracle.draw(1, 4)
    data = (straight @ turn.T).expand(count, 4)
    given = Problem(denoise, path, Velocity(), {}, torch.arange(count))
    first = Ode(num_steps=16, divergence=Exact())(replace(given, slots=torch.arange(1)), data[:1])
    true = log_density(oracle, CLEAN, straight).sum(1)
    torch.testing.assert_close(first, true, rtol=0, atol=3e-3)
    spreads = []
    for probes in (1, 4):
        got = Ode(num_steps=16, divergence=Hutchinson(probes=probes))(given, data)
        error = float(got.std()) / math.sqrt(count)
        assert abs(float(got.mean() - first)) < 4 * error
        spreads.append(float(got.std()))
    assert spreads[0] > 0.01
    assert spreads[0] / spreads[1] == pytest.approx(2.0, rel=0.2)


def test_a_sample_s_probes_are_those_of_its_slot() -> None:
    path = VP()
    denoise, _ = turned(Mixture(), path)
    given = Problem(denoise, path, Eps(), {}, torch.tensor([3, 8, 5]))
    data, ode = normal(3, 4), Ode(num_steps=4)
    whole = ode(given, data)
    alone = ode(replace(given, slots=torch.tensor([8])), data[1:2])
    assert_within(alone, whole[1:2], 4096)
    same = ode(replace(given, slots=torch.tensor([8, 8, 9])), data[1:2].expand(3, 4))
    assert_within(same[0], same[1], 4096)
    assert ulps(same[2], same[1]) > 1e9
    assert bool((ode(replace(given, seed=1), data) != whole).all())


@pytest.mark.parametrize("divergence", DIVERGENCES.names())
def test_a_network_is_differentiated_in_x_alone(divergence: str) -> None:
    """Whether gradients are on or off, in float32 too; nothing is left in the network."""
    layer = torch.nn.Linear(3, 3)
    path, prediction = Linear(), Velocity()
    denoise = Denoiser(lambda x, t, cond: layer(x) + cond["label"][:, None], path, prediction)
    label = torch.tensor([0, 1])
    given = Problem(denoise, path, prediction, {"label": label}, torch.arange(2))
    ode = Ode(num_steps=3, divergence=DIVERGENCES[divergence]())
    data = normal(1, 3, dtype=torch.float32).expand(2, 3)
    got = ode(given, data)
    with torch.no_grad():
        assert torch.equal(ode(given, data), got)
    assert layer.weight.grad is None
    assert not got.requires_grad
    assert got[0] != got[1]  # the condition reaches the network


@pytest.mark.parametrize("divergence", DIVERGENCES.names())
def test_a_shift_keeps_volumes(divergence: str) -> None:
    """A network that does not look at x moves all data alike."""

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        return Endpoints(torch.zeros_like(x), torch.full_like(x, 0.25))

    given = Problem(denoise, Linear(), Velocity(), {}, torch.arange(2))
    data = normal(2, 3)
    got = Ode(num_steps=2, divergence=DIVERGENCES[divergence]())(given, data)
    torch.testing.assert_close(got, log_normal(data + 0.25, 0.0, 1.0).sum(1))


# --- the bound ---------------------------------------------------------------------------------------------


def steps_of(bound: Bound, given: Problem) -> list[tuple[Node, Node]]:
    """(now, before) of every step, the last to clean data."""
    points = nodes(given.path, bound.times(given))
    return list(pairwise([*points[:-1], CLEAN]))


def with_variance(oracle: Gaussian, bound: Bound, given: Problem) -> Problem:
    """The same problem, whose network knows the variance of p(x_s | x_t) too and says it in its channels."""
    channels, log_small = {}, 0.0
    for now, before in steps_of(bound, given):
        step = posterior((now.alpha, now.sigma), (before.alpha, before.sigma))
        exact = math.log(step.variance + step.on_data**2 * left(oracle, now))
        log_small = math.log(step.variance) if step.variance else log_small
        width = math.log(step.step_variance) - log_small
        channels[now.t] = 2 * (exact - log_small) / width - 1

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        seen = given.denoise(x, t, cond)
        return Endpoints(seen.data, seen.eps, torch.full_like(x, channels[float(t[0])]))

    return replace(given, denoise=denoise)


def left(oracle: Gaussian, now: Node) -> float:
    """The variance of the data given x."""
    return (oracle.std * now.sigma) ** 2 / math.hypot(now.alpha * oracle.std, now.sigma) ** 2


def expected(oracle: Gaussian, bound: Bound, given: Problem) -> float:
    """The bound's mean over data and noise, in nats per element, for a variance of the range's ends."""
    (first, _), *_ = steps = steps_of(bound, given)
    std, total, log_small = given.prior_std(first), 0.0, 0.0
    total += (first.sigma**2 + first.alpha**2 * (oracle.std**2 + oracle.mean**2)) / std**2 / 2
    total += -0.5 - math.log(first.sigma / std)
    for now, before in steps:
        step = posterior((now.alpha, now.sigma), (before.alpha, before.sigma))
        is_last = step.variance == 0
        log_small = log_small if is_last else math.log(step.variance)
        log_variance = {"small": log_small, "large": math.log(step.step_variance)}[bound.variance]
        gap = step.on_data**2 * left(oracle, now) * math.exp(-log_variance)
        if is_last:
            total += 0.5 * (math.log(2 * math.pi) + log_variance + gap)
        else:
            total += 0.5 * (math.expm1(log_small - log_variance) - (log_small - log_variance) + gap)
    return total


def check_mean(values: Tensor, want: float) -> None:
    """Within four standard errors and rounding; the error itself is no more than 0.02."""
    error = float(values.std()) / math.sqrt(len(values))
    assert error < 0.02
    assert abs(float(values.mean()) - want) < 4 * error + 1e-9


ENTROPY = 0.5 * math.log(2 * math.pi * math.e)  # of N(0, 1)


@every_path
@pytest.mark.parametrize("num_steps", [3, 20])
def test_with_the_true_variance_the_bound_is_the_entropy(path: NoisePath, num_steps: int) -> None:
    """However few the steps: for Gaussian data the true steps are Gaussian. What is left is the prior's mismatch."""
    oracle, elements = Gaussian(mean=0.3, std=0.6), 500
    bound, data = Bound(num_steps=num_steps, variance="learned"), oracle.draw(64, elements)
    given = with_variance(oracle, bound, problem(oracle, path, V(), len(data)))
    (first, _), *_ = steps_of(bound, given)
    marginal = Normal(first.alpha * oracle.mean, math.hypot(first.alpha * oracle.std, first.sigma))
    mismatch = torch.distributions.kl_divergence(marginal, Normal(0.0, given.prior_std(first)))
    terms = bound.terms(given, data)
    check_mean(terms.total / elements, ENTROPY + math.log(oracle.std) + float(mismatch))
    torch.testing.assert_close(bound(given, data), -terms.total)


@every_path
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_with_a_fixed_variance(path: NoisePath, variance: str) -> None:
    """Its closed form; and never less than the entropy."""
    oracle, elements = Gaussian(mean=0.3, std=0.6), 500
    bound, data = Bound(num_steps=12, variance=variance), oracle.draw(64, elements)
    given = problem(oracle, path, V(), len(data))
    found = -bound(given, data) / elements
    want = expected(oracle, bound, given)
    error = float(found.std()) / 8
    assert abs(float(found.mean()) - want) < 4 * error
    assert error < 0.01 * want
    few = problem(oracle, path, V(), 4)
    nats = -float(ODE(few, data[:4, :3]).mean()) / 3
    assert nats == pytest.approx(float(-log_density(oracle, CLEAN, data[:4, :3]).mean()), abs=0.02)
    assert want > ENTROPY + math.log(oracle.std)


@pytest.mark.parametrize("path", [Linear(), VP()])
def test_the_bound_is_no_less_than_what_the_ode_finds(path: NoisePath) -> None:
    """In the mean over data that are no Gaussian, and not by much."""
    oracle, count = Mixture(), 600
    data, given = oracle.draw(count, 2), problem(oracle, path, V(), count)
    more = -Bound(num_steps=60, variance="large")(given, data) + ODE(given, data)
    error = float(more.std()) / math.sqrt(count)
    assert error < 0.1
    assert -4 * error < float(more.mean()) < 0.25


@every_pair
def test_the_bound_of_every_pair(path: NoisePath, prediction: Prediction) -> None:
    oracle = Gaussian(mean=0.3, std=0.6)
    bound, given = Bound(num_steps=5, variance="large"), problem(oracle, path, prediction, 20)
    found = -bound(given, oracle.draw(20, 500)) / 500
    assert abs(float(found.mean()) - expected(oracle, bound, given)) < 4 * float(found.std()) / math.sqrt(20)


def test_the_bound_closes_as_the_steps_grow() -> None:
    """Its excess over the entropy halves with every doubling: VE's even times are even in log sigma."""
    oracle, path, elements = Gaussian(mean=0.0, std=1.0), VE(), 1000
    data, excess = oracle.draw(32, elements), []
    for num_steps in (30, 60, 120):
        found = -Bound(num_steps=num_steps, variance="large")(problem(oracle, path, V(), 32), data)
        excess.append(float(found.mean()) / elements - ENTROPY)
    for coarse, fine in pairwise(excess):
        assert 1.7 < coarse / fine < 2.3
    assert excess[-1] > 0


def test_every_step_of_a_discrete_path_is_visited_once() -> None:
    path, seen = DiscreteVP(num_steps=50), []
    given = problem(Gaussian(), path, Eps(), 2)

    def noting(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        seen.append(path.model_time(t).tolist())
        return given.denoise(x, t, cond)

    Bound()(replace(given, denoise=noting), normal(2, 3))
    assert seen == [[k, k] for k in range(49, -1, -1)]


def test_the_bound_adds_up_what_the_learned_variance_is_trained_by() -> None:
    """The auxiliary term at every step, of the same draws, with the discretised decoder."""
    path, numel = DiscreteVP(num_steps=6, beta_end=0.5), 12
    data = (normal(3, numel) * 60).round().clamp(-127, 127) / 127.5
    layer = torch.nn.Linear(numel, 2 * numel).double()
    denoise = Denoiser(lambda x, t, cond: layer(x) * (1 + broadcast(t, x)) / 10, path, Eps())
    given = Problem(denoise, path, Eps(), {}, torch.arange(3), seed=4)
    bound = Bound(variance="learned", decoder="discretised")
    terms, sums = bound.terms(given, data), torch.zeros(3, dtype=torch.float64)
    points = [float(t) for t in bound.times(given)]
    for i, time in enumerate(points[:-1]):
        t = torch.full((3,), time, dtype=torch.float64)
        eps = given.draws(i).normal(17, data.shape[1:]).double()  # Purpose.LIKELIHOOD
        x = path.coeffs(t).mix(data, eps)
        with torch.no_grad():
            bits = LearnedRange()(path, t, x, data, denoise(x, t, {}))
        sums += bits * numel * math.log(2)
    torch.testing.assert_close(sums, terms.steps + terms.decoder, rtol=1e-9, atol=0)
    assert not terms.total.requires_grad


def test_the_discretised_decoder_is_the_density_of_a_bin() -> None:
    """Where the decoder is much wider than a level, and the data are away from the ends."""
    oracle = Gaussian(mean=0.0, std=0.2)
    path, data = Linear(), oracle.draw(2, 200).clamp(-0.8, 0.8)
    given = problem(oracle, path, Velocity(), 2)
    both = [
        Bound(num_steps=10, variance="large", decoder=name).terms(given, data).decoder
        for name in ("density", "discretised")
    ]
    torch.testing.assert_close(
        both[1] - both[0], torch.full((2,), 200 * math.log(127.5)).double(), rtol=1e-3, atol=0
    )


# --- all of them -------------------------------------------------------------------------------------------


def test_bits_per_dimension() -> None:
    nats = log_normal(torch.tensor([0.0, 1.0], dtype=torch.float64), 0.0, 1.0)
    want = 0.5 * math.log2(2 * math.pi)
    assert bits_per_dim(nats, 1).tolist() == pytest.approx([want, want + 0.5 / math.log(2)])
    assert bits_per_dim(10 * nats[:1], 10).tolist() == pytest.approx([want])


SMALL: list[Likelihood] = [Ode(num_steps=4), Bound(num_steps=4)]


def test_every_likelihood_is_tried() -> None:
    assert {LIKELIHOODS.name_of(method) for method in SMALL} == set(LIKELIHOODS)


@pytest.mark.parametrize("method", SMALL, ids=LIKELIHOODS.name_of)
def test_a_likelihood_is_a_function_of_sample_and_slot(method: Likelihood) -> None:
    """In any batch, of images, and in float32; and it is its own configuration."""
    assert LIKELIHOODS.parse(to_dict(method)) == method
    path, shape = PATHS["cosine"](), (2, 3, 2)
    given = problem(Gaussian(), path, V(), 5)
    data = Gaussian().draw(5, *shape)
    whole = method(given, data)
    assert (whole.shape, whole.dtype) == ((5,), torch.float64)
    part = method(replace(given, slots=given.slots[3:]), data[3:])
    assert_within(part, whole[3:], 4096)
    torch.testing.assert_close(method(given, data.float()), whole, rtol=1e-4, atol=1e-3)


def test_what_is_refused() -> None:
    oracle, data = Gaussian(), normal(2, 3)
    with pytest.raises(ConfigError, match="say num_steps"):
        Bound()(problem(oracle, Linear(), V(), 2), data)
    with pytest.raises(ConfigError, match="such as v"):
        Bound()(problem(oracle, DiscreteVP(zero_terminal_snr=True), Eps(), 2), data)
    with pytest.raises(ConfigError, match="twice the channels"):
        Bound(num_steps=3, variance="learned")(problem(oracle, Linear(), V(), 2), data)
    for wrong in ({"name": "bound", "num_steps": 1}, {"name": "ode", "num_steps": 0}, {"name": "odd"}):
        with pytest.raises(ConfigError):
            LIKELIHOODS.parse(wrong)
    with pytest.raises(ConfigError):
        DIVERGENCES.parse({"name": "hutchinson", "probes": 0})
