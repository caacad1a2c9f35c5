"""Couplings: they choose eps and never change data; OT against the reference and brute force; Sinkhorn against OT."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ConfigError, to_dict
from dit.flow.couple import COST_DROP, COUPLINGS, Independent, OptimalTransport, Reflow, Sinkhorn
from dit.rng import Draws
from tests.gaussian import golden, normal

every_coupling = pytest.mark.parametrize("name", COUPLINGS.names())
every_transport = pytest.mark.parametrize("kind", [OptimalTransport, Sinkhorn])


def draws(n: int, step: int = 0, first: int = 0) -> Draws:
    return Draws(seed=7, step=step, slots=torch.arange(first, first + n), batch=1024)


def cost(data: torch.Tensor, eps: torch.Tensor) -> float:
    return float((data.double() - eps.double()).square().sum(1).mean())


def rows_of(eps: torch.Tensor, drawn: torch.Tensor) -> list[int]:
    """For each row of eps the row of `drawn` it is, bitwise."""
    equal = (eps[:, None] == drawn[None]).flatten(2).all(2)
    assert bool((equal.sum(1) == 1).all())
    return equal.int().argmax(1).tolist()


@every_coupling
def test_a_coupling_chooses_eps_and_never_touches_data(name: str) -> None:
    coupling = COUPLINGS[name]()
    n = 2 * max(coupling.group, 4)
    data, eps = normal(n, 2, 3, seed=1, dtype=torch.float32), normal(n, 2, 3, seed=2, dtype=torch.float32)
    label = torch.arange(n) % 3
    before = data.clone(), eps.clone(), label.clone()
    chosen, metrics = coupling(data, eps, {"label": label}, draws(n))
    assert torch.equal(data, before[0])
    assert torch.equal(eps, before[1])
    assert torch.equal(label, before[2])
    assert len(rows_of(chosen, eps)) == n
    assert chosen.dtype == eps.dtype
    assert all(v.ndim == 0 and v.dtype == torch.float32 and not v.requires_grad for v in metrics.values())
    assert set(metrics) >= {COST_DROP} or name == "independent"


@pytest.mark.parametrize("name", [n for n in COUPLINGS.names() if n != "sinkhorn"])
def test_each_eps_is_used_once(name: str) -> None:
    coupling = COUPLINGS[name]()
    n = 2 * max(coupling.group, 4)
    eps = normal(n, 5, seed=2)
    chosen, _ = coupling(normal(n, 5, seed=1), eps, {"label": torch.arange(n) % 3}, draws(n))
    assert sorted(rows_of(chosen, eps)) == list(range(n))


@every_coupling
def test_a_batch_split_into_groups_is_coupled_alike(name: str) -> None:
    """So the micro-batch and the number of ranks do not matter."""
    coupling = COUPLINGS[name]()
    n = coupling.group
    data, eps, label = normal(4 * n, 8, seed=1), normal(4 * n, 8, seed=2), torch.arange(4 * n) % 5
    at = draws(4 * n)
    whole, _ = coupling(data, eps, {"label": label}, at)
    for size in (n, 2 * n):
        cuts = [slice(first, first + size) for first in range(0, 4 * n, size)]
        parts = [coupling(data[c], eps[c], {"label": label[c]}, at.select(c))[0] for c in cuts]
        assert torch.equal(torch.cat(parts), whole)


def test_the_reference_pairing() -> None:
    ref = golden("minibatch_ot")
    data, eps = torch.from_numpy(ref["data"]), torch.from_numpy(ref["noise"])
    chosen, metrics = OptimalTransport(group=64)(data, eps, {}, draws(64))
    for i, row in enumerate(rows_of(chosen, eps)):
        assert ref["pairing"][row] == i
    assert cost(data, chosen) == pytest.approx(float(ref["cost"]), rel=1e-6)
    want = 1 - float(ref["cost"]) / cost(data, eps)
    assert float(metrics[COST_DROP]) == pytest.approx(want, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6))
def test_no_pairing_is_cheaper(seed: int, n: int) -> None:
    data, eps = normal(n, 3, seed=seed), normal(n, 3, seed=seed + 1)
    chosen, metrics = OptimalTransport(group=n)(data, eps, {}, draws(n))
    best = min(cost(data, eps[list(order)]) for order in permutations(range(n)))
    assert cost(data, chosen) == pytest.approx(best, rel=1e-12)
    assert float(metrics[COST_DROP]) >= 0


def test_eps_stays_within_its_label_and_group() -> None:
    n, group = 96, 32
    data, eps = normal(n, 6, seed=1), normal(n, 6, seed=2)
    label = torch.from_numpy(np.random.default_rng(0).integers(-1, 4, n))  # −1: no label
    inside, narrow = OptimalTransport(group=group)(data, eps, {"label": label}, draws(n))
    across, wide = OptimalTransport(group=group, within_label=False)(data, eps, {"label": label}, draws(n))
    for i, row in enumerate(rows_of(inside, eps)):
        assert label[row] == label[i]
        assert row // group == i // group
    assert {row // group == i // group for i, row in enumerate(rows_of(across, eps))} == {True}
    assert any(label[row] != label[i] for i, row in enumerate(rows_of(across, eps)))
    assert cost(data, across) < cost(data, inside) < cost(data, eps)
    assert float(wide[COST_DROP]) > float(narrow[COST_DROP]) > 0


@every_transport
def test_dropped_labels_still_count(kind) -> None:
    """Label dropout is the conditioner's business: what is paired does not depend on it."""
    data, eps, label = normal(8, 4, seed=1), normal(8, 4, seed=2), torch.arange(8) % 2
    couple, drop = kind(group=8), torch.ones(8, dtype=torch.bool)
    plain, _ = couple(data, eps, {"label": label}, draws(8))
    dropped, _ = couple(data, eps, {"label": label, "drop": drop}, draws(8))
    assert torch.equal(plain, dropped)


@every_transport
def test_one_sample_per_label_is_left_alone(kind) -> None:
    data, eps = normal(8, 4, seed=1), normal(8, 4, seed=2)
    chosen, metrics = kind(group=8)(data, eps, {"label": torch.arange(8)}, draws(8))
    assert torch.equal(chosen, eps)
    assert float(metrics[COST_DROP]) == 0.0


@every_transport
def test_autocast_changes_nothing(kind) -> None:
    data, eps = normal(16, 40, seed=1, dtype=torch.float32), normal(16, 40, seed=2, dtype=torch.float32)
    plain, _ = kind(group=16)(data, eps, {}, draws(16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = kind(group=16)(data, eps, {}, draws(16))
    assert torch.equal(plain, cast)


def test_a_faulty_sample_unpairs_its_own_label_only() -> None:
    """No crash: the loss will be non-finite, which the training loop's guard handles."""
    data, eps, label = normal(16, 4, seed=1), normal(16, 4, seed=2), torch.arange(16) % 2
    ot = OptimalTransport(group=16)
    clean, _ = ot(data, eps, {"label": label}, draws(16))
    data[0] = torch.nan
    chosen, metrics = ot(data, eps, {"label": label}, draws(16))
    assert torch.equal(chosen[::2], eps[::2])
    assert torch.equal(chosen[1::2], clean[1::2])
    assert 0 < float(metrics[COST_DROP]) < 1


# --- Sinkhorn ----------------------------------------------------------------------------------------------


def plan_of(sinkhorn: Sinkhorn, data: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """(n, n) of one group without labels."""
    return sinkhorn.plan(data[None], eps[None], torch.zeros(1, len(data)))[0]


def plan_cost(plan: torch.Tensor, data: torch.Tensor, eps: torch.Tensor) -> float:
    """Mean |data − eps|² of pairs drawn from the plan."""
    return float((plan * (data[:, None] - eps[None]).square().sum(2)).sum() / len(data))


@pytest.mark.parametrize("size", [2, 300])
def test_the_entropic_plan_goes_from_optimal_to_independent(size: int) -> None:
    """Its cost rises with the regularisation, from that of exact transport to the mean over all pairs."""
    n = 16
    data, eps = 3 + normal(n, size, seed=1), normal(n, size, seed=2)
    optimal, _ = OptimalTransport(group=n)(data, eps, {}, draws(n))
    costs = []
    for regularisation in (0.003, 0.03, 0.3, 3.0, 1e4):
        plan = plan_of(Sinkhorn(group=n, regularisation=regularisation, iterations=4000), data, eps)
        torch.testing.assert_close(plan.sum(1), torch.ones(n, dtype=torch.float64))
        torch.testing.assert_close(plan.sum(0), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-3)
        assert bool((plan >= 0).all())
        costs.append(plan_cost(plan, data, eps))
    assert costs == sorted(costs)
    everywhere = torch.full((n, n), 1 / n, dtype=torch.float64)
    span = plan_cost(everywhere, data, eps) - cost(data, optimal)
    assert costs[0] - cost(data, optimal) == pytest.approx(0, abs=1e-3 * span)
    assert costs[-1] == pytest.approx(plan_cost(everywhere, data, eps), abs=1e-3 * span)
    torch.testing.assert_close(plan, everywhere, rtol=1e-2, atol=0)


def test_the_plan_is_the_entropic_optimum() -> None:
    """log plan = gain / regularisation + a row's number + a column's: double differences of both agree."""
    n = 12
    data, eps = normal(n, 5, seed=1), normal(n, 5, seed=2)
    plan = plan_of(Sinkhorn(group=n, regularisation=0.5, iterations=300), data, eps)
    cost_matrix = (data[:, None] - eps[None]).square().sum(2)

    def interaction(m: torch.Tensor) -> torch.Tensor:
        return m - m.mean(0, keepdim=True) - m.mean(1, keepdim=True) + m.mean()

    centred = 2 * (data - data.mean(0)) @ (eps - eps.mean(0)).T
    scale = 0.5 * float(centred.std(correction=0))
    torch.testing.assert_close(interaction(plan.log()), -interaction(cost_matrix) / scale)


def test_regularisation_does_not_depend_on_scale_or_place() -> None:
    """Nor on what all data or all eps have in common, which no pairing can change."""
    data, eps = normal(16, 6, seed=1), normal(16, 6, seed=2)
    sinkhorn = Sinkhorn(group=16)
    moved = plan_of(sinkhorn, 100 + 7 * data, 0.1 * eps - 20)
    torch.testing.assert_close(moved, plan_of(sinkhorn, data, eps))


def test_pairs_are_drawn_from_the_plan() -> None:
    """Frequencies over many groups of the same samples against the plan."""
    n, groups = 6, 4000
    data, eps = normal(n, 3, seed=1), normal(n, 3, seed=2)
    sinkhorn = Sinkhorn(group=n, regularisation=0.5)
    chosen, _ = sinkhorn(data.repeat(groups, 1), eps.repeat(groups, 1), {}, draws(n * groups))
    column = (chosen.view(groups, n, 1, 3) == eps).all(3).double()  # (groups, n, n), one 1 in each row
    assert bool((column.sum(2) == 1).all())
    plan = plan_of(sinkhorn, data, eps)
    error = (column.mean(0) - plan) / (plan * (1 - plan) / groups).sqrt()
    assert float(error.abs().max()) < 5
    assert float(plan.max()) > 0.3  # not the even plan


def test_each_data_draws_with_its_own_number() -> None:
    data, eps = torch.zeros(64, 3), normal(64, 3, seed=2)
    chosen, _ = Sinkhorn(group=64)(data, eps, {}, draws(64))
    assert len(set(rows_of(chosen, eps))) > 30  # of 64 draws with replacement 40 differ
    later, _ = Sinkhorn(group=64)(data, eps, {}, draws(64, step=1))
    assert not torch.equal(chosen, later)


def test_sinkhorn_stays_within_label_and_group() -> None:
    n, group = 96, 32
    data, eps = normal(n, 6, seed=1), normal(n, 6, seed=2)
    label = torch.from_numpy(np.random.default_rng(0).integers(-1, 4, n))
    chosen, narrow = Sinkhorn(group=group)(data, eps, {"label": label}, draws(n))
    for i, row in enumerate(rows_of(chosen, eps)):
        assert label[row] == label[i]
        assert row // group == i // group
    across, wide = Sinkhorn(group=group, within_label=False)(data, eps, {"label": label}, draws(n))
    assert any(label[row] != label[i] for i, row in enumerate(rows_of(across, eps)))
    assert float(wide[COST_DROP]) > float(narrow[COST_DROP]) > 0


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_a_faulty_sample_keeps_its_own_eps(fault: float) -> None:
    data, eps = normal(16, 4, seed=1), normal(16, 4, seed=2)
    data[5, 2] = fault
    chosen, metrics = Sinkhorn(group=8)(data, eps, {}, draws(16))
    rows = rows_of(chosen, eps)
    assert rows[5] == 5
    plan = plan_of(Sinkhorn(group=8), data[:8], eps[:8])
    alone = torch.eye(8, dtype=torch.float64)[5]
    assert torch.equal(plan[5], alone)  # its row
    assert torch.equal(plan[:, 5], alone)  # and its column
    assert all(bool(torch.isfinite(v)) for v in metrics.values())
    data[5, 2] = 0.0
    clean, _ = Sinkhorn(group=8)(data, eps, {}, draws(16))
    assert torch.equal(chosen[8:], clean[8:])


def test_too_few_iterations_show_in_the_marginal_error() -> None:
    data, eps = normal(32, 2, seed=1), normal(32, 2, seed=2)
    few, many = (
        Sinkhorn(group=32, regularisation=0.02, iterations=n)(data, eps, {}, draws(32))[1] for n in (1, 2000)
    )
    assert float(few["sinkhorn_marginal_error"]) > 0.5
    assert float(many["sinkhorn_marginal_error"]) < 0.05


# --- stored pairs and none ---------------------------------------------------------------------------------


def test_reflow_takes_what_is_stored() -> None:
    data, stored = normal(8, 40, seed=1), normal(8, 40, seed=2)
    chosen, metrics = Reflow()(data, stored, {}, draws(8))
    assert chosen is stored
    assert Reflow.stored
    assert not any(COUPLINGS[n].stored for n in COUPLINGS.names() if n != "reflow")
    assert abs(float(metrics[COST_DROP])) < 0.3  # these pairs are independent


def test_the_cost_drop_is_the_correlation() -> None:
    """Of unit-variance data and eps, element by element."""
    eps, other = normal(512, 64, seed=1), normal(512, 64, seed=2)
    data = 0.6 * eps + 0.8 * other
    assert float(Reflow()(data, eps, {}, draws(512))[1][COST_DROP]) == pytest.approx(0.6, abs=0.02)
    mixed = data[torch.from_numpy(np.random.default_rng(0).permutation(512))]
    _, metrics = OptimalTransport(group=512)(mixed, eps, {}, draws(512))  # finds the pairs again
    assert float(metrics[COST_DROP]) == pytest.approx(0.6, abs=0.02)


def test_independent_returns_the_very_draws() -> None:
    data, eps = normal(3, 2), normal(3, 2, seed=1)
    chosen, metrics = Independent()(data, eps, {}, draws(3))
    assert chosen is eps
    assert metrics == {}


@every_transport
def test_batches_that_groups_do_not_divide_are_refused(kind) -> None:
    with pytest.raises(ValueError, match=r"coupling\.group = 8"):
        kind(group=8)(torch.zeros(12, 2), torch.zeros(12, 2), {}, draws(12))


@every_transport
def test_other_shapes_are_refused(kind) -> None:
    with pytest.raises(ValueError, match="one shape"):
        kind(group=2)(torch.zeros(2, 3, 4), torch.zeros(2, 4, 3), {}, draws(2))


@every_transport
@pytest.mark.parametrize("group", [0, 1, -4, True])
def test_impossible_groups_are_refused(kind, group: int) -> None:
    with pytest.raises(ConfigError):
        kind(group=group)


@pytest.mark.parametrize("values", [{"regularisation": 0.0}, {"regularisation": -1}, {"iterations": 0}])
def test_impossible_regularisations_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        Sinkhorn(**values)


@every_coupling
def test_a_coupling_is_its_own_configuration(name: str) -> None:
    assert COUPLINGS.parse(to_dict(COUPLINGS[name]())) == COUPLINGS[name]()
