"""willisma/SiT's weights: its numbers, and samples in the right direction for every path and prediction it has."""

from __future__ import annotations

import ast
import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.config import ConfigError
from dit.errors import Notice
from dit.flow.objective import Objective
from dit.flow.path import Linear
from dit.flow.predict import ReverseVelocity, Velocity
from dit.interop import sit
from dit.interop.sit import PATHS, PREDICTIONS, PathName, PredictionName, SiT, TimeName
from dit.interop.weights import Arguments, Pretrained, WeightsError, network, parse_arguments
from dit.model.dit import DiTConfig
from dit.sample.denoise import Denoiser
from dit.sample.grid import UniformGrid
from dit.sample.solve import Heun
from tests.gaussian import golden, normal
from tests.interop.reference import TINY, weights

EXACT = {"rtol": 0.0, "atol": 1e-6}  # numbers up to 3, in float32
KINDS = [(path, prediction) for path in get_args(PathName) for prediction in get_args(PredictionName)]


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    return golden("sit")


@pytest.fixture(scope="module")
def model(numbers: dict[str, np.ndarray]) -> Pretrained:
    state = {name[2:]: torch.from_numpy(w) for name, w in numbers.items() if name.startswith("w/")}
    return sit.from_state_dict(state, **ast.literal_eval(str(numbers["config"])))


def test_the_network_gives_the_references_numbers(model: Pretrained, numbers: dict[str, np.ndarray]) -> None:
    x, t, y, out = (torch.from_numpy(numbers[name]) for name in ("x", "t", "y", "out"))
    assert numbers["w/final_layer.linear.bias"].shape == (2 * 4 * 4,)  # twice what it returns
    with torch.no_grad():
        torch.testing.assert_close(model.model(x, t, y), out, **EXACT)
        as_cond = {"label": torch.where(y == 10, -1, y)}
        torch.testing.assert_close(model.model(x, t, as_cond), out, **EXACT)


def test_dit_sample_sees_it_in_reverse(model: Pretrained, numbers: dict[str, np.ndarray]) -> None:
    """Our velocity at t is minus SiT's at 1 - t, and exactly 1 - t is what the network gets."""
    x, s, y, out = (torch.from_numpy(numbers[name]) for name in ("x", "t", "y", "out"))
    assert model.prediction == ReverseVelocity()
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.path.model_time(t), 1 - t)
    with torch.no_grad():
        cond = {"label": torch.where(y == 10, -1, y)}
        ends = Denoiser(model.model, model.path, model.prediction)(x, 1 - s, cond)
    velocity = ends.velocity(model.path.coeffs(1 - s))
    torch.testing.assert_close(velocity, -out, rtol=0, atol=1e-5)
    back = model.path.coeffs(1 - s).mix(ends.data, ends.eps)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


def interpolant(path: str, s: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of SiT's path at its time s: 0 noise, 1 data (arXiv 2401.08740, section 2.2)."""
    log_alpha = -0.25 * (1 - s) ** 2 * 19.9 - 0.5 * (1 - s) * 0.1
    return {
        "Linear": (s, 1 - s),
        "GVP": (torch.sin(math.pi / 2 * s), torch.cos(math.pi / 2 * s)),
        "VP": (log_alpha.exp(), (1 - (2 * log_alpha).exp()).clamp(min=1e-30).sqrt()),
    }[path]


@pytest.mark.parametrize("path", get_args(PathName))
def test_the_paths_are_sits(path: PathName) -> None:
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    for ours, theirs in zip(PATHS[path].alpha_sigma(t), interpolant(path, 1 - t), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def exact(path: str, prediction: str, mean: float, std: float, seen: list[Tensor]):
    """The best network of data N(mean, std²), in SiT's terms; it notes the times that it sees."""

    def model(x: Tensor, s: Tensor, y: object) -> Tensor:
        seen.append(s[:1])
        assert ((s >= 0) & (s <= 1)).all()
        (alpha, sigma), (d_alpha, d_sigma) = torch.func.jvp(
            lambda time: interpolant(path, time), (s,), (torch.ones_like(s),)
        )
        alpha, sigma, d_alpha, d_sigma = (v[:, None] for v in (alpha, sigma, d_alpha, d_sigma))
        whitened = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        data, noise = mean + alpha * std**2 * whitened, sigma * whitened
        return {
            "velocity": d_alpha * data + d_sigma * noise,  # dx/ds: from noise to data
            "noise": noise,
            "score": -whitened,
        }[prediction]

    return model


@pytest.mark.parametrize(("path", "prediction"), KINDS)
def test_an_exact_network_in_sits_terms_samples_its_data(path: PathName, prediction: PredictionName) -> None:
    mean, std, seen = 1.5, 0.4, []
    made = sit.from_state_dict(weights(), path=path, prediction=prediction, **TINY)
    times = UniformGrid()(50, made.path, made.prediction)
    start = made.path.prior(normal(8, 4000))
    denoise = Denoiser(exact(path, prediction, mean, std, seen), made.path, made.prediction)
    x = Heun()(denoise, start, times, made.path)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(std, abs=0.015)
    order = torch.cat(seen)
    assert order[0] < 0.01  # from noise
    assert order[-1] > 0.95  # to data
    assert (order.diff() >= -1e-12).all()


@pytest.mark.parametrize(("path", "prediction"), KINDS)
def test_every_kind_is_an_objective_that_trains_and_is_known_again(path: str, prediction: str) -> None:
    kind = SiT(path=path, prediction=prediction)
    objective = kind.objective(parse_arguments(TINY, Arguments))
    objective.check()
    model = DiTConfig(size="nano").build(8, 4, 10)
    assert "pos_embed" in SiT().theirs(model, objective)


def test_the_rows_that_sit_discards_are_left_out_and_put_back_as_zeros() -> None:
    state, arguments = weights(), parse_arguments(TINY, Arguments)
    kept, ours = SiT().ours(state, arguments)
    assert not kept.learn_sigma
    model = network(ours, kept)
    full = SiT().theirs(model, SiT().objective(kept))
    assert full.keys() == state.keys()
    output = {"final_layer.linear.weight", "final_layer.linear.bias"}
    for name, tensor in state.items():
        assert full[name].shape == tensor.shape
        rows = full[name].unflatten(0, (4, 8)) if name in output else full[name]
        given = tensor.unflatten(0, (4, 8)) if name in output else tensor
        if name in output:
            assert not rows[:, 4:].any()
            rows, given = rows[:, :4], given[:, :4]
        assert torch.equal(rows, given), name
    assert torch.equal(SiT().ours(full, arguments)[1]["output.proj.weight"], ours["output.proj.weight"])


def test_without_learn_sigma_there_and_back_is_the_same_to_the_bit() -> None:
    state, arguments = weights(learn_sigma=False), parse_arguments({**TINY, "learn_sigma": False}, Arguments)
    kept, ours = SiT().ours(state, arguments)
    assert kept == arguments
    back = SiT(learn_sigma=False).theirs(network(ours, kept), SiT().objective(kept))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_what_does_not_fit_is_said_in_the_files_shapes() -> None:
    with pytest.raises(WeightsError, match=r"final_layer.linear.weight: is \(16, 32\), expected \(32, 32\)"):
        sit.from_state_dict(weights(learn_sigma=False), **TINY)
    broken = weights()
    del broken["final_layer.linear.weight"]
    with pytest.raises(WeightsError, match=r"missing: final_layer.linear.weight \(32, 32\)"):
        sit.from_state_dict(broken, **TINY)


@pytest.mark.parametrize("given", [{"path": "linear"}, {"prediction": "eps"}, {"patchsize": 2}])
def test_unknown_kinds_and_arguments_are_refused(given: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        sit.from_state_dict(weights(), **{**TINY, **given})


def test_other_objectives_are_not_given_out() -> None:
    model = DiTConfig(size="nano").build(8, 4, 10)
    for objective in (Objective(), Objective(path=Linear(), prediction=ReverseVelocity())):
        with pytest.raises(WeightsError, match=r"SiT has no prediction .* model time of 1 - t"):
            SiT().theirs(model, objective)
    assert PATHS.keys() == set(get_args(PathName))
    assert PREDICTIONS.keys() == set(get_args(PredictionName))


def repa() -> dict[str, Tensor]:
    """A SiT's weights without discarded rows, with what REPA trains beside them."""
    beside = {"projectors.0.0.weight": torch.ones(64, 32), "projectors.0.0.bias": torch.ones(64)}
    return {**weights(learn_sigma=False), **beside}


def test_repas_projectors_are_left_out_and_its_time_is_ours() -> None:
    """Its velocity goes from data (0) to noise (1); the very network is SiT's."""
    arguments = {**TINY, "learn_sigma": False}
    made, plain = (
        sit.from_state_dict(repa(), **arguments),
        sit.from_state_dict(weights(learn_sigma=False), **arguments),
    )
    assert (made.path, made.prediction) == (Linear(model_time_noise=1.0), Velocity())
    x, t, y = normal(2, 4, 8, 8).float(), torch.tensor([0.25, 0.75]), torch.tensor([3, 10])
    with torch.no_grad():
        assert torch.equal(made.model(x, t, y), plain.model(x, t, y))
    assert torch.equal(made.path.model_time(t), t)
    with pytest.warns(
        Notice, match=r"2 entries of projectors \(projectors\.0\.0\.bias, .*whose time is taken"
    ):
        found = SiT().infer(repa(), num_heads=4)
    assert not found.learn_sigma


@pytest.mark.parametrize(("time", "state"), [("repa", weights(learn_sigma=False)), ("sit", repa())])
def test_whose_time_it_is_can_be_said(time: TimeName, state: dict[str, Tensor]) -> None:
    kind = SiT(time=time)
    kept, _ = kind.ours(state, parse_arguments({**TINY, "learn_sigma": False}, Arguments))
    expected = Velocity() if time == "repa" else ReverseVelocity()
    assert kind.objective(kept).prediction == expected


@pytest.mark.parametrize("fields", [{"path": "VP"}, {"prediction": "score"}])
def test_what_repa_does_not_train_is_refused(fields: dict) -> None:
    with pytest.raises(ConfigError, match="REPA trains velocity on Linear or GVP"):
        sit.from_state_dict(repa(), **fields, **{**TINY, "learn_sigma": False})
