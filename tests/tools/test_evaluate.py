"""tools/evaluate.py: figures of given features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.commands import ROOT, call
from tools.evaluate import features

GOLDEN = ROOT / "tests" / "golden" / "metrics.npz"
FIGURES = ["frechet", "kid", "precision", "recall", "density", "coverage", "mind", "inception_score"]
FEW = "--mind.projections=20"


def test_figures_intervals_and_protocol_of_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "new" / "figures.json"
    assert call(features, GOLDEN, GOLDEN, FEW, "--bootstrap=20", f"--json_file={place}") == 0
    said = capsys.readouterr().out
    found = json.loads(place.read_text())
    with np.load(GOLDEN) as held:
        for name in FIGURES:
            if name != "mind":
                assert found[name] == pytest.approx(float(held[name]), rel=1e-6)
            assert found["intervals"][name][0] <= found[name] <= found["intervals"][name][1]
            assert f"{found[name]:.6g}" in said
    assert set(found) == {*FIGURES, "intervals", "bootstrap", "samples", "protocol", "hash"}
    assert found["samples"] == {"generated": 900, "reference": 1100}
    assert found["bootstrap"] == {"resamples": 20, "level": 0.95, "seed": 0}
    assert found["protocol"]["metrics"]["mind"]["projections"] == 20
    assert found["hash"] in said


def test_without_logits_there_is_no_inception_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    np.savez(ours, rng.normal(size=(30, 4)))
    np.savez(theirs, features=rng.normal(size=(40, 4)))
    assert call(features, ours, theirs, FEW, f"--json_file={tmp_path / 'f.json'}") == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["inception_score"] is None
    assert found["bootstrap"] is None
    assert set(found) >= set(FIGURES)
    assert "needs logits" in capsys.readouterr().out
    assert call(features, ours, theirs, "--metrics=inception_score") == 1
    assert "ours.npz: inception_score needs logits" in capsys.readouterr().err
    assert call(features, ours, theirs, "--metrics=kid") == 0
    assert "frechet" not in capsys.readouterr().out
    assert call(features, ours, GOLDEN) == 1
    assert "features of 4 dimensions, the reference of 48" in capsys.readouterr().err
    assert call(features, ours, theirs, "--bootstrap=3") == 1
    assert "expected 0 (no intervals) or at least 20" in capsys.readouterr().err


def test_where_the_figures_go_is_looked_at_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(features, "nowhere.npz", GOLDEN, f"--json_file={tmp_path}") == 1
    assert "is a folder, and a file is to be written" in capsys.readouterr().err
