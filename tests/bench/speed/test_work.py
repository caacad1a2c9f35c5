"""Exponents of time against work: the fit, and the figures of a very small run."""

import math

import pytest

from dit.bench.speed import work
from dit.bench.speed.work import AXES, WorkBench, growth, lines, slope, turns
from dit.config import ConfigError, from_dict

SMALL = {
    "base_batch": 2,
    "base_patch": 8,
    "base_width": 32,
    "base_depth": 1,
    "batch": [1, 2],
    "patch": [16, 8],
    "width": [32, 64],
    "depth": [1, 2],
    "ranks": [1],
    "repeats": 2,
}


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7, -0.5])
def test_a_power_is_found_again(power):
    sizes = [3, 5, 11, 40]
    assert slope(sizes, [7.0 * size**power for size in sizes]) == pytest.approx(power)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_power_is_found_behind_a_part_that_does_not_grow(power):
    sizes = [2, 4, 8, 16]
    assert growth(sizes, [100.0 + 3.0 * size**power for size in sizes]) == pytest.approx(power)
    assert growth([3, 1, 2], [10.0, 6.0, 8.0]) == pytest.approx(1)
    assert math.isnan(growth([1, 2, 3], [2.0, 1.0, 3.0]))


def test_every_axis_is_measured_alone():
    cfg = from_dict(WorkBench, SMALL)
    seen = []
    found = work.run(cfg, lambda: seen.append(1))
    assert list(found) == list(AXES)
    assert len(seen) == turns(cfg) == 24
    assert found["tokens"]["sizes"] == [4, 16]
    assert 0 < found["depth"]["of_flops"] < 1  # less what comes before and after the blocks
    assert found["batch"]["of_flops"] == pytest.approx(1)
    assert found["width"]["of_flops"] > 1.5
    assert all(0 < row["low"] <= row["high"] for one in found.values() for row in one["seconds"])
    text = list(lines(found))
    assert len(text) == 5
    assert text[1].startswith("batch")


def test_sizes_that_give_no_exponent_are_refused():
    with pytest.raises(ConfigError, match="two sizes or more of depth"):
        from_dict(WorkBench, {**SMALL, "depth": [2, 2]})
    with pytest.raises(ConfigError, match="axes are batch"):
        from_dict(WorkBench, {**SMALL, "axes": ["heads"]})
