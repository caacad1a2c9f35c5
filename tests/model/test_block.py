"""Blocks, each of the registry: identity at first, the reference's arithmetic, float32 where it counts, one graph."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dit.model.block import BLOCKS, AdaLNZero, AdaLNZeroBlock, Attention, OutputLayer
from dit.model.dims import Dims
from dit.model.norms import LayerNorm, RMSNorm

DIMS = Dims(
    width=32, depth=1, heads=4, mlp_width=96, patch=2, grid=(3, 2), channels=4, out_channels=4, num_classes=3
)
CONFIGS = {name: cls() for name, cls in BLOCKS.items()} | {"adaln_zero_qk": AdaLNZero(qk_norm=True)}
every_block = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def perturbed(module: nn.Module, std: float = 0.1) -> nn.Module:
    """The module with noise on every parameter, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, DIMS.tokens, DIMS.width, generator=generator)
    return x.to(dtype), torch.randn(2, DIMS.width, generator=generator).to(dtype)


@every_block
def test_a_block_with_its_zero_layers_at_zero_is_the_identity(config):
    block = config.build(DIMS)
    for layer in block.zero_layers():
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    x, c = inputs()
    assert torch.equal(block(x, c), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x, c), x)  # the residual is not rounded
    assert torch.equal(block.bfloat16()(x, c), x)


def layer_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + epsilon)


def reference_attention(attention: Attention, x: Tensor) -> Tensor:
    """One head after the other, in the reference's layout of the qkv rows."""
    (batch, tokens, width), heads = x.shape, attention.heads
    size = width // heads
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    out = torch.zeros(batch, tokens, width, dtype=x.dtype)
    for head in range(heads):
        q, k, v = (
            qkv[..., part * width + head * size : part * width + (head + 1) * size] for part in range(3)
        )
        if isinstance(attention.q_norm, RMSNorm):
            q, k = (
                a / torch.sqrt(a.square().mean(-1, keepdim=True) + 1e-6) * norm.gain
                for a, norm in ((q, attention.q_norm), (k, attention.k_norm))
            )
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(size), dim=-1)
        out[..., head * size : (head + 1) * size] = weights @ v
    return out @ attention.proj.weight.T + attention.proj.bias


def reference_block(block: AdaLNZeroBlock, x: Tensor, c: Tensor) -> Tensor:
    """Equations of arXiv 2212.09748, section 3.2, in the order of its code: shift, scale, gate; attention, MLP."""
    rows = (c @ block.modulation.weight.T + block.modulation.bias)[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = rows.split(x.shape[-1], dim=-1)
    x = x + gate1 * reference_attention(block.attention, layer_norm(x) * (1 + scale1) + shift1)
    h = (
        layer_norm(x, block.cfg.mlp_epsilon) * (1 + scale2) + shift2
    ) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return x + gate2 * (h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, {"mlp_epsilon": 0.1}])
def test_adaln_zero_computes_the_reference(fields):
    block = perturbed(AdaLNZero(**fields).build(DIMS).double())
    x, c = inputs(torch.float64)
    torch.testing.assert_close(block(x, c), reference_block(block, x, c), rtol=1e-10, atol=1e-10)


def test_the_output_layer_computes_the_reference():
    layer = perturbed(OutputLayer(DIMS, LayerNorm()).double())
    x, c = inputs(torch.float64)
    shift, scale = (c @ layer.modulation.weight.T + layer.modulation.bias)[:, None].chunk(2, dim=-1)
    expected = (layer_norm(x) * (1 + scale) + shift) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x, c), expected, rtol=1e-10, atol=1e-10)


@every_block
def test_a_large_residual_keeps_its_low_bits_under_bfloat16(config):
    """At 300 a bfloat16 stream steps by 2: float32 keeps what a block adds."""
    block = perturbed(config.build(DIMS), 0.02)
    x, c = inputs()
    x = x + 300.0
    exact = block(x, c) - x
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x, c)
    assert out.dtype == torch.float32
    assert (out - x - exact).norm() < 0.1 * exact.norm()
    out = block.bfloat16()(x, c)
    assert out.dtype == torch.float32
    assert (out - x - exact).norm() < 0.1 * exact.norm()


@every_block
@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_compiles_to_one_graph(config, autocast):
    """`fullgraph` raises at the first graph break; two blocks share one compilation."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x, c = inputs()
    for seed in range(2):
        torch.manual_seed(seed)
        block = config.build(DIMS)
        compiled = torch.compile(block.forward, fullgraph=True, backend=counter)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = block(x, c)
            torch.testing.assert_close(compiled(x, c), expected)
    assert counter.frame_count == 1


@pytest.mark.slow
@every_block
def test_a_block_compiled_by_inductor_has_the_same_gradients(config):
    torch.compiler.reset()
    block = perturbed(config.build(DIMS))
    x, c = inputs()
    compiled = torch.compile(block.forward, fullgraph=True)
    results = []
    for forward in (block.forward, compiled):
        block.zero_grad()
        out = forward(x, c)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in block.parameters())])
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)
