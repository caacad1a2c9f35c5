"""Components of modern networks, each alone and many together: at first nothing, every number trained and counted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit.config import ConfigError, from_dict
from dit.model.cost import cost
from dit.model.dit import DiT, DiTConfig
from dit.model.rope import ROPES, Alternating, Halves, rotate
from tests.model.modern import COMPONENTS, modern
from tests.model.test_block import perturbed

every = pytest.mark.parametrize("name", COMPONENTS)
SIZE, CHANNELS, CLASSES = (4, 6), 3, 5


def built(name: str, **more: object) -> DiT:
    return modern(name, **more).build(SIZE, CHANNELS, CLASSES, torch.Generator().manual_seed(0))


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, CHANNELS, *SIZE, generator=generator)
    return x, torch.tensor([0.2, 0.7]), {"label": torch.tensor([1, -1])}


@every
def test_says_nothing_at_first(name: str) -> None:
    assert torch.equal(built(name)(*inputs()), torch.zeros(2, CHANNELS, *SIZE))


@every
def test_every_parameter_has_a_gradient_that_checkpointing_keeps(name: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = perturbed(built(name, checkpoint_blocks=checkpointed))
        model(*inputs()).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        assert gradient is not None, parameter
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(gradients[1][parameter], gradient)


@every
def test_parameters_and_flops_are_counted(name: str) -> None:
    cfg = modern(name)
    found = cost(cfg, SIZE, CHANNELS, CLASSES)
    with torch.device("meta"):
        model = cfg.build(SIZE, CHANNELS, CLASSES)
        x, t, label = torch.empty(3, CHANNELS, *SIZE), torch.empty(3), torch.zeros(3).long()
    assert sum(p.numel() for p in model.parameters()) == found.parameters.trainable
    with FlopCounterMode(display=False) as counter:
        model(x, t, {"label": label})
    assert counter.get_total_flops() == 3 * found.forward_flops


@every
def test_changes_what_a_trained_network_says(name: str) -> None:
    """A component that is on is not only on paper."""
    found, plain = (perturbed(built(n))(*inputs()) for n in (name, "plain"))
    assert (name == "plain") == torch.equal(found, plain)
    assert torch.isfinite(found).all()


@every
def test_maximal_updates_know_every_parameter(name: str) -> None:
    """Of twice the base width all matrices but the inputs' train at another rate; of the base width nothing changes."""
    base = {"name": "mup", "base_width": 32}
    same, plain = built(name, parametrization=base), built(name)
    assert all(torch.equal(p, q) for p, q in zip(same.parameters(), plain.parameters(), strict=True))
    wide = built(name, parametrization={"name": "mup", "base_width": 16})
    hidden = [p for b in wide.blocks for p in b.mlp.parameters() if p.ndim == 2]
    rates = [getattr(p, "lr_factor", 1.0) for p in hidden]
    assert rates == pytest.approx([0.5] * len(hidden), rel=0.02)  # a gate's width is rounded


@every
def test_float64_and_bfloat16_agree(name: str) -> None:
    model = perturbed(built(name), 0.05)
    x, t, cond = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, t, cond)
    exact = model.double()(x.double(), t.double(), cond)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.05 * exact.norm()


# --- rotary positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROPES.names())
def test_products_of_turned_channels_know_distances_alone(name: str) -> None:
    """The same queries and keys everywhere: their products depend on the steps down and across between two tokens."""
    grid, width = (5, 5), 8
    table = ROPES[name]().table(grid, width)
    q, k = torch.randn(2, 1, 1, 1, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = [rotate(a.expand(1, 1, 25, width), table)[0, 0] for a in (q, k)]
    products = (turned[0] @ turned[1].T).view(5, 5, 5, 5)
    for down in range(-2, 3):
        for across in range(-2, 3):
            same = [
                products[i, j, i + down, j + across]
                for i in range(5)
                for j in range(5)
                if 0 <= i + down < 5 and 0 <= j + across < 5
            ]
            torch.testing.assert_close(torch.stack(same), same[0].expand(len(same)))
    assert products.std() > 0.01


def test_turning_keeps_lengths_and_dtypes() -> None:
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, Halves().table((2, 3), 8).float())
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=0.02, atol=0.0)


def test_angles_are_those_of_the_papers() -> None:
    """Of the token in row 1, column 2, with two frequencies a side: 1 and 1/100."""
    halves = Halves().angles((2, 3), 2)[5]
    torch.testing.assert_close(halves, torch.tensor([1.0, 0.01, 2.0, 0.02], dtype=torch.float64))
    alternating = Alternating(length=4.0).angles((2, 3), 2)[5]
    torch.testing.assert_close(alternating, torch.tensor([4.0, 4.0, 0.04, 0.04], dtype=torch.float64))
    pressed = Halves(trained_rows=2).angles((4, 4), 2)[-1]
    torch.testing.assert_close(pressed, torch.tensor([1.5, 0.015, 1.5, 0.015], dtype=torch.float64))


def test_tokens_beside_the_image_are_not_turned() -> None:
    model = built("registers and rope")
    assert model.rotation is not None
    assert torch.equal(model.rotation[0, :3], torch.ones(3, 4))
    assert torch.equal(model.rotation[1, :3], torch.zeros(3, 4))
    expected = Halves().table((2, 3), 8)
    torch.testing.assert_close(model.rotation[:, 3:], expected.float())


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"width": 24, "heads": 4, "block": {"rope": "halves"}}, "heads of a multiple of 4 channels"),
        ({"heads": 4, "head_width": 8}, "leave out one of the two"),
        ({"head_width": 7}, "does not divide the width"),
        ({"heads": 4, "context_from": 1}, "needs some: cond"),
        (
            {"heads": 4, "context_from": 2, "cond": [{"name": "class", "context": 2}]},
            "which of the 2 blocks",
        ),
        (
            {
                "heads": 4,
                "context_from": 1,
                "cond": [{"name": "class", "context": 2}],
                "block": {"value_residual": True},
            },
            "the same tokens in every block",
        ),
        ({"heads": 4, "block": {"mlp": "swiglo"}}, "swiglu"),
        ({"heads": 4, "block": {"norm": "none"}}, "unknown norm"),
        ({"heads": 4, "time_period": 0}, "time_period: expected"),
        ({"heads": 4, "registers": -1}, "expected 0 or more, got -1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(fields: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_dict(DiTConfig, {"width": 32, "depth": 2, "patch": 2, **fields}).dims(SIZE, CHANNELS, CLASSES)


@pytest.mark.parametrize(
    ("word", "name"), [(True, "rms"), (False, "none"), ("true", "rms"), ("layer", "layer")]
)
def test_a_switch_of_before_is_still_understood(word: object, name: str) -> None:
    cfg = from_dict(DiTConfig, {"size": "nano", "block": {"name": "adaln_zero", "qk_norm": word}})
    assert type(cfg.block.qk_norm).registered_name == name


def test_a_size_may_have_heads_of_another_width() -> None:
    assert DiTConfig(size="XL", head_width=64).dims(32, 4, 1000).heads == 18
    assert DiTConfig(size="XL").dims(32, 4, 1000).head_width == 72
    assert math.isclose(
        cost(DiTConfig(size="XL", head_width=64), 32, 4, 1000).multiply_adds / 1e9, 118.6, rel_tol=1e-3
    )
