"""What a real run's directory tells."""

import json
from pathlib import Path

import pytest
import yaml

import tools.train_classifier
import tools.train_vae
from dit.config import from_dict
from dit.data.shards.manifest import Manifest
from dit.errors import UserError
from dit.experiments.diffusion import Experiment
from dit.reports.comparison import Comparison
from dit.reports.curves import panels
from dit.reports.page import as_text
from dit.reports.told import RunTold
from tests.commands import call
from tests.datasets import Digits
from tests.experiments.test_autoencoder import values as autoencoder_values
from tests.experiments.test_classifier import values as classifier_values
from tests.train.runs import go, values


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told") / "run"
    go(values(digits, folder, train={"steps": 2}, checkpoint={"every": 2}))
    return folder


def test_the_flops_are_those_of_the_cost_model_told_by_the_start_or_by_a_checkpoint(
    run: Path, digits: Digits
) -> None:
    told = RunTold.read(run)
    cost = from_dict(Experiment, values(digits, run)).cost(Manifest.load(str(digits.moments)))
    assert told.flops_per_sample == cost.training_flops
    history = run / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    for row in rows:
        row.pop("flops_per_sample")
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))  # as older versions began runs
    assert RunTold.read(run).flops_per_sample == cost.training_flops


def test_its_last_step_and_seconds(run: Path) -> None:
    told = RunTold.read(run)
    assert told.last["step"] == told.planned == 2
    assert told.last["samples"] == 2 * told.batch
    assert told.seconds[-1] > 0


@pytest.mark.parametrize(
    ("go_on", "values_of", "figures", "terms"),
    [
        (tools.train_vae.main, autoencoder_values, ["psnr", "ssim", "loss"], ["kl", "pixel_mse"]),
        (tools.train_classifier.main, classifier_values, ["accuracy", "loss"], ["accuracy"]),
    ],
)
def test_runs_of_other_kinds_are_compared_by_their_own_figures(
    digits: Digits, tmp_path: Path, go_on, values_of, figures: list[str], terms: list[str]
) -> None:
    for seed, name in enumerate(("a", "b")):
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values_of(digits, tmp_path / name, seed=seed, train={"steps": 2})))
        assert call(go_on, config) == 0
    found = Comparison([RunTold.read(tmp_path / name) for name in "ab"])
    assert [contest.alike.figure for contest in found.contests] == [f"held-out {name}" for name in figures]
    for contest in found.contests:
        values = [one.value for one in contest.standings]
        assert values == sorted(values, reverse=contest.alike.figure != "held-out loss")
    assert {f"training: {term}" for term in terms} <= {panel.title for panel in panels(found)}
    assert [row.key for row in found.differences] == ["seed"]
    assert found.unlike == []
    for run in found.runs:
        (run.folder / "held_out.jsonl").unlink()
    found = Comparison([RunTold.read(tmp_path / name) for name in "ab"])
    assert "tools/sample.py" not in as_text(found)  # which draws from none of them
    assert "data.val" in as_text(found)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("metrics.jsonl", '{"step": 1}\n', "None for samples in row 1"),
        ("config.yaml", "kind: vae\n", r"None for train\.steps"),
        ("config.yaml", "", r"None for train\.steps"),
    ],
)
def test_files_that_are_of_no_run_are_named(
    run: Path, tmp_path: Path, file: str, text: str, words: str
) -> None:
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{file} has {words}"):
        RunTold.read(tmp_path)
