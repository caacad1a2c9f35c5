"""The objective: reference losses, the known minimiser, the first loss, precision, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit.config import ConfigError, from_dict, to_dict
from dit.flow.couple import OptimalTransport
from dit.flow.objective import Objective
from dit.flow.path import VP, DiscreteVP, Linear, Path
from dit.flow.predict import Cond, Eps, Prediction, Score, V, Velocity, usable
from dit.flow.times import TIMES, LogitNormal, Uniform
from dit.rng import Draws
from tests.gaussian import PAIR_IDS, PAIRS, Gaussian, golden, normal

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)


def draws(n: int, step: int = 0) -> Draws:
    return Draws(seed=7, step=step, slots=torch.arange(n), batch=n)


def silent(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
    """A network that says 0, as a zero-initialised one does."""
    return torch.zeros_like(x)


def says(pred: Tensor) -> Callable[[Tensor, Tensor, Cond], Tensor]:
    return lambda x, model_time, cond: pred


def deviation(values: Tensor) -> float:
    """How many standard errors the mean lies from 0."""
    return abs(float(values.mean())) / (float(values.std()) / math.sqrt(len(values)))


# --- reference numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [("linear", Linear()), ("vp", VP())])
def test_sit_losses(name: str, path: Path) -> None:
    ref = {k: torch.from_numpy(v).double() for k, v in golden("interpolants").items()}
    at = (ref["data"], ref["noise"], 1 - ref["t"], {})
    velocity = Objective(path=path, prediction=Velocity()).per_sample(says(-ref["pred"]), *at)
    noise = Objective(path=path, prediction=Eps()).per_sample(says(ref["pred"]), *at)
    score = Objective(path=path, prediction=Score()).per_sample(says(ref["pred"]), *at)
    _, sigma = path.alpha_sigma(1 - ref["t"])
    torch.testing.assert_close(velocity, ref[f"{name}/loss/velocity/None"], rtol=1e-5, atol=0)
    torch.testing.assert_close(noise, ref[f"{name}/loss/noise/None"], rtol=1e-5, atol=0)
    # theirs is |sigma·score + eps|²: sigma² times the plain one
    torch.testing.assert_close(score * sigma**2, ref[f"{name}/loss/score/None"], rtol=1e-5, atol=0)


def test_ddpm_loss_ignores_the_variance_channels() -> None:
    ref = {k: torch.from_numpy(v) for k, v in golden("ddpm").items()}
    objective = Objective(path=DiscreteVP(), prediction=Eps())
    seen: list[Tensor] = []

    def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        seen.append(model_time)
        return ref["model_out"]

    got = objective.per_sample(model, ref["x0"], ref["eps"], (ref["t"] + 1).float() / 1000, {})
    torch.testing.assert_close(got, ref["loss/mse"], rtol=1e-5, atol=0)
    assert torch.equal(seen[0], ref["t"].float())


# --- the minimiser (I5) ------------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("times", TIMES.names())
def test_the_best_network_has_the_bayes_loss_and_is_stationary(
    path: Path, prediction: Prediction, times: str
) -> None:
    """At E[target | x] the loss is the known conditional variance and no change linear in x lowers it."""
    oracle, n = Gaussian(), 4096
    objective = Objective(path=path, prediction=prediction, times=TIMES[times]())
    best = oracle.network(path, prediction)
    data = oracle.draw(n, 4)

    def change(x: Tensor, t: Tensor) -> list[Tensor]:
        """Directions in the space of networks, of the size of the best loss at each t."""
        size = oracle.best_loss(path, prediction, t).sqrt()[:, None]
        alpha, sigma = path.alpha_sigma(t)
        spread = torch.hypot(alpha * oracle.std, sigma)[:, None]
        return [size, size * (x - alpha[:, None] * oracle.mean) / spread]

    knobs = [torch.zeros(n, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        return best(x, model_time, cond) + sum(k * d for k, d in zip(knobs, change(x, t), strict=True))

    t = objective.loss(says(torch.zeros_like(data)), data, {}, draws(n)).t
    loss = objective.loss(model, data, {}, draws(n))
    assert torch.equal(loss.t, t)
    expected = oracle.best_loss(path, prediction, t)
    assert deviation(loss.per_sample.detach() / expected - 1) < 5
    loss.per_sample.sum().backward()
    for knob in knobs:
        assert knob.grad is not None
        assert deviation(knob.grad[:, 0] / expected) < 5


@every_pair
def test_another_network_is_worse_and_not_stationary(path: Path, prediction: Prediction) -> None:
    """The test above can fail: the best network of other data does not pass it."""
    n = 4096
    objective = Objective(path=path, prediction=prediction, times=LogitNormal())
    data = Gaussian().draw(n, 4)
    wrong = objective.loss(Gaussian(mean=1.2, std=0.6).network(path, prediction), data, {}, draws(n))
    excess = wrong.per_sample / Gaussian().best_loss(path, prediction, wrong.t) - 1
    assert float(excess.mean()) > 0
    assert deviation(excess) > 10


# --- the first loss (I6) -----------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("times", TIMES.names())
def test_the_first_loss_is_the_analytic_target_variance(
    path: Path, prediction: Prediction, times: str
) -> None:
    n, shape = 4096, (2, 3, 4)
    objective = Objective(path=path, prediction=prediction, times=TIMES[times](shift=1.5))
    loss = objective.loss(silent, normal(n, *shape, dtype=torch.float32), {}, draws(n))
    first = objective.first_loss(math.prod(shape))
    assert abs(first.deviation(loss.per_sample)) < 6


@pytest.mark.parametrize("prediction", [Velocity(), V()])
def test_a_wrong_normalisation_shows_in_the_first_loss(prediction: Prediction) -> None:
    objective = Objective(prediction=prediction)
    first = objective.first_loss(64)
    for scale in (0.7, 1.4):
        loss = objective.loss(silent, scale * normal(1024, 64, dtype=torch.float32), {}, draws(1024))
        assert abs(first.deviation(loss.per_sample)) > 6


@pytest.mark.parametrize(
    ("objective", "mean", "second"),
    [
        (Objective(), 2.0, 4.0),
        (Objective(prediction=V()), 2 / 3, 7 / 15),  # ∫ t² + (1 − t)², and its square
        (Objective(path=VP(), prediction=V()), 1.0, 1.0),
        (Objective(path=DiscreteVP(), prediction=Eps()), 1.0, 1.0),
    ],
)
def test_known_first_losses(objective: Objective, mean: float, second: float) -> None:
    first = objective.first_loss(50)
    assert first.mean == pytest.approx(mean, rel=1e-6)
    assert first.std == pytest.approx(math.sqrt(second * (1 + 2 / 50) - mean**2), rel=1e-5)
    assert first.standard_error(100) == pytest.approx(first.std / 10)


def test_the_first_loss_of_vp_velocity_counts_the_end_near_data() -> None:
    """∫ |row|² = ∫ (beta/2)²·alpha²/sigma² grows like log(1/t_lo)/40: an even rule would miss a part."""
    lo, hi = usable(VP(), Velocity())
    s = torch.linspace(math.log(lo), math.log(hi), 200_001, dtype=torch.float64)
    t = s.exp()
    c = VP().coeffs(t)
    size = (c.d_alpha**2 + c.d_sigma**2) * t
    want = float(torch.trapezoid(size, s) + size[0])  # times below t_lo are clamped to it
    assert Objective(path=VP()).first_loss(8).mean == pytest.approx(want, rel=1e-4)


def test_ot_lowers_the_first_loss_by_what_it_logs() -> None:
    n = 1024
    objective = Objective(coupling=OptimalTransport(group=64))
    loss = objective.loss(silent, normal(n, 4, dtype=torch.float32), {}, draws(n))
    drop = float(loss.metrics["ot_cost_drop"])
    assert drop > 0.3
    assert objective.first_loss(4).deviation(loss.per_sample) < -6
    assert abs(objective.first_loss(4, correlation=drop).deviation(loss.per_sample)) < 6


# --- times and draws ---------------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("times", TIMES.names())
def test_times_stay_in_the_usable_interval(path: Path, prediction: Prediction, times: str) -> None:
    objective = Objective(path=path, prediction=prediction, times=TIMES[times]())
    lo, hi = usable(path, prediction)
    u = torch.cat([torch.tensor([2.0**-24, 1 - 2.0**-24]), torch.rand(1000)])
    t = objective.time(u)
    assert t.dtype == torch.float32
    assert float(t.min()) >= lo * (1 - 1e-6)
    assert float(t.max()) <= hi * (1 + 1e-6)
    if path.num_steps:
        assert torch.equal(path.snap(t), t)  # no step is clamped away
    loss = objective.loss(silent, normal(64, 4, dtype=torch.float32), {}, draws(64))
    assert bool(torch.isfinite(loss.per_sample).all())


def test_the_loss_depends_on_slots_not_on_the_micro_batch() -> None:
    data, whole = normal(48, 3, dtype=torch.float32), draws(48, step=11)
    objective = Objective(times=LogitNormal(), coupling=OptimalTransport(group=12))
    full = objective.loss(silent, data, {}, whole)
    for size in (12, 24):
        for first in range(0, 48, size):
            part = slice(first, first + size)
            loss = objective.loss(silent, data[part], {}, whole.select(part))
            assert torch.equal(loss.t, full.t[part])
            torch.testing.assert_close(loss.per_sample, full.per_sample[part])
    assert not torch.equal(objective.loss(silent, data, {}, draws(48, step=12)).t, full.t)


def test_the_mean_is_that_of_the_samples_and_carries_gradients() -> None:
    layer = torch.nn.Linear(6, 6)
    loss = Objective().loss(lambda x, t, cond: layer(x), normal(16, 6, dtype=torch.float32), {}, draws(16))
    torch.testing.assert_close(loss.mean, loss.per_sample.mean())
    assert loss.per_sample.shape == loss.t.shape == (16,)
    loss.mean.backward()
    assert float(layer.weight.grad.abs().sum()) > 0


def test_a_faulty_sample_spoils_its_own_loss_only() -> None:
    data = normal(8, 3, dtype=torch.float32)
    data[2] = torch.nan
    bad = torch.isnan(Objective().loss(silent, data, {}, draws(8)).per_sample)
    assert bad.nonzero().flatten().tolist() == [2]


# --- precision and speed -----------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("latents", [torch.bfloat16, torch.float32, torch.float64])
def test_time_and_loss_stay_float32_at_least(
    path: Path, prediction: Prediction, latents: torch.dtype
) -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        seen.extend([x, model_time])
        return x.bfloat16()  # as a network under autocast answers

    wide = torch.float64 if latents is torch.float64 else torch.float32
    objective = Objective(path=path, prediction=prediction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective.loss(model, normal(8, 3, dtype=latents), {}, draws(8))
    assert {v.dtype for v in (*seen, loss.mean, loss.per_sample, loss.t)} == {wide}
    coeffs = path.coeffs(loss.t)
    assert torch.equal(seen[1], path.model_time(loss.t))
    assert coeffs.sigma.dtype == wide


def test_the_error_of_a_low_precision_answer_is_taken_in_float32() -> None:
    """An answer right to bfloat16 rounding has a loss of about that rounding squared, not of its own."""
    data, eps = normal(8, 64, dtype=torch.float32), normal(8, 64, seed=1, dtype=torch.float32)
    target = eps - data
    at = (data, eps, torch.full((8,), 0.5), {})
    got = Objective().per_sample(says(target.bfloat16()), *at)
    want = (target.bfloat16().double() - target.double()).square().mean(1)
    assert float(want.min()) > 0
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


class NoSync(TorchDispatchMode):
    """Fails on whatever would make the host wait for the device, or would copy from host to device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"), name
        return func(*args, **(kwargs or {}))


@every_pair
def test_a_training_step_waits_for_no_device(path: Path, prediction: Prediction) -> None:
    objective = Objective(path=path, prediction=prediction, times=LogitNormal(shift=2.0))
    data, at = normal(8, 3, dtype=torch.float32), draws(8)
    objective.loss(silent, data, {}, at)  # intervals and tables are computed once, at the first step
    with NoSync():
        objective.loss(silent, data, {}, at)


def test_the_guard_against_waiting_works() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        float(torch.ones(1) + 1)


@pytest.mark.parametrize("path", [Linear(), VP(), DiscreteVP()])
def test_the_loss_compiles_in_one_graph(path: Path) -> None:
    objective = Objective(path=path, prediction=V())
    layer = torch.nn.Linear(3, 3)

    def step(data: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return objective.per_sample(lambda x, t, cond: layer(x), data, eps, t, {})

    at = normal(4, 3, dtype=torch.float32), normal(4, 3, seed=1, dtype=torch.float32), torch.rand(4)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*at), step(*at))


# --- configuration and what is refused ---------------------------------------------------------------------


@every_pair
def test_every_registered_pair_can_be_trained(path: Path, prediction: Prediction) -> None:
    Objective(path=path, prediction=prediction).check()


def test_eps_at_zero_terminal_snr_is_a_configuration_error() -> None:
    path = DiscreteVP(beta_end=0.9999)
    with pytest.raises(ConfigError, match="such as v"):
        Objective(path=path, prediction=Eps()).check()
    Objective(path=path, prediction=V()).check()


def test_paths_that_do_not_end_in_noise_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not reach from data to noise"):
        Objective(path=VP(beta_max=0.2), prediction=V()).check()  # data is still seen at t = 1


def test_an_objective_is_its_own_configuration() -> None:
    values = {
        "path": {"name": "ddpm", "num_steps": 500},
        "prediction": "eps",
        "times": {"name": "logit_normal", "mean": "-5e-1"},
        "coupling": {"name": "ot", "group": 16},
    }
    objective = from_dict(Objective, values)
    assert objective.path == DiscreteVP(num_steps=500)
    assert objective.times == LogitNormal(mean=-0.5)
    assert from_dict(Objective, to_dict(objective)) == objective
    with pytest.raises(ConfigError, match="did you mean velocity"):
        from_dict(Objective, {"prediction": "velocty"})
    with pytest.raises(ConfigError, match=r"path\.beta_maxx"):
        from_dict(Objective, {"path": {"name": "vp", "beta_maxx": 3}})


@pytest.mark.parametrize("shape", [(8, 1, 4, 4), (1, 3, 4, 4), (8, 3, 1, 1), (8,)])
def test_networks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the network gave"):
        Objective(times=Uniform()).loss(says(torch.zeros(shape)), torch.zeros(8, 3, 4, 4), {}, draws(8))


def test_draws_for_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="4 slots were given for 8 samples"):
        Objective().loss(silent, torch.zeros(8, 3), {}, draws(4))
