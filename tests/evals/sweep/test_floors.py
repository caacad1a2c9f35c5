"""Floors: at the counts that samples are compared at, of splits at random."""

from __future__ import annotations

import numpy as np
import pytest

from dit.evals.features.network import FeatureNetwork
from dit.evals.metrics import METRICS
from dit.evals.metrics.metric import FeatureSet, Statistics
from dit.evals.sides import Sides
from dit.evals.sweep.floors import floor_of

FRECHET = {"frechet": METRICS["frechet"]()}


def normal(seed: int, count: int, mean: float = 0.0) -> FeatureSet:
    return FeatureSet(np.random.default_rng(seed).normal(mean, 1, (count, 3)))


def test_a_floor_is_of_equal_counts_and_not_of_all_there_are() -> None:
    """The distance of a few Gaussian samples is larger by itself: by about (D + D(D+1)/4) (1/N + 1/M)."""
    side = Sides(FeatureNetwork(), {}, normal(0, 2000))
    held_out = normal(1, 2000)
    few = floor_of(held_out, side, FRECHET, 100, 20, {})
    many = floor_of(held_out, side, FRECHET, 2000, 20, {})
    assert (few.samples, few.reference) == (100, 2000)
    assert len(few.figures["frechet"]) == 20
    for found, count in ((few, 100), (many, 2000)):
        expected = (3 + 3 * 4 / 4) * (1 / count + 1 / 2000)
        assert found.mean("frechet") == pytest.approx(expected, rel=0.35)
    assert few.mean("frechet") > 5 * many.mean("frechet")
    assert 0 < few.spread("frechet") < few.mean("frechet")


def test_both_sides_of_a_floor_are_of_one_distribution() -> None:
    """Held-out images that are none of the reference's kind have a distance of 4; all of them at random have not."""
    side = Sides(FeatureNetwork(), {}, normal(0, 500))
    found = floor_of(normal(1, 500, mean=2.0), side, FRECHET, 300, 5, {"frechet": "fid"})
    assert set(found.figures) == {"fid"}
    assert found.mean("fid") < 0.3


def test_statistics_alone_are_compared_with_what_is_held_out() -> None:
    reference = normal(0, 1000)
    side = Sides(FeatureNetwork(), {}, None, Statistics.fit(reference.features))
    found = floor_of(normal(1, 200), side, FRECHET, 200, 3, {})
    values = found.figures["frechet"]
    assert found.reference == 1000
    assert values[0] == pytest.approx(values[1])  # all of them each time
    assert values[0] == pytest.approx(FRECHET["frechet"](normal(1, 200), reference)["frechet"])
