"""Every item of the GPU benchmark runs at toy size on a CPU, and gives figures that JSON can hold."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from dit.bench.gpu import training
from dit.bench.gpu.item import Found, Item, Place
from dit.bench.gpu.items import ITEMS
from dit.bench.gpu.training import losses
from dit.bench.speed.steppers import OurStep, Setting, StepBench
from dit.config import from_dict
from dit.model.cost import cost
from dit.model.dit import DiTConfig
from dit.ranks import group


def kind(item: Item) -> object:
    """What it runs, but for the model's size, which a toy has not."""
    if not isinstance(item.run, partial):
        return item.run
    rest = {key: value for key, value in item.run.keywords.items() if key != "size"}
    return item.run.func, tuple(sorted(rest.items()))


KINDS = list({kind(item): item for item in reversed(ITEMS)}.values())[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("item", KINDS, ids=lambda item: item.name)
def test_an_item_runs_at_toy_size(item: Item, tmp_path: Path) -> None:
    torch.compiler.reset()
    told: list[Found] = []
    found = item.run(Place(True, tmp_path, told.append))
    assert found.text
    assert "\n" not in found.text
    for each in (found, *told):
        assert json.loads(json.dumps(each.figures)) == each.figures != {}


def test_items_have_names_of_their_own_and_estimates() -> None:
    names = [item.name for item in ITEMS]
    assert len(set(names)) == len(names)
    assert all(0 < item.seconds < 540 and item.what and "," not in item.name for item in ITEMS)


def test_a_compiled_loss_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = from_dict(StepBench, {"size": ["nano"], "patch": 8, "batch": 2, "compile": False})
    with group.session() as world:
        stepper = OurStep(Setting(cfg, "nano", world), 2, None)
        found = losses(stepper, 2, "fp32")
        assert found["loss"] == found["loss_eager"] > 0
        first, forward = [True], stepper.engine.module.forward

        def wrong(*args, **given):
            scale, first[0] = (1.01 if first[0] else 1.0), False
            return scale * (forward(*args, **given) + 1)

        monkeypatch.setattr(stepper.engine.module, "forward", wrong)
        with pytest.raises(RuntimeError, match="the compiled network's loss is"):
            losses(stepper, 2, "fp32")


def test_the_share_of_the_peak_is_that_of_six_flops_a_multiply_add() -> None:
    cfg = from_dict(StepBench, {"size": ["XL"], "batch": 256})
    with group.session() as world:
        setting = Setting(cfg, "S", world)
    multiply_adds = cost(DiTConfig(size="S", patch=2), 32, 4, 1000).multiply_adds
    assert setting.flops == 6 * multiply_adds
    held = {micro: training.predicted(cfg, micro) for micro in (64, 128, 256)}
    assert held[64] < held[128] < held[256]


def test_values_of_a_key_are_compared_and_one_that_fails_costs_itself_alone(tmp_path: Path) -> None:
    told: list[Found] = []
    place = Place(True, tmp_path, told.append)
    found = training.variants(place, "S", "patch", (8, 3, 16), compile=False)
    assert list(found.figures["rows"]) == ["8", "3", "16"]
    assert "patch=3 failed: " in found.text
    assert "patch=8" in found.text
    assert "(1 x)" in found.text
    assert found.figures["rows"]["16"]["flops_per_image"] < found.figures["rows"]["8"]["flops_per_image"]
    assert len(told) >= 3
    with pytest.raises(RuntimeError, match="patch=3 failed"):
        training.variants(place, "S", "patch", (3,), compile=False)
