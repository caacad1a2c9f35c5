"""Spreads: uniform in every slot, even over the global batch, and the same however the batch is cut."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import to_dict
from dit.flow.objective import Objective
from dit.flow.spread import SPREADS, LowDiscrepancy, Stratified, _in_stratum
from dit.rng import Draws

every_spread = pytest.mark.parametrize("name", SPREADS.names())
every_even = pytest.mark.parametrize("spread", [Stratified(), LowDiscrepancy()], ids=["stratified", "low"])


def draws(n: int, step: int = 0, seed: int = 7) -> Draws:
    return Draws(seed, step, torch.arange(n), n)


@every_spread
@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 700),
    step=st.integers(0, 2**40),
    seed=st.integers(0, 2**63),
    order=st.randoms(use_true_random=False),
)
def test_a_cut_of_the_batch_changes_nothing(name: str, batch: int, step: int, seed: int, order) -> None:
    """Ranks and micro-batches hold any slots, in any order."""
    spread, whole = SPREADS[name](), draws(batch, step, seed)
    u = spread(whole)
    assert u.dtype == torch.float32
    assert u.shape == (batch,)
    assert torch.equal(u * 2**23 - 0.5, torch.floor(u * 2**23))  # middles of cells, so inside (0, 1)
    assert 0 < float(u.min()) <= float(u.max()) < 1
    slots = list(range(batch))
    order.shuffle(slots)
    cut = order.randrange(batch + 1)
    for part in (torch.tensor(slots[:cut]).long(), torch.tensor(slots[cut:]).long()):
        assert torch.equal(spread(whole.select(part)), u[part])


@every_even
@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 5000), step=st.integers(0, 2**40))
def test_every_stratum_of_the_global_batch_gets_one(spread, batch: int, step: int) -> None:
    """Exactly: no u rounds into the next stratum, whatever the batch."""
    stratum = torch.floor(spread(draws(batch, step)).double() * batch).long()
    assert torch.equal(stratum.sort().values, torch.arange(batch))


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 5000))
def test_the_ends_of_a_stratum_stay_inside(batch: int) -> None:
    """With the smallest and the largest bits, which a random test hardly meets; and no cell is left between two."""
    strata = torch.arange(batch)
    low, high = (_in_stratum(strata, torch.full((batch,), bits), batch).double() for bits in (0, 2**32 - 1))
    assert bool((low * batch >= strata).all())
    assert bool((high * batch < strata + 1).all())
    assert torch.equal((low[1:] - high[:-1]) * 2**23, torch.ones(batch - 1).double())
    assert float(low[0]) == 2**-24
    assert float(high[-1]) == 1 - 2**-24


def test_independent_draws_leave_strata_empty() -> None:
    """The test above can fail."""
    stratum = torch.floor(SPREADS["independent"]()(draws(256)).double() * 256).long()
    assert len(stratum.unique()) < 200


@every_spread
def test_each_slot_is_uniform_over_the_steps(name: str) -> None:
    """And knows nothing of the step before: a slot, which is a lane of the data, is tied to no time."""
    batch, spread = 12, SPREADS[name]()
    u = torch.stack([spread(draws(batch, step)) for step in range(500)])  # (steps, slots)
    for slot in range(batch):
        assert scipy.stats.kstest(u[:, slot].numpy(), "uniform").pvalue > 1e-4
    centred = u - u.mean(0)
    after = (centred[1:] * centred[:-1]).mean() / centred.square().mean()
    assert abs(float(after)) < 5 / (500 * batch) ** 0.5


@every_even
def test_the_place_inside_a_stratum_is_uniform(spread) -> None:
    u = torch.cat([spread(draws(24, step)) for step in range(400)]).double() * 24
    place = (u - u.floor()).view(400, 24)
    some = place[:, 0]  # one a step: those of a step are one number where the comb is rigid
    assert scipy.stats.kstest(some.numpy(), "uniform").pvalue > 1e-4
    rigid = float((place - place[:, :1]).abs().max()) < 1e-4
    assert rigid == isinstance(spread, LowDiscrepancy)


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("independent", (1 / 5 - 1 / 9) / 64),  # var(u²) / n
        ("stratified", 4 / 3 / 12 / 64**3),  # ∫ (2u)² du / (12 n³)
        ("low_discrepancy", 1 / 12 / 64**2),  # (1² − 0²)² / (12 n²)
    ],
)
def test_even_times_lower_the_noise_of_the_loss(name: str, variance: float) -> None:
    """The mean over a batch of 64 of a loss that is u²: its variance over the steps, to leading order."""
    means = torch.stack([SPREADS[name]()(draws(64, step)).double().square().mean() for step in range(200)])
    assert abs(float(means.mean()) - 1 / 3) < 5 * (variance / 200) ** 0.5 + 1e-4
    assert float(means.var()) == pytest.approx(variance, rel=0.5)


@every_spread
def test_the_objective_draws_its_times_so(name: str) -> None:
    spread, whole = SPREADS[name](), draws(32, step=5)
    objective = Objective(spread=spread)
    loss = objective.loss(lambda x, t, cond: torch.zeros_like(x), torch.zeros(32, 2), {}, whole)
    assert torch.equal(loss.t, objective.time(spread(whole)))
    assert torch.equal(loss.t, spread(whole))  # uniform times on the linear path


def test_pinned() -> None:
    """Part of every run's identity: a change makes resumed runs see other times."""
    pins = {
        name: SPREADS[name]()(Draws(1, 2, torch.tensor([0, 5, 6]), 7)).mul(2**24).long().tolist()
        for name in SPREADS.names()
    }
    assert pins == PINS


PINS = {
    "independent": [15732541, 13412345, 9897279],
    "stratified": [9437741, 16296519, 11000877],
    "low_discrepancy": [9437741, 16627977, 11834487],
}


@every_spread
def test_a_spread_is_its_own_configuration(name: str) -> None:
    assert SPREADS.parse(to_dict(SPREADS[name]())) == SPREADS[name]()
