"""Peak bytes: of allocations that are known, and of steps beside what is predicted."""

import pytest
import torch

from dit.bench.speed import memory
from dit.bench.speed.allocated import live_bytes, peak_bytes
from dit.bench.speed.memory import WITHIN, MemoryBench, lines
from dit.config import ConfigError, from_dict

KIB = 1024


def test_the_peak_is_what_lives_at_a_time():
    """A tensor of 400 KiB before, two of 800 that never live together, one of 100 that stays."""

    def build():
        return torch.zeros(100 * KIB)

    def work(held):
        for _ in range(2):
            two = torch.zeros(200 * KIB)
            del two
        return torch.zeros(25 * KIB) + held[0]

    assert peak_bytes(torch.device("cpu"), build, work) == pytest.approx(1200 * KIB, rel=0.001)


def test_what_lives_is_counted_once_with_gradients():
    before = live_bytes()
    weight = torch.zeros(1000, requires_grad=True)
    view = weight.detach()[10:]
    assert live_bytes() - before == 4000
    weight.sum().backward()
    assert live_bytes() - before == 8000
    assert view.numel() == 990


@pytest.mark.slow
def test_the_prediction_is_within_a_tenth_at_every_stage():
    cfg = from_dict(MemoryBench, {"size": ["micro"], "ranks": [2]})
    rows = memory.run(cfg)
    assert len(rows) == 16
    assert {(row["stage"], row["recompute"]) for row in rows} == {case[1:] for case in cfg.cases()}
    for row in rows:
        assert row["ratio"] == pytest.approx(1, abs=WITHIN), row
    for stage in cfg.stages:
        measured = {row["recompute"]: row["measured_bytes"] for row in rows if row["stage"] == stage}
        assert measured["all"] < measured["half"] < measured["none"]
        assert measured["products"] < measured["none"]
    assert len(list(lines(rows))) == 18


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="cannot be shared by 3"):
        from_dict(MemoryBench, {"accumulation": 3})
    with pytest.raises(ConfigError, match="unknown size"):
        from_dict(MemoryBench, {"size": ["huge"]})
