"""facebookresearch/DiT's weights: its numbers, its guidance, and samples that its eps leads to."""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.config import ConfigError
from dit.flow.discrete import DiscreteVP
from dit.flow.objective import Objective
from dit.flow.path import Linear
from dit.flow.predict import Eps
from dit.interop import facebook_dit
from dit.interop.facebook_dit import FacebookDiT
from dit.interop.weights import Arguments, Pretrained, WeightsError, parse_arguments
from dit.model.dit import DiTConfig
from dit.sample.denoise import Denoiser
from dit.sample.grid import UniformGrid
from dit.sample.guide import ClassifierFree
from dit.sample.solve import Heun
from tests.gaussian import golden, normal
from tests.interop.reference import TINY, weights

EXACT = {"rtol": 0.0, "atol": 1e-6}  # numbers up to 2, in float32


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    return golden("dit_facebook")


@pytest.fixture(scope="module")
def model(numbers: dict[str, np.ndarray]) -> Pretrained:
    state = {name[2:]: torch.from_numpy(w) for name, w in numbers.items() if name.startswith("w/")}
    return facebook_dit.from_state_dict(state, **ast.literal_eval(str(numbers["config"])))


def test_the_network_gives_the_references_numbers(model: Pretrained, numbers: dict[str, np.ndarray]) -> None:
    x, t, y, out = (torch.from_numpy(numbers[name]) for name in ("x", "t", "y", "out"))
    assert y[-1] == 10  # the null class
    with torch.no_grad():
        torch.testing.assert_close(model.model(x, t, y), out, **EXACT)
        torch.testing.assert_close(model.model(x, t.long(), y), out, **EXACT)
        as_cond = {"label": torch.where(y == 10, -1, y)}
        torch.testing.assert_close(model.model(x, t, as_cond), out, **EXACT)
        dropped = {"label": torch.tensor([0, 3, 9, 9]), "drop": torch.tensor([False] * 3 + [True])}
        torch.testing.assert_close(model.model(x, t, dropped), out, **EXACT)
        double = model.model.double()(x.double(), t.double(), y)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), out, rtol=0, atol=5e-6)
    model.model.float()


def test_the_path_hands_it_the_step(model: Pretrained, numbers: dict[str, np.ndarray]) -> None:
    """What dit.sample sees at t = (k + 1)/1000 is the reference's eps and variance at step k."""
    x, k, y, out = (torch.from_numpy(numbers[name]) for name in ("x", "t", "y", "out"))
    assert (model.path, model.prediction) == (DiscreteVP(), Eps())
    with torch.no_grad():
        cond = {"label": torch.where(y == 10, -1, y)}
        ends = Denoiser(model.model, model.path, model.prediction)(x, (k + 1) / 1000, cond)
    torch.testing.assert_close(ends.eps, out[:, :4], **EXACT)
    torch.testing.assert_close(ends.log_variance, out[:, 4:], **EXACT)


def test_the_legacy_guidance_is_the_references(model: Pretrained, numbers: dict[str, np.ndarray]) -> None:
    """forward_with_cfg: both halves of its batch see the first half's x; three of four channels are guided."""
    x, k, y, out = (torch.from_numpy(numbers[f"cfg_{name}"])[:2] for name in ("x", "t", "y", "out"))
    assert (torch.from_numpy(numbers["cfg_y"])[2:] == 10).all()
    guidance = ClassifierFree(scale=float(numbers["cfg_scale"]), channels=3)
    denoise = guidance(Denoiser(model.model, model.path, model.prediction))
    with torch.no_grad():
        ends = denoise(x, (k + 1) / 1000, {"label": y})
    torch.testing.assert_close(ends.eps, out[:, :4], rtol=0, atol=1e-5)
    torch.testing.assert_close(ends.log_variance, out[:, 4:], rtol=0, atol=1e-5)


def test_an_exact_eps_network_in_the_references_terms_samples_its_data(model: Pretrained) -> None:
    """Data N(1.5, 0.4²): E[eps | x] from the reference's own betas, at the step that the path hands over."""
    mean, std = 1.5, 0.4
    log_alpha = torch.from_numpy(0.5 * np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000))))

    def network(x: Tensor, k: Tensor, y: object) -> Tensor:
        assert ((k >= 0) & (k <= 999)).all()
        low = k.floor().long().clamp(max=998)
        log = torch.lerp(log_alpha[low], log_alpha[low + 1], k - low)[:, None]
        alpha, variance = log.exp(), -torch.expm1(2 * log)
        eps = variance.sqrt() * (x - alpha * mean) / (alpha**2 * std**2 + variance)
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)

    times = UniformGrid()(50, model.path, model.prediction)
    x = Heun()(Denoiser(network, model.path, model.prediction), normal(8, 4000), times, model.path)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(std, abs=0.01)


def test_without_learn_sigma_there_is_eps_alone() -> None:
    arguments = {**TINY, "learn_sigma": False}
    made = facebook_dit.from_state_dict(weights(learn_sigma=False), **arguments)
    out = made.model(torch.zeros(2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 10]))
    assert out.shape == (2, 4, 8, 8)


def test_the_null_class_is_num_classes_and_nothing_beyond() -> None:
    made = facebook_dit.from_state_dict(weights(), **TINY)
    x, k = torch.zeros(1, 4, 8, 8), torch.tensor([3])
    null, last = (made.model(x, k, torch.tensor([y])) for y in (10, 9))
    assert not torch.equal(null, last)
    assert torch.equal(null, made.model(x, k, torch.tensor([-1])))
    with pytest.raises(ValueError, match="label 11: this model has classes 0 to 9"):
        made.model(x, k, torch.tensor([11]))


def test_the_defaults_are_xl_2() -> None:
    with pytest.raises(
        WeightsError, match=r"speak for input_size=8, hidden_size=32, depth=2, num_classes=10$"
    ):
        facebook_dit.from_state_dict(weights())
    with pytest.raises(ConfigError, match="did you mean patch_size"):
        facebook_dit.from_state_dict(weights(), **{**TINY, "patchsize": 2})


def test_the_objective_trains_the_variance_if_there_is_one() -> None:
    arguments = parse_arguments(TINY, Arguments)
    assert FacebookDiT().objective(arguments).uses_variance
    without = parse_arguments({**TINY, "learn_sigma": False}, Arguments)
    assert not FacebookDiT().objective(without).uses_variance


def test_only_its_own_objective_is_given_out() -> None:
    model = DiTConfig(size="nano").build(8, 4, 10)
    assert "pos_embed" in FacebookDiT().theirs(model, Objective(path=DiscreteVP(), prediction=Eps()))
    for objective in (Objective(), Objective(path=DiscreteVP(num_steps=500), prediction=Eps())):
        with pytest.raises(WeightsError, match="samples eps on"):
            FacebookDiT().theirs(model, objective)
    assert Objective().path == Linear()
