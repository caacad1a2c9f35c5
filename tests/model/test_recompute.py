"""Recomputation: the same losses and gradients to the bit, less memory, and fewer operations than all of them again."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit.config import ConfigError
from dit.model.block import AdaLNZero
from dit.model.ddt import DDTConfig
from dit.model.dit import DiTConfig
from dit.model.mlp import SwiGluMlp
from dit.model.modulation import MODULATIONS
from dit.model.norms import RootMeanSquare
from dit.model.recompute import NOTHING, Recompute, ways
from dit.model.rope import ROPES

SHAPE = {"width": 36, "depth": 3, "heads": 3, "patch": 2}
MODELS = {
    "modern": DiTConfig(
        **SHAPE,
        registers=3,
        block=AdaLNZero(
            norm=RootMeanSquare(),
            qk_norm=RootMeanSquare(),
            mlp=SwiGluMlp(),
            rope=ROPES["halves"](),
            value_residual=True,
        ),
    ),
    **{kind: DiTConfig(**SHAPE, block=AdaLNZero(modulation=cls())) for kind, cls in MODULATIONS.items()},
    "ddt": DDTConfig(**SHAPE, decoder_depth=2, decoder_width=48, block=AdaLNZero(rope=ROPES["halves"]())),
}
CHOICES = [(True, "input"), (2, "products"), (4, "products")]


def model_of(name, dtype=torch.float32):
    """With weights that start at zero drawn too, or most gradients would be zero."""
    torch.manual_seed(0)
    model = MODELS[name].build(12, 4, 10).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def outcome(model, recompute, autocast=False, taps=(2,)):
    """Loss and all gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 12, 12, generator=generator)
    model.recompute = recompute
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        said, tapped = model(x, torch.rand(3, generator=generator), {"label": torch.arange(3)}, taps)
    loss = said.square().mean() + sum(h.square().mean() for h in tapped)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def products(model, recompute):
    """FLOPs of the matrix products in both passes."""
    with FlopCounterMode(display=False) as counter:
        outcome(model, recompute)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "autocast"), [*((name, False) for name in MODELS), ("modern", True), ("ddt", True)]
)
def test_losses_and_gradients_are_those_without_recomputation_to_the_bit(name, autocast):
    model = model_of(name)
    loss, gradients = outcome(model, NOTHING, autocast)
    total = MODELS[name].blocks
    for blocks, keep in CHOICES:
        found, theirs = outcome(model, Recompute.of(min(blocks, total), keep, total), autocast)
        assert torch.equal(found, loss)
        assert theirs.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert torch.equal(theirs[parameter], gradient), (parameter, blocks, keep)


@pytest.mark.parametrize("name", ["full", "modern", "ddt"])
def test_kept_products_are_computed_once_and_dropped_ones_twice(name):
    model = model_of(name)
    total = MODELS[name].blocks
    whole = products(model, NOTHING)
    assert products(model, Recompute(None, "products")) == whole
    one, every = (products(model, Recompute(blocks)) for blocks in (1, None))
    assert whole < one < every
    if name == "full":  # its blocks are alike
        assert every - whole == total * (one - whole)


def test_what_a_configuration_says_is_what_is_done():
    assert DiTConfig(**SHAPE).recompute == NOTHING
    assert [DiTConfig(**SHAPE, checkpoint_blocks=True).recompute.at(i) for i in range(3)] == ["input"] * 3
    cfg = DiTConfig(**SHAPE, checkpoint_blocks=2, checkpoint_keep="products")
    assert [cfg.recompute.at(i) for i in range(3)] == ["products", "products", None]
    assert cfg.build(12, 4, 10).recompute == Recompute(2, "products")
    assert [MODELS["ddt"].recompute.after(3).at(i) for i in range(2)] == [None, None]
    assert [Recompute(4).after(3).at(i) for i in range(2)] == ["input", None]
    assert DDTConfig(**SHAPE, checkpoint_blocks=5).recompute.count(5) == 5
    with pytest.raises(ConfigError, match="checkpoint_blocks is 4, and there are 3 blocks"):
        DiTConfig(**SHAPE, checkpoint_blocks=4)
    with pytest.raises(ConfigError, match="checkpoint_keep"):
        DiTConfig(**SHAPE, checkpoint_keep="norms")


def test_ways_go_from_no_work_to_the_whole_forward_pass():
    found = list(ways(4))
    work = [way.work(4) for way in found]
    assert (found[0], found[-1]) == (NOTHING, Recompute(4))
    assert work == sorted(work)
    assert len(set(found)) == 9
    assert found[1] == Recompute(1, "products")


def test_compiled_blocks_that_keep_products_are_left_to_the_compiler():
    model = model_of("full")
    loss, gradients = outcome(model, NOTHING)
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    for recompute in (Recompute(2), Recompute(None, "products")):
        found, theirs = outcome(model, recompute)
        assert torch.allclose(found, loss, rtol=1e-6)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(theirs[parameter], gradient, rtol=1e-5, atol=1e-7)
