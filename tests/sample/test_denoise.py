"""The denoiser: the network's answer turned into endpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dit.flow.discrete import DiscreteVP
from dit.flow.path import VP, Linear, NoisePath
from dit.flow.predict import Cond, Endpoints, Eps, Prediction, V, Velocity, usable
from dit.model.dit import DiTConfig
from dit.sample.denoise import Denoiser, with_precision
from dit.sample.generate import Sampler, SamplerSpec
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


def test_in_bf16_the_blocks_are_narrow_and_the_ends_and_the_solver_wide() -> None:
    """Patches, output and every state of the solver are float32; what the blocks multiply is bfloat16."""
    torch.manual_seed(0)
    model = DiTConfig(width=64, depth=2, heads=2, patch=2).build(8, 4, 3).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, given, out: seen.setdefault(name, set()).add(out.dtype)

    inside = {"block": model.blocks[0].attention.qkv, "patches": model.patch_embed, "output": model.output}
    for name, module in inside.items():
        module.register_forward_hook(note(name))
    made = {}
    for precision in ("fp32", "bf16"):
        network = with_precision(model, torch.device("cpu"), precision)
        spec = SamplerSpec(num_steps=4, cfg_scale=2.0)
        sampler = Sampler(network, Linear(), Velocity(), lambda x: x, (4, 8, 8), spec, torch.device("cpu"))
        states: list[Tensor] = []

        def watched(x: Tensor, t: Tensor, cond: Cond, states=states, sampler=sampler) -> Endpoints:
            states.append(x)
            return sampler.denoise(x, t, cond)

        made[precision] = sampler.latents(torch.arange(2), torch.tensor([0, 2]), denoise=watched)
        assert {x.dtype for x in (*states, made[precision])} == {torch.float32}
    assert seen["block"] == {torch.float32, torch.bfloat16}
    assert seen["patches"] == seen["output"] == {torch.float32}
    gap = float((made["bf16"] - made["fp32"]).norm() / made["fp32"].norm())
    assert 0 < gap < 2e-2
