"""Ladders: sizes by a list or a rule, their names, and what is rounded."""

from __future__ import annotations

import pytest

from dit.config import ConfigError
from dit.scaling.ladder import LADDERS, Ladder, Size, rungs


def ladder(**values: object) -> Ladder:
    return LADDERS.parse(values)


def test_an_aspect_ladder_has_one_head_width_and_one_ratio() -> None:
    found = rungs(ladder(name="aspect", widths=[256, 64, 128], head_width=32, aspect=16))
    assert [(r.name, r.size) for r in found] == [
        ("w64d4", Size(width=64, depth=4, heads=2)),
        ("w128d8", Size(width=128, depth=8, heads=4)),
        ("w256d16", Size(width=256, depth=16, heads=8)),
    ]


def test_what_is_rounded_is_said() -> None:
    exact = ladder(name="aspect", widths=[64, 128], head_width=16, aspect=32)
    rounded = ladder(name="aspect", widths=[16, 64, 96], head_width=16, aspect=64)
    assert exact.notes() == []
    assert [size.depth for size in rounded.sizes()] == [1, 1, 2]  # 0.25, 1 and 1.5
    (note,) = rounded.notes()
    assert "16 at width 16" in note
    assert "48 at width 96" in note
    assert "width 64" not in note


def test_a_list_is_sorted_and_like_shapes_are_told_apart_by_heads() -> None:
    sizes = [{"width": 64, "depth": 2, "heads": 2}, {"width": 32, "depth": 2, "heads": 2}]
    assert [r.name for r in rungs(ladder(name="list", sizes=sizes))] == ["w32d2", "w64d2"]
    more = [*sizes, {"width": 64, "depth": 2, "heads": 4}]
    assert [r.name for r in rungs(ladder(name="list", sizes=more))] == ["w32d2", "w64d2h2", "w64d2h4"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "list", "sizes": []}, "has no size"),
        ({"name": "list", "sizes": [{"width": 8, "depth": 1, "heads": 1}] * 2}, "w8d1 with 1 heads twice"),
        ({"name": "aspect", "widths": [40], "head_width": 16}, "40 is no multiple of ladder.head_width = 16"),
        ({"name": "aspekt", "widths": [40]}, "did you mean aspect"),
        ({"name": "aspect", "widths": [0]}, "widths.0: expected 1 or more, got 0"),
        ({"name": "aspect", "width": [64]}, "did you mean widths"),
    ],
)
def test_wrong_ladders_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rungs(ladder(**values))
