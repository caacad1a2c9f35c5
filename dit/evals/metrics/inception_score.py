"""Inception score: how surely a classifier names single samples, and how many names it gives all of them."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.special import log_softmax

from dit.config import config
from dit.evals.metrics.metric import METRICS, FeatureSet, Figures, Metric, Side, blocks
from dit.evals.metrics.resampling import GENERATED, Resampling


@METRICS.register("inception")
@config
class InceptionScore(Metric):
    """exp of the mean KL divergence of p(class | sample) from p(class) (Salimans et al., 2016, arXiv 1606.03498)."""

    splits: Annotated[int, Field(ge=1)] = (
        1  # parts, in the order of samples, whose scores are averaged (often 10)
    )

    figures = ("inception_score",)
    needs = "logits"
    looks_at_reference = False
    takes_statistics = True
    is_shifted = True

    @property
    def at_least(self) -> int:
        return 2 * self.splits

    def values(self, generated: FeatureSet, reference: Side, draws: Resampling) -> Figures:
        """Resamples are of the generated set; its splits stay as they are."""
        logits = self.array(generated)
        counts = draws.counts(GENERATED, len(logits))
        parts = np.array_split(np.arange(len(logits)), self.splits)
        scores = [_scores(logits[part[0] : part[-1] + 1], counts[:, part]) for part in parts]
        return {"inception_score": np.mean(scores, axis=0)}


def _scores(logits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,) scores of logits (N, K), counted as counts (R, N) say."""
    marginal = np.zeros((len(counts), logits.shape[1]))
    entropies = np.zeros(len(counts))
    for part, rows in blocks(logits):
        logs = log_softmax(rows, axis=1)
        p = np.exp(logs)
        each = counts[:, part].astype(np.float64)
        marginal += each @ p
        entropies += each @ (p * logs).sum(1)
    total = counts.sum(1)
    marginal /= total[:, None]
    surprise = np.where(
        marginal > 0, marginal * np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal)), 0.0
    )
    scores: np.ndarray = np.exp(entropies / total - surprise.sum(1))
    return scores
