"""Weights: their definitions, stated on the eps loss; the same in any prediction; finite wherever one is used."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, to_dict
from dit.flow.discrete import DiscreteVP
from dit.flow.objective import Objective
from dit.flow.path import PATHS, VP, Coeffs, Linear, NoisePath
from dit.flow.predict import PREDICTIONS, Prediction, V, Velocity, usable
from dit.flow.weight import (
    WEIGHTS,
    EDMWeight,
    EpsWeight,
    LikelihoodWeight,
    MinSNR,
    SigmoidWeight,
    UniformWeight,
    VelocityWeight,
    eps_factor,
)
from tests.gaussian import ALL_PATHS, PAIR_IDS, PAIRS, normal

every_path = pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
every_weight = pytest.mark.parametrize("name", WEIGHTS.names())


def half_g2(c: Coeffs) -> Tensor:
    """½ g² = ½ (σ²)' − (ln α)' σ² of the SDE dx = (ln α)' x dt + g dw that has these marginals."""
    return c.sigma * c.d_sigma - c.d_alpha / c.alpha * c.sigma**2


# what each weight is on the eps loss, from the papers; s = sigma/alpha, the others by their names
ON_EPS: dict[str, Callable[[NoisePath, Tensor, Coeffs], Tensor]] = {
    "eps": lambda path, t, c: torch.ones_like(t),
    "velocity": lambda path, t, c: (c.d_sigma - c.d_alpha * c.sigma / c.alpha) ** 2,  # data = (x − σ·eps)/α
    "likelihood": lambda path, t, c: (half_g2(c) / c.sigma**2).clamp(max=1000),
    "min_snr": lambda path, t, c: (5 * c.sigma**2 / c.alpha**2).clamp(max=1),
    "edm": lambda path, t, c: (c.sigma / c.alpha) ** 2 + 1,
    "sigmoid": lambda path, t, c: torch.sigmoid(-path.log_snr(t)) * half_g2(c) / c.sigma**2,
}


def inner_times(path: NoisePath, prediction: Prediction, n: int = 201) -> Tensor:
    """Times of the usable interval, finer towards its ends, but for where a definition on eps is 0/0."""
    lo, hi = usable(path, prediction)
    u = torch.sigmoid(torch.linspace(-14, 14, n, dtype=torch.float64))
    return path.snap(lo + (hi - lo) * u).unique().clamp(1e-6, 1 - 1e-6)


@every_pair
@pytest.mark.parametrize("name", ON_EPS)
def test_a_weighted_loss_is_the_same_in_any_prediction(
    path: NoisePath, prediction: Prediction, name: str
) -> None:
    """And what its definition says on the eps loss: a network's error, whatever it was asked for, counts as much."""
    t = inner_times(path, prediction)
    if path.num_steps:
        t = t[:-1]  # eps tells nothing at zero terminal SNR
    c = path.coeffs(t)
    data, eps, wrong = (normal(len(t), 4, seed=i) for i in range(3))
    # an error that x cannot tell: alpha·(error of data) + sigma·(error of eps) = 0
    pred = prediction.target(c, data - c.sigma[:, None] * wrong, eps + c.alpha[:, None] * wrong)
    objective = Objective(path=path, prediction=prediction, weight=WEIGHTS[name]())
    got = objective.per_sample(lambda x, model_time, cond: pred, data, eps, t, {})
    eps_loss = (c.alpha[:, None] * wrong).square().mean(1)
    torch.testing.assert_close(got, ON_EPS[name](path, t, c) * eps_loss, rtol=1e-6, atol=0)


@every_path
@pytest.mark.parametrize("name", [n for n in WEIGHTS.names() if n != "uniform"])
def test_no_weight_but_uniform_knows_the_prediction(path: NoisePath, name: str) -> None:
    """For those without a definition above too: the weight on the loss of v is the same by way of any prediction."""
    t = path.snap(torch.linspace(0.01, 0.99, 99, dtype=torch.float64))
    c = path.coeffs(t)

    def on_v(prediction: Prediction) -> Tensor:
        row = prediction.row(c)
        return WEIGHTS[name]()(c, row) * eps_factor(c, V().row(c)) / eps_factor(c, row)

    for _, prediction in PREDICTIONS.items():
        torch.testing.assert_close(on_v(prediction()), WEIGHTS[name]()(c, V().row(c)), rtol=1e-9, atol=0)


TERMINAL = [
    (DiscreteVP(zero_terminal_snr=True), V()),
    (DiscreteVP(zero_terminal_snr=True), Velocity()),
    (DiscreteVP(num_steps=10, beta_end=0.9), V()),
    (VP(beta_min=1e-3), V()),
]


@pytest.mark.parametrize(("path", "prediction"), PAIRS + TERMINAL)
@every_weight
def test_weights_are_finite_and_not_negative(path: NoisePath, prediction: Prediction, name: str) -> None:
    """From end to end of the usable interval, where alpha or sigma may be 0 and a derivative infinite."""
    lo, hi = usable(path, prediction)
    t = torch.cat([inner_times(path, prediction), torch.tensor([lo, hi, 2**-24, 1 - 2**-24])])
    t = t.double().clamp(lo, hi)
    for dtype in (torch.float32, torch.float64):
        c = path.coeffs(t.to(dtype))
        weight = WEIGHTS[name]()(c, prediction.row(c))
        assert weight.shape == c.alpha.shape
        assert weight.dtype == dtype
        assert bool(torch.isfinite(weight).all())
        assert bool((weight >= 0).all())
        assert float(weight.max()) > 0


@every_pair
@every_weight
def test_single_precision_weights_are_those_of_double(
    path: NoisePath, prediction: Prediction, name: str
) -> None:
    t = inner_times(path, prediction).clamp(1e-4, 0.999).float()
    single, double = (path.coeffs(t.to(d)) for d in (torch.float32, torch.float64))
    got = WEIGHTS[name]()(single, prediction.row(single)).double()
    want = WEIGHTS[name]()(double, prediction.row(double))
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0)


@every_pair
def test_eps_factor_turns_the_loss_into_the_eps_loss(path: NoisePath, prediction: Prediction) -> None:
    """A wrong prediction's error, seen in eps, is the factor times the error seen in the prediction."""
    lo, hi = usable(path, prediction)
    t = torch.linspace(max(lo, 0.05), min(hi, 0.95), 21, dtype=torch.float64)
    c = path.coeffs(t)
    data, eps, wrong = (normal(21, 4, seed=i) for i in range(3))
    target = prediction.target(c, data, eps)
    found = prediction.endpoints(c, c.mix(data, eps), target + wrong).eps
    want = (found - eps).square().mean(1)
    torch.testing.assert_close(eps_factor(c, prediction.row(c)) * wrong.square().mean(1), want)


# --- what each is for --------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize(
    ("weight", "prediction"),
    [(EpsWeight(), "eps"), (VelocityWeight(), "velocity"), (VelocityWeight(), "reverse_velocity")],
)
def test_a_prediction_of_its_own_has_weight_one(path: NoisePath, weight, prediction: str) -> None:
    p = PREDICTIONS[prediction]()
    c = path.coeffs(torch.linspace(*usable(path, p), 101, dtype=torch.float64))
    torch.testing.assert_close(weight(c, p.row(c)), torch.ones(101, dtype=torch.float64))


@every_path
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_edms_weight_makes_the_loss_of_its_preconditioned_network_plain(
    path: NoisePath, sigma_data: float
) -> None:
    """lambda·c_out² = 1 (Karras et al., section 5)."""
    p = PREDICTIONS["edm"](sigma_data=sigma_data)
    c = path.coeffs(torch.linspace(*usable(path, p), 101, dtype=torch.float64))
    torch.testing.assert_close(EDMWeight(sigma_data=sigma_data)(c, p.row(c)), torch.ones(101).double())


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_of_v_is_the_papers(gamma: float) -> None:
    """min(SNR, gamma) / (SNR + 1) where alpha² + sigma² = 1 (Hang et al., section 3.4)."""
    t = torch.linspace(0.001, 1, 100, dtype=torch.float64)
    c = VP().coeffs(t)
    snr = VP().log_snr(t).exp()
    torch.testing.assert_close(MinSNR(gamma=gamma)(c, V().row(c)), snr.clamp(max=gamma) / (snr + 1))


@every_path
def test_the_likelihood_weight_is_flat_in_log_snr(path: NoisePath) -> None:
    """Its integral over time is half the log-SNR that goes by: a bound knows the path's ends alone (VDM, §5.1)."""
    times = torch.linspace(0.05, 0.95, 200_001, dtype=torch.float64)
    c = path.coeffs(times)
    weight = LikelihoodWeight()(c, (torch.zeros_like(times), torch.ones_like(times)))
    first, last = path.log_snr(times[[0, -1]])
    assert float(torch.trapezoid(weight, times)) == pytest.approx(float(first - last) / 2, rel=2e-3)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_the_sigmoid_weight_halves_the_likelihood_weight_at_its_bias(bias: float) -> None:
    path = Linear()
    t = path.time_at(torch.tensor([bias], dtype=torch.float64))
    c = path.coeffs(t)
    row = V().row(c)
    assert float(SigmoidWeight(bias=bias)(c, row) / LikelihoodWeight()(c, row)) == pytest.approx(0.5)


@pytest.mark.parametrize("limit", [2.0, 50.0])
def test_the_likelihood_weight_is_capped_on_the_eps_loss(limit: float) -> None:
    c = Linear().coeffs(torch.linspace(0, 0.999, 100, dtype=torch.float64))
    weight = LikelihoodWeight(max=limit)(c, (torch.zeros_like(c.alpha), torch.ones_like(c.alpha)))
    assert float(weight.max()) <= limit
    assert float(weight[0]) == limit


def test_the_uniform_weight_is_one() -> None:
    (path, prediction), *_ = PAIRS
    c = path.coeffs(torch.tensor([0.2, 0.8]))
    assert UniformWeight()(c, prediction.row(c)).tolist() == [1.0, 1.0]


@every_weight
def test_a_weight_is_its_own_configuration(name: str) -> None:
    assert WEIGHTS.parse(to_dict(WEIGHTS[name]())) == WEIGHTS[name]()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("likelihood", "max", 0.0),
        ("min_snr", "gamma", -1.0),
        ("edm", "sigma_data", 0.0),
        ("sigmoid", "bias", math.inf),
    ],
)
def test_impossible_weights_are_refused(name: str, field: str, value: float) -> None:
    with pytest.raises(ConfigError):
        WEIGHTS[name](**{field: value})
