"""The whole job, as `make quickstart` runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quickstart_reaches_its_figures_and_says_where_the_picture_is(tmp_path):
    command = [sys.executable, "tools/quickstart.py", f"--out={tmp_path / 'q'}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    report = json.loads((tmp_path / "q/report.json").read_text())
    assert report["samples"] == 500
    assert report["class_accuracy"] >= 0.97
    assert report["class_accuracy_held_out_real"] >= 0.97
    assert report["frechet"] <= 1.5 * report["frechet_floor"]
    assert report["reconstruction_mse"] <= 1e-3
    assert {"train_autoencoder", "encode_latents_train", "train_dit", "sample_cfg2", "total"} <= set(
        report["seconds"]
    )
    assert str(tmp_path / "q/grid.png") in ended.stdout
    picture = np.asarray(Image.open(tmp_path / "q/grid.png"))
    assert picture.shape == (684, 684, 3)  # 10 x (32 + 2) + 2, twice as large
    assert picture.std() > 30  # something was drawn
