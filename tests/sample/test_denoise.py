"""The denoiser: the network's answer turned into endpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit.flow.discrete import DiscreteVP
from dit.flow.path import VP, Linear, NoisePath
from dit.flow.predict import Cond, Eps, Prediction, V, usable
from dit.sample.denoise import Denoiser, with_precision
from tests.gaussian import PAIR_IDS, PAIRS, Gaussian, golden, normal

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)


@every_pair
def test_the_best_network_gives_the_posterior_means(path: NoisePath, prediction: Prediction) -> None:
    """Whatever is predicted, over the whole usable interval (I5)."""
    oracle, (lo, hi) = Gaussian(), usable(path, prediction)
    t = path.snap(torch.linspace(lo, hi, 41, dtype=torch.float64)[1:])
    x = oracle.transport(path, normal(40, 3), 1.0, 0.5)
    got = Denoiser(oracle.network(path, prediction), path, prediction)(x, t, {})
    want = oracle.endpoints(path, x, t)
    torch.testing.assert_close(got.data, want.data, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.eps, want.eps, rtol=1e-6, atol=1e-6)


@every_pair
def test_precision(path: NoisePath, prediction: Prediction) -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        seen.append(model_time)
        return x.bfloat16()

    denoiser = Denoiser(model, path, prediction)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        ends = denoiser(normal(2, 3, dtype=torch.float32), torch.full((2,), 0.5), {})
    assert seen[0].dtype == ends.data.dtype == ends.eps.dtype == torch.float32


def test_the_condition_reaches_the_network() -> None:
    seen: list[Cond] = []

    def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        seen.append(cond)
        return x

    cond = {"label": torch.tensor([3])}
    Denoiser(model, Linear(), V())(torch.ones(1, 2), torch.tensor([0.5]), cond)
    assert seen == [cond]


def test_ddpm_predicted_clean_data_with_learned_variance() -> None:
    """From the reference's x_t and its model output of 2C channels."""
    ref = {k: torch.from_numpy(v).double() for k, v in golden("ddpm").items()}
    denoiser = Denoiser(lambda x, t, cond: ref["model_out"], DiscreteVP(), Eps())
    ends = denoiser(ref["x_t"], (ref["t"] + 1) / 1000, {})
    cumulative = ref["linear/alphas_cumprod"][ref["t"].long()].view(-1, 1, 1, 1)
    want = (ref["x_t"] - (1 - cumulative).sqrt() * ref["model_out"][:, :4]) / cumulative.sqrt()
    torch.testing.assert_close(ends.data, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ends.log_variance, ref["model_out"][:, 4:])


@pytest.mark.parametrize("t", [torch.tensor([0.5]), torch.full((4, 1), 0.5), torch.tensor(0.5)])
def test_times_of_another_shape_are_refused(t: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(|one number per sample"):
        Denoiser(lambda x, t, cond: x, VP(), V())(torch.ones(4, 3), t, {})


def test_matrix_products_run_in_the_precision_asked_for() -> None:
    weight, x = torch.randn(4, 4), torch.randn(3, 4)

    def model(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        return x @ weight

    cpu, t = torch.device("cpu"), torch.zeros(3)
    assert torch.equal(with_precision(model, cpu, "fp32")(x, t, {}), x @ weight)
    assert with_precision(model, cpu, "bf16")(x, t, {}).dtype == torch.bfloat16
