"""The benchmark of updates: every way updates and averages, and the bytes are those of its own sums."""

from __future__ import annotations

import pytest
import torch

from dit.bench.speed.updates import Updates, UpdatesBench, ways
from dit.ranks.group import World

CFG = UpdatesBench(size="nano", steps=8, repeats=1)
PLAIN = [way for way in ways() if not way.optim.one_pass]


@pytest.mark.parametrize("way", PLAIN, ids=lambda way: way.name)
def test_a_turn_updates_and_averages(way) -> None:
    made = Updates(way, CFG, World())
    before = [
        (f.weight.clone(), a.clone()) for f, a in zip(made.engine.fragments(), made.ema.pieces, strict=True)
    ]
    assert made.run(0) == 8
    assert made.engine.updates == 8
    for (weight, average), f, a in zip(before, made.engine.fragments(), made.ema.pieces, strict=True):
        assert not torch.equal(weight, f.weight)
        assert not torch.equal(average, a)
    assert sum(f.numel for f in made.engine.fragments()) == made.numbers
    if way.bytes is not None:  # it clips still, so that those bytes are moved; Muon overwrites gradients
        assert made.engine.grad_norm() > 0.999 * way.optim.clip


def test_bytes_are_sums_of_what_each_part_moves() -> None:
    """float32: the norm reads 1 number; the factor 1 + 1; AdamW 4 + 3; an average 2 + 1. In one pass 5 + 4."""
    found = {way.name: way.bytes for way in ways()}
    assert found["each by itself, flat"] == 4 * (1 + 2 + 7 + 3)
    assert found["in one pass, flat"] == 4 * (1 + 9)
    assert found["each by itself, flat, every 8"] == 4 * (1 + 2 + 7 + 3 / 8)
    assert found["in one pass, flat, every 8"] == 4 * (1 + 7 + 2 / 8)
    assert found["muon, by parameter"] is None
    assert len(found) == 9
