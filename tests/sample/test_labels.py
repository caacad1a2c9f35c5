"""Classes of images that are drawn: functions of the seed and the image's number."""

from __future__ import annotations

import pytest
import torch

from dit.config import ConfigError
from dit.sample.labels import ORDERS, Labels

CLASSES = [4, 0, 7]


@pytest.mark.parametrize("order", ORDERS)
def test_a_label_does_not_depend_on_which_others_are_asked_for(order) -> None:
    labels = Labels(CLASSES, order, seed=3)
    whole = labels(torch.arange(100))
    assert whole.dtype == torch.int64
    assert torch.equal(labels(torch.arange(40, 60)), whole[40:60])
    assert torch.equal(labels(torch.tensor([99, 5])), whole[[99, 5]])
    assert set(whole.tolist()) == set(CLASSES)


def test_balanced_labels_come_in_turn() -> None:
    assert Labels(CLASSES)(torch.arange(7)).tolist() == [4, 0, 7, 4, 0, 7, 4]
    assert torch.equal(Labels(CLASSES, seed=1)(torch.arange(7)), Labels(CLASSES)(torch.arange(7)))


def test_random_labels_are_uniform_and_the_seeds_own() -> None:
    """Counts of 30,000 within 5 standard deviations of the binomial; neighbours as independent samples have them."""
    labels = Labels(CLASSES, "random", seed=3)(torch.arange(30_000))
    counts = torch.tensor([int((labels == c).sum()) for c in CLASSES])
    assert float((counts - 10_000).abs().max()) < 5 * (30_000 * 2 / 9) ** 0.5
    same = int((labels[1:] == labels[:-1]).sum())
    assert abs(same - 10_000) < 5 * (30_000 * 2 / 9) ** 0.5
    assert not torch.equal(labels, Labels(CLASSES, "random", seed=4)(torch.arange(30_000)))


def test_an_order_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="label_order is 'sorted', expected balanced or random"):
        Labels(CLASSES, "sorted")  # type: ignore[arg-type]
