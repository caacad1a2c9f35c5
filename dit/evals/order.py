"""What is asked of an evaluation: which sets, in which features, which figures, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from dit.config import config
from dit.evals.extraction import Pass
from dit.evals.features.network import FeatureSpace
from dit.evals.features.spaces import FEATURES
from dit.evals.figures import own_names
from dit.evals.metrics.measuring import ALL, choose_metrics
from dit.evals.metrics.metric import FeatureSet
from dit.ranks.asked import EndAsked


@config
class Options:
    """How sets are evaluated."""

    metrics: str = ALL  # figures or metrics, comma-separated; all = those that can be computed
    bootstrap: Annotated[int, Field(ge=0)] = 0  # resamples for 95% intervals, 200 are usual; 0 = no intervals
    seed: Annotated[int, Field(ge=0)] = 0  # of the resamples alone
    num_samples: int | None = None  # samples that are taken, at random; none = all
    num_reference: int | None = None  # reference images that are taken, at random; none = all
    held_out: str | None = None  # real images beside the reference: also distance / theirs, and fdr
    class_accuracy: bool = False  # the share of samples that an ImageNet classifier takes for their class
    image_size: Annotated[int, Field(ge=1)] | None = (
        None  # pixels a side files are cropped and resized to; none = as is
    )
    batch_size: Annotated[int, Field(ge=1)] = 64  # images at a time and rank


@dataclass(frozen=True)
class Order:
    """What is to be evaluated against what, in which features, and how.

    samples, reference: what `open_pictures` opens; the reference may be a statistics file. metric_keys: as
    `choose_metrics` has them. workers: threads that read images. asked: where a signal says that it is to end.
    """

    samples: str
    reference: str
    spaces: Sequence[FeatureSpace]
    options: Options = Options()  # noqa: RUF009
    metric_keys: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    asked: EndAsked = field(default_factory=EndAsked)

    @property
    def how(self) -> Pass:
        """How images are gone through."""
        return Pass(self.options.batch_size, self.workers, self.asked)


def renamed(order: Order) -> Order:
    """The order with figures by the names that they have in all spaces. ConfigError for a name that one cannot have."""
    metrics = own_names(order.options.metrics, [FEATURES.name_of(space) for space in order.spaces])
    return replace(order, options=replace(order.options, metrics=metrics))


def check_names(metrics: str, keys: Mapping[str, str]) -> None:
    """ConfigError for figures, and fields of them, that there are not: before hours of work."""
    anything = FeatureSet(np.eye(2))
    choose_metrics(metrics, keys, anything, anything)
