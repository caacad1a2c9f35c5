"""Names, shapes and arguments of the reference's state dicts, there and back."""

from __future__ import annotations

import pytest
import torch

from dit.config import ConfigError
from dit.interop.outward import arguments_of, to_theirs
from dit.interop.weights import (
    Arguments,
    WeightsError,
    check,
    infer,
    network,
    parse_arguments,
    ratio_of,
    their_name,
    to_ours,
)
from dit.model.dit import DiTConfig
from tests.interop.reference import TINY, shapes, weights

# of models.py's constructors: width, depth, heads, and the parameters of /2 as the paper counts them
PAPER = {
    "S": (384, 12, 6, 32_963_360),
    "B": (768, 12, 12, 130_512_416),
    "L": (1024, 24, 16, 458_102_816),
    "XL": (1152, 28, 16, 675_129_632),
}


def on_meta(**arguments: int) -> dict[str, torch.Tensor]:
    """A state dict without numbers."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes(**arguments).items()}


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", PAPER)
def test_the_paper_models_are_known_by_their_shapes(size: str, patch: int) -> None:
    width, depth, heads, count = PAPER[size]
    state = on_meta(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    found = infer(state)
    assert found == Arguments(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    assert found.model() == DiTConfig(size=size, patch=patch, learn_sigma=True)
    check(state, found)
    if patch == 2:
        assert sum(t.numel() for t in state.values()) == count


def test_the_official_files_need_no_arguments() -> None:
    check(on_meta(), Arguments())
    assert infer(on_meta()) == Arguments()
    large = {"input_size": 64}  # 512 x 512 pixels
    assert infer(on_meta(**large)) == Arguments(**large)


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": 12},
        {"patch_size": 4},
        {"in_channels": 3},
        {"hidden_size": 48},
        {"depth": 11},
        {"mlp_ratio": 3.3},
        {"num_classes": 0},
        {"num_classes": 7},
        {"learn_sigma": False},
    ],
)
def test_every_argument_but_the_heads_is_in_the_shapes(change: dict) -> None:
    given = {**TINY, **change}
    found = infer(on_meta(**given), num_heads=4)
    assert found.shapes() == shapes(**given)
    assert {name: getattr(found, name) for name in given if name != "mlp_ratio"} == {
        k: v for k, v in given.items() if k != "mlp_ratio"
    }


@pytest.mark.parametrize("width", [20, 32, 44, 384])
def test_every_hidden_width_is_a_ratio_of_the_width(width: int) -> None:
    """In floating point hidden / width · width may be less than hidden."""
    hidden = range(1, 6 * width)
    assert [int(width * ratio_of(h, width)) for h in hidden] == list(hidden)


def test_a_model_without_label_dropout_gets_a_null_row_of_zeros() -> None:
    state = weights()
    label = "y_embedder.embedding_table.weight"
    state[label] = state[label][:10]
    assert infer(state, num_heads=4).num_classes == 9  # which nothing in the file contradicts
    arguments = infer(state, num_heads=4, num_classes=10)
    assert (arguments.num_classes, arguments.class_dropout_prob) == (10, 0.0)
    table = to_ours(state, arguments)["conditioners.0.table.weight"]
    assert torch.equal(table[:10], state[label])
    assert torch.equal(table[10], torch.zeros(32))


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_there_and_back_is_the_same_to_the_bit(learn_sigma: bool) -> None:
    state = weights(learn_sigma=learn_sigma)
    arguments = parse_arguments({**TINY, "learn_sigma": learn_sigma}, Arguments)
    model = network(to_ours(state, arguments), arguments)
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert arguments_of(model) == arguments
    back = to_theirs(model)
    assert back.keys() == state.keys() == shapes(**TINY).keys()
    for name, tensor in state.items():
        assert back[name].shape == tensor.shape, name
        assert torch.equal(back[name], tensor), name


def test_the_weights_are_copies_in_at_least_float32() -> None:
    state = weights()
    before = {name: t.clone() for name, t in state.items()}
    model = network(to_ours(state, parse_arguments(TINY, Arguments)), parse_arguments(TINY, Arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.position.zero_()
    assert all(torch.equal(state[name], before[name]) for name in state)
    narrow = {name: t.bfloat16() for name, t in before.items()}
    ours = to_ours(narrow, parse_arguments(TINY, Arguments))
    assert {t.dtype for t in ours.values()} == {torch.float32}
    wide = to_ours({name: t.double() for name, t in before.items()}, parse_arguments(TINY, Arguments))
    assert {t.dtype for t in wide.values()} == {torch.float64}


def test_a_position_table_that_is_not_the_computed_one_is_kept() -> None:
    """The reference's EMA averages the fixed table too, and it drifts by rounding."""
    state, arguments = weights(), parse_arguments(TINY, Arguments)
    assert "position" not in to_ours(state, arguments)
    drifted = {**state, "pos_embed": state["pos_embed"] * (1 + 1e-4)}
    ours = to_ours(drifted, arguments)
    model = network(ours, arguments)
    assert torch.equal(model.position, drifted["pos_embed"][0])
    assert torch.equal(model.state_dict()["position"], model.position)
    assert torch.equal(to_theirs(model)["pos_embed"], drifted["pos_embed"])
    rounded = {**state, "pos_embed": state["pos_embed"] + 1e-7}
    assert "position" not in to_ours(rounded, arguments)


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    state = weights()
    del state["blocks.1.attn.proj.bias"]
    state["blocks.0.attn.q_norm.weight"] = torch.zeros(8)
    state["pos_embed"] = state["pos_embed"][:, :4]
    with pytest.raises(WeightsError) as error:
        to_ours(state, parse_arguments(TINY, Arguments))
    said = str(error.value)
    assert "missing: blocks.1.attn.proj.bias (32,)" in said
    assert "unexpected: blocks.0.attn.q_norm.weight (8,)" in said
    assert "pos_embed: is (1, 4, 32), expected (1, 16, 32)" in said
    with pytest.raises(WeightsError, match=r"and 58 more like that\nThe shapes speak for depth=9$"):
        to_ours(weights(depth=9), parse_arguments(TINY, Arguments))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_sise": 4}, "did you mean hidden_size"),
        ({"depth": 0}, "depth"),
        ({"num_heads": 5}, "not a multiple of heads 5"),
        ({"input_size": 9}, "patch 2 does not divide"),
        ({"class_dropout_prob": 2}, "class_dropout_prob"),
    ],
)
def test_impossible_arguments_are_refused(change: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_arguments({**TINY, **change}, Arguments).shapes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_embedder.proj.weight": None}, r"x_embedder.proj.weight are missing; there are pos_embed"),
        ({"x_embedder.proj.weight": torch.zeros(32, 16)}, r"have \[2, 3, 2, 2, 2\] axes"),
        ({"pos_embed": torch.zeros(1, 15, 32)}, "15 positions, which is no square"),
    ],
)
def test_what_is_no_dit_is_refused(change: dict, says: str) -> None:
    state = {name: t for name, t in (weights() | change).items() if t is not None}
    with pytest.raises(WeightsError, match=says):
        infer(state, num_heads=4)


def test_heads_of_an_unknown_width_must_be_said() -> None:
    with pytest.raises(WeightsError, match="width 32 is not known: give --num_heads"):
        infer(weights())


def test_no_two_of_our_names_become_one() -> None:
    names = [name for name, _ in DiTConfig(size="nano").build(8, 4, 10).named_parameters()]
    assert len({their_name(name) for name in names}) == len(names)
