"""From a stored batch to a loss: micro-batches, label drops, fingerprints, the probe, the first loss's prediction."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dit.config import from_dict
from dit.data.codecs.norm import LatentNorm
from dit.data.loading.stream import Batch
from dit.flow.loss import Loss
from dit.flow.objective import Objective
from dit.rng import Draws, Purpose
from dit.train.task import LatentTask, Samples, batch_samples, synthetic_samples
from tests.first_loss import first_loss
from tests.ulps import assert_within

CPU = torch.device("cpu")
NORM = LatentNorm(mean=(0.0, 0.0), std=(1.0, 1.0))


def task(
    label_drop: float = 0.5, objective: dict | None = None, has_unit_variance: bool = True
) -> LatentTask:
    return LatentTask(from_dict(Objective, objective or {}), NORM, label_drop, has_unit_variance)


def batch(n: int = 16) -> Batch:
    slots = torch.arange(n)
    moments = Draws(9, 0, slots, n).normal(Purpose.VAL, (2, 2, 4, 4)).abs().half()
    return Batch(moments, slots % 3, slots + 100, slots % 2, slots, 5)


def zero(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
    return torch.zeros_like(x)


def test_micro_batches_see_what_the_whole_sees() -> None:
    stored = batch()
    samples, _ = batch_samples(stored, task(), Draws(1, 5, stored.slots, 16), CPU)
    whole = task().loss(zero, samples)
    parts = [task().loss(zero, part) for part in samples.micro_batches(4)]
    assert [len(p.per_sample) for p in parts] == [4] * 4
    assert_within(torch.cat([p.per_sample for p in parts]), whole.per_sample, 16)
    assert torch.equal(torch.cat([p.t for p in parts]), whole.t)
    assert [len(p.label) for p in samples.micro_batches(5)] == [5, 5, 5, 1]


def test_auxiliary_terms_of_micro_batches_are_those_of_the_whole() -> None:
    stored, added = batch(), task(objective={"auxiliary": "direction"})
    samples, _ = batch_samples(stored, added, Draws(1, 5, stored.slots, 16), CPU)

    def model(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        return x.flip(1)

    whole = added.loss(model, samples)
    parts = [added.loss(model, part) for part in samples.micro_batches(4)]
    auxiliary = torch.cat([part.auxiliary for part in parts if part.auxiliary is not None])
    torch.testing.assert_close(auxiliary, whole.auxiliary)
    assert float(auxiliary.std()) > 0
    means = torch.stack([part.metrics["direction"] for part in parts])
    torch.testing.assert_close(means.mean(), whole.metrics["direction"])
    torch.testing.assert_close(torch.stack([part.mean for part in parts]).mean(), whole.mean)


def test_stored_noise_stays_with_its_sample() -> None:
    """To the device, through micro-batches, to the loss: of a network that says 0 it is the mean of (eps - data)²."""
    stored = replace(batch(), moments=batch().moments[:, :1])
    eps = Draws(8, 0, stored.slots, 16).normal(Purpose.VAL, (2, 4, 4))
    reflow, draws = task(objective={"coupling": "reflow"}), Draws(1, 5, stored.slots, 16)
    samples, _ = batch_samples(replace(stored, eps=eps), reflow, draws, CPU)
    expected = (eps - stored.moments[:, 0].float()).square().mean((1, 2, 3))
    for size in (16, 5):
        parts = [reflow.loss(zero, part).per_sample for part in samples.micro_batches(size)]
        torch.testing.assert_close(torch.cat(parts), expected)
    without, _ = batch_samples(stored, reflow, draws, CPU)
    assert without.eps is None
    with pytest.raises(ValueError, match="takes the eps stored with each sample"):
        reflow.loss(zero, without)
    assert reflow.uncoupled().loss(zero, without).per_sample.shape == (16,)


def test_labels_are_dropped_at_their_rate_by_draws_of_their_own() -> None:
    slots = torch.arange(20_000)
    rate = float(task(0.1).drops(Draws(0, 0, slots, 20_000)).float().mean())
    assert abs(rate - 0.1) < 5 * math.sqrt(0.09 / 20_000)
    assert not bool(task(0.0).drops(Draws(0, 0, slots, 20_000)).any())


def test_the_condition_reaches_the_model_and_the_fingerprints() -> None:
    stored, seen = batch(), []
    draws = Draws(1, 5, stored.slots, 16)
    samples, prints = batch_samples(stored, task(), draws, CPU)

    def model(x: torch.Tensor, t: torch.Tensor, cond: dict) -> torch.Tensor:
        seen.append(cond)
        return torch.zeros_like(x)

    task().loss(model, samples)
    drop = draws.uniform(Purpose.DROP) < 0.5
    assert 0 < int(drop.sum()) < 16
    assert torch.equal(seen[0]["drop"], drop)
    assert torch.equal(seen[0]["label"], stored.label)
    assert torch.equal(prints, draws.fingerprint(stored.id, stored.view, drop))
    _, without = batch_samples(stored, task(0.0), draws, CPU)
    assert [bool(d) for d in drop] == [bool(a != b) for a, b in zip(prints, without, strict=True)]


def test_every_random_number_is_keyed_by_step_and_slot() -> None:
    stored = batch()
    losses = [
        task()
        .loss(zero, batch_samples(stored, task(), Draws(seed, step, stored.slots, 16), CPU)[0])
        .per_sample
        for seed, step in ((1, 5), (1, 5), (1, 6), (2, 5))
    ]
    assert torch.equal(losses[0], losses[1])
    assert bool((losses[0] != losses[2]).all())
    assert bool((losses[0] != losses[3]).all())


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 3, 8, 8)])
def test_the_probe_is_fixed_and_valid(shape: tuple[int, ...]) -> None:
    a, b = (synthetic_samples(shape, 3, CPU) for _ in range(2))
    assert a.moments.shape == (8, *shape)
    assert torch.equal(a.moments, b.moments)
    if shape[0] == 2:
        assert float(a.moments[:, 1].min()) >= 0
    assert a.label.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert a.drop.tolist() == [False, False, False, True] * 2
    assert synthetic_samples(shape, 0, CPU).label.tolist() == [-1] * 8
    assert float(a.moments[0, 0, 0, 0, 0]) == pytest.approx(PROBE_PIN[shape[0]], rel=1e-6)


PROBE_PIN = {
    2: -0.6104643940925598,
    1: -0.6104643940925598,
}  # part of every checkpoint: a change makes all of them unloadable


def test_the_probe_takes_no_coupling() -> None:
    coupled = task(objective={"coupling": {"name": "ot", "group": 32}})
    assert coupled.group == 32
    assert coupled.uncoupled().group == 1
    assert task().uncoupled() == task()
    probe = Samples(torch.zeros(8, 1, 2, 4, 4), torch.zeros(8).long(), torch.zeros(8).bool(), batch_draws(8))
    assert coupled.uncoupled().loss(zero, probe).per_sample.shape == (8,)


def batch_draws(n: int) -> Draws:
    return Draws(0, 0, torch.arange(n), n)


def losses_of(scale: float, n: int = 64, objective: dict | None = None, seed: int = 3) -> list[Loss]:
    """The first losses on Gaussian latents of this scale."""
    draws = Draws(seed, 0, torch.arange(n), n)
    moments = scale * draws.normal(Purpose.VAL, (1, 2, 8, 8))
    samples = Samples(moments, torch.zeros(n).long(), torch.zeros(n).bool(), draws)
    return [task(objective=objective).loss(zero, part) for part in samples.micro_batches(16)]


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"path": "vp", "prediction": "v"},
        {"coupling": {"name": "ot", "group": 16}},
        {"coupling": {"name": "sinkhorn", "group": 16}},
        {"auxiliary": ["direction"]},
        {"path": "ve", "prediction": "data", "times": "edm", "weight": "edm", "spread": "stratified"},
    ],
)
def test_the_first_loss_is_predicted(objective: dict) -> None:
    checked = task(objective=objective)
    assert checked.check_first_loss(losses_of(1.0, objective=objective), 128) is None
    complaint = checked.check_first_loss(losses_of(0.7, objective=objective), 128)
    assert complaint is not None
    assert "do not fit the manifest's statistics" in complaint


def test_a_wrong_scale_shows_under_weights_that_grow_without_bound() -> None:
    """The velocity loss of data goes like 1/t²: against its own time each loss tells, against their mean none."""
    objective = {"path": "linear", "prediction": "data", "weight": "velocity"}
    checked, first = task(objective=objective), first_loss(task(objective=objective).objective, 128)
    for seed in range(20):
        good, wrong = (losses_of(scale, objective=objective, seed=seed) for scale in (1.0, 1.2))
        assert checked.check_first_loss(good, 128) is None
        assert checked.check_first_loss(wrong, 128) is not None
        assert abs(first.deviation(torch.cat([loss.per_sample for loss in wrong]))) < 6


def test_it_is_not_predicted_where_it_cannot_be() -> None:
    assert task(has_unit_variance=False).check_first_loss(losses_of(0.1), 128) is None
    assert task().check_first_loss(losses_of(0.1, n=4), 128) is None  # too few to tell


def test_losses_that_are_not_finite_are_left_to_the_skipping() -> None:
    """One NaN among good samples is no matter of statistics, and does not hide wrong ones."""
    good, wrong = losses_of(1.0), losses_of(0.5)
    for found in (good, wrong):
        found[0].per_sample[3] = float("nan")
    assert task().check_first_loss(good, 128) is None
    assert task().check_first_loss(wrong, 128) is not None
    for loss in good:
        loss.per_sample.fill_(float("inf"))
    assert task().check_first_loss(good, 128) is None
