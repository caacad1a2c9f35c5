"""tools/toys.py: a short real run shows what couplings do, and leaves its table and pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import tools.toys
from dit.evals import plane
from tests.commands import call


@pytest.fixture
def small(monkeypatch):
    """Less of everything."""
    monkeypatch.setattr(plane, "PAIRS", 2048)
    monkeypatch.setattr(plane, "JUDGED", 256)
    monkeypatch.setattr(tools.toys, "Budget", lambda **given: plane.Budget(batch=128, width=64, **given))


def test_transport_straightens_and_reflow_straightens_further(small, tmp_path, capsys) -> None:
    words = ("--steps=80", f"--out={tmp_path / 'tables' / 'toys'}", f"--pictures={tmp_path / 'pictures'}")
    assert call(tools.toys.main, *words) == 0
    values = json.loads((tmp_path / "tables" / "toys.json").read_text())
    assert values["protocol"]["steps"] == 80
    for problem in ("moons", "checkerboard"):
        rows = values["results"][problem]
        flows = ("independent", "ot", "reflow", "ot_reflow")
        bend, energy, error = (
            {n: rows[n]["bend"] for n in flows},
            {n: rows[n]["energy"] for n in flows},
            {n: rows[n]["error"]["4"] for n in flows},
        )
        assert bend["ot"] < 0.2 * bend["independent"]
        assert bend["reflow"] < 0.2 * bend["independent"]
        assert bend["ot_reflow"] < bend["ot"]
        assert energy["ot"] < 0.8 * energy["independent"]
        assert max(error["ot"], error["reflow"]) < 0.6 * error["independent"]
        assert error["ot_reflow"] < error["ot"]
        picture = np.asarray(Image.open(tmp_path / "pictures" / f"toys_{problem}.png").convert("RGB"))
        assert min(picture.shape[:2]) > 500
        assert picture.std() > 10
    table = (tmp_path / "tables" / "toys.md").read_text()
    assert table == capsys.readouterr().out
    assert "| optimal transport, then reflow | " in table
    assert f"protocol {values['hash']}" in table
    assert call(tools.toys.main, *words) == 0
    assert "made already by the same protocol" in capsys.readouterr().out
    assert call(tools.toys.main, *words, "--seed=1") == 1
    assert "protocol.seed: 0 there, 1 now" in capsys.readouterr().err


def test_a_picture_of_something_else_is_not_replaced(small, tmp_path, capsys) -> None:
    (tmp_path / "toys_moons.png").touch()
    assert call(tools.toys.main, "--steps=1", f"--out={tmp_path / 'toys'}") == 1
    assert "toys_moons.png is there already, and nothing says how it was made" in capsys.readouterr().err
    assert call(tools.toys.main, "--steps=1") == 2
    assert "missing --out" in capsys.readouterr().err


def test_what_is_wrong_is_said(tmp_path, capsys) -> None:
    assert call(tools.toys.main, "--steps=0", f"--out={tmp_path / 'toys'}") == 1
    assert "steps must be at least 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
