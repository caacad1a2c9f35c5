"""The objective: reference losses, the known minimiser, the first loss, precision, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit.compiling import compile_for_one_size
from dit.config import ConfigError, from_dict, to_dict
from dit.flow import objective as objectives
from dit.flow.couple import COST_DROP, OptimalTransport, Reflow, Sinkhorn
from dit.flow.discrete import DiscreteVP
from dit.flow.objective import Objective
from dit.flow.path import PATHS, VE, VP, Cosine, Linear, NoisePath
from dit.flow.predict import Cond, Eps, Prediction, Score, V, Velocity, usable
from dit.flow.spread import SPREADS, Stratified
from dit.flow.times import TIMES, EDMTimes, LogitNormal, Uniform
from dit.flow.variance import LearnedRange
from dit.flow.weight import WEIGHTS, EpsWeight, LikelihoodWeight, UniformWeight, VelocityWeight
from dit.rng import Draws
from tests.first_loss import first_loss
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


SIT_PATHS = {"linear": Linear(), "gvp": Cosine(), "vp": VP()}
# SiT's unweighted score loss is |sigma·score + eps|²: that of eps
SIT_WEIGHTS = {
    "velocity/None": (Velocity(), UniformWeight(), -1),
    "noise/None": (Eps(), UniformWeight(), 1),
    "noise/velocity": (Eps(), VelocityWeight(), 1),
    "noise/likelihood": (Eps(), LikelihoodWeight(), 1),
    "score/None": (Score(), EpsWeight(), 1),
    "score/velocity": (Score(), VelocityWeight(), 1),
    "score/likelihood": (Score(), LikelihoodWeight(), 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SIT_PATHS)
@pytest.mark.parametrize("loss", SIT_WEIGHTS)
def test_sit_losses(name: str, loss: str, dtype: torch.dtype) -> None:
    """Its time and with it the velocity's sign run the other way."""
    prediction, weight, sign = SIT_WEIGHTS[loss]
    ref = {k: torch.from_numpy(v).to(dtype) for k, v in golden("interpolants").items()}
    objective = Objective(path=SIT_PATHS[name], prediction=prediction, weight=weight)
    got = objective.per_sample(says(sign * ref["pred"]), ref["data"], ref["noise"], 1 - ref["t"], {})
    torch.testing.assert_close(got, ref[f"{name}/loss/{loss}"], rtol=1e-5, atol=0)


def test_every_reference_loss_is_compared() -> None:
    there = {k for k in golden("interpolants") if "/loss/" in k}
    assert there == {f"{name}/loss/{loss}" for name in SIT_PATHS for loss in SIT_WEIGHTS}


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


def directions(path: NoisePath, prediction: Prediction, x: Tensor, t: Tensor) -> list[Tensor]:
    """Changes of the network, constant and linear in x, of the size of the best loss at each t."""
    size = Gaussian().best_loss(path, prediction, t).sqrt()[:, None]
    alpha, sigma = path.alpha_sigma(t)
    spread = torch.hypot(alpha * Gaussian().std, sigma)[:, None]
    return [size, size * (x - alpha[:, None] * Gaussian().mean) / spread]


best_network = lru_cache(Gaussian().network)  # (path, prediction) → a model


def stationarity(objective: Objective, best: Callable[..., Tensor], n: int) -> list[float]:
    """Deviations from 0, in standard errors: of the loss from the Bayes loss, and of its slopes.

    Of each sample relative to what is expected at its time, so that no time's noise hides another's fault.
    """
    path, prediction, data = objective.path, objective.prediction, Gaussian().draw(n, 4)
    t = objective.loss(silent, data, {}, draws(n)).t
    assert t is not None
    knobs = [torch.zeros(n, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        ways = directions(path, prediction, x / path.input_scale(t)[:, None], t)
        return best(x, model_time, cond) + sum(k * d for k, d in zip(knobs, ways, strict=True))

    loss = objective.loss(model, data, {}, draws(n))
    coeffs = path.coeffs(t)
    weight = objective.weight(coeffs, prediction.row(coeffs))
    expected = weight * Gaussian().best_loss(path, prediction, t)
    counted = expected > 0
    loss.per_sample.sum().backward()
    terms = [loss.per_sample.detach() / expected - 1, *(k.grad[:, 0] / expected for k in knobs)]  # type: ignore[index]
    return [deviation(v[counted]) for v in terms]


@every_pair
@pytest.mark.parametrize("times", TIMES.names())
def test_the_best_network_has_the_bayes_loss_and_is_stationary(
    path: NoisePath, prediction: Prediction, times: str
) -> None:
    """At E[target | x] the loss is the known conditional variance and no change linear in x lowers it."""
    objective = Objective(path=path, prediction=prediction, times=TIMES[times]())
    assert max(stationarity(objective, best_network(path, prediction), 2048)) < 5


@every_pair
def test_no_weight_and_no_spread_moves_the_minimiser(path: NoisePath, prediction: Prediction) -> None:
    """They count times, they change no time's target; nor does an independent choice of eps."""
    best = best_network(path, prediction)
    spreads = [spread() for _, spread in SPREADS.items()]
    for i, (_, weight) in enumerate(WEIGHTS.items()):
        chosen = {"weight": weight(), "spread": spreads[i % len(spreads)], "times": LogitNormal()}
        objective = Objective(path=path, prediction=prediction, **chosen)
        assert max(stationarity(objective, best, 1024)) < 5, chosen


@every_pair
def test_another_network_is_worse_and_not_stationary(path: NoisePath, prediction: Prediction) -> None:
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
    path: NoisePath, prediction: Prediction, times: str
) -> None:
    n, shape = 1024, (2, 3, 4)
    objective = Objective(path=path, prediction=prediction, times=TIMES[times](shift=1.5))
    loss = objective.loss(silent, normal(n, *shape, dtype=torch.float32), {}, draws(n))
    first = first_loss(objective, math.prod(shape))
    assert abs(first.deviation(loss.per_sample)) < 6


@every_pair
def test_the_first_loss_of_every_weight(path: NoisePath, prediction: Prediction) -> None:
    """By its distribution over the times, which rise one after the other here, and by each sample's own time."""
    n, size = 1024, 8
    data = normal(n, size, dtype=torch.float32)
    for i, (_, weight) in enumerate(WEIGHTS.items(), start=PAIRS.index((path, prediction))):
        times = TIMES[TIMES.names()[i % len(TIMES.names())]]()
        objective = Objective(
            path=path, prediction=prediction, times=times, weight=weight(), spread=Stratified()
        )
        loss = objective.loss(silent, data, {}, draws(n))
        first, each = first_loss(objective, size), objective.first_losses(loss.t)
        assert abs(first.deviation(loss.per_sample)) < 6, objective
        share = (loss.per_sample / each)[each > 0]
        assert abs(float(share.mean()) - 1) < 5 * math.sqrt(2 / size / len(share)), objective
        assert float(share.var()) == pytest.approx(2 / size, rel=0.25)  # chi-squared


@pytest.mark.slow
@every_pair
def test_the_first_loss_of_every_combination(path: NoisePath, prediction: Prediction) -> None:
    n, size = 2048, 8
    data = normal(n, size, dtype=torch.float32)
    for (_, times), (_, weight), (_, spread) in product(TIMES.items(), WEIGHTS.items(), SPREADS.items()):
        chosen = {"times": times(), "weight": weight(), "spread": spread()}
        objective = Objective(path=path, prediction=prediction, **chosen)
        objective.check()
        loss = objective.loss(silent, data, {}, draws(n))
        assert abs(first_loss(objective, size).deviation(loss.per_sample)) < 6, chosen


@pytest.mark.parametrize("prediction", [Velocity(), V()])
def test_a_wrong_normalisation_shows_in_the_first_loss(prediction: Prediction) -> None:
    objective = Objective(prediction=prediction)
    first = first_loss(objective, 64)
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
    first = first_loss(objective, 50)
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
    assert first_loss(Objective(path=VP()), 8).mean == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("coupling", [OptimalTransport(group=64), Sinkhorn(group=64)])
def test_transport_lowers_the_first_loss_by_what_it_logs(coupling) -> None:
    n = 1024
    objective = Objective(coupling=coupling)
    loss = objective.loss(silent, normal(n, 4, dtype=torch.float32), {}, draws(n))
    drop = float(loss.metrics[COST_DROP])
    assert drop > 0.3
    assert first_loss(objective, 4).deviation(loss.per_sample) < -6
    assert abs(first_loss(objective, 4, correlation=drop).deviation(loss.per_sample)) < 6


# --- times and draws ---------------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("times", TIMES.names())
def test_times_stay_in_the_usable_interval(path: NoisePath, prediction: Prediction, times: str) -> None:
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


@pytest.mark.parametrize("coupling", [OptimalTransport(group=12), Sinkhorn(group=12)])
@pytest.mark.parametrize("spread", [spread() for _, spread in SPREADS.items()], ids=SPREADS.names())
def test_the_loss_depends_on_slots_not_on_the_micro_batch(coupling, spread) -> None:
    data, whole = normal(48, 3, dtype=torch.float32), draws(48, step=11)
    objective = Objective(times=LogitNormal(), spread=spread, coupling=coupling)
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


# --- stored pairs and auxiliary terms ----------------------------------------------------------------------


def test_reflow_trains_on_the_stored_eps() -> None:
    data, stored = normal(16, 5, seed=1), normal(16, 5, seed=2, dtype=torch.float16)
    seen: list[Tensor] = []

    def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    loss = Objective(coupling=Reflow()).loss(model, data, {}, draws(16), paired=stored)
    t = loss.t[:, None]
    torch.testing.assert_close(seen[0], (1 - t) * data + t * stored.double())
    torch.testing.assert_close(loss.per_sample, (stored.double() - data).square().mean(1))
    assert COST_DROP in loss.metrics


def test_reflow_without_stored_eps_is_refused() -> None:
    for paired in (None, torch.zeros(16, 4)):
        with pytest.raises(ValueError, match="--save_pairs"):
            Objective(coupling=Reflow()).loss(silent, torch.zeros(16, 5), {}, draws(16), paired=paired)


def test_other_couplings_draw_their_eps_whatever_is_stored() -> None:
    data = normal(16, 5, dtype=torch.float32)
    plain = Objective().loss(silent, data, {}, draws(16))
    assert torch.equal(
        plain.per_sample, Objective().loss(silent, data, {}, draws(16), paired=data).per_sample
    )


LEARNED = Objective(path=DiscreteVP(), prediction=Eps(), auxiliary=LearnedRange(weight=0.5))


def test_an_auxiliary_term_is_added_and_logged() -> None:
    """The main term stays what it is without; the term is what the auxiliary gives at the network's endpoints."""
    data = normal(16, 4, 2, 2, dtype=torch.float32)
    output = torch.cat([normal(16, 4, 2, 2, seed=1), normal(16, 4, 2, 2, seed=2)], 1).float()
    output.requires_grad_()
    seen: list[Tensor] = []

    def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        seen.append(x)
        return output

    loss = LEARNED.loss(model, data, {}, draws(16))
    plain = Objective(path=DiscreteVP(), prediction=Eps()).loss(model, data, {}, draws(16))
    assert torch.equal(loss.per_sample, plain.per_sample)
    assert plain.auxiliary is None
    ends = Eps().endpoints(DiscreteVP().coeffs(loss.t), seen[0], output)
    torch.testing.assert_close(
        loss.auxiliary, LearnedRange(weight=0.5)(LEARNED.path, loss.t, seen[0], data, ends)
    )
    torch.testing.assert_close(loss.mean, (loss.per_sample + loss.auxiliary).mean())
    assert float(loss.metrics["variational_bound"]) == pytest.approx(float(loss.auxiliary.detach().mean()))
    assert not loss.metrics["variational_bound"].requires_grad
    (grad,) = torch.autograd.grad(loss.mean, output)
    (main,) = torch.autograd.grad(plain.mean, output)
    torch.testing.assert_close(grad[:, :4], main[:, :4])  # the main term alone trains the prediction
    assert bool((main[:, 4:] == 0).all())
    assert float(grad[:, 4:].abs().min()) > 0


def test_first_losses_know_no_auxiliary_term() -> None:
    assert first_loss(LEARNED, 8) == first_loss(Objective(path=DiscreteVP(), prediction=Eps()), 8)


def test_a_variance_term_needs_variance_channels() -> None:
    assert LEARNED.uses_variance
    assert not Objective().uses_variance
    with pytest.raises(ValueError, match="learn_sigma"):
        LEARNED.loss(silent, torch.zeros(4, 4, 2, 2), {}, draws(4))


def test_an_auxiliary_term_checks_its_path() -> None:
    LEARNED.check()
    with pytest.raises(ConfigError, match="discrete steps"):
        Objective(path=VP(), prediction=Eps(), auxiliary=LearnedRange()).check()


# --- precision and speed -----------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("latents", [torch.bfloat16, torch.float32, torch.float64])
def test_time_and_loss_stay_float32_at_least(
    path: NoisePath, prediction: Prediction, latents: torch.dtype
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
def test_a_training_step_waits_for_no_device(path: NoisePath, prediction: Prediction) -> None:
    i, data, label = PAIRS.index((path, prediction)), normal(8, 3, dtype=torch.float32), torch.arange(8) % 3
    times, spread, weight = (
        axis[axis.names()[i % len(axis.names())]]() for axis in (TIMES, SPREADS, WEIGHTS)
    )
    chosen = {"times": times, "spread": spread, "weight": weight, "coupling": Sinkhorn(group=4, iterations=2)}
    objective = Objective(path=path, prediction=prediction, **chosen)
    objective.loss(
        silent, data, {"label": label}, draws(8)
    )  # intervals and tables are computed once, at first
    with NoSync():
        objective.loss(silent, data, {"label": label}, draws(8))


def test_the_guard_against_waiting_works() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        float(torch.ones(1) + 1)


@pytest.mark.parametrize(("path", "weight"), list(zip(PATHS.names(), cycle(WEIGHTS.names()))))
def test_the_loss_compiles_in_one_graph(path: str, weight: str) -> None:
    torch._dynamo.reset()  # so many graphs of one function count as a fault otherwise
    objective = Objective(path=PATHS[path](), prediction=V(), weight=WEIGHTS[weight]())
    layer = torch.nn.Linear(3, 3)

    def step(data: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return objective.per_sample(lambda x, t, cond: layer(x), data, eps, t, {})

    at = normal(4, 3, dtype=torch.float32), normal(4, 3, seed=1, dtype=torch.float32), torch.rand(4)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*at), step(*at))


def compiled_with(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Have what is around the network compiled by another backend, or with other options, of torch.compile."""
    torch._dynamo.reset()
    ends = [compile_for_one_size(function, fullgraph=True, **options) for function in objectives.EAGER]
    monkeypatch.setattr(objectives, "_compiled", lambda: objectives._Ends(*ends))


def loss_and_gradient(chosen: Objective, compiled: bool) -> tuple[Tensor, Tensor]:
    """Of a network that is a number times its input, at latents whose sizes fill no vector register."""
    data, factor = normal(5, 3, 3, 3, dtype=torch.float32), torch.tensor(0.7, requires_grad=True)
    cond = {"label": torch.arange(5)}
    loss = chosen.loss(lambda x, t, cond: factor * x, data, cond, draws(5), compiled=compiled)
    loss.mean.backward()
    assert factor.grad is not None
    return loss.per_sample.detach(), factor.grad


@pytest.mark.parametrize(("path", "weight"), list(zip(PATHS.names(), cycle(WEIGHTS.names()))))
def test_what_is_around_the_network_compiles_to_the_same(
    monkeypatch: pytest.MonkeyPatch, path: str, weight: str
) -> None:
    compiled_with(monkeypatch, backend="eager")
    chosen = Objective(path=PATHS[path](), prediction=V(), weight=WEIGHTS[weight]())
    for found, expected in zip(*(loss_and_gradient(chosen, c) for c in (True, False)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.slow
def test_it_is_the_same_to_rounding_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_with(monkeypatch)
    chosen = Objective(weight=VelocityWeight(), prediction=Eps())
    for found, expected in zip(*(loss_and_gradient(chosen, c) for c in (True, False)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


# --- configuration and what is refused ---------------------------------------------------------------------


@every_pair
def test_every_registered_pair_can_be_trained(path: NoisePath, prediction: Prediction) -> None:
    Objective(path=path, prediction=prediction).check()


def test_eps_at_zero_terminal_snr_is_a_configuration_error() -> None:
    path = DiscreteVP(beta_end=0.9999)
    with pytest.raises(ConfigError, match="such as v"):
        Objective(path=path, prediction=Eps()).check()
    Objective(path=path, prediction=V()).check()


def test_paths_that_do_not_end_in_noise_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not reach from data to noise"):
        Objective(path=VP(beta_max=0.2), prediction=V()).check()  # data is still seen at t = 1


@pytest.mark.parametrize(
    ("path", "what"), [(VE(sigma_max=5.0), "to .1, 5."), (VE(sigma_min=0.3), "from .1, 0.3")]
)
def test_noise_ranges_that_do_not_reach_are_refused_with_their_ends(path: NoisePath, what: str) -> None:
    """sigma(0) of VE is never 0: it has to be small beside the data, and sigma(1) large."""
    with pytest.raises(ConfigError, match=what):
        Objective(path=path, prediction=V()).check()


@pytest.mark.parametrize(
    ("path", "prediction", "mean"),
    [
        (VE(), V(), -9.0),
        (VE(), V(), 9.0),
        (VP(), V(), 9.0),
        (DiscreteVP(), Eps(), 9.0),
        (Linear(), Eps(), 9.0),
    ],
)
def test_times_beyond_the_usable_are_refused(path: NoisePath, prediction: Prediction, mean: float) -> None:
    with pytest.raises(ConfigError, match=r"\d% of the training times"):
        Objective(path=path, prediction=prediction, times=EDMTimes(mean=mean)).check()


def test_few_steps_are_not_the_ends_of_the_times() -> None:
    for steps in (2, 5):
        Objective(path=DiscreteVP(num_steps=steps, beta_start=5e-3, beta_end=0.999), prediction=V()).check()


def test_steps_that_a_prediction_cannot_use_are_not_trained_at() -> None:
    """The steps of betas that end in pure noise, of which eps says nothing, stand for none of the times."""
    path = DiscreteVP(beta_end=0.9999)
    hi = usable(path, Eps())[1]
    t = Objective(path=path, prediction=Eps()).time(torch.tensor([0.5 * hi, hi + 0.01, 1 - 2**-24]))
    assert t.tolist() == pytest.approx([math.ceil(500 * hi) / 1000, hi, hi])


def test_shifted_times_on_a_discrete_path_are_its_steps() -> None:
    path = PATHS["ddpm"]()
    objective = Objective(
        path=path, prediction=Eps(), times=TIMES.parse({"name": "logit_normal", "shift": 3})
    )
    t = objective.time((torch.arange(500) + 0.5) / 500)
    assert torch.equal(path.snap(t), t)


def test_parts_that_scale_by_the_data_must_agree() -> None:
    one = {"path": {"name": "ve", "sigma_data": 0.5}, "prediction": "edm", "times": "edm", "weight": "edm"}
    with pytest.raises(
        ConfigError, match=r"path.sigma_data = 0.5, prediction.sigma_data = 1, weight.sigma_data"
    ):
        from_dict(Objective, one).check()
    half = {"sigma_data": 0.5}
    alike = one | {"prediction": {"name": "edm", **half}, "weight": {"name": "edm", **half}}
    from_dict(Objective, alike).check()


def test_an_objective_is_its_own_configuration() -> None:
    values = {
        "path": {"name": "ddpm", "num_steps": 500},
        "prediction": "eps",
        "times": {"name": "logit_normal", "mean": "-5e-1"},
        "coupling": {"name": "ot", "group": 16},
        "spread": "stratified",
        "weight": {"name": "min_snr", "gamma": 3},
        "auxiliary": "learned_range",
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


def test_a_shift_by_dimension_is_of_the_data_that_come() -> None:
    """(2, 64, 128) is 16,384 numbers, √4 of the base; both losses draw the same times and noise."""
    draws, data = Draws(0, 0, torch.arange(4), 4), torch.randn(4, 2, 64, 128)
    losses = [
        Objective(times=LogitNormal(shift=shift)).loss(
            lambda x, t, cond: torch.zeros_like(x), data, {}, draws
        )
        for shift in ("dimension", 2.0)
    ]
    assert torch.equal(losses[0].t, losses[1].t)
    assert torch.equal(losses[0].per_sample, losses[1].per_sample)


def test_times_shifted_by_dimension_are_checked_at_the_latents_size() -> None:
    """eps on the linear path ends at t = 0.999: a shift of 1,000 (of 64 x 8 MiPixels) moves most times there."""
    objective = Objective(prediction=Eps(), times=Uniform(shift="dimension"))
    objective.check()
    with pytest.raises(ConfigError, match="of the training times"):
        objective.check(4096 * 1000**2)
