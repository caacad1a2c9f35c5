"""tools/scaling.py fit and predict: from a CSV to files and figures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import call
from tests.scaling.laws.surfaces import HOFFMANN, Grid, table, write
from tools.scaling import fit, predict

FEW = "--bootstrap=100"
SPEC = """
out: experiment
training: {base: BASE}
ladder: {name: list, sizes: [{width: 64, depth: 2, heads: 2}]}
budgets: [1e12]
batch: {name: power, at: 256, params: 1e8, exponent: 0.6667}
lr: {name: power, at: 1e-3, params: 1e8, exponent: -0.3333}
"""


def test_from_runs_to_a_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"tokens": row["flops"] / 6 / row["params"]} for row in table(HOFFMANN, Grid(6, 4), 1e-3)]
    rows = [row | {"samples": row["tokens"] / 256, "complete": "true"} for row in rows]
    rows[3] |= {"complete": "false", "loss": ""}
    runs, out = write(tmp_path / "runs.csv", rows), tmp_path / "new" / "fitted"
    assert call(fit, runs, f"--out={out}", FEW) == 0
    said = capsys.readouterr()
    held = json.loads((out / "fit.json").read_text())
    assert "23 runs of runs.csv" in said.out
    assert f"{held['alpha']:.5g}" in said.out
    assert "warning: not complete and left out: 1 run (line 5)" in said.err
    with Image.open(out / "residuals.png") as picture:
        assert len(picture.convert("L").getcolors()) > 20
    assert call(fit, runs, f"--out={out}", FEW) == 0  # an earlier fit is replaced
    figures = tmp_path / "figures.json"
    words = ("--flops=1e21", "--device=h100", "--gpus=8", f"--json_file={figures}")
    capsys.readouterr()
    assert call(predict, out / "fit.json", *words) == 0
    found = json.loads(figures.read_text())
    assert found["figures"]["samples"] == pytest.approx(found["figures"]["tokens"] / 256)
    assert "GPU-hours  701.8 of h100 at an assumed MFU of 40%" in capsys.readouterr().out
    assert call(predict, out / "fit.json", "--flops=1e21", "--gpus=8") == 1
    assert "--gpus and --mfu say for how many hours of --device" in capsys.readouterr().err
    assert call(fit, out / "fit.json", f"--out={out}", FEW) == 1
    assert "is no CSV of runs: it begins with '{'" in capsys.readouterr().err


def test_batch_rate_and_steps_by_a_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write(tmp_path / "runs.csv", table(HOFFMANN, Grid(6, 4), 1e-3))
    base = Path("configs/digits.yaml").resolve()
    (tmp_path / "spec.yaml").write_text(SPEC.replace("BASE", str(base)))
    figures = tmp_path / "figures.json"
    assert call(fit, runs, f"--out={tmp_path / 'fitted'}", FEW) == 0
    words = (
        "--flops=1e20",
        f"--spec={tmp_path / 'spec.yaml'}",
        "--tokens_per_sample=256",
        f"--json_file={figures}",
    )
    assert call(predict, tmp_path / "fitted", *words) == 0, capsys.readouterr().err
    found = json.loads(figures.read_text())["figures"]
    share = found["params"] / 1e8
    assert found["batch"] % 8 == 0
    assert found["batch"] == pytest.approx(256 * share**0.6667, abs=4)
    assert found["lr"] == pytest.approx(1e-3 * share**-0.3333, rel=1e-3)
    assert found["steps"] == round(found["samples"] / found["batch"])


def test_what_is_refused_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write(tmp_path / "runs.csv", [{"params": 1e6, "flops": 1e15, "loss": "nan"}])
    assert call(fit, runs, f"--out={tmp_path / 'fitted'}") == 1
    assert "line 2: loss is not finite" in capsys.readouterr().err
    assert not (tmp_path / "fitted").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "residuals.png").write_bytes(b"of something else")
    assert call(fit, runs, f"--out={tmp_path / 'kept'}") == 1
    assert "residuals.png is there already, and is not of a fit" in capsys.readouterr().err
    assert call(predict, tmp_path / "nothing", "--flops=1e21") == 1
    assert "there is no such file" in capsys.readouterr().err
    assert call(predict, tmp_path, "--flops=1e21", "--device=abacus") == 1
    assert "--device=abacus: its peak is not known; expected one of A100" in capsys.readouterr().err
