"""The spec's file: every mistake is named, with its key and where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dit.config import ConfigError
from dit.scaling.spec import load_spec
from tests.datasets import Digits
from tests.scaling.experiments import spec_values

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "scaling").glob("*.yaml"))


def saved(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_specs_that_come_with_the_house_are_right(file: Path) -> None:
    assert load_spec(file).points


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"budgets": [1e9]}, "one of the two"),
        ({"samples_per_param": []}, "one of the two"),
        ({"samples_per_param": [1, 1]}, "samples_per_param has 1 twice"),
        ({"samples_per_param": [1, float("inf")]}, "samples_per_param.1: .*finite"),
        ({"samples_per_param": [1, 1.0000001]}, "two points are 1 to six digits"),
        ({"device": {"flops": float("inf")}}, "device.flops: .*finite"),
        ({"lr": {"exponent": float("inf")}}, "lr.exponent: .*finite"),
        ({"decay": None}, "branching needs `decay`"),
        ({"decay": 1.5}, "decay: .*less than 1"),
        ({"window": [3, 1]}, "LOW < HIGH"),
        ({"seeds": []}, "seeds: give one or more"),
        ({"more_seeds": [{"seeds": [0]}]}, "seed 0 is in `seeds`"),
        ({"more_seeds": [{"seeds": [1], "sizes": ["w17d1"]}]}, "w17d1 is not among them: w16d1, w32d1"),
        ({"more_seeds": [{"seeds": [1], "budgets": [0.03]}]}, "0.03 is not among them: 0.02, 0.04"),
        ({"batches": 3}, "batches: unknown key; did you mean batch"),
        ({"training": {"train": {"stepz": 3}}}, "train.stepz: unknown key; did you mean train.steps"),
        ({"device": {"name": "abacus", "flops": None}}, "the peak of 'abacus' is not known"),
        ({"lr": {"name": "powr"}}, "did you mean power"),
    ],
)
def test_mistakes_are_named(digits: Digits, tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_spec(saved(tmp_path, spec_values(digits, tmp_path / "out", **keys)))


def test_a_training_config_in_place_of_a_spec_is_said_once(digits: Digits, tmp_path: Path) -> None:
    training = spec_values(digits, tmp_path / "out")["training"]
    with pytest.raises(
        ConfigError, match=r"is a training config; .*`training: {base: spec\.yaml}`"
    ) as caught:
        load_spec(saved(tmp_path, training))
    assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError, match="trainign: unknown key; did you mean training"):
        load_spec(saved(tmp_path, {"out": "here", "trainign": training, "budgets": [1e9]}))


def test_the_base_is_relative_to_the_spec(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = spec_values(digits, tmp_path / "out")
    (tmp_path / "configs" / "scaling").mkdir(parents=True)
    (tmp_path / "configs" / "small.yaml").write_text(yaml.safe_dump(values["training"]))
    values["training"] = {"base": "../small.yaml", "train": {"global_batch": 8}}
    file = saved(tmp_path / "configs" / "scaling", values)
    monkeypatch.chdir(tmp_path / "configs" / "scaling")
    here = load_spec("spec.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_spec(file.relative_to(tmp_path), out="elsewhere").out == "elsewhere"
    assert here.training["train"] == {"global_batch": 8}


def test_more_seeds_are_at_their_points_alone(digits: Digits, tmp_path: Path) -> None:
    more = [{"seeds": [1, 2], "sizes": ["w16d1"], "budgets": [0.02]}]
    found = load_spec(saved(tmp_path, spec_values(digits, tmp_path, more_seeds=more)))
    assert found.seeds_at("w16d1", 0.02) == [0, 1, 2]
    assert found.seeds_at("w16d1", 0.04) == found.seeds_at("w32d1", 0.02) == [0]
