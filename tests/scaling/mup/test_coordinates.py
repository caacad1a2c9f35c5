"""The coordinate check: flat by maximal updates, growing without; and that a wrong factor shows."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dit.config import ConfigError
from dit.experiments.diffusion import Experiment
from dit.model.dit import DiTConfig
from dit.model.models import MODELS
from dit.model.parametrization import MuP
from dit.outputs import OutputError
from dit.scaling.mup.coordinates import FLAT, GROWS, Check, Coordinates, Setting, Size, measure, slope_of
from dit.scaling.mup.widths import at_width, base_of, parametrized
from tests.datasets import Digits
from tests.train.runs import experiment, values
from tools.scaling import coordinates

SMALL = Check(widths=(32, 96, 256), steps=(1, 2, 4), seeds=(0, 1), batch=8)
BEHIND_GATES = (
    "blocks.*.attention.qkv",
    "blocks.*.mlp.fc2",
    "blocks.*.modulation",
    "output.modulation",
    "output.proj",
)


@pytest.fixture(scope="module")
def checked() -> Coordinates:
    return measure(Setting.synthetic(SMALL), SMALL)


@pytest.mark.parametrize("step", [2, 4])
def test_every_layer_is_flat_by_maximal_updates(checked: Coordinates, step: int) -> None:
    slopes = {s.layer: s for s in checked.slopes if (s.parametrization, s.step) == ("mup", step)}
    assert set(BEHIND_GATES) < set(slopes)
    for layer, slope in slopes.items():
        assert slope.change is None or abs(slope.change) < FLAT, layer
        assert slope.rms is None or abs(slope.rms) < FLAT, layer
    assert step == 2 or all(s.change is not None for s in slopes.values())


def test_without_them_layers_grow(checked: Coordinates) -> None:
    slopes = {s.layer: s.change for s in checked.slopes if (s.parametrization, s.step) == ("standard", 4)}
    for layer in BEHIND_GATES:
        assert (slopes[layer] or 0.0) > GROWS, layer
    assert checked.verdict("standard").startswith("standard: growing")
    assert checked.verdict("mup").startswith("mup: flat")


def test_after_one_step_the_last_layer_alone_has_changed(checked: Coordinates) -> None:
    """All else stands behind a last layer of zero, and gets no gradient."""
    changed = {s.layer for s in checked.slopes if s.step == 1 and s.change is not None}
    assert changed == {"output.proj"}
    before = [s.rms for s in checked.sizes if s.layer == "blocks.*.modulation" and s.step == 1]
    assert before == [0.0] * len(before)


def test_parametrizations_are_one_at_the_base_width(checked: Coordinates) -> None:
    def at_base(name: str) -> list[Any]:
        return [
            replace(s, parametrization="")
            for s in checked.sizes
            if (s.parametrization, s.width) == (name, 32)
        ]

    assert at_base("mup") == at_base("standard")


def test_a_layer_whose_rate_is_not_scaled_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check is for: one wrong factor among many."""
    build = DiTConfig.build

    def wrong(self: DiTConfig, *args: Any) -> nn.Module:
        model = build(self, *args)
        for block in model.blocks:
            block.mlp.fc2.weight.lr_factor = 1.0  # type: ignore[union-attr]
        return model

    monkeypatch.setattr(DiTConfig, "build", wrong)
    check = replace(SMALL, parametrizations=("mup",), seeds=(0,), steps=(4,))
    found = measure(Setting.synthetic(check), check)
    assert found.steepest("mup").layer == "blocks.*.mlp.fc2"
    assert (found.steepest("mup").change or 0.0) > FLAT


@pytest.mark.parametrize(
    "model",
    [{"block": {"value_residual": True}}, {"name": "ddt", "size": "nano", "decoder_depth": 1}],
    ids=["value residual", "ddt"],
)
def test_blocks_of_every_kind_are_looked_at(model: dict[str, Any]) -> None:
    """Also where a block hands on more than its tokens, and in a decoder."""
    check = Check(widths=(32, 64), steps=(1,), seeds=(0,), batch=4)
    setting = replace(Setting.synthetic(check), model=MODELS.parse({"name": "dit", "size": "nano", **model}))
    layers = {size.layer for size in measure(setting, check).sizes}
    assert "blocks.*" in layers
    assert ("output.blocks.*" in layers) == (model.get("name") == "ddt")


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0])
def test_a_slope_is_the_power(power: float) -> None:
    points = [(width, 3 * width**power * share) for width in (16, 32, 128) for share in (0.5, 1.5)]
    assert slope_of(points) == pytest.approx(power)
    assert slope_of([*points, (256, 0.0)]) is None
    assert slope_of([*points, (256, math.nan)]) is None


def test_nothing_that_changes_is_said() -> None:
    sizes = [Size("standard", width, 0, 1, "layer", 1.0, 0.0) for width in (16, 32)]
    with pytest.raises(ConfigError, match="no activation has changed"):
        Coordinates(Check(steps=(1,)), sizes).verdict("standard")


# --- widths ------------------------------------------------------------------------------------------------


def test_another_width_keeps_depth_and_the_heads_width() -> None:
    wide = at_width(DiTConfig(size="micro"), 256)
    assert (wide.size, wide.width, wide.depth, wide.heads) == (None, 256, 4, 8)
    with pytest.raises(ConfigError, match="width 80 is no multiple of 32"):
        at_width(DiTConfig(size="micro"), 80)


def test_the_base_is_what_is_given_the_models_own_or_the_least() -> None:
    own = DiTConfig(size="nano", parametrization=MuP(base_width=32))
    assert (base_of(DiTConfig(), (64, 128), None), base_of(DiTConfig(), (64,), 96)) == (64, 96)
    assert base_of(own, (64, 128), None) == 32
    with pytest.raises(ConfigError, match="base_width 64 is not"):
        base_of(own, (64, 128), 64)
    with pytest.raises(ConfigError, match="did you mean mup"):
        parametrized(own, "mupp", 32)


@pytest.mark.parametrize(("given", "complaint"), [
    ({"widths": (64, 64)}, "two or more widths"),
    ({"steps": (0,)}, "steps of 1 or more"),
    ({"seeds": ()}, "seeds"),
    ({"parametrizations": ()}, "parametrizations"),
    ({"lr": 0.0}, "lr"),
])  # fmt: skip
def test_what_cannot_be_checked_is_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Check(**given)


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_takes_the_configurations_model_and_data(
    digits: Digits, tmp_path: Path, capsys: Any
) -> None:
    import yaml

    given = {**values(digits, tmp_path / "run"), "model": {"width": 32, "depth": 1, "heads": 1}}
    file, out = tmp_path / "config.yaml", tmp_path / "check"
    file.write_text(yaml.safe_dump(given))
    small = {"widths": [32, 64], "steps": [2], "seeds": [0], "batch": 4}
    (out / ".coordinates.json.partial").mkdir(parents=True)  # in the way, as a full disk would be
    with pytest.raises(IsADirectoryError):
        coordinates(str(file), out=str(out), **small)
    (out / ".coordinates.json.partial").rmdir()
    coordinates(str(file), out=str(out), **small)
    said = capsys.readouterr().out
    assert "| output.proj |" in said
    record = json.loads((out / "coordinates.json").read_text())
    assert record["protocol"]["optim"]["lr"] == given["optim"]["lr"]
    assert set(record["verdicts"]) == {"standard", "mup"}
    with (out / "coordinates.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["width"] for row in rows} == {"32", "64"}
    assert (out / "coordinates.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="another result"):
        coordinates(str(file), out=str(out), **{**small, "seeds": [1]})


def test_data_decide_the_batch(digits: Digits, tmp_path: Path) -> None:
    cfg: Experiment = experiment(values(digits, tmp_path))
    setting = Setting.of(cfg, SMALL)
    assert setting.samples.moments.shape[0] == SMALL.batch
    assert setting.data == cfg.data.open().manifest.digest
    assert setting.optim.warmup == 0


def test_keys_without_a_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.patch"):
        coordinates(out=str(tmp_path), **{"model.patch": "4"})
