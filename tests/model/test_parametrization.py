"""μP: the standard network at the base width, and at others the table of arXiv 2203.03466 for Adam (table 3)."""

import math

import pytest
import torch
from torch import nn

from dit.config import ConfigError, from_dict, to_dict
from dit.interop.outward import arguments_of
from dit.interop.weights import WeightsError
from dit.model.block import BLOCKS
from dit.model.cost import cost
from dit.model.dit import DiT, DiTConfig
from dit.model.parametrization import PARAMETRIZATIONS, MuP, scale
from dit.train.optim import parameter_groups

BASE, RATIO = 16, 8
# what arXiv 2203.03466 calls the tensors of each kind, by the ends of their names
INPUT = ("patch_embed.proj.weight", "time_embed.fc1.weight", "table.weight")
OUTPUT = ("output.proj.weight",)


def config(width, heads=None, block="adaln_zero", **parametrization):
    given = {"parametrization": {"name": "mup", **parametrization}} if parametrization else {}
    return from_dict(
        DiTConfig, {"width": width, "depth": 1, "heads": heads or width // 8, "block": block, **given}
    )


def built(cfg):
    return cfg.build(8, 4, 10, torch.Generator().manual_seed(0))


def kind_of(name, parameter):
    if parameter.ndim == 1:
        return "vector"
    return "input" if name.endswith(INPUT) else "output" if name.endswith(OUTPUT) else "hidden"


def factors(model):
    """name -> (rate, decay, eps), as the optimizer's groups have them, over those of the configuration."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (g["lr_factor"], g["weight_decay"] / 0.5, g.get("eps", 1e-6) / 1e-6)
        for g in parameter_groups(model, 0.5, eps=1e-6)
        for p in g["params"]
    }


@pytest.mark.parametrize("block", BLOCKS.names())
def test_at_the_base_width_it_is_the_standard_network_to_the_bit(block):
    standard, mup = built(config(BASE, block=block)), built(config(BASE, block=block, base_width=BASE))
    assert all(torch.equal(p, mup.get_parameter(name)) for name, p in standard.named_parameters())
    assert [{**g, "params": len(g["params"])} for g in parameter_groups(mup, 0.5)] == [
        {**g, "params": len(g["params"])} for g in parameter_groups(standard, 0.5)
    ]


@pytest.mark.parametrize("block", BLOCKS.names())
def test_rates_decay_and_eps_are_table_3s(block):
    model = built(config(BASE * RATIO, block=block, base_width=BASE))
    expected = {
        "input": (1.0, 1.0, 1 / RATIO),
        "hidden": (1 / RATIO, RATIO, 1 / RATIO),
        "output": (1 / RATIO, RATIO, 1.0),
    }
    found = factors(model)
    for name, p in model.named_parameters():
        if (kind := kind_of(name, p)) != "vector":
            assert found[name] == pytest.approx(expected[kind]), name
        else:  # as the outputs that it belongs to grow: the last layer's bias and gains of heads do not
            grows = 1.0 if name.endswith(("output.proj.bias", "gain")) else 1 / RATIO
            assert found[name] == pytest.approx((1.0, 0.0, grows)), name


def test_initial_weights_are_as_large_as_table_3_has_them():
    """The base's standard deviation in input matrices, that over √ratio in hidden ones; zero stays zero."""
    base, wide = built(config(BASE * 4)), built(config(BASE * 4 * RATIO, base_width=BASE * 4))
    for name, p in wide.named_parameters():
        ours, theirs = float(p.detach().std()), float(base.get_parameter(name).detach().std())
        if p.ndim == 1 or theirs == 0:
            assert ours == theirs == 0, name
        else:
            expected = theirs if kind_of(name, p) == "input" else theirs / math.sqrt(RATIO)
            assert ours == pytest.approx(expected, rel=0.08), name  # 640 numbers at least: 3 % a deviation


def test_an_output_matrix_that_does_not_start_at_zero_is_scaled_by_the_ratio():
    """Of its initial variance table 3 has 1/fan_in², which here starts at zero; a network may not."""

    class Open(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.last = nn.Linear(width, 3)
            nn.init.ones_(self.last.weight)

        def initial_std(self, module):
            return 1.0

    model = Open(BASE * RATIO)
    scale(model, Open(BASE))
    assert torch.equal(model.last.weight, torch.full_like(model.last.weight, 1 / RATIO))


def test_a_wide_model_narrower_than_the_base_trains_faster():
    name = "blocks.0.mlp.fc1.weight"
    assert factors(built(config(BASE, base_width=BASE * 2)))[name] == pytest.approx((2.0, 0.5, 2.0))


def test_a_matrix_of_unknown_axes_is_refused_by_name():
    class Raw(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.mix = nn.Parameter(torch.zeros(width, width))

        def initial_std(self, module):
            return 1.0

    model = nn.Module()
    model.inner, model.initial_std = Raw(8), Raw(8).initial_std
    with pytest.raises(ConfigError, match=r"inner\.mix, \(8, 8\) of Raw.*parametrization: standard"):
        scale(model, model)


def test_logits_go_by_the_heads_width_and_are_the_standard_ones_where_that_stays():
    assert built(config(64, heads=8, base_width=16)).blocks[0].attention.scale is None
    assert built(config(64, heads=8, base_width=16, base_head_width=8)).blocks[0].attention.scale is None
    scaled = built(config(64, heads=2, base_width=16, base_head_width=8)).blocks[0].attention
    assert scaled.scale == pytest.approx(math.sqrt(8) / 32)
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    q, k, v = (a.unflatten(-1, (2, 32)).transpose(1, 2) for a in scaled.qkv(x).chunk(3, dim=-1))
    weights = torch.softmax(q @ k.transpose(-1, -2) * math.sqrt(8) / 32, dim=-1)
    expected = scaled.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(scaled(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_added_to_the_network():
    """So exports, checkpoints and costs are those of any other."""
    standard, mup = config(64), config(64, base_width=16)
    assert built(standard).state_dict().keys() == built(mup).state_dict().keys()
    assert cost(standard, 8, 4, 10).forward_flops == cost(mup, 8, 4, 10).forward_flops
    assert arguments_of(built(mup)) == arguments_of(built(standard))


def test_the_reference_has_no_other_scale_of_logits():
    with pytest.raises(WeightsError, match="base_head_width"):
        arguments_of(built(config(64, heads=2, base_width=16, base_head_width=8)))


@pytest.mark.parametrize(("given", "complaint"), [
    ({}, "base_width"),
    ({"base_width": 18}, r"base_width.*18 is not a multiple of 4"),
    ({"base_width": 0}, "base_width"),
    ({"base_width": 16, "base_head_width": 0}, "base_head_width"),
])  # fmt: skip
def test_what_makes_no_base_is_refused(given, complaint):
    with pytest.raises(ConfigError, match=complaint):
        from_dict(DiTConfig, {"size": "nano", "parametrization": {"name": "mup", **given}})


def test_what_older_configurations_lack_is_the_standard_one():
    values = {key: value for key, value in to_dict(DiTConfig()).items() if key != "name"}
    assert values.pop("parametrization") == {"name": "standard"}
    assert from_dict(DiTConfig, values) == DiTConfig()


@pytest.mark.parametrize(("name", "cls"), PARAMETRIZATIONS.items())
def test_every_parametrization_builds_and_says_what_it_does(name, cls):
    given = {"name": name, **({"base_width": 16} if cls is MuP else {})}
    cfg = from_dict(DiTConfig, {"size": "nano", "parametrization": given})
    assert isinstance(built(cfg), DiT)
    about = cfg.parametrization.about(cfg.dims(8, 4, 10))
    assert about is None if name == "standard" else "rate / 4" in about
