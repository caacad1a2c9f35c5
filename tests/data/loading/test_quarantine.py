"""Blocks that cannot be read: within a budget their samples keep their slots and count for nothing."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.data import DataError
from dit.data.loading.quarantine import Quarantine
from dit.data.loading.stream import Stream
from tests.data.helpers import flip_byte, write_dataset

SIZES = [5, 5, 3, 5, 5, 4, 5]  # 32 samples


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("whole") / "set", SIZES, views=2)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The same with blocks 1 (altered) and 5 (in a truncated shard) broken, and with 6, which that takes along."""
    made = write_dataset(tmp_path_factory.mktemp("broken") / "set", SIZES, views=2)
    flip_byte(made.path(0), made.blocks[1].offset + 700)
    os.truncate(made.path(1), made.blocks[5].offset + 100)
    Path(made.path(2)).unlink()
    return made, {1, 5, 6}


def batches(manifest, steps, budget=3, **kwargs):
    stream = Stream(manifest, 0, 8, quarantine=Quarantine(budget), **{"lanes": 4, **kwargs})
    try:
        return [stream.batch(step) for step in steps], stream
    finally:
        stream.close()


def test_every_other_sample_stays_where_it_was(whole, broken):
    made, bad = broken
    expected, stream = batches(whole, range(9))
    got, faulty = batches(made, range(9))
    for a, b in zip(expected, got, strict=True):
        block, _ = stream.order.locate(a.step)
        missing = torch.from_numpy(np.isin(block, list(bad)))
        assert torch.equal(b.valid, ~missing)
        assert a.whole
        assert b.whole == (not bool(missing.any()))
        for name in ("moments", "label", "id"):
            assert torch.equal(getattr(a, name)[b.valid], getattr(b, name)[b.valid])
        assert torch.equal(a.view, b.view)
        assert not b.moments[missing].any()
        assert (b.label[missing] == -1).all()
        assert (b.id[missing] == -1).all()
    assert set(faulty.quarantine.reasons) == {(0, b) for b in bad}
    assert all("record" in reason for reason in faulty.quarantine.reasons.values())


def test_the_budget_is_zero_by_default(broken):
    with pytest.raises(DataError, match=r"shard-00000\d.tar: record"):
        batches(broken[0], range(4), budget=0)


def test_beyond_the_budget_all_are_named(broken):
    with pytest.raises(DataError, match=r"more than data.max_quarantined = 2 broken block") as error:
        batches(broken[0], range(4), budget=2)
    assert str(error.value).count(": record ") == 3


@settings(max_examples=15, deadline=None)
@given(size=st.sampled_from([1, 2, 4, 8]), lanes=st.sampled_from([1, 2, 8]), start=st.integers(0, 8))
def test_the_same_on_any_ranks(broken, size, lanes, start):
    steps = range(start, start + 3)
    one, _ = batches(broken[0], steps, lanes=lanes)
    parts = [batches(broken[0], steps, rank=r, size=size, lanes=lanes)[0] for r in range(size)]
    for i, whole in enumerate(one):
        for name in ("moments", "label", "id", "valid"):
            assert torch.equal(torch.cat([getattr(p[i], name) for p in parts]), getattr(whole, name))
