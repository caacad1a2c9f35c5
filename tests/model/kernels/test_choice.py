"""The key `model.kernels` without a GPU: the operations' references, one graph, less kept, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks

from dit.config import ConfigError, from_dict
from dit.model.block import AdaLNZero
from dit.model.dit import DiTConfig
from dit.model.kernels import activation, heads, residual
from dit.model.kernels.choice import KERNELS, Kerneled, Triton, use
from dit.model.kernels.running import on_triton
from dit.model.mlp import MLPS, Mlp, SwiGlu
from dit.model.rope import Halves
from tests.model.kernels import oracles
from tests.model.kernels.oracles import EPSILON, compare, doubled, drawn
from tests.model.modern import COMPONENTS
from tests.model.test_block import DIMS, inputs, perturbed
from tests.model.test_modern import built
from tests.model.test_modern import inputs as images

MANY = AdaLNZero(
    **from_dict(AdaLNZero, {"norm": "rms", "qk_norm": "rms", "mlp": "swiglu", "shift": False}).__dict__
    | {"rope": Halves()}
)


@pytest.fixture(autouse=True)
def references() -> None:
    """On the CPU the operations are their references here; cases.py tests the kernels."""
    assert not on_triton(torch.empty(0))


# --- the references' formulas of gradients, against autograd -----------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("has_norm", [True, False])
def test_the_references_gradients_of_a_half_block(centred: bool, has_norm: bool) -> None:
    given: list[Tensor | None] = [drawn(2, 5, 12), drawn(2, 5, 12, seed=1)]
    given += [drawn(2, 12, seed=i) if i == 2 or has_norm else None for i in (2, 3, 4)]
    exact = doubled(*given)
    found = residual.residual(*given, epsilon=EPSILON, centred=centred)[: 1 + has_norm]  # type: ignore[arg-type]
    compare(found, given, oracles.half_block(*exact, centred), exact)  # type: ignore[arg-type]


@pytest.mark.parametrize("gated", [True, False])
def test_the_references_gradients_of_an_activation(gated: bool) -> None:
    given = [drawn(7, 10), drawn(10, seed=1), drawn(3, 5 if gated else 10, seed=2), drawn(3, seed=3)]
    exact: Any = doubled(*given)
    expected = oracles.linear(oracles.activated(exact[0], exact[1], gated), exact[2], exact[3])
    compare([activation.activated_linear(*given, gated=gated)], given, [expected], exact)


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_the_references_gradients_of_heads(norm: str) -> None:
    given: list[Any] = [
        drawn(2, 5, 3, 2, 8),
        *(drawn(2, 8, seed=i) if norm != "none" else None for i in (1, 2)),
    ]
    angles = drawn(5, 4).detach()
    exact: Any = doubled(*given)
    expected = [
        oracles.head(exact[0][:, :, i], *(g if g is None else g[i] for g in exact[1:]), angles.double(), norm)
        for i in range(2)
    ]
    table = torch.stack([angles.cos(), angles.sin()])
    how: Any = {"epsilon": EPSILON, "normed": norm != "none", "centred": norm == "layer"}
    compare(
        heads.normed_turned_heads(*given, table, **how), given, [*expected, exact[0][:, :, 2]], exact
    )  # fmt: skip


f32, b16 = torch.float32, torch.bfloat16
OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "half block": (
        residual._residual,
        (drawn(2, 3, 8), drawn(2, 3, 8), drawn(2, 8), drawn(2, 8), drawn(2, 8), 1e-6, True, f32, b16),
    ),
    "norm": (residual._residual, (drawn(2, 3, 8), None, None, drawn(2, 8), None, 1e-6, False, f32, f32)),
    "gelu": (activation.activation, (drawn(5, 8), drawn(8), False)),
    "swiglu": (activation.activation, (drawn(5, 8), None, True)),
    "heads": (
        heads.queries_keys,
        (drawn(2, 3, 3, 2, 8).detach(), drawn(2, 8).detach(), None, drawn(2, 3, 4).detach(), 1e-6, True, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_what_they_tell_the_compiler(name: str) -> None:
    """Torch's own check: schema, shapes without data, autograd, and both traced with dynamic shapes."""
    operation, given = OPERATIONS[name]
    torch.library.opcheck(operation, given)


# --- networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPONENTS)
def test_networks_compute_and_learn_the_same(name: str) -> None:
    """Through the operations' references, with and without checkpointing; and they are taken."""
    found = []
    for kernels, checkpointed in (("plain", False), ("triton", False), ("triton", True)):
        model = perturbed(built(name, kernels=kernels, checkpoint_blocks=checkpointed))
        out = model(*images())
        names = _nodes(out)
        assert ("ActivatedLinearBackward" in names) == (kernels == "triton")
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8


def _nodes(out: Tensor) -> set[str]:
    """Names of the steps of a backward pass."""
    names, ahead, seen = set(), [out.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            ahead += [n for n, _ in node.next_functions]
    return names


@pytest.mark.parametrize(("block", "autocast"), [(AdaLNZero(), True), (MANY, False)], ids=["plain", "many"])
def test_a_block_compiles_to_one_graph(block: AdaLNZero, autocast: bool) -> None:
    """`fullgraph` raises at the first graph break; values and gradients are the eager ones, two blocks share one."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x, c = inputs()
    turns = {} if block.rope is None else {"rotation": block.rope.table(DIMS.grid, DIMS.head_width).float()}
    for _ in range(2):
        module = perturbed(block.build(DIMS))
        use(module, Triton())
        results = []
        for run in (module.forward, torch.compile(module.forward, fullgraph=True, backend=counter)):
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = run(x, c, **turns)
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad for p in module.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("kind", "kept"), [(Mlp, 1), (SwiGlu, 2)])
def test_an_mlp_keeps_its_first_product_alone(kind: Callable[..., Any], kept: int) -> None:
    """Of its hidden width; plain, GELU's input and output, and SwiGLU's four."""
    tokens, width, hidden = 6, 4, 40
    counts = []
    for kernels in ("triton", "plain"):
        module = kind(width, hidden)
        use(module, KERNELS[kernels]())
        weights, sizes = {p.data_ptr() for p in module.parameters()}, {}

        def pack(kept: Tensor, weights: set[int] = weights, sizes: dict[int, int] = sizes) -> Tensor:
            if kept.data_ptr() not in weights:
                sizes[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes() // kept.itemsize
            return kept

        with saved_tensors_hooks(pack, lambda kept: kept):
            out = module(torch.randn(1, tokens, width))
        counts.append(sum(size for size in sizes.values() if size >= tokens * hidden) // (tokens * hidden))
        assert out.shape == (1, tokens, width)
    assert counts == [kept, 2 * kept]


# --- the key ---------------------------------------------------------------------------------------------------


def test_the_key_reaches_every_module_and_is_plain_by_default() -> None:
    for name, cls in KERNELS.items():
        model = built("many", kernels=name)
        reached = [m for m in model.modules() if isinstance(m, Kerneled)]
        assert len(reached) == 3 * len(model.blocks)
        assert {type(m.kernels) for m in reached} == {cls}
    assert from_dict(DiTConfig, {"size": "nano"}).kernels == KERNELS["auto"]()
    x, t, cond = images()
    assert torch.equal(*(perturbed(built("many", kernels=k))(x, t, cond) for k in ("auto", "plain")))


def test_triton_without_a_gpu_is_refused_and_the_others_are_not() -> None:
    cpu = torch.device("cpu")
    for name, cls in KERNELS.items():
        if name != "triton":
            cls().check(cpu)
    with pytest.raises(
        ConfigError, match=r"model\.kernels: triton .*(device is cpu|not installed).*kernels: auto"
    ):
        Triton().check(cpu)


@pytest.mark.parametrize("cls", [cls for _, cls in MLPS.items()])
def test_layers_that_are_more_than_their_weights_are_called(cls: Callable[[], Any]) -> None:
    module, called = cls().build(DIMS), []
    use(module, Triton())
    module.fc1.register_forward_hook(lambda *_: called.append("hook"))
    module(torch.randn(1, 2, DIMS.width))
    assert called == ["hook"]
    module = cls().build(DIMS)
    use(module, Triton())

    class Counted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            called.append("class")
            return super().forward(input)

    module.fc2 = Counted(module.fc2.in_features, DIMS.width)
    module(torch.randn(1, 2, DIMS.width))
    assert called == ["hook", "class"]


def test_a_norm_of_another_kind_takes_the_plain_path() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    kernels, x, scale = Triton(), torch.randn(2, 3, 8), torch.zeros(2, 1, 8)
    normed = partial(kernels.normed, shift=None, scale=scale, weight=torch.empty(8, 8))
    assert torch.equal(normed(x, Half())[1], x / 2)
    y = kernels.added_normed(x, torch.ones(2, 1, 8), x, Half(), None, scale, torch.empty(8, 8))[1]
    assert torch.equal(y, x)
