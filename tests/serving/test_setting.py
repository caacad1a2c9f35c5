"""What a visitor may ask for: bad input names its field; the spec is that of the command line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dit.config import ConfigError, from_dict
from dit.experiments.trained import Trained
from dit.sample.generate import SamplerSpec
from dit.sample.grid import GRIDS
from dit.sample.solve import SOLVERS
from dit.serving.setting import Limits, Setting, class_choices, fitting
from tests.datasets import Digits
from tests.train.runs import random_run

BAD = {
    "no scale": ({"scale": None}, "scale: .*null"),
    "scale not a number": ({"scale": math.nan}, "scale: .*nan"),
    "infinite scale": ({"scale": math.inf}, "scale: .*inf"),
    "negative scale": ({"scale": -1}, "scale: .*-1"),
    "text for a scale": ({"scale": "many"}, "scale: .*'many'"),
    "interval reversed": ({"interval_from": 0.7, "interval_to": 0.2}, "interval: .*from < to.*0.7 to 0.2"),
    "interval empty": ({"interval_from": 0.5, "interval_to": 0.5}, "interval: .*from < to"),
    "interval not a number": ({"interval_from": math.nan}, "interval"),
    "interval out of range": ({"interval_to": 1.5}, "interval_to: .*1.5"),
    "negative seed": ({"seed": -1}, "seed: .*-1"),
    "huge seed": ({"seed": 2**70}, "seed: .*at most"),
    "seed of a fraction": ({"seed": 0.5}, "seed: .*0.5"),
    "no steps": ({"steps": 0}, "steps: .*0"),
    "no images": ({"images": 0}, "images: .*0"),
    "a list for steps": ({"steps": [1]}, "steps: "),
    "a number for a class": ({"classes": 3}, "classes: "),
    "another key": ({"folder": "/"}, "folder: unknown key"),
}


@pytest.mark.parametrize(("given", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_names_its_field(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_dict(Setting, given)


@pytest.mark.parametrize(
    ("given", "said"), [({"solver": "huen"}, "did you mean heun"), ({"grid": "even"}, "grid")]
)
def test_another_choice_is_named(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_dict(Setting, given).spec()


@pytest.mark.parametrize(
    ("given", "said"),
    [({"images": 5}, "images: at most 4 .*got 5"), ({"steps": 10**9}, "steps: at most 10 .*got 1000000000")],
)
def test_more_than_the_limits_is_refused(given: dict, said: str) -> None:
    limits = Limits(max_images=4, max_steps=10)
    from_dict(Setting, {"images": 4, "steps": 10}).check(limits)
    with pytest.raises(ConfigError, match=said):
        from_dict(Setting, {"images": 4, "steps": 10, **given}).check(limits)


def test_the_spec_is_that_of_the_command_line() -> None:
    whole = from_dict(Setting, {"scale": 3, "solver": "euler", "steps": 4, "seed": 9, "grid": "karras"})
    spec = {"solver": "euler", "num_steps": 4, "seed": 9, "grid": "karras"}
    assert whole.spec() == from_dict(SamplerSpec, {**spec, "cfg_scale": 3})
    part = from_dict(Setting, {"scale": 3, "interval_from": 0.2, "steps": 4})
    guidance = {"name": "cfg", "scale": 3, "interval": [0.2, 1.0]}
    assert part.spec() == from_dict(SamplerSpec, {"num_steps": 4, "guidance": [guidance]})
    neutral = from_dict(Setting, {"interval_from": 0.2, "solver": "dopri5"})
    assert neutral.spec() == from_dict(SamplerSpec, {"solver": "dopri5"}), "no guidance, so no jump in it"


def test_classes_of_one_name_are_told_apart() -> None:
    shown = class_choices(("crane", "tench", "crane"))
    assert shown == [
        ("every class in turn", "all"),
        *[("crane (0)", "0"), ("tench", "1"), ("crane (2)", "2")],
        ("no class", "-1"),
    ]
    assert class_choices(()) == [("no class", "-1")]


def test_what_cannot_draw_from_the_model_is_not_offered(
    digits: Digits, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run: Path = random_run(digits, tmp_path_factory.mktemp("run"))
    solvers, grids = fitting(Trained.load(str(run), "ema", torch.device("cpu")))
    assert set(solvers) == {name for name, _ in SOLVERS.items()}, "none of them by default wants a variance"
    assert set(grids) == {name for name, _ in GRIDS.items()} - {"respaced"}, "its path is continuous"
