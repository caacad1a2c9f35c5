"""The order of samples: properties over all small cases, an independent reference, and frozen values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ConfigError
from dit.data.loading.order import Order, lane_slots, rank_slots
from dit.rng import Draws, Purpose, permutation


@st.composite
def orders(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    batch = draw(st.integers(1, sum(sizes)))
    return {
        "sizes": sizes,
        "seed": draw(st.integers(0, 2**40)),
        "global_batch": batch,
        "lanes": draw(st.integers(1, 12)),
        "window": draw(st.integers(1, 4)),
    }


def pairs(order, steps):
    """(block, row) of every slot of the steps, in order."""
    return [p for s in steps for p in zip(*(a.tolist() for a in order.locate(s)), strict=True)]


def reference_epoch(sizes, seed, global_batch, lanes, window, epoch):
    """The same order, straight from the words of the data contract: {(step in epoch, slot): (block, row)}."""
    steps = sum(sizes) // global_batch
    owner = sorted(slot % min(lanes, global_batch) for slot in range(global_batch))  # dealt in turn
    bits = Draws(seed, epoch, torch.arange(len(sizes)), 1).bits(Purpose.ROTATION, 1)[:, 0].tolist()
    first = [bit * size // 2**32 for bit, size in zip(bits, sizes, strict=True)]
    places = [
        (int(b), (first[b] + i) % sizes[b])
        for b in permutation(seed, Purpose.BLOCKS, epoch, len(sizes))
        for i in range(sizes[b])
    ]
    found = {}
    for lane in range(min(lanes, global_batch)):
        slot, k = owner.index(lane), owner.count(lane)
        stretch = list(range(slot * steps, (slot + k) * steps))
        touched = list(dict.fromkeys(places[p][0] for p in stretch))  # the lane's block pieces
        mixed = []
        for w in range(0, len(touched), window):
            inside = [p for p in stretch if places[p][0] in touched[w : w + window]]
            words = Draws(seed, epoch, torch.tensor(inside) // 4, 1).bits(Purpose.SAMPLES, 4)
            keys = words[torch.arange(len(inside)), torch.tensor(inside) % 4].tolist()
            mixed += [p for _, p in sorted(zip(keys, inside, strict=True))]
        for i, p in enumerate(mixed):
            found[i // k, slot + i % k] = places[p]
    return found


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 3))
def test_every_sample_at_most_once_an_epoch_and_fewer_than_a_batch_left_out(given_order, epoch):
    order = Order(**given_order)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    seen = pairs(order, steps)
    assert len(set(seen)) == len(seen) == order.steps_per_epoch * order.global_batch
    assert 0 <= order.samples - len(seen) < order.global_batch
    assert all(0 <= row < given_order["sizes"][block] for block, row in seen)


@settings(max_examples=40, deadline=None)
@given(orders(), st.integers(0, 2))
def test_the_order_is_the_one_of_the_data_contract(given_order, epoch):
    order = Order(**given_order)
    expected = reference_epoch(**given_order, epoch=epoch)
    for step in range(order.steps_per_epoch):
        got = pairs(order, [epoch * order.steps_per_epoch + step])
        assert got == [expected[step, slot] for slot in range(order.global_batch)]


@settings(max_examples=40, deadline=None)
@given(orders(), st.data())
def test_any_step_can_be_asked_first(given_order, data):
    """Nothing depends on what was asked before: a resume at any step sees what an unbroken run saw."""
    unbroken = Order(**given_order)
    steps = data.draw(st.lists(st.integers(0, 3 * unbroken.steps_per_epoch), min_size=1, max_size=6))
    for step in steps:
        assert pairs(unbroken, [step]) == pairs(Order(**given_order), [step])


@settings(max_examples=40, deadline=None)
@given(orders(), st.integers(0, 200))
def test_windows_tile_a_lane_and_touch_no_more_than_their_blocks(given_order, position):
    order = Order(**given_order)
    for lane in range(order.lanes):
        window = order.window_at(lane, position)
        assert window.start <= position < window.stop
        assert len(window.block) == len(window.row) == window.stop - window.start
        assert set(window.block.tolist()) == set(window.pieces)
        assert len(window.pieces) <= order.window
        assert order.window_at(lane, window.stop).start == window.stop
        assert window.start // order.lane_length(lane) == (window.stop - 1) // order.lane_length(lane)


@given(st.integers(1, 500), st.integers(1, 80))
def test_lanes_share_the_slots_evenly(batch, lanes):
    slots = lane_slots(batch, lanes)
    sizes = np.diff(slots).tolist()
    assert (slots[0], slots[-1], len(sizes)) == (0, batch, min(lanes, batch))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@given(st.integers(1, 64), st.integers(1, 16))
def test_ranks_share_the_slots(share, size):
    parts = [range(*rank_slots(share * size, r, size)) for r in range(size)]
    assert [slot for part in parts for slot in part] == list(range(share * size))
    assert {len(part) for part in parts} == {share}


def test_epochs_and_seeds_differ():
    order = Order([8] * 8, seed=0, global_batch=16, lanes=4)
    epochs = [tuple(pairs(order, range(e * 4, e * 4 + 4))) for e in range(4)]
    other = Order([8] * 8, seed=1, global_batch=16, lanes=4)
    assert len({*epochs, tuple(pairs(other, range(4)))}) == 5


def test_what_is_left_out_changes_with_the_epoch():
    order = Order([10] * 7, seed=0, global_batch=24, lanes=8)
    everything = {(b, r) for b in range(7) for r in range(10)}
    left_out = [frozenset(everything - set(pairs(order, range(2 * e, 2 * e + 2)))) for e in range(6)]
    assert len(set(left_out)) > 1


def test_what_is_left_out_of_a_single_block_changes_too():
    """Or the last samples of a small data set would never be trained on."""
    order = Order([10], seed=0, global_batch=8, lanes=8)
    left_out = [{r for _, r in {(0, r) for r in range(10)} - set(pairs(order, [e]))} for e in range(60)]
    assert set.union(*left_out) == set(range(10))


def test_a_window_is_mixed_uniformly():
    """The first sample of a window of 8 over 800 windows: chi squared with 7 degrees of freedom."""
    first = [Order([8], seed=s, global_batch=1, window=1).window_at(0, 0).row[0] for s in range(800)]
    counts = np.bincount(first, minlength=8)
    assert ((counts - 100) ** 2 / 100).sum() < 24.3  # 0.1%


def test_frozen_values():
    """These change only with every run's data order: a change here breaks the resuming of runs."""
    order = Order([3, 2, 4, 1, 3], seed=7, global_batch=6, lanes=3, window=2)
    assert [pairs(order, [s]) for s in (0, 1, 5)] == [
        [(3, 0), (1, 1), (0, 1), (0, 2), (4, 2), (4, 1)],
        [(1, 0), (0, 0), (2, 2), (2, 3), (2, 0), (2, 1)],
        [(0, 0), (0, 1), (2, 2), (2, 3), (4, 2), (4, 1)],
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"sizes": [3, 4], "seed": 0, "global_batch": 8},
            "global batch of 8 is larger than the data set of 7",
        ),
        ({"sizes": [3], "seed": 0, "global_batch": 0}, "global_batch is 0"),
        ({"sizes": [3], "seed": 0, "global_batch": 1, "lanes": 0}, "lanes is 0"),
        ({"sizes": [3], "seed": 0, "global_batch": 1, "window": 0}, "window is 0"),
    ],
)
def test_impossible_orders(arguments, words):
    with pytest.raises(ConfigError, match=words):
        Order(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 0, 4), "does not divide among 4 ranks; take 8 or 12"),
        ((3, 0, 4), "does not divide among 4 ranks; take 4"),
        ((8, 4, 4), "rank 4 of 4"),
    ],
)
def test_impossible_ranks(arguments, words):
    with pytest.raises(ConfigError, match=words):
        rank_slots(*arguments)
