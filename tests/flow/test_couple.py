"""Couplings: they choose eps and never change data; OT against the reference and brute force."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import to_dict
from dit.flow.couple import COUPLINGS, Independent, OptimalTransport
from tests.gaussian import golden, normal

every_coupling = pytest.mark.parametrize("name", COUPLINGS.names())


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
    chosen, metrics = coupling(data, eps, {"label": label})
    assert torch.equal(data, before[0])
    assert torch.equal(eps, before[1])
    assert torch.equal(label, before[2])
    assert sorted(rows_of(chosen, eps)) == list(range(n))
    assert chosen.dtype == eps.dtype
    assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())


@every_coupling
def test_a_batch_split_into_groups_is_coupled_alike(name: str) -> None:
    """So the micro-batch and the number of ranks do not matter."""
    coupling = COUPLINGS[name]()
    n = coupling.group
    data, eps, label = normal(4 * n, 8, seed=1), normal(4 * n, 8, seed=2), torch.arange(4 * n) % 5
    whole, _ = coupling(data, eps, {"label": label})
    for size in (n, 2 * n):
        parts = [
            coupling(d, e, {"label": y})[0]
            for d, e, y in zip(data.split(size), eps.split(size), label.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_the_reference_pairing() -> None:
    ref = golden("minibatch_ot")
    data, eps = torch.from_numpy(ref["data"]), torch.from_numpy(ref["noise"])
    chosen, metrics = OptimalTransport(group=64)(data, eps, {})
    for i, row in enumerate(rows_of(chosen, eps)):
        assert ref["pairing"][row] == i
    assert cost(data, chosen) == pytest.approx(float(ref["cost"]), rel=1e-6)
    want = 1 - float(ref["cost"]) / cost(data, eps)
    assert float(metrics["ot_cost_drop"]) == pytest.approx(want, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6))
def test_no_pairing_is_cheaper(seed: int, n: int) -> None:
    data, eps = normal(n, 3, seed=seed), normal(n, 3, seed=seed + 1)
    chosen, metrics = OptimalTransport(group=n)(data, eps, {})
    best = min(cost(data, eps[list(order)]) for order in permutations(range(n)))
    assert cost(data, chosen) == pytest.approx(best, rel=1e-12)
    assert float(metrics["ot_cost_drop"]) >= 0


def test_eps_stays_within_its_label_and_group() -> None:
    n, group = 96, 32
    data, eps = normal(n, 6, seed=1), normal(n, 6, seed=2)
    label = torch.from_numpy(np.random.default_rng(0).integers(-1, 4, n))  # −1: no label
    inside, narrow = OptimalTransport(group=group)(data, eps, {"label": label})
    across, wide = OptimalTransport(group=group, within_label=False)(data, eps, {"label": label})
    for i, row in enumerate(rows_of(inside, eps)):
        assert label[row] == label[i]
        assert row // group == i // group
    assert {row // group == i // group for i, row in enumerate(rows_of(across, eps))} == {True}
    assert any(label[row] != label[i] for i, row in enumerate(rows_of(across, eps)))
    assert cost(data, across) < cost(data, inside) < cost(data, eps)
    assert float(wide["ot_cost_drop"]) > float(narrow["ot_cost_drop"]) > 0


def test_dropped_labels_still_count() -> None:
    """Label dropout is the conditioner's business: what is paired does not depend on it."""
    data, eps, label = normal(8, 4, seed=1), normal(8, 4, seed=2), torch.arange(8) % 2
    ot = OptimalTransport(group=8)
    plain, _ = ot(data, eps, {"label": label})
    dropped, _ = ot(data, eps, {"label": label, "drop": torch.ones(8, dtype=torch.bool)})
    assert torch.equal(plain, dropped)


def test_one_sample_per_label_is_left_alone() -> None:
    data, eps = normal(8, 4, seed=1), normal(8, 4, seed=2)
    chosen, metrics = OptimalTransport(group=8)(data, eps, {"label": torch.arange(8)})
    assert torch.equal(chosen, eps)
    assert float(metrics["ot_cost_drop"]) == 0.0


def test_autocast_changes_nothing() -> None:
    data, eps = normal(16, 40, seed=1, dtype=torch.float32), normal(16, 40, seed=2, dtype=torch.float32)
    plain, _ = OptimalTransport(group=16)(data, eps, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = OptimalTransport(group=16)(data, eps, {})
    assert torch.equal(plain, cast)


def test_a_faulty_sample_unpairs_its_own_label_only() -> None:
    """No crash: the loss will be non-finite, which the training loop's guard handles."""
    data, eps, label = normal(16, 4, seed=1), normal(16, 4, seed=2), torch.arange(16) % 2
    ot = OptimalTransport(group=16)
    clean, _ = ot(data, eps, {"label": label})
    data[0] = torch.nan
    chosen, metrics = ot(data, eps, {"label": label})
    assert torch.equal(chosen[::2], eps[::2])
    assert torch.equal(chosen[1::2], clean[1::2])
    assert bool(torch.isfinite(metrics["ot_cost_drop"]))


def test_independent_returns_the_very_draws() -> None:
    data, eps = normal(3, 2), normal(3, 2, seed=1)
    chosen, metrics = Independent()(data, eps, {})
    assert chosen is eps
    assert metrics == {}


def test_batches_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"coupling\.group = 8"):
        OptimalTransport(group=8)(torch.zeros(12, 2), torch.zeros(12, 2), {})


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        OptimalTransport(group=2)(torch.zeros(2, 3, 4), torch.zeros(2, 4, 3), {})


@pytest.mark.parametrize("group", [0, 1, -4, True])
def test_impossible_groups_are_refused(group: int) -> None:
    with pytest.raises(pydantic.ValidationError):
        OptimalTransport(group=group)


@every_coupling
def test_a_coupling_is_its_own_configuration(name: str) -> None:
    assert COUPLINGS.parse(to_dict(COUPLINGS[name]())) == COUPLINGS[name]()
