"""What must hold of the kernels themselves: run by Triton's interpreter, or compiled, on a GPU.

No file of tests by its name: test_interpreted.py runs it in a process that interprets, and test_on_gpu.py where there
is a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.config import from_dict
from dit.model.ddt import DDTConfig
from dit.model.kernels.activation import activated_linear, activation
from dit.model.kernels.choice import Plain, Triton, use
from dit.model.kernels.heads import normed_turned_heads
from dit.model.kernels.residual import normed, residual
from dit.model.kernels.running import on_triton
from tests.model.kernels import oracles
from tests.model.kernels.oracles import EPSILON, compare, doubled, drawn
from tests.model.modern import COMPONENTS, modern
from tests.model.test_block import perturbed

slow = partial(pytest.param, marks=pytest.mark.slow)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
centred = pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
gated = pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Everything on the GPU, or on the CPU in a process that interprets; never the references."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert on_triton(torch.empty(0, device=place))
    with place:
        yield


# --- the residual stream ---------------------------------------------------------------------------------------


@dtypes
@centred
@pytest.mark.parametrize("shape", [(2, 9, 37), slow((1, 1, 72))])  # an odd width, several parts
@pytest.mark.parametrize("parts", ["x h gate weight shift", "x h gate weight", "x h gate", "x weight shift"])
def test_half_block(shape: tuple[int, int, int], parts: str, centred: bool, dtype: torch.dtype) -> None:
    batch, _, width = shape
    made: dict[str, Any] = {"x": drawn(*shape), "h": drawn(*shape, dtype=dtype, seed=1)}
    # rows as a block cuts them from one product: not contiguous
    rows = drawn(batch, 3 * width, seed=2)
    made |= dict(zip(("gate", "weight", "shift"), rows.chunk(3, 1), strict=True))
    given = [made[n] if n in parts.split() else None for n in ("x", "h", "gate", "weight", "shift")]
    exact = doubled(*given)
    out = residual(*given, epsilon=EPSILON, centred=centred, dtype=dtype)
    asked = ("gate" in parts, "weight" in parts)
    found = [v for v, is_asked in zip(out, asked, strict=True) if is_asked]
    assert [v.dtype for v in found] == [torch.float32] * asked[0] + [dtype] * asked[1]
    compare(found, given, oracles.half_block(*exact, centred), exact, dtype)  # type: ignore[arg-type]


@centred
def test_a_normed_stream_that_goes_on_has_both_gradients(centred: bool) -> None:
    given = [drawn(2, 9, 20), drawn(2, 20, seed=1), drawn(2, 20, seed=2)]
    exact = doubled(*given)
    x, y = normed(*given, epsilon=EPSILON, centred=centred)
    expected = [exact[0], *oracles.half_block(exact[0], None, None, exact[1], exact[2], centred)]  # type: ignore[list-item]
    compare([x, y], given, expected, exact)  # type: ignore[arg-type]


def test_a_stream_in_bfloat16_is_normed_as_it_is_kept() -> None:
    x, h, gate, weight = drawn(2, 3, 16), drawn(2, 3, 16, seed=1), drawn(2, 16, seed=2), drawn(2, 16, seed=3)
    out, y = residual(x, h, gate, weight, epsilon=EPSILON, stream=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    expected = oracles.normed(out.double(), True) * weight[:, None]
    assert (y - expected).norm() < 1e-6 * expected.norm()


def test_sums_over_tokens_are_the_same_to_the_bit() -> None:
    given = [drawn(2, 22, 24), drawn(2, 22, 24, seed=1), drawn(2, 24, seed=2), drawn(2, 24, seed=3)]
    rounds = []
    for _ in range(2):
        out, y = residual(*given)
        rounds.append(torch.autograd.grad((out * y).sum(), given))
    assert all(torch.equal(a, b) for a, b in zip(*rounds, strict=True))


# --- the MLP's activation --------------------------------------------------------------------------------------


@dtypes
@gated
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("shape", [(70, 37), slow((1, 3)), slow((3, 600))])  # several tiles
def test_activation(shape: tuple[int, int], bias: bool, gated: bool, dtype: torch.dtype) -> None:
    rows, width = shape
    wide = width * (1 + gated)
    given = [drawn(rows, wide, dtype=dtype), drawn(wide, seed=1) if bias else None]
    weight, offset = drawn(5, width, seed=2, dtype=dtype), drawn(5, seed=3) if bias else None
    exact = doubled(*given, weight, offset)
    assert exact[0] is not None
    said = oracles.activated(exact[0], exact[1], gated)
    compare([activation(given[0], given[1], gated)], given, [said], exact[:2], dtype)
    said = oracles.activated(exact[0], exact[1], gated)
    out = activated_linear(given[0], given[1], weight, offset, gated=gated)  # type: ignore[arg-type]
    expected = oracles.linear(said, exact[2], exact[3])  # type: ignore[arg-type]
    compare([out], [*given, weight, offset], [expected], exact, dtype)


def test_activations_far_out_are_finite() -> None:
    h = torch.tensor([[-1e4, -50.0, -10.0, 0.0, 10.0, 50.0, 1e4]], requires_grad=True)
    out = activation(h, None, False)
    torch.testing.assert_close(out, torch.nn.functional.gelu(h, approximate="tanh"), rtol=1e-5, atol=1e-6)
    out.sum().backward()
    assert torch.isfinite(h.grad).all()


# --- queries and keys ------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(1, 3, 2, 6), slow((2, 17, 8, 64)), slow((1, 2, 3, 72))])
@pytest.mark.parametrize(
    ("norm", "parts"),
    [("rms", "gain turn"), ("rms", "turn"), ("layer", "gain bias turn"), ("layer", ""), ("none", "turn")],
)
def test_heads(shape: tuple[int, int, int, int], norm: str, parts: str, dtype: torch.dtype) -> None:
    batch, tokens, heads, width = shape
    qkv = drawn(batch, tokens, 3, heads, width, dtype=dtype)
    gain, bias = (drawn(2, width, seed=i) if n in parts else None for i, n in enumerate(("gain", "bias")))
    angles = drawn(tokens, width // 2, seed=3).detach() * 3 if "turn" in parts else None
    table = None if angles is None else torch.stack([angles.cos(), angles.sin()])
    exact = doubled(qkv, gain, bias)
    full = exact[0]
    assert full is not None
    expected = [
        oracles.head(full[:, :, i], *(None if g is None else g[i] for g in exact[1:]), turn, norm)  # type: ignore[misc]
        for turn in (None if angles is None else angles.double(),)
        for i in range(2)
    ]
    how: dict[str, Any] = {"epsilon": EPSILON, "normed": norm != "none", "centred": norm == "layer"}
    found = normed_turned_heads(qkv, gain, bias, table, **how)
    compare(found, [qkv, gain, bias], [*expected, full[:, :, 2]], exact, dtype)


# --- networks --------------------------------------------------------------------------------------------------


def passes(model: torch.nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """What a network says, and every gradient."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 6, generator=generator, device="cpu").to(torch.get_default_device())
    place = x.device.type
    with torch.autocast(place, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(x, torch.tensor([0.2, 0.7]), {"label": torch.tensor([1, -1])})
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]  # type: ignore[list-item]


def built(cfg: Any) -> torch.nn.Module:
    """A network with noise on every parameter, drawn on the CPU."""
    with torch.device("cpu"):
        model = perturbed(cfg.build((4, 6), 3, 5, torch.Generator().manual_seed(0)))
    return model.to(torch.get_default_device())


def check_same(cfg: Any) -> None:
    """Values and gradients in float32; not relative to gradients that are zero but for rounding (of keys' biases)."""
    found, expected = (passes(built(replace(cfg, kernels=k)), torch.float32) for k in (Triton(), Plain()))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8


def test_networks_compute_and_learn_the_same() -> None:
    check_same(modern("many", checkpoint_blocks=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPONENTS)
def test_networks_of_all_components_compute_and_learn_the_same(name: str) -> None:
    check_same(modern(name))


@pytest.mark.slow
def test_a_network_in_bfloat16() -> None:
    cfg = modern("plain", kernels="triton")
    found, exact = (
        passes(built(cfg), torch.bfloat16),
        passes(built(replace(cfg, kernels=Plain())), torch.float32),
    )
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-6


@pytest.mark.slow
def test_a_decoupled_network_whose_tokens_each_have_their_modulation() -> None:
    check_same(from_dict(DDTConfig, {"width": 16, "depth": 1, "heads": 2, "patch": 2, "decoder_width": 20}))


def test_float64_takes_the_plain_path() -> None:
    models = [built(modern("many")).double() for _ in range(2)]
    use(models[0], Triton())
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    said = [m(x, torch.tensor([0.3]), {"label": torch.tensor([1])}) for m in models]
    assert torch.equal(*said)
