"""Figures of a set of samples, from features of them and of a reference: arithmetic on arrays, in float64.

metric.py has what every figure is computed from, the base of all and the registry; measuring.py computes several, with
intervals (resampling.py); arrays.py reads features from files.
"""

from dit.evals.metrics import frechet, inception_score, kid, mind, neighbours  # noqa: F401
from dit.evals.metrics.metric import METRICS, FeatureSet, Metric, Side, Statistics

__all__ = ["METRICS", "FeatureSet", "Metric", "Side", "Statistics"]
