"""The bench of checkpoints: every contender handles the same bytes, and only the last checkpoint is left."""

from pathlib import Path

import pytest

from dit.bench.speed.saving import SavingBench, run, turns
from dit.config import ConfigError, from_dict

SMALL = {"parameters": 70_000, "width": 128, "repeats": 2}


def test_figures(tmp_path: Path) -> None:
    cfg, ticks = from_dict(SavingBench, SMALL), []
    found = run(tmp_path, cfg, lambda: ticks.append(1))
    assert found["bytes"] == 16 * 4 * 128**2  # four matrices fit
    assert len(ticks) == turns(cfg) == 9
    assert set(found["seconds"]) == {"plain write", "save", "load", "stall"}
    # the stall is a part of its turn's save, however busy the machine is
    assert 0 < found["stall / save"]["low"] <= found["stall / save"]["high"] < 1
    assert found["save / plain write"]["median"] > 0
    (left,) = (tmp_path / "ours").iterdir()
    assert left.name == "step-00000002"
    assert sum(f.stat().st_size for f in left.glob("*.safetensors")) > found["bytes"]


def test_sizes_that_make_no_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must fill a matrix of width x width \(1024\)"):
        from_dict(SavingBench, {"parameters": 1000})
