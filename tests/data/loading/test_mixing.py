"""How far neighbours land apart, against counts by hand and the closed form of a uniform permutation."""

import numpy as np
import pytest

from dit.data.loading.mixing import mixing, neighbour_steps
from dit.data.loading.order import Order


def test_against_the_order_itself():
    order = Order([4, 3, 5, 4], seed=1, global_batch=4, lanes=2, window=1)
    step = {}
    for s in range(order.steps_per_epoch):
        for block, row in zip(*(a.tolist() for a in order.locate(s)), strict=True):
            step[block, row] = s
    expected = [
        abs(step[b, r + 1] - step[b, r])
        for b, n in enumerate([4, 3, 5, 4])
        for r in range(n - 1)
        if (b, r) in step and (b, r + 1) in step
    ]
    assert neighbour_steps(order).tolist() == expected


def test_one_window_over_everything_is_a_uniform_permutation():
    found = [mixing(Order([1000] * 4, seed=s, global_batch=20, lanes=1, window=4)) for s in range(5)]
    middle = np.mean([m.quartiles[1] for m in found])
    assert middle == pytest.approx(found[0].uniform[0], rel=0.03)
    assert np.mean([m.same_batch for m in found]) == pytest.approx(found[0].uniform[1], rel=0.2)


def test_a_wider_window_mixes_further():
    middles = [
        mixing(Order([64] * 64, seed=0, global_batch=64, lanes=4, window=w)).quartiles[1] for w in (1, 2, 4)
    ]
    assert middles[0] < middles[1] < middles[2]
    assert "steps apart" in str(mixing(Order([8] * 8, seed=0, global_batch=8)))


def test_blocks_of_one_have_no_neighbours():
    assert mixing(Order([1] * 8, seed=0, global_batch=2)).quartiles == (0, 0, 0)
