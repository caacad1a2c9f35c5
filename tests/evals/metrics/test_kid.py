"""The kernel distance against its definition, and closed forms."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from dit.data import DataError
from dit.evals.metrics import FeatureSet
from dit.evals.metrics.kid import Kid, squared_mmd


def by_pairs(x: np.ndarray, y: np.ndarray) -> float:
    """Each pair by itself."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def within(z: np.ndarray) -> float:
        n = len(z)
        return sum(kernel(z[i], z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    return within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_all_pairs_whatever_the_blocks(rows: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 3)), rng.normal(size=(14, 3)) + 0.3
    ones = [np.ones((1, n), np.int32) for n in (9, 14)]
    assert squared_mmd(x, y, *ones, rows)[0] == pytest.approx(by_pairs(x, y), rel=1e-12)
    assert Kid()(FeatureSet(x.astype(np.float32)), FeatureSet(y))["kid"] == pytest.approx(
        by_pairs(x, y), rel=1e-5
    )


def test_counts_are_repetitions_that_make_no_pair_with_themselves() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    a, b = np.array([[2, 0, 1, 1, 3, 1]]), np.array([[1, 1, 1, 2, 0]])
    repeated = [np.repeat(np.arange(len(c[0])), c[0]) for c in (a, b)]

    def within(z: np.ndarray, which: np.ndarray) -> float:
        kernel = (z[which] @ z[which].T / 3 + 1) ** 3
        others = which[:, None] != which
        return float(kernel[others].sum() / others.sum())

    cross = ((x[repeated[0]] @ y[repeated[1]].T / 3 + 1) ** 3).mean()
    expected = within(x, repeated[0]) + within(y, repeated[1]) - 2 * cross
    assert squared_mmd(x, y, a, b, 2)[0] == pytest.approx(expected, rel=1e-12)


def exactly(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> Fraction:
    """Of whole numbers, each counted as often as a and b say, without rounding."""

    def mean(one: list[tuple[int, list[int]]], other: list[tuple[int, list[int]]], is_same: bool) -> Fraction:
        total = weight = 0
        for i, (w, left) in enumerate(one):
            for j, (v, right) in enumerate(other):
                if not (is_same and i == j):
                    inner = sum(p * q for p, q in zip(left, right, strict=True)) + len(left)
                    total, weight = total + w * v * inner**3, weight + w * v
        return Fraction(total, weight * len(one[0][1]) ** 3)

    p, q = (list(zip(c.tolist(), z.astype(int).tolist(), strict=True)) for c, z in ((a, x), (b, y)))
    return mean(p, p, True) + mean(q, q, True) - 2 * mean(p, q, False)


@pytest.mark.parametrize("offset", [0, 30, 1000, 10**6, 10**9])
@pytest.mark.parametrize("rows", [3, 1000])
def test_features_that_lie_far_from_0_lose_no_digits(offset: int, rows: int) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.integers(-9, 9, (8, 4)) + offset + 2.0, rng.integers(-9, 9, (7, 4)) + float(offset)
    a, b = np.ones((2, 8), int), np.ones((2, 7), int)
    a[1], b[1] = [2, 0, 1, 1, 3, 1, 0, 0], [0, 1, 1, 2, 0, 3, 0]
    found = squared_mmd(x, y, a, b, rows)
    for value, counts in zip(found, zip(a, b, strict=True), strict=True):
        assert value == pytest.approx(float(exactly(x, y, *counts)), rel=1e-9)


def test_it_is_unbiased() -> None:
    """Sets of one distribution are at 0 on average, on both sides of it."""
    rng = np.random.default_rng(2)
    found = [Kid()(*(FeatureSet(rng.normal(size=(20, 4))) for _ in range(2)))["kid"] for _ in range(300)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(300)
    assert min(found) < 0 < max(found)


def test_one_sample_makes_no_pair() -> None:
    x = np.random.default_rng(3).normal(size=(5, 2))
    with pytest.raises(DataError, match=r"features: 1 sample\(s\), and kid needs at least 2"):
        Kid()(FeatureSet(x), FeatureSet(x[:1]))
