"""The Inception score against cases that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy

from dit.data import DataError
from dit.evals.metrics import FeatureSet, Statistics
from dit.evals.metrics.inception_score import InceptionScore
from dit.evals.metrics.metric import ROWS
from dit.evals.metrics.resampling import GENERATED, Resampling

REFERENCE = Statistics(np.zeros(2), np.eye(2))  # of no consequence


def score(logits: np.ndarray, **fields: int) -> float:
    features = np.random.default_rng(0).normal(size=(len(logits), 2))
    return InceptionScore(**fields)(FeatureSet(features, logits), REFERENCE)["inception_score"]


def test_sure_and_even_over_classes_is_their_number_and_unsure_is_one() -> None:
    sure = 1e4 * np.eye(7)[np.arange(70) % 7]
    assert score(sure) == pytest.approx(7, rel=1e-12)
    assert score(sure + 1e5) == pytest.approx(7, rel=1e-12)  # a constant changes no probability
    assert score(np.zeros((70, 7))) == pytest.approx(1, rel=1e-12)
    assert score(sure[:14].repeat(5, axis=0)[: 5 * 7]) == pytest.approx(7, rel=1e-12)


def test_it_is_the_exponential_of_the_mean_divergence() -> None:
    logits = np.random.default_rng(1).normal(size=(ROWS + 30, 5)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    assert score(logits) == pytest.approx(np.exp(np.mean([entropy(row, p.mean(0)) for row in p])), rel=1e-12)


def test_splits_are_consecutive_and_averaged() -> None:
    logits = np.random.default_rng(2).normal(size=(31, 4))
    parts = [score(logits[:11]), score(logits[11:21]), score(logits[21:])]
    assert score(logits, splits=3) == pytest.approx(np.mean(parts), rel=1e-12)
    with pytest.raises(DataError, match=r"31 sample.*needs at least 32"):
        score(logits, splits=16)


def test_resamples_are_scores_of_repeated_rows() -> None:
    logits = np.random.default_rng(3).normal(size=(25, 4))
    drawn = Resampling(3)
    found = InceptionScore(splits=2)
    each = found.values(FeatureSet(np.eye(25), logits), REFERENCE, drawn)["inception_score"]
    for row, counts in enumerate(drawn.counts(GENERATED, 25)):
        parts = [np.repeat(logits[part], counts[part], axis=0) for part in (slice(0, 13), slice(13, 25))]
        assert each[row] == pytest.approx(np.mean([score(part) for part in parts]), rel=1e-12)


def test_without_logits() -> None:
    with pytest.raises(DataError, match="mine: inception_score needs logits, and the set has none"):
        InceptionScore()(FeatureSet(np.eye(3), name="mine"), REFERENCE)
