"""Predictions: rows, their inversion, where they are usable, and the exact Gaussian velocity and score."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ConfigError
from dit.flow.path import VP, Coeffs, DiscreteVP, Linear, Path
from dit.flow.predict import (
    DELTA,
    PREDICTIONS,
    Data,
    Endpoints,
    Eps,
    Prediction,
    Score,
    V,
    Velocity,
    call_network,
    check_times,
    split_channels,
    usable,
)
from tests.gaussian import ALL_PATHS, PAIR_IDS, PAIRS, Gaussian, golden, normal

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
every_path = pytest.mark.parametrize("path", ALL_PATHS)


def round_trip(path: Path, prediction: Prediction, t: torch.Tensor) -> float:
    """Largest error of data and eps found again from x and the prediction, relative to what δ allows."""
    data, eps = normal(len(t), 3, 2, 2, seed=1, dtype=t.dtype), normal(len(t), 3, 2, 2, seed=2, dtype=t.dtype)
    c = path.coeffs(t)
    ends = prediction.endpoints(c, c.mix(data, eps), prediction.target(c, data, eps))
    return max(float((ends.data - data).abs().max()), float((ends.eps - eps).abs().max()))


@every_pair
def test_a_prediction_inverts_on_its_usable_interval(path: Path, prediction: Prediction) -> None:
    lo, hi = usable(path, prediction)
    t = torch.linspace(lo, hi, 257, dtype=torch.float64)
    assert round_trip(path, prediction, t) < 1e-9
    assert round_trip(path, prediction, t[2:-2].float()) < 2e-2  # rounding, magnified at most 1/δ times


@every_pair
@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1))
def test_a_prediction_inverts_anywhere(path: Path, prediction: Prediction, share: float) -> None:
    lo, hi = usable(path, prediction)
    assert round_trip(path, prediction, torch.tensor([lo + share * (hi - lo)], dtype=torch.float64)) < 1e-9


# --- the usable interval -----------------------------------------------------------------------------------


def holds(path: Path, prediction: Prediction, t: float) -> bool:
    """The definition, written out: finite, bounded, and at an angle to (alpha, sigma)."""
    c = path.coeffs(torch.tensor([t], dtype=torch.float64))
    a, b = (float(v) for v in prediction.row(c))
    alpha, sigma = float(c.alpha), float(c.sigma)
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    angle = math.atan2(b, a) - math.atan2(sigma, alpha)
    bounded = math.hypot(a, b) * DELTA <= math.hypot(alpha, sigma) * (1 + 1e-9)
    return bounded and abs(math.sin(angle)) >= DELTA * (1 - 1e-9)


@every_pair
def test_the_interval_ends_where_the_definition_does(path: Path, prediction: Prediction) -> None:
    lo, hi = usable(path, prediction)
    assert 0 <= lo < hi <= 1
    assert all(holds(path, prediction, float(t)) for t in torch.linspace(lo, hi, 101, dtype=torch.float64))
    assert lo == 0 or not holds(path, prediction, lo * (1 - 1e-6))
    assert hi == 1 or not holds(path, prediction, 1 - (1 - hi) * (1 - 1e-6))


EDGE = DELTA / (DELTA + math.sqrt(1 - DELTA**2))  # of the linear path: t/(1 − t) = tan(asin δ)


@pytest.mark.parametrize(
    ("path", "prediction", "want"),
    [
        (Linear(), Velocity(), (0.0, 1.0)),
        (Linear(), Eps(), (0.0, 1 - EDGE)),
        (Linear(), Data(), (EDGE, 1.0)),
        (VP(), Eps(), (0.0, 1.0)),
        (VP(), V(), (0.0, 1.0)),
        (DiscreteVP(), Eps(), (0.0, 1.0)),
    ],
)
def test_known_intervals(path: Path, prediction: Prediction, want: tuple[float, float]) -> None:
    assert usable(path, prediction) == pytest.approx(want, rel=1e-9)


def test_vp_velocity_ends_where_it_grows_beyond_the_bound() -> None:
    """|velocity row| = ½ beta·alpha/sigma there, about ½ sqrt(beta_min/t)."""
    lo, hi = usable(VP(), Velocity())
    assert lo == pytest.approx((0.05 * DELTA) ** 2 / 0.1, rel=1e-3)
    assert hi == 1.0


@every_path
def test_v_is_usable_everywhere(path: Path) -> None:
    """Its row is (alpha, sigma) turned by a right angle."""
    assert usable(path, V()) == (0.0, 1.0)


def test_the_interval_is_kept() -> None:
    assert usable(VP(), Score()) is usable(VP(beta_min=0.1), Score())
    assert usable(VP(beta_min=0.2), Score()) != usable(VP(), Score())


class Frozen(Path):
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
        (DiscreteVP(beta_end=0.9999), Eps(), 1.0),  # zero terminal SNR
        (Linear(), Data(), 0.0),
        (VP(), Velocity(), 0.0),
        (VP(), Score(), 0.0),
        (Linear(), Velocity(), 1.5),
        (Linear(), Velocity(), math.nan),
    ],
)
def test_times_outside_the_interval_are_refused(path: Path, prediction: Prediction, t: float) -> None:
    with pytest.raises(ConfigError, match="such as v"):
        check_times(path, prediction, torch.tensor([0.5, t]))


@every_pair
def test_times_inside_the_interval_are_taken(path: Path, prediction: Prediction) -> None:
    lo, hi = usable(path, prediction)
    check_times(path, prediction, torch.tensor([lo, 0.5, hi]))  # float32 ends may round outwards


# --- Gaussian data -----------------------------------------------------------------------------------------


@every_path
def test_exact_posterior_means_give_the_exact_velocity(path: Path) -> None:
    """dx/dt along the known solution of the ODE; between the steps of a discrete path, whose slope jumps there."""
    oracle = Gaussian()
    t = torch.linspace(0.0505, 0.9505, 10, dtype=torch.float64)
    x = normal(10, 4) + 0.7
    got = oracle.endpoints(path, x, t).velocity(path.coeffs(t))
    h = 1e-5
    for i, now in enumerate(t.tolist()):
        ahead, behind = (oracle.transport(path, x[i], now, now + sign * h) for sign in (1, -1))
        torch.testing.assert_close(got[i], (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-5)


@every_path
def test_exact_posterior_means_give_the_exact_score(path: Path) -> None:
    oracle, t, x = Gaussian(), torch.linspace(0.05, 0.95, 10, dtype=torch.float64), normal(10, 4)
    c = path.coeffs(t)
    variance = c.alpha**2 * oracle.std**2 + c.sigma**2
    want = -(x - (c.alpha * oracle.mean)[:, None]) / variance[:, None]
    torch.testing.assert_close(oracle.endpoints(path, x, t).score(c), want)


@every_pair
def test_targets_average_to_what_the_exact_posterior_predicts(path: Path, prediction: Prediction) -> None:
    """The row of E[data | x], E[eps | x] is E[target | x]: regress many targets on x and compare."""
    oracle = Gaussian()
    lo, hi = usable(path, prediction)
    n = 20_000
    data, eps = oracle.draw(n, 1), normal(n, 1, seed=5)
    t = torch.full((n,), min(max(0.4, lo), hi), dtype=torch.float64)
    c = path.coeffs(t)
    x, target = c.mix(data, eps), prediction.target(c, data, eps)
    ends = oracle.endpoints(path, x, t)
    residual = target - prediction.target(c, ends.data, ends.eps)
    for feature in (torch.ones_like(x), x - x.mean()):
        moment = residual * feature
        assert abs(float(moment.mean())) < 5 * float(moment.std()) / math.sqrt(n)


# --- reference numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [("linear", Linear()), ("vp", VP())])
def test_sit_conversions(name: str, path: Path) -> None:
    ref = {k: torch.from_numpy(v).double() for k, v in golden("interpolants").items()}
    c = path.coeffs(1 - ref["t"])
    x, pred = ref[f"{name}/x_t"], ref["pred"]
    ends = Velocity().endpoints(c, x, -pred)  # their velocity points from noise to data
    for key, got in {"score_from_velocity": ends.score(c), "noise_from_velocity": ends.eps}.items():
        want = ref[f"{name}/{key}"]
        error = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
        assert float(error.max()) < 1e-4, key
    velocity = Velocity().target(c, ref["data"], ref["noise"])
    torch.testing.assert_close(-velocity, ref[f"{name}/velocity"], rtol=1e-4, atol=1e-4)


def test_sit_velocity_from_score() -> None:
    ref = {k: torch.from_numpy(v).double() for k, v in golden("interpolants").items()}
    c = Linear().coeffs(1 - ref["t"])
    ends = Score().endpoints(c, ref["linear/x_t"], ref["pred"])
    want = -ref["linear/velocity_from_score"]
    error = (ends.velocity(c) - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-4


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


@every_pair
def test_variance_channels_stay_out_of_the_row(path: Path, prediction: Prediction) -> None:
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
