"""A configuration's choices in words."""

from __future__ import annotations

import pytest

from dit.config import from_dict
from dit.experiments.about import named
from dit.flow.objective import Objective

PLAIN = "path linear, prediction velocity, times uniform, spread independent, weight uniform, coupling independent"


@pytest.mark.parametrize(
    ("auxiliary", "said"),
    [
        (None, ""),
        ("direction", ", auxiliary direction"),
        ({"name": "direction", "weight": 0.5}, ", auxiliary direction {weight: 0.5}"),
        (["direction", {"name": "layersync", "early": 2}], ", auxiliary direction + layersync {early: 2}"),
    ],
)
def test_every_choice_is_named_with_what_is_not_its_default(auxiliary: object, said: str) -> None:
    assert named(from_dict(Objective, {"auxiliary": auxiliary})) == PLAIN + said
