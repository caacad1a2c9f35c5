"""The named kernels of attention: the same values and gradients, in compiled blocks too; refused where absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from dit.config import ConfigError, from_dict
from dit.model import sdpa
from dit.model.block import Attention
from dit.model.dit import DiTConfig
from tests.model.test_stream import built, every, inputs

CPU = torch.device("cpu")
ON_CPU = ("flash", "math")
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 10, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def test_each_backend_has_a_name_in_the_configuration() -> None:
    assert set(get_args(sdpa.Backend)) == {"auto", *sdpa.BACKENDS}


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("backend", ["auto", *ON_CPU])
def test_computes_attention_and_its_gradient(backend: sdpa.Backend, scale: float | None) -> None:
    q, k, v = tensors()
    out = sdpa.attend(q, k, v, scale, backend)
    logits = q @ k.transpose(-1, -2) * (8**-0.5 if scale is None else scale)
    expected = torch.softmax(logits, -1) @ v
    torch.testing.assert_close(out, expected)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((a * weight).sum(), (q, k, v)) for a in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_half_precision_is_within_its_rounding() -> None:
    exact = sdpa.attend(*tensors())
    for backend in ON_CPU:
        rough = sdpa.attend(*tensors(torch.bfloat16), backend=backend)  # type: ignore[arg-type]
        assert rough.dtype == torch.bfloat16
        assert (rough - exact).norm() < 2e-2 * exact.norm()


def operations(run: Callable[[], Tensor], of: nn.Module) -> tuple[list[str], list[str]]:
    """What a module's compiled forward and backward pass consist of, in one graph."""
    seen: tuple[list[str], list[str]] = ([], [])

    def noting(into: list[str]) -> Callable[..., Any]:
        def compiler(graph: Any, given: Any) -> Any:
            into.extend(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(fw_compiler=noting(seen[0]), bw_compiler=noting(seen[1]))
    of.compile(fullgraph=True, backend=backend)
    run().sum().backward()
    return seen


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_choice_holds_in_a_compiled_graph(backend: str) -> None:
    torch.compiler.reset()
    layer = built("plain", attention=backend).blocks[0].attention
    x = torch.randn(2, 6, 32)
    there, back = operations(lambda: layer(x)[0], layer)
    assert (FLASH in there) == (backend == "flash")
    assert any("flash" in name for name in back) == (backend == "flash")
    assert any("softmax" in name for name in there) == (backend == "math")


@every
@pytest.mark.parametrize("checkpointed", [False, True])
def test_networks_of_all_kinds_say_the_same_with_it(name: str, checkpointed: bool) -> None:
    gradients = []
    for backend in ON_CPU:
        model = built(name, attention=backend, checkpoint_blocks=checkpointed)
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        assert {layer.backend for layer in layers} == {backend}
        assert len(layers) == (4 if name == "ddt" else 2)
        out = model(*inputs())
        out.square().mean().backward()
        gradients.append([out.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_blocks_compile_once_with_it() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = built("plain", attention="math", checkpoint_blocks=True)
    expected = model(*inputs())
    model.compile_blocks(fullgraph=True, backend=counter)
    out = model(*inputs())
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_what_a_device_has_not_is_refused_with_what_it_has(backend: sdpa.Backend) -> None:
    with pytest.raises(ConfigError) as told:
        sdpa.check(backend, CPU, torch.bfloat16, 72, 16)
    assert str(told.value) == (
        f"model.attention: {backend} cannot compute attention on cpu in bfloat16 with heads of 72 channels and 16 "
        "tokens; flash and math can: name one of these, or auto, which leaves it to torch"
    )
    with pytest.raises(
        ConfigError, match=rf"{backend} cannot compute attention on cpu in float64 .*10 tokens"
    ):
        sdpa.attend(*tensors(), backend=backend)
    assert [name for name in sdpa.BACKENDS if sdpa.can(name, CPU, torch.float32, 64, 16)] == list(ON_CPU)


@pytest.mark.parametrize("backend", ["auto", *ON_CPU])
def test_what_a_device_has_is_taken(backend: sdpa.Backend) -> None:
    sdpa.check(backend, CPU, torch.float32, 64, 16)


def test_an_error_of_another_kind_is_torchs_own() -> None:
    q, k, v = tensors()
    with pytest.raises(RuntimeError, match="size"):
        sdpa.attend(q, k[..., :4], v, backend="math")


def test_a_size_may_have_heads_of_another_width() -> None:
    for size, head_width, heads in (("XL", 64, 18), ("XL", 128, 9), ("S", 96, 4)):
        dims = from_dict(DiTConfig, {"size": size, "head_width": head_width}).dims(32, 4, 1000)
        assert (dims.heads, dims.head_width) == (heads, head_width)
    with pytest.raises(ConfigError, match="head_width 64 does not divide the width 1000"):
        from_dict(DiTConfig, {"width": 1000, "depth": 2, "head_width": 64})


def test_stacks_are_all_that_attends() -> None:
    cfg = from_dict(DiTConfig, {"size": "nano", "registers": 3, "cond": [{"name": "class", "context": 2}]})
    assert [(s.sequence, s.head_width) for s in cfg.stacks(cfg.dims(8, 4, 10))] == [(21, 32)]
    ddt = built("ddt").cfg
    assert [s.head_width for s in ddt.stacks(ddt.dims(8, 4, 10))] == [8, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("head_width", [64, 72, 128])
def test_a_gpu_s_kernels_compute_the_same_eager_and_compiled(head_width: int) -> None:
    """All that the device has for bf16, of which flash and math are everywhere."""
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 256, head_width, generator=generator) for _ in range(3))
    exact = sdpa.attend(q.double(), k.double(), v.double())
    here = [x.to(device, torch.bfloat16).requires_grad_() for x in (q, k, v)]
    able = [name for name in sdpa.BACKENDS if sdpa.can(name, device, torch.bfloat16, head_width, 256)]
    assert {"flash", "math"} <= set(able)
    for backend in ("auto", *able):
        torch.compiler.reset()
        compiled = torch.compile(sdpa.attend, fullgraph=True)
        for attend in (sdpa.attend, compiled):
            out = attend(*here, None, backend)
            assert (out.cpu().double() - exact).norm() < 2e-2 * exact.norm(), backend
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), here)), backend
