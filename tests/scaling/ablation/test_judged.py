"""Verdicts, held against Student's t by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dit.scaling.ablation.judged import Against, Figure
from dit.scaling.ablation.study import Variant


def of(ours: list[float], theirs: list[float], comparisons: int = 1, low_is_good: bool = True) -> Against:
    found = Against.of(
        dict(enumerate(ours)), dict(enumerate(theirs)), comparisons, low_is_good
    )  # fmt: skip
    assert found is not None
    return found


def test_differences_are_paired_and_bounded_by_students_t() -> None:
    """Of the differences -1, -2, -3: mean -2, standard error 1 / sqrt(3); t of 2 degrees at 1 - 0.05 / (2 · k)."""
    for comparisons in (1, 4):
        found = of([9.0, 18.0, 27.0], [10.0, 20.0, 30.0], comparisons)
        assert found.difference.mean == pytest.approx(-2.0)
        t = float(stats.t.ppf(1 - 0.05 / (2 * comparisons), 2))
        assert found.difference.half == pytest.approx(t / math.sqrt(3))
        assert found.ratio == pytest.approx(0.9)
        # 4.303 / sqrt(3) = 2.48 > 2: three seeds do not tell these apart
        assert found.outcome == "not distinguishable"


@pytest.mark.parametrize(("sign", "low_is_good", "outcome"), [
    (-1.0, True, "better"), (1.0, True, "worse"), (-1.0, False, "worse"), (1.0, False, "better"),
])  # fmt: skip
def test_what_is_better_depends_on_the_figure(sign: float, low_is_good: bool, outcome: str) -> None:
    base = [10.0, 20.0, 30.0]
    ours = [10.0 + sign * 1.0, 20.0 + sign * 1.1, 30.0 + sign * 0.9]
    assert of(ours, base, 1, low_is_good).outcome == outcome


def test_more_comparisons_ask_for_more() -> None:
    base, ours = (
        [0.0, 0.0, 0.0],
        [-1.0, -1.3, -0.7],
    )  # t = 1 / (0.3 / sqrt 3) = 5.77, 4.30 and 6.21 are needed
    assert of(ours, base, 1).outcome == "better"
    assert of(ours, base, 2).outcome == "not distinguishable"


def test_one_seed_tells_nothing_and_none_in_common_is_no_comparison() -> None:
    assert of([1.0], [100.0]).outcome == "not distinguishable"
    assert math.isinf(of([1.0], [100.0]).difference.half)
    assert Against.of({1: 1.0}, {2: 1.0}, 1) is None


def test_chance_alone_gives_a_verdict_as_rarely_as_it_says() -> None:
    """Four changes that do nothing, three seeds: some verdict in 5 % of ablations at most."""
    draws = np.random.default_rng(0).normal(size=(2000, 5, 3))
    wrong = sum(
        any(of(list(one[i]), list(one[0]), 4).outcome != "not distinguishable" for i in range(1, 5))
        for one in draws
    )
    assert 0 < wrong / len(draws) <= 0.055


def test_unlike_protocols_are_not_compared() -> None:
    ours, base = Variant("rms", 1e9), Variant("plain", 1e9)
    values = {ours: {1: 1.0, 2: 1.1}, base: {1: 2.0, 2: 2.1}}
    alike = Figure("frechet (pixels)", values, {ours: "a", base: "a"})
    assert alike.is_common
    assert alike.against(ours, "plain", 1) is not None
    unlike = Figure("frechet (pixels)", values, {ours: "a", base: "b"})
    assert not unlike.is_common
    assert unlike.against(ours, "plain", 1) is None
    assert alike.against(Variant("rms", 2e9), "plain", 1) is None
    assert alike.low_is_good
    assert not Figure("class_accuracy (efficientnet_lite0)", {}, {}).low_is_good
