"""The bench of draws: both contenders are timed in the same turns, and draws are the smaller part of a step."""

from dit.bench.speed.draws import DrawsBench, run, turns
from dit.config import from_dict


def test_figures() -> None:
    cfg, ticks = from_dict(DrawsBench, {"size": "nano", "batch": 2, "steps": 1, "repeats": 3}), []
    found = run(cfg, lambda: ticks.append(1))
    assert len(ticks) == turns(cfg) == 8
    assert set(found["ms"]) == {"draws", "step"}
    assert 0 < found["draws / step"]["low"] <= found["draws / step"]["median"] < 1
