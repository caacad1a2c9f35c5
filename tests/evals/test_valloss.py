"""Losses by quarter of t."""

from dataclasses import replace

import pytest
import torch

from dit.evals.valloss import held_out_loss, sums_by_quarter
from dit.flow.loss import Loss


def loss(per_sample, t):
    per_sample = torch.tensor(per_sample)
    return Loss(per_sample.mean(), per_sample, None if t is None else torch.tensor(t), {})


def test_sums_and_counts_of_each_quarter_both_ends_included():
    sums = sums_by_quarter(loss([1.0, 2.0, 4.0, 8.0, 16.0], [0.0, 0.2499, 0.25, 0.75, 1.0]))
    assert sums.tolist() == [[3.0, 4.0, 0.0, 24.0], [2.0, 1.0, 0.0, 2.0]]


def test_means_over_batches_weigh_every_sample_alike_and_leave_out_empty_quarters():
    values = held_out_loss([loss([1.0], [0.1]), loss([2.0, 6.0, 3.0], [0.2, 0.3, 0.9])])
    assert values == {"loss": 3.0, "loss_q1": 1.5, "loss_q2": 6.0, "loss_q4": 3.0}


def test_a_loss_without_times_has_no_quarters():
    assert held_out_loss([loss([1.0, 3.0], None)]) == {"loss": 2.0}


def test_metrics_are_means_over_samples_too():
    """One of three samples, then all of one: 2 of 4."""
    first, second = loss([1.0, 2.0, 3.0], None), loss([4.0], None)
    given = [
        replace(first, metrics={"accuracy": torch.tensor(1 / 3)}),
        replace(second, metrics={"accuracy": torch.tensor(1.0)}),
    ]
    values = held_out_loss(given)
    assert values == {"loss": 2.5, "accuracy": pytest.approx(0.5)}
    assert all(type(value) is float for value in values.values())


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="no data"):
        held_out_loss([])
