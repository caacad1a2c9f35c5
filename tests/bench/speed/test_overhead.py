"""The bench of the loop's share: parts add up to the step, what is put between the calls shows, and nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from dit.bench.speed.overhead import AVERAGE, LOG, PASSES, REST, WAIT, OverheadBench, lines, run, turns
from dit.config import ConfigError, from_dict
from dit.train.ema import Ema
from dit.train.engines.plain import PlainEngine

TINY = {"size": "nano", "batch": 2, "stage": None, "steps": 2, "repeats": 2, "log_every": 2}
NAP = 0.05  # seconds


def measured(folder: Path, **keys: Any) -> dict[str, Any]:
    return run(from_dict(OverheadBench, {**TINY, **keys}), folder)


def test_parts_add_up_to_the_step_and_the_share_is_what_the_engine_does_not_take(tmp_path: Path) -> None:
    told: list[None] = []
    cfg = from_dict(OverheadBench, {**TINY, "repeats": 1})
    found = run(cfg, tmp_path / "x", lambda: told.append(None))
    assert len(told) == turns(cfg) == 2
    ms = {name: values["median"] for name, values in found["ms"].items()}
    step = ms.pop("step")
    assert sum(ms.values()) == pytest.approx(step)
    assert found["loop / step"]["median"] == pytest.approx(1 - ms[PASSES] / step)
    assert min(ms[PASSES], ms[LOG], ms[REST], ms[WAIT]) > 0
    (*_, last) = lines(found, 1.0, enough=True)
    assert last.startswith("loop / step")
    assert last.endswith("(at most 1: met)")


def test_time_goes_to_the_part_that_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = measured(tmp_path / "plain")["ms"]
    update, step = Ema.update, PlainEngine.step

    def slow_average(self: Ema) -> None:
        time.sleep(NAP)
        update(self)

    def slow_step(self: PlainEngine, lr: float) -> bool:
        time.sleep(2 * NAP)
        return step(self, lr)

    monkeypatch.setattr(Ema, "update", slow_average)
    monkeypatch.setattr(PlainEngine, "step", slow_step)
    slow = measured(tmp_path / "slow")["ms"]
    assert slow[AVERAGE]["low"] > 1e3 * NAP > plain[AVERAGE]["median"]
    assert slow[PASSES]["low"] > 2e3 * NAP


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch at most"):
        from_dict(OverheadBench, {"batch": 10**6})
    with pytest.raises(ConfigError, match="unknown size"):
        from_dict(OverheadBench, {"size": "SX"})
