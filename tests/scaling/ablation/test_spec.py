"""The spec of an ablation: what changes come to, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dit.config import ConfigError
from dit.flow.guided import ModelGuidance
from dit.model.norms import RootMeanSquare
from dit.scaling.ablation.spec import load_ablation
from tests.datasets import Digits
from tests.scaling.ablation.ablations import CHANGES, ablation_values, spec_of

LEARNED = {"name": "ddpm", "variance": "learned"}  # which the network does not give
CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs" / "ablations").glob("*.yaml"))


def saved(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_specs_that_come_with_the_house_are_right(file: Path) -> None:
    spec = load_ablation(file)
    drawn = spec.config(spec.baselines[0]).evaluate
    assert (drawn.cfg_scale, drawn.guidance) == (1.0, ())


def test_changes_are_laid_over_the_base_alone_and_together(digits: Digits, tmp_path: Path) -> None:
    spec = load_ablation(saved(tmp_path, ablation_values(digits, tmp_path / "out")))
    plain, rms, guided, both = (spec.config(name) for name in CHANGES)
    assert (rms.model.block.norm, rms.objective) == (RootMeanSquare(), plain.objective)
    assert isinstance(guided.objective.auxiliary, ModelGuidance)
    assert (both.model, both.objective) == (rms.model, guided.objective)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"baselines": ["plian"]}, "baselines: there is no change 'plian'; did you mean plain"),
        ({"baselines": []}, "baselines must be there"),
        ({"changes": {"both": ["rms", "guidde"]}}, "changes.both: there is no change 'guidde'; did you mean guided"),
        ({"changes": {"a": ["b"], "b": ["a"]}}, "a → b → a leads back to itself"),
        ({"changes": {"self": ["self"]}}, "self → self leads back"),
        ({"changes": {"none": []}}, "changes.none: an empty list"),
        ({"changes": {"a b": {"seed": 3}}}, "'a b' is no name of a run"),
        ({"changes": {"fast": {"optim": {"lr": 1.0}}}}, "changes.fast sets optim.lr, which no change does: .*lrs"),
        ({"changes": {"fast": {"train": {"steps": 1}}}}, "changes.fast sets train.steps, .*budgets"),
        ({"changes": {"other": {"data": {"path": "x"}}}}, "changes.other sets data.path"),
        ({"changes": {"typo": {"model": {"blokc": "rms"}}}}, r"model.blokc: unknown key.*\(in changes.typo"),
        ({"changes": {"same": {"model": {"block": {"norm": "layer"}}}}}, "same and plain come to the same config"),
        (
            {"changes": {"sync": {"objective": {"auxiliary": "direction"}}, "all": ["guided", "sync"]}},
            "changes.all: what guided sets as objective.auxiliary = .*model_guidance.* is undone",
        ),
        ({"seeds": [0, 1]}, "tune_seed = 0 is in `seeds`"),
        ({"seeds": [1, 1]}, "seeds must be there, each once"),
        ({"budgets": [0]}, "budgets.0"),
        ({"training": {"data": {"val": None}}}, "data.val is not set"),
        ({"training": {"evaluate": {"reference": "x", "solver": LEARNED}}}, "pictures drawn during training"),
    ],
)  # fmt: skip
def test_what_is_no_ablation_is_refused(
    digits: Digits, tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_ablation(saved(tmp_path, ablation_values(digits, tmp_path / "out", **keys)))


def test_one_change_alone_is_none(digits: Digits, tmp_path: Path) -> None:
    values = ablation_values(digits, tmp_path / "out") | {"changes": {"plain": {}}}
    with pytest.raises(ConfigError, match="a baseline and one other"):
        load_ablation(saved(tmp_path, values))


def test_a_training_config_in_place_of_a_spec_is_said_once(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a training config; expected the spec of an ablation") as caught:
        load_ablation(saved(tmp_path, ablation_values(digits, tmp_path)["training"]))
    assert len(caught.value.problems) == 1


def test_the_seed_of_the_rates_may_be_reported_where_there_is_one_rate(
    digits: Digits, tmp_path: Path
) -> None:
    assert not spec_of(digits, tmp_path, lrs=[1e-3], seeds=[0, 1]).is_tuned


def test_a_part_may_give_fields_of_what_another_names(digits: Digits, tmp_path: Path) -> None:
    """A choice's name and its fields are no contradiction, in this order."""
    changes = {
        "times": {"objective": {"times": "logit_normal"}},
        "shift": {"objective": {"times": {"shift": 2.0}}},
        "late": ["times", "shift"],
    }
    times = spec_of(digits, tmp_path, changes=changes).config("late").objective.times
    assert (type(times).__name__, times.shift) == ("LogitNormal", 2.0)
