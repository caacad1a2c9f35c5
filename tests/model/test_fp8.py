"""Linear layers in float8: products of rounded numbers, by definition; in the right layers; weights as they were."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dit.config import ConfigError
from dit.model.dit import DiT
from dit.model.fp8 import FP8, Fp8, Rowwise, Tensorwise, float8_classes, product_layers
from tests.model.test_stream import built, every, said

CPU = torch.device("cpu")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
recipes = pytest.mark.parametrize("recipe", FP8.names())


FITTING: dict[str, Any] = {"heads": 2, "mlp_ratio": 6}  # widths that are multiples of 16, also of a gate


class One(nn.Module):
    """A network of one block with one linear layer."""

    def __init__(self, given: int, made: int):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(given, made))])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks[0](x)
        return out


def rounded(x: Tensor, dtype: torch.dtype, axis: int | None = None) -> Tensor:
    """x with 3 or 2 bits behind the first, scaled by its greatest number; along `axis` by powers of 2."""
    greatest = x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)
    scale = torch.finfo(dtype).max / greatest
    if axis is not None:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x * scale).to(dtype).float() / scale


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_scale_of_each_tensor_is_what_is_multiplied_there_and_back() -> None:
    model = One(32, 48)
    layer = model.blocks[0][0]
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    Tensorwise(emulate=True).convert(model)
    x, gradient = drawn(64, 32).requires_grad_(), drawn(64, 48, seed=1)
    out = model(x)
    out.backward(gradient)
    near, far, back = rounded(x.detach(), E4M3), rounded(weight, E4M3), rounded(gradient, E5M2)
    torch.testing.assert_close(out.detach(), near @ far.T + bias)
    found = model.blocks[0][0].weight.grad
    assert x.grad is not None
    assert found is not None
    torch.testing.assert_close(x.grad, back @ far)
    torch.testing.assert_close(found, back.T @ near)
    assert not torch.allclose(out.detach(), x.detach() @ weight.T + bias, rtol=1e-3)


def test_a_scale_of_each_row_is_what_is_multiplied() -> None:
    model = One(32, 48)
    weight, bias = (p.detach().clone() for p in model.blocks[0][0].parameters())
    Rowwise(emulate=True).convert(model)
    x = drawn(64, 32) * torch.logspace(-3, 3, 64)[:, None]
    torch.testing.assert_close(model(x).detach(), rounded(x, E4M3, 1) @ rounded(weight, E4M3, 1).T + bias)


def converted(name: str, recipe: str, **more: Any) -> DiT:
    model = built(name, **FITTING, **more)
    assert FP8[recipe](emulate=True).convert(model) is model
    return model


@every
def test_it_is_attention_and_mlp_that_change(name: str) -> None:
    plain = built(name, **FITTING)
    model = converted(name, "tensorwise")
    changed = {n for n, m in model.named_modules() if type(m).__module__.startswith("torchao.")}
    assert changed == set(product_layers(plain))
    blocks = [n for n, m in plain.named_modules() if hasattr(m, "attention")]
    layers = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    assert changed == {f"{block}.{layer}" for block in blocks for layer in layers}
    assert len(float8_classes(model)) == 1
    assert float8_classes(plain) == []


@every
@recipes
def test_values_and_gradients_are_those_of_bfloat16_but_for_rounding(name: str, recipe: str) -> None:
    """A number is rounded by up to 1/16 (e4m3); over a network's sums it averages out to some percent."""
    exact, gradients, _ = said(built(name, **FITTING))
    rough, roughly, _ = said(converted(name, recipe))
    assert rough.dtype == torch.float32
    assert 1e-3 * exact.norm() < (rough - exact).norm() < 4e-2 * exact.norm()
    assert roughly.keys() == gradients.keys()
    whole, other = (torch.cat([g.flatten() for g in found.values()]) for found in (gradients, roughly))
    assert (other - whole).norm() < 6e-2 * whole.norm()


def test_state_is_as_it_was_and_goes_either_way() -> None:
    plain, model = built("many", **FITTING), converted("many", "rowwise")
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name])
        assert tensor.dtype == after[name].dtype
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        parameters["blocks.0.mlp.fc1.weight"].add_(1)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(before)


@recipes
def test_marks_of_parameters_stay(recipe: str) -> None:
    """Maximal updates mark weights with rates of their own, which the optimizer reads off the parameters."""
    mup = {"name": "mup", "base_width": 16}
    plain, model = (
        built("plain", **FITTING, parametrization=mup),
        converted("plain", recipe, parametrization=mup),
    )
    rates = [[getattr(p, "lr_factor", 1.0) for p in m.parameters()] for m in (plain, model)]
    assert rates[0] == rates[1]
    assert set(rates[0]) == {0.5, 1.0}


def test_blocks_compile_once_with_it() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    expected = said(converted("plain", "tensorwise", checkpoint_blocks=True))
    model = converted("plain", "tensorwise", checkpoint_blocks=True)
    model.compile_blocks(fullgraph=True, backend=counter)
    out, gradients, _ = said(model)
    assert counter.frame_count == 1
    torch.testing.assert_close(out, expected[0])
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][parameter], rtol=1e-2, atol=1e-4)


def test_it_is_an_outline_too() -> None:
    with torch.device("meta"):
        model = Tensorwise(emulate=True).convert(One(32, 48))
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(("given", "made"), [(24, 32), (32, 40)])
def test_widths_that_kernels_do_not_take_are_refused(given: int, made: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"blocks\.0\.0 makes {made} numbers of {given}, .* multiples of 16"
    ):
        Tensorwise(emulate=True).convert(One(given, made))


@pytest.mark.parametrize("recipe", [Tensorwise(), Rowwise()])
def test_a_device_without_such_products_is_refused_with_what_helps(recipe: Fp8) -> None:
    with pytest.raises(ConfigError, match=r"capability 8\.9 .* this is a CPU: .* train.fp8.emulate: true"):
        recipe.check(CPU, 256)


def test_tokens_that_kernels_do_not_add_up_are_refused() -> None:
    Tensorwise(emulate=True).check(CPU, 256)
    with pytest.raises(ConfigError, match="the 258 tokens of a micro-batch are no multiple of 16"):
        Tensorwise(emulate=True).check(CPU, 258)


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    for use in (lambda: Tensorwise(emulate=True).check(CPU, 256), lambda: Rowwise().convert(One(32, 48))):
        with pytest.raises(
            ConfigError, match=r"train.fp8 needs torchao 0.18 or newer: pip install 'dit\[fp8\]'"
        ):
            use()


def test_what_torchao_tells_at_its_import_is_not_heard() -> None:
    """Diffusers imports it wherever it is, with warnings of parts that nobody uses here on every command's stderr."""
    for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)


@pytest.mark.gpu
@recipes
def test_a_gpu_s_products_are_the_emulated_ones(recipe: str) -> None:
    """Eager and compiled, values and gradients: sums are of the same rounded numbers, in bfloat16 at the end."""
    device = torch.device("cuda")
    torch.compiler.reset()
    FP8[recipe]().check(device, 64)
    x, found = drawn(64, 32).to(device), []
    for emulate, is_compiled in ((True, False), (False, False), (False, True)):
        torch.manual_seed(0)
        model = FP8[recipe](emulate=emulate).convert(One(32, 48).to(device))
        if is_compiled:
            model.compile(fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x)
        out.float().square().mean().backward()
        found.append(
            [out.detach().float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)]
        )
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).norm() < 2e-2 * a.norm()
