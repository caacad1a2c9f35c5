"""What a run will cost: measured where that is quick, and else said why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit.experiments.parts import make_parts
from dit.train.dry_run import dry_run
from tests.datasets import Digits
from tests.train.runs import experiment, values


def test_it_measures_nothing_that_takes_long(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit.train.dry_run.PATIENCE", 0.0)
    dry_run(experiment(values(digits, tmp_path / "run")), make_parts)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hours")]
    assert "at 50% MFU" in row
    assert "stated shares of the peak: a pass of 8 samples may take" in row
    assert not (tmp_path / "run").exists()
