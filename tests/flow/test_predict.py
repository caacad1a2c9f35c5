"""Predictions: rows, their inversion, where they are usable, and the exact Gaussian velocity and score."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ConfigError
from dit.flow.discrete import CosineDDPM, DiscreteVP
from dit.flow.path import PATHS, VE, VP, Coeffs, Cosine, Linear, NoisePath
from dit.flow.predict import (
    DELTA,
    DELTA_STEPS,
    EDM,
    PREDICTIONS,
    Data,
    Endpoints,
    Eps,
    Prediction,
    ReverseVelocity,
    Score,
    V,
    Velocity,
    call_network,
    check_times,
    split_channels,
    usable,
)
from tests.gaussian import ALL_PATHS, PAIR_IDS, PAIRS, Gaussian, Mixture, golden, normal

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
every_oracle = pytest.mark.parametrize("oracle", [Gaussian(), Mixture()], ids=["gaussian", "mixture"])


def round_trip(path: NoisePath, prediction: Prediction, t: torch.Tensor) -> float:
    """Largest error of data and eps found again from x and the prediction, relative to what δ allows."""
    data, eps = normal(len(t), 3, 2, 2, seed=1, dtype=t.dtype), normal(len(t), 3, 2, 2, seed=2, dtype=t.dtype)
    c = path.coeffs(t)
    ends = prediction.endpoints(c, c.mix(data, eps), prediction.target(c, data, eps))
    return max(float((ends.data - data).abs().max()), float((ends.eps - eps).abs().max()))


@every_pair
def test_a_prediction_inverts_on_its_usable_interval(path: NoisePath, prediction: Prediction) -> None:
    lo, hi = usable(path, prediction)
    t = torch.linspace(lo, hi, 257, dtype=torch.float64)
    assert round_trip(path, prediction, t) < 1e-9
    assert round_trip(path, prediction, t[2:-2].float()) < 2e-2  # rounding, magnified at most 1/δ times


@every_pair
@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1))
def test_a_prediction_inverts_anywhere(path: NoisePath, prediction: Prediction, share: float) -> None:
    lo, hi = usable(path, prediction)
    assert round_trip(path, prediction, torch.tensor([lo + share * (hi - lo)], dtype=torch.float64)) < 1e-9


# --- the usable interval -----------------------------------------------------------------------------------


def holds(path: NoisePath, prediction: Prediction, t: float) -> bool:
    """The definition, written out: finite, bounded, and at an angle to (alpha, sigma)."""
    c = path.coeffs(torch.tensor([t], dtype=torch.float64))
    a, b = (float(v) for v in prediction.row(c))
    alpha, sigma = float(c.alpha), float(c.sigma)
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    angle = math.atan2(b, a) - math.atan2(sigma, alpha)
    at_steps = path.num_steps is not None and t >= (1 - 1e-9) / path.num_steps
    delta = DELTA_STEPS if at_steps else DELTA
    bounded = math.hypot(a, b) * delta <= math.hypot(alpha, sigma) * (1 + 1e-9)
    return bounded and abs(math.sin(angle)) >= delta * (1 - 1e-9)


@every_pair
def test_the_interval_ends_where_the_definition_does(path: NoisePath, prediction: Prediction) -> None:
    lo, hi = usable(path, prediction)
    assert 0 <= lo < hi <= 1
    assert all(holds(path, prediction, float(t)) for t in torch.linspace(lo, hi, 101, dtype=torch.float64))
    assert lo == 0 or not holds(path, prediction, lo * (1 - 1e-6))
    if path.num_steps is None:
        assert hi == 1 or not holds(path, prediction, 1 - (1 - hi) * (1 - 1e-6))
    else:  # it ends at a step
        step = torch.tensor([hi], dtype=torch.float64)
        assert torch.equal(path.snap(step), step)
        assert hi == 1 or not holds(path, prediction, hi + 1 / path.num_steps)


EDGE = DELTA / (DELTA + math.sqrt(1 - DELTA**2))  # of the linear path: t/(1 − t) = tan(asin δ)


@pytest.mark.parametrize(
    ("path", "prediction", "want"),
    [
        (Linear(), Velocity(), (0.0, 1.0)),
        (Linear(), Eps(), (0.0, 1 - EDGE)),
        (Linear(), Data(), (EDGE, 1.0)),
        (Cosine(), Data(), (2 / math.pi * math.asin(DELTA), 1.0)),
        (Cosine(), Eps(), (0.0, 1 - 2 / math.pi * math.asin(DELTA))),
        (VP(), Eps(), (0.0, 1.0)),
        (DiscreteVP(), Eps(), (0.0, 1.0)),
    ],
)
def test_known_intervals(path: NoisePath, prediction: Prediction, want: tuple[float, float]) -> None:
    assert usable(path, prediction) == pytest.approx(want, rel=1e-9)


def test_vp_velocity_ends_where_it_grows_beyond_the_bound() -> None:
    """|velocity row| = ½ beta·alpha/sigma there, about ½ sqrt(beta_min/t)."""
    lo, hi = usable(VP(), Velocity())
    assert lo == pytest.approx((0.05 * DELTA) ** 2 / 0.1, rel=1e-3)
    assert hi == 1.0


@every_path
@pytest.mark.parametrize("prediction", [V(), EDM(), EDM(sigma_data=0.5)])
def test_v_and_edm_are_usable_everywhere(path: NoisePath, prediction: Prediction) -> None:
    """Their rows are (alpha, sigma) turned by a right angle, or (for another sigma_data) nearly."""
    assert usable(path, prediction) == (0.0, 1.0)


CUT_AT_DATA = {  # paths whose interval begins above t = 0, as the documentation of `usable` says
    "data": {"linear", "cosine", "vp", "ddpm", "iddpm"},
    "score": {"linear", "cosine", "vp", "ddpm", "iddpm"},
    "velocity": {"vp", "ddpm", "iddpm"},
    "reverse_velocity": {"vp", "ddpm", "iddpm"},
}
CUT_AT_NOISE = {"eps": {"linear", "cosine"}, "score": {"linear", "cosine"}}


@pytest.mark.parametrize("path", ["linear", "cosine", "vp", "ve", "ddpm", "iddpm"])
@pytest.mark.parametrize("prediction", ["data", "eps", "velocity", "v", "score", "edm", "reverse_velocity"])
def test_which_ends_are_cut_off(path: str, prediction: str) -> None:
    lo, hi = usable(PATHS[path](), PREDICTIONS[prediction]())
    assert (lo > 0) == (path in CUT_AT_DATA.get(prediction, ()))
    assert (hi < 1) == (path in CUT_AT_NOISE.get(prediction, ()))
    assert lo < 2e-3
    assert hi > 0.998


@pytest.mark.parametrize(
    ("path", "prediction", "lo", "hi"),
    [
        (VE(sigma_max=2000.0), Eps(), 0.002, 1e3),
        (VE(sigma_max=2000.0), Velocity(), 0.002, 1e3),
        (VE(sigma_max=2000.0), Score(), 0.002, 1e3),
        (VE(sigma_max=2000.0), Data(), 0.002, 2000.0),
        (VE(sigma_min=1e-4), Data(), 1e-3, 80.0),
        (VE(sigma_min=1e-4), Score(), 1e-3, 80.0),
        (VE(sigma_min=1e-4), Eps(), 1e-4, 80.0),
    ],
)
def test_exploding_noise_ends_where_the_other_endpoint_is_lost(
    path: VE, prediction: Prediction, lo: float, hi: float
) -> None:
    """Beyond sigma = 1/δ noise hides the data from eps; below δ it is too small to be told from them."""
    _, sigma = path.alpha_sigma(torch.tensor(usable(path, prediction), dtype=torch.float64))
    assert sigma.tolist() == pytest.approx([lo, hi], rel=1e-5)


def test_the_interval_is_kept() -> None:
    assert usable(VP(), Score()) is usable(VP(beta_min=0.1), Score())
    assert usable(VP(beta_min=0.2), Score()) != usable(VP(), Score())


class Frozen(NoisePath):
    """No noise at all: eps can be seen at no time."""

    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


def test_a_prediction_usable_nowhere_is_an_error() -> None:
    with pytest.raises(ConfigError, match="usable nowhere"):
        usable(Frozen(), Data())


@pytest.mark.parametrize(
    ("path", "prediction", "t"),
    [
        (Linear(), Eps(), 1.0),
        (DiscreteVP(beta_end=0.9999), Eps(), 1.0),
        (DiscreteVP(zero_terminal_snr=True), Eps(), 1.0),
        (CosineDDPM(zero_terminal_snr=True), Score(), 1.0),
        (Cosine(), Eps(), 1.0),
        (Linear(), Data(), 0.0),
        (VP(), Velocity(), 0.0),
        (VP(), Score(), 0.0),
        (Linear(), Velocity(), 1.5),
        (Linear(), Velocity(), math.nan),
    ],
)
def test_times_outside_the_interval_are_refused(path: NoisePath, prediction: Prediction, t: float) -> None:
    with pytest.raises(ConfigError, match="such as v"):
        check_times(path, prediction, torch.tensor([0.5, t]))


@every_pair
def test_times_inside_the_interval_are_taken(path: NoisePath, prediction: Prediction) -> None:
    lo, hi = usable(path, prediction)
    check_times(path, prediction, torch.tensor([lo, 0.5, hi]))  # float32 ends may round outwards


# --- Gaussian data -----------------------------------------------------------------------------------------


@every_path
@every_oracle
def test_exact_posterior_means_give_the_exact_velocity(path: NoisePath, oracle: Gaussian | Mixture) -> None:
    """dx/dt along the known solution of the ODE; between the steps of a discrete path, whose slope jumps there."""
    t = torch.linspace(0.0505, 0.9505, 10, dtype=torch.float64)
    # where the mass is, in the tails of which quantiles are rounded; in the middle the mixture's bend
    x = path.coeffs(t).mix(oracle.draw(10, 4), normal(10, 4))
    got = oracle.endpoints(path, x, t).velocity(path.coeffs(t))
    h = 1e-5
    for i, now in enumerate(t.tolist()):
        ahead, behind = (oracle.transport(path, x[i], now, now + sign * h) for sign in (1, -1))
        torch.testing.assert_close(got[i], (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-5)


@every_path
def test_exact_posterior_means_give_the_exact_score(path: NoisePath) -> None:
    oracle, t, x = Gaussian(), torch.linspace(0.05, 0.95, 10, dtype=torch.float64), normal(10, 4)
    c = path.coeffs(t)
    variance = c.alpha**2 * oracle.std**2 + c.sigma**2
    want = -(x - (c.alpha * oracle.mean)[:, None]) / variance[:, None]
    torch.testing.assert_close(oracle.endpoints(path, x, t).score(c), want)


@every_path
def test_the_mixture_s_score_is_the_slope_of_its_log_density(path: NoisePath) -> None:
    oracle = Mixture()
    for t in (0.05, 0.4, 0.9):
        time = torch.full((5,), t, dtype=torch.float64)
        c = path.coeffs(time)
        spread = float((c.alpha * oracle.std).hypot(c.sigma)[0])
        x = torch.linspace(-2, 2, 5, dtype=torch.float64) * (float(c.alpha[0]) + spread)

        def log_density(x: torch.Tensor, t: float = t) -> torch.Tensor:
            return torch.func.grad(lambda x: oracle.distribution(path, x, t))(x).log()

        want = torch.stack([torch.func.grad(log_density)(value) for value in x])
        got = oracle.endpoints(path, x.unsqueeze(1), time).score(c)
        torch.testing.assert_close(got.squeeze(1), want, rtol=1e-6, atol=1e-9)


@every_pair
@every_oracle
def test_targets_average_to_what_the_exact_posterior_predicts(
    path: NoisePath, prediction: Prediction, oracle: Gaussian | Mixture
) -> None:
    """The row of E[data | x], E[eps | x] is E[target | x]: regress many targets on x and compare."""
    lo, hi = usable(path, prediction)
    n = 20_000
    data, eps = oracle.draw(n, 1), normal(n, 1, seed=5)
    t = torch.full((n,), min(max(0.4, lo), hi), dtype=torch.float64)
    c = path.coeffs(t)
    x, target = c.mix(data, eps), prediction.target(c, data, eps)
    ends = oracle.endpoints(path, x, t)
    residual = target - prediction.target(c, ends.data, ends.eps)
    z = (x - x.mean()) / x.std()
    for feature in (torch.ones_like(x), z, torch.sin(2 * z)):
        moment = residual * feature
        assert abs(float(moment.mean())) < 5 * float(moment.std()) / math.sqrt(n)


# --- reference numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "path"), [("linear", Linear()), ("gvp", Cosine()), ("vp", VP())])
def test_sit_conversions(name: str, path: NoisePath, dtype: torch.dtype) -> None:
    """SiT's time runs from noise to data, and so does its velocity: prediction `reverse_velocity`."""
    ref = {k: torch.from_numpy(v).to(dtype) for k, v in golden("interpolants").items()}
    c = path.coeffs(1 - ref["t"])
    x, pred = ref[f"{name}/x_t"], ref["pred"]
    ends = ReverseVelocity().endpoints(c, x, pred)
    got = {
        "velocity": ReverseVelocity().target(c, ref["data"], ref["noise"]),
        "score_from_velocity": ends.score(c),
        "noise_from_velocity": ends.eps,
        "velocity_from_score": -Score().endpoints(c, x, pred).velocity(c),
    }
    for key, value in got.items():
        torch.testing.assert_close(value, ref[f"{name}/{key}"], rtol=1e-5, atol=1e-5)


# --- rows --------------------------------------------------------------------------------------------------


@every_path
def test_the_reverse_velocity_is_the_velocity_reversed(path: NoisePath) -> None:
    c = path.coeffs(torch.linspace(0.01, 1, 7, dtype=torch.float64))
    data, eps = normal(7, 3), normal(7, 3, seed=1)
    assert torch.equal(ReverseVelocity().target(c, data, eps), -Velocity().target(c, data, eps))


def test_edm_is_the_preconditioning_of_the_paper() -> None:
    """data = c_skip·x + c_out·F with arXiv 2206.00364, table 1, on the path with alpha = 1."""
    path, sd = VE(sigma_data=0.5), 0.5
    c = path.coeffs(torch.linspace(0, 1, 9, dtype=torch.float64))
    x, pred = normal(9, 5), normal(9, 5, seed=1)
    s = c.sigma.unsqueeze(1)
    skip, out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
    data = EDM(sigma_data=sd).endpoints(c, x, pred).data
    torch.testing.assert_close(data, skip * x + out * pred)


@every_path
@pytest.mark.parametrize("sd", [0.5, 1.0, 2.0])
def test_edm_targets_have_unit_variance_and_are_unknown_to_x(path: NoisePath, sd: float) -> None:
    """Whatever the path: what c_skip is chosen for, F is uncorrelated with x."""
    c = path.coeffs(torch.linspace(0, 1, 21, dtype=torch.float64))
    a, b = EDM(sigma_data=sd).row(c)
    torch.testing.assert_close(a**2 * sd**2 + b**2, torch.ones_like(a))
    correlation = a * c.alpha * sd**2 + b * c.sigma
    torch.testing.assert_close(correlation, torch.zeros_like(a), rtol=0, atol=1e-12)


# --- endpoints and channels --------------------------------------------------------------------------------


def test_lerp() -> None:
    one = Endpoints(normal(4, 3), normal(4, 3, seed=1), torch.zeros(4, 3))
    two = Endpoints(normal(4, 3, seed=2), normal(4, 3, seed=3), torch.ones(4, 3))
    out = one.lerp(two, 2.5)
    torch.testing.assert_close(out.data, -1.5 * one.data + 2.5 * two.data)
    torch.testing.assert_close(out.eps, -1.5 * one.eps + 2.5 * two.eps)
    assert out.log_variance is two.log_variance
    assert torch.equal(one.lerp(two, 0.0).data, one.data)
    weight = torch.tensor([0.0, 1.0, 2.5, -1.0], dtype=torch.float64)
    each = one.lerp(two, weight)
    for i, w in enumerate(weight.tolist()):
        torch.testing.assert_close(each.eps[i], one.lerp(two, w).eps[i])
    with pytest.raises(ValueError, match="one number per sample"):
        one.lerp(two, weight[:3])


@every_path
def test_with_data_keeps_x(path: NoisePath) -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    c = path.coeffs(t)
    x, old = normal(9, 3), Endpoints(normal(9, 3, seed=1), normal(9, 3, seed=2), normal(9, 3, seed=3))
    new = old.with_data(c, x, old.data.clamp(-0.5, 0.5))
    assert torch.equal(new.data, old.data.clamp(-0.5, 0.5))
    assert new.log_variance is old.log_variance
    noisy = c.sigma > 0
    torch.testing.assert_close(c.mix(new.data, new.eps)[noisy], x[noisy])
    assert torch.equal(new.eps[~noisy], old.eps[~noisy])  # clean x says nothing of eps
    assert int(noisy.sum()) >= 8


def test_with_data_is_finite_in_gradient_and_value_at_clean_data() -> None:
    c = Linear().coeffs(torch.zeros(2))
    data = torch.ones(2, 3, requires_grad=True)
    ends = Endpoints(data, torch.ones(2, 3)).with_data(c, torch.zeros(2, 3), 2 * data)
    (ends.data + ends.eps).sum().backward()
    assert torch.equal(ends.eps, torch.ones(2, 3))
    assert torch.equal(data.grad, torch.full((2, 3), 2.0))


@every_pair
def test_variance_channels_stay_out_of_the_row(path: NoisePath, prediction: Prediction) -> None:
    t = torch.full((2,), 0.5)
    c = path.coeffs(t)
    x, pred = normal(2, 3, 4, 4, dtype=torch.float32), normal(2, 6, 4, 4, seed=1, dtype=torch.float32)
    wide, plain = prediction.endpoints(c, x, pred), prediction.endpoints(c, x, pred[:, :3])
    assert torch.equal(wide.data, plain.data)
    assert torch.equal(wide.eps, plain.eps)
    assert plain.log_variance is None
    assert torch.equal(wide.log_variance, pred[:, 3:])


@pytest.mark.parametrize(
    "shape", [(2, 1, 4, 4), (1, 3, 4, 4), (2, 9, 4, 4), (2, 3, 1, 4), (2, 3), (2, 3, 4, 8)]
)
def test_outputs_that_would_broadcast_silently_are_refused(shape: tuple[int, ...]) -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="the network gave"):
        split_channels(torch.zeros(shape), x)
    with pytest.raises(ValueError, match="the network gave"):
        V().endpoints(Linear().coeffs(torch.full((2,), 0.5)), x, torch.zeros(shape))


@pytest.mark.parametrize("name", PREDICTIONS.names())
def test_targets_refuse_other_shapes(name: str) -> None:
    c = Linear().coeffs(torch.full((4,), 0.5))
    with pytest.raises(ValueError, match="one shape"):
        PREDICTIONS[name]().target(c, torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="one number per sample"):
        PREDICTIONS[name]().target(c, torch.zeros(3, 4), torch.zeros(3, 4))


def test_low_precision_outputs_are_solved_in_float32() -> None:
    c = VP().coeffs(torch.tensor([0.999]))
    ends = Eps().endpoints(c, torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bfloat16))
    assert ends.data.dtype == torch.float32
    assert ends.eps.dtype == torch.float32


class Doubled(Linear):
    """A path with its own input scale and model time."""

    def model_time(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t

    def input_scale(self, t: torch.Tensor) -> torch.Tensor:
        return 2.0 + t


def test_the_network_gets_scaled_input_and_its_own_time() -> None:
    seen: dict[str, object] = {}

    def model(x: torch.Tensor, model_time: torch.Tensor, cond: dict) -> torch.Tensor:
        seen.update(x=x, model_time=model_time, cond=cond)
        return x

    t, cond = torch.tensor([0.25, 0.5]), {"label": torch.tensor([1, 2])}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call_network(model, Doubled(), torch.ones(2, 3), t, cond)
    assert seen["cond"] is cond
    torch.testing.assert_close(seen["model_time"], torch.tensor([0.75, 0.5]))
    torch.testing.assert_close(seen["x"], torch.tensor([[2.25] * 3, [2.5] * 3]))
    with pytest.raises(ValueError, match="float32"):
        call_network(model, Linear(), torch.ones(2, 3), t.bfloat16(), cond)


def test_rows_of_infinite_coefficients_stay_visible() -> None:
    """No quiet clamping: an unusable time gives inf or nan, which the loss's guard then sees."""
    one, zero, inf = torch.ones(1), torch.zeros(1), torch.full((1,), math.inf)
    ends = Velocity().endpoints(Coeffs(one, zero, -one, inf), torch.ones(1, 2), torch.ones(1, 2))
    assert not bool(torch.isfinite(ends.data).any())
