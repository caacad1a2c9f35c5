"""Discrete paths: reference betas, exact steps, the pieces between them, zero terminal SNR."""

from __future__ import annotations

import pytest
import torch

from dit.config import ConfigError
from dit.flow.discrete import CosineDDPM, DiscretePath, DiscreteVP
from dit.flow.objective import Objective
from dit.flow.path import PATHS
from dit.flow.predict import PREDICTIONS, Eps, V, check_steps, check_times, usable
from tests.gaussian import golden

KINDS = [kind for _, kind in PATHS.items() if issubclass(kind, DiscretePath)]
every_kind = pytest.mark.parametrize("kind", KINDS)
float_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def steps_of(path: DiscretePath, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.arange(path.num_steps) + 1).to(dtype) / path.num_steps


# --- reference numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [("linear", DiscreteVP()), ("squaredcos_cap_v2", CosineDDPM())])
def test_betas_and_coefficients_are_the_references(name: str, path: DiscretePath) -> None:
    ref = golden("ddpm")
    torch.testing.assert_close(path.betas(), torch.from_numpy(ref[f"{name}/betas"]), rtol=1e-12, atol=0)
    cumulative = torch.from_numpy(ref[f"{name}/alphas_cumprod"])
    alpha, sigma = path.alpha_sigma(steps_of(path))
    torch.testing.assert_close(alpha**2, cumulative, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma**2, 1 - cumulative, rtol=1e-11, atol=0)
    low, _ = path.alpha_sigma(steps_of(path, torch.float32))
    torch.testing.assert_close(low.double() ** 2, cumulative, rtol=2e-6, atol=0)


@float_types
def test_ddpm_noises_and_recovers_as_the_reference_does(dtype: torch.dtype) -> None:
    ref = golden("ddpm")
    x0, eps, x_t, out = (torch.from_numpy(ref[name]).to(dtype) for name in ("x0", "eps", "x_t", "model_out"))
    c = DiscreteVP().coeffs((torch.from_numpy(ref["t"]) + 1).to(dtype) / 1000)
    torch.testing.assert_close(c.mix(x0, eps), x_t, rtol=1e-5, atol=1e-6)
    ends = Eps().endpoints(c, x_t, out)
    torch.testing.assert_close(
        ends.data, torch.from_numpy(ref["p/pred_xstart"]).to(dtype), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(ends.log_variance, out[:, 4:])


# --- steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000, 4000, 8000])
@float_types
@every_kind
def test_model_time_is_exactly_k(kind: type[DiscretePath], steps: int, dtype: torch.dtype) -> None:
    path, k = kind(num_steps=steps), torch.arange(steps)
    exact, _ = path.alpha_sigma(steps_of(path))
    for t in (
        (k + 1).to(dtype) / steps,
        (k + 1).to(dtype) * (1.0 / steps),
        1 - (steps - 1 - k).to(dtype) / steps,
        path.time_at(path.log_snr((k + 1).to(dtype) / steps)),
    ):
        assert torch.equal(path.model_time(t), k.to(dtype))
        assert torch.equal(path.snap(t), (k + 1).to(dtype) / steps)
        alpha, _ = path.alpha_sigma(
            t
        )  # k = 999 of 1000 of iDDPM's betas too, where alpha falls 97% in a step
        torch.testing.assert_close(alpha, exact.to(dtype), rtol=3e-5, atol=0)


def test_uniform_times_give_each_step_equally_often() -> None:
    u = (torch.arange(10_000) + 0.5) / 10_000
    counts = torch.bincount((DiscreteVP(num_steps=10).snap(u) * 10).round().long())
    assert counts.tolist() == pytest.approx([0, *[1000] * 10], abs=1)  # the slack is 1/1000 of a step


@every_kind
@pytest.mark.parametrize("terminal", [False, True])
def test_log_alpha_is_straight_between_steps(kind: type[DiscretePath], terminal: bool) -> None:
    path = kind(zero_terminal_snr=terminal)
    k = torch.arange(1, 999 if terminal else 1000, dtype=torch.float64)
    below, middle, above = (path.alpha_sigma((k + f) / 1000)[0].log() for f in (0.0, 0.25, 1.0))
    torch.testing.assert_close(middle, 0.75 * below + 0.25 * above, rtol=1e-9, atol=0)
    torch.testing.assert_close(path.model_time((k + 0.25) / 1000), k - 0.75)


@every_kind
@pytest.mark.parametrize("terminal", [False, True])
def test_coefficients_are_continuous_across_steps(kind: type[DiscretePath], terminal: bool) -> None:
    """Where the slope jumps: from just below a step to beyond the slack in which a float32 time means it."""
    path = kind(num_steps=100, zero_terminal_snr=terminal)
    near = torch.tensor([-1e-6, 0.0, 1e-6, 0.999e-3, 1.001e-3], dtype=torch.float64)
    t = (torch.arange(1, 100, dtype=torch.float64).unsqueeze(1) + near) / 100
    alpha, _ = path.alpha_sigma(t)
    log_alpha = alpha.log()
    slope = (log_alpha[:, 4] - log_alpha[:, 1]) / 1.001e-3  # per step
    for i in (2, 3):
        torch.testing.assert_close(log_alpha[:, i], log_alpha[:, 1] + near[i] * slope, rtol=0, atol=2e-6)
    torch.testing.assert_close(log_alpha[:, 0], log_alpha[:, 1], rtol=0, atol=1e-5)


@every_kind
def test_slope_at_a_step_is_of_the_piece_below_in_both_precisions(kind: type[DiscretePath]) -> None:
    path = kind(num_steps=4000)
    want = 0.5 * torch.log1p(-path.betas()) * 4000
    for dtype in (torch.float32, torch.float64):
        c = path.coeffs(steps_of(path, dtype))
        torch.testing.assert_close((c.d_alpha / c.alpha).double(), want, rtol=1e-6, atol=0)


@every_kind
def test_a_path_begins_clean(kind: type[DiscretePath]) -> None:
    alpha, sigma = kind().alpha_sigma(torch.zeros(1))
    assert (float(alpha), float(sigma)) == (1.0, 0.0)
    assert float(kind().alpha_sigma(torch.full((1,), 1e-7))[1]) > 0  # and does not round small times to it


def test_log_snr_holds_where_alpha_underflows() -> None:
    path = DiscreteVP(beta_end=0.9999)  # alpha ends at e^−502, of which float32 knows nothing
    low, exact = (path.log_snr(steps_of(path, dtype)) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(low.double(), exact, rtol=1e-6, atol=1e-6)
    assert float(exact[-1]) < -1000
    assert torch.equal(path.snap(path.time_at(low)), steps_of(path, torch.float32))


def test_other_betas_are_taken() -> None:
    halved = DiscreteVP(num_steps=2, beta_start=0.5, beta_end=0.75)
    alpha, _ = halved.alpha_sigma(torch.tensor([0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(alpha**2, torch.tensor([0.5, 0.125], dtype=torch.float64))
    assert float(CosineDDPM(max_beta=0.5).betas().max()) == 0.5
    assert float(CosineDDPM(offset=0.1).betas()[0]) > float(CosineDDPM().betas()[0])


def test_tables_are_built_once_and_serve_gradients() -> None:
    path = DiscreteVP(num_steps=10)
    with torch.inference_mode():
        path.coeffs(torch.tensor([0.5]))
    for t in (0.33, 0.3):  # as a likelihood or a learned time may ask
        time = torch.tensor([t], requires_grad=True)
        path.coeffs(time).alpha.sum().backward()
        assert float(time.grad) == pytest.approx(float(path.coeffs(time.detach()).d_alpha), rel=1e-5)


# --- zero terminal SNR -------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("steps", [2, 10, 1000])
@float_types
def test_zero_terminal_snr_is_the_papers(kind: type[DiscretePath], steps: int, dtype: torch.dtype) -> None:
    """arXiv 2305.08891, algorithm 1, written as it is there."""
    plain, path = kind(num_steps=steps), kind(num_steps=steps, zero_terminal_snr=True)
    root = torch.cumprod(1 - plain.betas(), 0).sqrt()
    first, last = float(root[0]), float(root[-1])
    want = (root - last) * (first / (first - last))
    c = path.coeffs(steps_of(path, dtype))
    accuracy = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(c.alpha.double(), want, rtol=accuracy, atol=accuracy)
    torch.testing.assert_close(c.sigma.double(), (1 - want**2).sqrt(), rtol=10 * accuracy, atol=0)
    assert (float(c.alpha[-1]), float(c.sigma[-1])) == (0.0, 1.0)
    assert bool(torch.isfinite(torch.cat([c.d_alpha, c.d_sigma])).all())
    assert float(c.d_alpha[-1]) == pytest.approx(-float(want[-2]) * steps, rel=1e-6)
    assert float(c.d_sigma[-1]) == 0.0


@every_kind
def test_alpha_falls_evenly_in_the_last_piece(kind: type[DiscretePath]) -> None:
    path = kind(num_steps=10, zero_terminal_snr=True)
    t = torch.linspace(0.9, 1.0, 11, dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(t)
    torch.testing.assert_close(
        alpha, alpha[0] * torch.linspace(1, 0, 11, dtype=torch.float64), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))


def test_the_last_piece_is_accurate_in_float32_where_it_begins_nearly_clean() -> None:
    path = DiscreteVP(num_steps=2, zero_terminal_snr=True)  # alpha falls there from 0.99995 to 0
    t = torch.tensor([0.5001, 0.51, 0.6, 0.9])
    torch.testing.assert_close(
        path.alpha_sigma(t)[1].double(), path.alpha_sigma(t.double())[1], rtol=1e-5, atol=0
    )


def test_zero_terminal_snr_serves_gradients() -> None:
    """The branch not taken must not put nan into the gradient of the other."""
    path = DiscreteVP(num_steps=10, zero_terminal_snr=True)
    t = torch.tensor([0.05, 0.5, 0.95, 1.0], dtype=torch.float64, requires_grad=True)
    c = path.coeffs(t)
    (alpha,) = torch.autograd.grad(c.alpha.sum(), t, retain_graph=True)
    (sigma,) = torch.autograd.grad(c.sigma.sum(), t)
    torch.testing.assert_close(alpha, c.d_alpha.detach())
    torch.testing.assert_close(sigma, c.d_sigma.detach())


@every_kind
@pytest.mark.parametrize("name", PREDICTIONS.names())
def test_what_pure_noise_does_not_determine_is_refused(kind: type[DiscretePath], name: str) -> None:
    """eps and score say nothing of the data at t = 1; the others do, and can be trained."""
    path, prediction = kind(zero_terminal_snr=True), PREDICTIONS[name]()
    end = torch.ones(1)
    if name in ("eps", "score"):
        assert usable(path, prediction)[1] < 1.0
        with pytest.raises(ConfigError, match="such as v"):
            check_times(path, prediction, end)
        with pytest.raises(ConfigError, match="such as v"):
            Objective(path=path, prediction=prediction).check()
    else:
        assert usable(path, prediction)[1] == 1.0
        check_times(path, prediction, end)
        Objective(path=path, prediction=prediction).check()


# --- every step is usable or the pair is refused -----------------------------------------------------------


def test_the_last_step_of_cosine_betas_is_trained_at_and_sampled() -> None:
    """alpha falls there from 1.6e-3 to 5e-5, as its authors have it."""
    path = CosineDDPM()
    for prediction in (Eps(), V()):
        assert usable(path, prediction) == (0.0, 1.0)
        Objective(path=path, prediction=prediction).check()
        t = Objective(path=path, prediction=prediction).time(torch.tensor([0.9985, 0.9995]))
        assert path.model_time(t).tolist() == [998.0, 999.0]


@pytest.mark.parametrize(
    "path", [DiscreteVP(beta_end=0.9999), DiscreteVP(num_steps=4, beta_end=0.9999999999999)]
)
def test_a_step_that_cannot_be_used_is_too_many(path: DiscretePath) -> None:
    with pytest.raises(ConfigError, match="such as v"):
        check_steps(path, Eps())
    check_steps(path, V())


def test_intervals_end_at_steps() -> None:
    path = DiscreteVP(beta_end=0.9999)
    _, hi = usable(path, Eps())
    k = hi * 1000 - 1
    assert k == pytest.approx(round(k), abs=1e-9)
    alpha, _ = path.alpha_sigma(torch.tensor([hi, hi + 1e-3], dtype=torch.float64))
    assert float(alpha[0]) >= 1e-6 > float(alpha[1])
    few = DiscreteVP(num_steps=10, beta_start=1e-13, beta_end=1e-11)  # sigma is 3e-7 at k = 0, 1.1e-6 at 1
    assert usable(few, PREDICTIONS["data"]())[0] == 2 / 10


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"num_steps": 0},
        {"num_steps": 8001},
        {"beta_start": 0.0},
        {"beta_end": 1.0},
        {"beta_stop": 0.1},
        {"num_steps": 1, "zero_terminal_snr": True},
    ],
)
def test_impossible_betas_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        DiscreteVP(**fields)


@pytest.mark.parametrize("fields", [{"offset": 0.0}, {"max_beta": 1.0}, {"beta_start": 1e-4}])
def test_impossible_cosine_betas_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        CosineDDPM(**fields)
