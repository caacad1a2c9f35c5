"""Precision, recall, density, coverage against their definitions, taken one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from dit.data import DataError
from dit.evals.metrics import FeatureSet
from dit.evals.metrics.neighbours import Neighbours, membership, squared_distances


def by_definition(x: np.ndarray, y: np.ndarray, k: int, density_k: int) -> dict[str, float]:
    def radius(points: np.ndarray, i: int, kth: int) -> float:
        return sorted(float(np.linalg.norm(points[i] - points[j])) for j in range(len(points)) if j != i)[
            kth - 1
        ]

    apart = cdist(x, y)
    n, m = len(x), len(y)
    of_x = [radius(x, i, k) for i in range(n)]
    of_y = [radius(y, j, k) for j in range(m)]
    wide = [radius(y, j, density_k) for j in range(m)]
    return {
        "precision": sum(any(apart[i, j] <= of_y[j] for j in range(m)) for i in range(n)) / n,
        "recall": sum(any(apart[i, j] <= of_x[i] for i in range(n)) for j in range(m)) / m,
        "density": sum(apart[i, j] < wide[j] for i in range(n) for j in range(m)) / (density_k * n),
        "coverage": sum(any(apart[i, j] < wide[j] for i in range(n)) for j in range(m)) / m,
    }


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4), st.floats(0.3, 3))
def test_small_sets_against_the_definition(seed: int, k: int, density_k: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = scale * rng.normal(size=(rng.integers(5, 12), 2)), rng.normal(size=(rng.integers(5, 12), 2))
    found = Neighbours(k=k, density_k=density_k)(FeatureSet(x), FeatureSet(y))
    assert found == pytest.approx(by_definition(x, y, k, density_k), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_blocks_do_not_matter(rows: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(61, 6))
    whole, cut = membership(x, y, 3, 5, 1000), membership(x, y, 3, 5, rows)
    assert 0 < whole.realistic.sum() < 50
    for name in ("realistic", "depth", "recalled", "covered"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_identical_sets(offset: float) -> None:
    """A sample lies on the surface of the balls that it is the k-th neighbour of, whatever rounding says."""
    x = np.random.default_rng(1).normal(size=(400, 64)) + offset
    found = Neighbours()(FeatureSet(x), FeatureSet(x.copy()))
    assert found == {"precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0}


def test_copies_of_one_sample_have_balls_without_extent() -> None:
    rng = np.random.default_rng(2)
    y = rng.normal(size=(30, 8))
    x = np.concatenate([np.repeat(y[:1], 10, axis=0), np.full((10, 8), 100.0)])
    found = Neighbours()(FeatureSet(x), FeatureSet(y))
    assert found["precision"] == 10 / 20  # all but the far ones
    assert found["recall"] == 1 / 30


def test_distances_of_close_points_are_those_of_their_differences() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=(40, 10)) + 1000
    b = a + 1e-6 * rng.normal(size=a.shape)
    np.testing.assert_allclose(squared_distances(a, b), cdist(a, b, "sqeuclidean"), rtol=1e-6)
    np.testing.assert_allclose(np.diag(squared_distances(a, b)), np.square(a - b).sum(1), rtol=1e-12)


def test_a_share_of_the_reference_is_drawn_at_random_and_said() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(40, 3)), np.sort(rng.normal(size=(200, 3)), axis=0)  # in an order, as by classes
    picked = [Neighbours(references=50, seed=seed)(FeatureSet(x), FeatureSet(y)) for seed in (0, 0, 1)]
    assert picked[0] == picked[1] != picked[2]
    assert picked[0] != Neighbours()(FeatureSet(x), FeatureSet(y[:50]))
    assert Neighbours(references=200)(FeatureSet(x), FeatureSet(y)) == Neighbours()(
        FeatureSet(x), FeatureSet(y)
    )
    with pytest.raises(DataError, match=r"references is 201; expected 6 \(of k and density_k\) to 200"):
        Neighbours(references=201)(FeatureSet(x), FeatureSet(y))


@pytest.mark.parametrize("sizes", [(5, 20), (20, 5)])
def test_fewer_samples_than_neighbours(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    x, y = (FeatureSet(rng.normal(size=(n, 3)), name=f"set of {n}") for n in sizes)
    with pytest.raises(DataError, match=r"set of 5: 5 sample\(s\), and precision needs at least 6"):
        Neighbours()(x, y)
