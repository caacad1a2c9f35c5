"""The classifier of noisy latents: it starts knowing nothing, and sees the noise level, every place and no label."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, from_dict, to_dict
from dit.model.classifier import Classifier, ClassifierConfig
from dit.model.dit import DiTConfig
from dit.model.sizes import SIZES

X, TIME = (
    torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([1.0, 500.0, 999.0]),
)


def stirred(**fields: object) -> Classifier:
    """A small one whose weights are random everywhere."""
    torch.manual_seed(0)
    model = from_dict(ClassifierConfig, {"size": "nano", **fields}).build(8, 4, 10)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_a_new_one_finds_all_classes_as_likely() -> None:
    logits = ClassifierConfig(size="nano").build(8, 4, 10)(X, TIME, {})
    assert logits.shape == (3, 10)
    assert torch.equal(logits, torch.zeros(3, 10))


def test_it_looks_at_every_place() -> None:
    """Also while its blocks do nothing, so that no place tells another of itself."""
    model = ClassifierConfig(size="nano").build(8, 4, 10)
    torch.nn.init.normal_(model.output.proj.weight, std=0.2)
    logits = model(X, TIME, {})
    for place in ((0, 0), (3, 4), (7, 7)):
        changed = X.clone()
        changed[:, :, place[0], place[1]] += 1.0
        assert not torch.allclose(model(changed, TIME, {}), logits, atol=1e-4)


def test_it_learns_from_the_first_step() -> None:
    model = ClassifierConfig(size="nano").build(8, 4, 10)
    torch.nn.functional.cross_entropy(model(X, TIME, {}), torch.tensor([0, 1, 2])).backward()
    assert float(model.output.proj.weight.grad.abs().max()) > 0


def test_every_place_and_the_time_matter_and_a_condition_does_not() -> None:
    model = stirred().eval()
    logits = model(X, TIME, {})
    for changed in (X.flip(0), X.flip(-1), X.roll(2, dims=2), X + 0.1):
        assert not torch.allclose(model(changed, TIME, {}), logits, atol=1e-3)
    assert not torch.allclose(model(X, TIME.flip(0), {})[0], logits[0], atol=1e-3)
    assert torch.equal(model(X, TIME, {"label": torch.tensor([1, 2, 3])}), logits)
    torch.testing.assert_close(model(X[1:2], TIME[1:2], {}), logits[1:2])


def test_its_gradient_in_x_is_that_of_finite_differences_with_and_without_recomputing() -> None:
    weight, found = torch.randn(3, 10, generator=torch.Generator().manual_seed(1)).double(), []
    for recompute in (False, True):
        model = stirred(checkpoint_blocks=recompute).double()
        leaf = X.double().requires_grad_()
        found.append(torch.autograd.grad((model(leaf, TIME.double(), {}) * weight).sum(), leaf)[0])
    torch.testing.assert_close(*found)
    step = torch.zeros_like(leaf)
    step[1, 2, 3, 4] = 1e-5
    with torch.no_grad():
        up, down = ((model(leaf + s, TIME.double(), {}) * weight).sum() for s in (step, -step))
    assert float(found[0][1, 2, 3, 4]) == pytest.approx(float(up - down) / 2e-5, rel=1e-4)


def test_logits_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert stirred()(X, TIME, {}).dtype == torch.float32


@pytest.mark.parametrize("size", ["nano", "micro"])
def test_a_size_is_that_of_the_model(size: str) -> None:
    """The DiT's trunk to the parameter: all but the output and the label table."""
    ours = ClassifierConfig(size=size).build(8, 4, 10)
    theirs = DiTConfig(size=size, cond=()).build(8, 4, 10)

    def trunk(model: torch.nn.Module) -> dict[str, torch.Size]:
        return {n: p.shape for n, p in model.named_parameters() if not n.startswith("output.")}

    assert trunk(ours) == trunk(theirs)
    assert len(ours.blocks) == SIZES[size].depth


@pytest.mark.parametrize(
    ("fields", "classes", "says"),
    [
        ({"size": "XXL"}, 10, "did you mean"),
        ({"size": "nano", "width": 8}, 10, "leave out one of the two"),
        ({"width": 8}, 10, "give width, depth and heads"),
        ({"size": "nano", "learn_sigma": True}, 10, "learn_sigma: unknown key"),
        ({"size": "nano", "patch": 3}, 10, "patch 3 does not divide"),
        ({"size": "nano"}, 1, "at least two classes, these have 1"),
        ({"size": "nano"}, 0, "at least two classes, these have 0"),
    ],
)
def test_what_cannot_be_built_is_refused(fields: dict, classes: int, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(ClassifierConfig, fields).build(8, 4, classes)
    assert says in str(error.value)


def test_it_is_its_own_configuration() -> None:
    cfg = ClassifierConfig(size="nano", mlp_ratio=2.0)
    assert from_dict(ClassifierConfig, to_dict(cfg)) == cfg


def test_it_takes_rectangles() -> None:
    wide: Tensor = torch.randn(2, 4, 8, 16)
    assert ClassifierConfig(size="nano").build((8, 16), 4, 3)(wide, TIME[:2], {}).shape == (2, 3)
