"""tools/train_classifier.py: trains, resumes, and what it makes guides tools/sample.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import tools.sample
import tools.train_classifier
from dit.experiments.classifier import ClassifierExperiment
from tests.commands import call
from tests.datasets import Digits
from tests.experiments.test_classifier import values
from tests.train.runs import column
from tests.train.runs import go as go_diffusion
from tests.train.runs import values as diffusion_values


@pytest.fixture
def config(digits: Digits, tmp_path: Path) -> Path:
    path = tmp_path / "classifier.yaml"
    path.write_text(yaml.safe_dump(values(digits, tmp_path / "run", train={"steps": 3})))
    return path


def test_it_trains_goes_on_and_guides(digits: Digits, config: Path, tmp_path: Path, capsys) -> None:
    assert call(tools.train_classifier.main, config) == 0
    assert call(tools.train_classifier.main, config, "--train.steps=5") == 0
    assert "resuming" in capsys.readouterr().out
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4, 5]
    go_diffusion(diffusion_values(digits, tmp_path / "dit", engine="local", train={"steps": 2}))
    drawn = {}
    for scale in (0, 20):
        guidance = f"[{{name: classifier, checkpoint: {tmp_path / 'run'}, scale: {scale}}}]"
        words = (
            "--num_samples=4",
            "--num_steps=2",
            f"--guidance={guidance}",
            f"--out={tmp_path / str(scale)}",
        )
        assert call(tools.sample.main, tmp_path / "dit", *words) == 0
        with np.load(tmp_path / str(scale) / "samples.npz") as held:
            drawn[scale] = held["arr_0"]
        spec = json.loads((tmp_path / str(scale) / "spec.json").read_text())
        assert (spec["nfe"], spec["network_evaluations"]) == (4, 8 if scale else 4)
        assert spec["sampler"]["guidance"][0]["scale"] == scale
    assert (drawn[0] != drawn[20]).any()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--clasifier.size=S"], "did you mean classifier"),
        (["--objective.prediction=eps"], "objective.prediction: unknown key"),
        (["--classifier.patch=3"], "patch 3 does not divide"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    config: Path, tmp_path: Path, capsys, words: list[str], says: str
) -> None:
    assert call(tools.train_classifier.main, config, *words) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_lists_its_keys(capsys) -> None:
    assert call(tools.train_classifier.main, "--help", config=ClassifierExperiment) == 0
    said = capsys.readouterr().out
    assert "  classifier.size " in said
    assert "  objective.path " in said
