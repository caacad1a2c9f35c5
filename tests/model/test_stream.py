"""The residual stream in bfloat16: where it is, what it costs in accuracy, and that float32 is what it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dit.config import from_dict
from dit.model.block import AdaLNZero
from dit.model.dit import DiT
from dit.model.models import MODELS
from dit.model.modulation import FullRows
from tests.model.modern import COMPONENTS
from tests.model.test_block import perturbed

SIZE, CHANNELS, CLASSES = (4, 6), 3, 5
NETWORKS: dict[str, dict[str, Any]] = {
    name: COMPONENTS[name] for name in ("plain", "value residual", "registers", "class tokens", "many")
} | {"ddt": {"name": "ddt", "decoder_width": 48, "decoder_heads": 6}}
every = pytest.mark.parametrize("name", NETWORKS)


def built(name: str, **more: Any) -> DiT:
    values = {"name": "dit", "width": 32, "depth": 2, "heads": 4, "patch": 2, **NETWORKS[name], **more}
    cfg = from_dict(MODELS[values.pop("name")], values)
    model = cfg.build(SIZE, CHANNELS, CLASSES)
    assert isinstance(model, DiT)
    with torch.no_grad():  # the same weights whatever the key: the draws are made anew
        model.reset_parameters(torch.Generator().manual_seed(0))
    return perturbed(model, 0.05)


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = torch.randn(2, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.2, 0.7]), {"label": torch.tensor([1, -1])}


def said(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], set[torch.dtype]]:
    """What a network says under autocast, all gradients, and the dtypes in which tokens left its blocks."""
    dtypes: set[torch.dtype] = set()

    def note(module: nn.Module, given: Any, out: Any) -> None:
        dtypes.add((out[0] if isinstance(out, tuple) else out).dtype)

    hooks = [m.register_forward_hook(note) for m in model.modules() if hasattr(m, "attention")]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs())
    out.square().mean().backward()
    for hook in hooks:
        hook.remove()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, dtypes


@every
def test_values_and_gradients_are_those_of_float32_but_for_rounding(name: str) -> None:
    exact, gradients, wide = said(built(name))
    rough, roughly, narrow = said(built(name, residual="bfloat16"))
    assert (wide, narrow) == ({torch.float32}, {torch.bfloat16})
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < 2e-2 * exact.norm()
    assert roughly.keys() == gradients.keys()
    whole, other = (torch.cat([g.flatten() for g in found.values()]) for found in (gradients, roughly))
    assert (other - whole).norm() < 2e-2 * whole.norm()


@every
def test_checkpointing_keeps_values_and_gradients(name: str) -> None:
    (out, gradients, _), (again, same, _) = (
        said(built(name, residual="bfloat16", checkpoint_blocks=c)) for c in (False, True)
    )
    assert torch.equal(out, again)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(same[parameter], gradient)


def test_nothing_is_rounded_where_products_are_exact() -> None:
    plain, asked = built("many"), built("many", residual="bfloat16")
    assert torch.equal(plain(*inputs()), asked(*inputs()))


def test_a_network_of_bfloat16_parameters_has_it_without_autocast() -> None:
    model = built("plain", residual="bfloat16").bfloat16()
    seen = []
    model.blocks[0].register_forward_hook(lambda module, given, out: seen.append((given[0].dtype, out.dtype)))
    model(*inputs())
    assert seen == [(torch.bfloat16, torch.bfloat16)]


def test_a_block_adds_in_float32_and_rounds_once_a_half() -> None:
    """Without its second half a block gives exactly the rounded sum that a float32 stream gives."""
    dims = replace(built("plain").dims, depth=1)
    block = perturbed(AdaLNZero().build(dims))
    assert isinstance(block.modulation, FullRows)
    with torch.no_grad():  # the last of six rows is the gate of the MLP
        block.modulation.weight[-32:] = 0
        block.modulation.bias[-32:] = 0
    generator = torch.Generator().manual_seed(2)
    x, c = torch.randn(2, 6, 32, generator=generator).bfloat16(), torch.randn(2, 32, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, wide = block(x, c), block(x.float(), c)
    assert torch.equal(narrow, wide.bfloat16())
    assert not torch.equal(narrow.float(), wide)


def test_it_compiles_once_for_all_blocks_and_the_network_to_one_graph() -> None:
    torch.compiler.reset()
    expected = said(built("plain", residual="bfloat16"))
    counter = CompileCounterWithBackend("aot_eager")
    model = built("plain", residual="bfloat16")
    model.compile_blocks(fullgraph=True, backend=counter)
    out, _, dtypes = said(model)
    assert dtypes == {torch.bfloat16}
    assert counter.frame_count == 1
    torch.testing.assert_close(out, expected[0])
    whole = torch.compile(built("plain", residual="bfloat16"), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(whole(*inputs()).detach(), expected[0])
