"""`import dit`: what it offers, how little it costs, and that fit and encode do what the command lines do."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import dit
import tools.encode
from dit import api
from dit.config import ConfigError, to_dict
from dit.data import DataError
from dit.data.encoding.encode import EncodeOptions
from dit.errors import UserError
from tests.commands import ROOT, call
from tests.datasets import Digits
from tests.odd_torch import odd_torch
from tests.train.runs import at_step, differing, experiment, go, state, values

pytestmark = pytest.mark.filterwarnings("ignore::dit.errors.Notice")  # averages of so few steps
LAZY = """
import sys, time
start = time.process_time()
import dit
print(time.process_time() - start, *{"torch", "numpy", "pydantic", "dit.api"} & sys.modules.keys())
"""


def test_import_dit_takes_no_time_and_no_torch() -> None:
    """CPU time, which a busy machine does not stretch."""
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, *loaded = done.stdout.split()
    assert float(seconds) < 0.3
    assert loaded == []


def test_all_names_are_there_and_lazily() -> None:
    assert {*dit.__all__} == {*api.__all__, "__version__"}
    assert {*dit.__all__} <= {*dir(dit)}
    for name in api.__all__:
        assert getattr(dit, name) is getattr(api, name)
    with pytest.raises(AttributeError, match=r"no attribute 'laod'; it has .*, load"):
        _ = dit.laod
    assert api.Objective.__name__ == "Objective"


def test_options_of_encode_are_the_fields() -> None:
    assert set(typing.get_type_hints(api.HowToEncode)) == {f.name for f in dataclasses.fields(EncodeOptions)}


# --- fit ---------------------------------------------------------------------------------------------------


SHORT = {"engine": "local", "train": {"steps": 3}, "checkpoint": {"every": 3}}


def test_fit_trains_what_the_command_line_does(digits: Digits, tmp_path: Path, capsys) -> None:
    go(values(digits, tmp_path / "theirs", **SHORT))
    given = values(digits, tmp_path / "ours", **SHORT)
    capsys.readouterr()
    run = dit.fit(given, progress=False)
    assert run == tmp_path / "ours"
    assert not differing(state(at_step(run, 3)), state(at_step(tmp_path / "theirs", 3)))
    assert "train:" not in capsys.readouterr().err
    assert dit.load(run).step == 3

    longer = dit.fit(experiment(given), {"train.steps": 4})  # goes on
    said = capsys.readouterr()
    assert (longer, dit.load(run).step) == (run, 4)
    assert "resuming" in said.out
    assert "train: 4/4 step" in said.err


def test_fit_takes_files_bases_and_overrides_of_any_type(digits: Digits, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values(digits, tmp_path / "a", **SHORT)))
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(api, "train", lambda cfg, *rest, **more: seen.append(cfg))
    over = {"train.steps": 5, "objective.path": {"name": "vp"}, "optim.lr": "1e-3", "run_dir": tmp_path / "b"}
    assert dit.fit(file, over) == dit.fit("mine.yaml", over) == tmp_path / "b"
    dit.fit({"base": "mine.yaml", "run_dir": "c"}, {k: v for k, v in over.items() if k != "run_dir"})
    assert seen[0] == seen[1]
    assert (seen[0].train.steps, seen[0].optim.lr, seen[0].objective.path.registered_name) == (5, 1e-3, "vp")
    assert to_dict(seen[2]) == to_dict(seen[0]) | {"run_dir": "c"}


def test_wrong_experiments_are_refused_by_where_they_are_from(digits: Digits, tmp_path: Path) -> None:
    given = values(digits, tmp_path / "run", **SHORT)
    with pytest.raises(ConfigError, match=r"train.step: .*train.steps.* \(in the overrides\)"):
        dit.fit(given, {"train.step": 3})
    with pytest.raises(ConfigError, match=r"modell: .*model.* \(in the values given\)"):
        dit.fit({**given, "modell": {}})
    with pytest.raises(ConfigError, match="no such config file"):
        dit.fit(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="expected a YAML file, a dictionary or an Experiment, got int"):
        dit.fit(3)  # type: ignore[arg-type]
    for over in ([("train.steps", 3)], {3: 3}):
        with pytest.raises(ConfigError, match=r"overrides: expected a dictionary with dotted keys, got .*3"):
            dit.fit(given, over)  # type: ignore[arg-type]
    with pytest.raises(DataError):
        dit.fit(given, {"data.path": tmp_path / "nothing"})
    assert not (tmp_path / "run").exists()


def test_fits_follow_each_other_in_one_process(digits: Digits, tmp_path: Path, monkeypatch) -> None:
    """Also one after a failure, and with ranks that have parted since; what another is under way stays out."""
    given = values(digits, tmp_path / "run", **{**SHORT, "engine": "deepspeed"})
    for stage in (0, 2, 3):
        run = dit.fit(given, {"run_dir": tmp_path / f"{stage}", "zero.stage": stage}, progress=False)
        assert dit.load(run).step == 3

    def stumbles(*_: object) -> None:
        with pytest.raises(UserError, match="another training is under way in this process"):
            dit.fit(given)
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr("dit.train.loop.Loop.train", stumbles)
        with pytest.raises(ZeroDivisionError):
            dit.fit(given)
    assert dit.load(dit.fit(given, progress=False)).step == 3


def test_a_fit_takes_nothing_from_the_program_around_it_and_leaves_it_alone(
    digits: Digits, tmp_path: Path
) -> None:
    given = values(digits, tmp_path / "run", **SHORT)
    wanted = state(at_step(dit.fit(given, progress=False), 3))
    with odd_torch():
        dit.fit(given, {"run_dir": tmp_path / "aside"}, progress=False)
    assert not differing(wanted, state(at_step(tmp_path / "aside", 3)))


# --- encode ------------------------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_encode_writes_what_the_command_line_does(tmp_path: Path, capsys) -> None:
    flags = ("--codec=pixels", "--image_size=8", "--no-flip", "--holdout=0.2", "--crop=random_resized")
    assert call(tools.encode.main, "digits:test", tmp_path / "theirs" / "set", *flags) == 0
    said = capsys.readouterr()
    how = {"image_size": 8, "flip": False, "crop": {"name": "random_resized"}}
    report = dit.encode("digits:test", tmp_path / "ours" / "set", "pixels", holdout=0.2, **how)
    ours = capsys.readouterr()
    assert ours.out.splitlines()[:3] == said.out.splitlines()[:3]
    assert "encode: 400/400 img" in ours.err
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    assert (report.manifest.samples, len(report.manifest.classes)) == (400, 10)

    again = dit.encode("digits:test", tmp_path / "ours" / "set", "pixels", holdout=0.2, **how, progress=False)
    assert "all was there already" in str(again)
    assert capsys.readouterr() == ("", "")


def test_encode_refuses_what_the_command_line_does(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for how, says in (
        ({"codec": "pixel"}, "unknown codec 'pixel'; did you mean pixels"),
        ({"codec": "vae"}, "the vae codec needs a path"),
        ({"codec": "pixels", "imagesize": 8}, "imagesize: unknown argument; did you mean image_size"),
        ({"codec": "pixels", "holdot": 0.1}, "holdot: unknown argument; did you mean holdout"),
        ({"codec": "pixels", "holdout": 1.5}, "holdout is 1.5"),
        ({"codec": "pixels", "label_type": "numbre"}, "label_type: .* got 'numbre'"),
        ({"codec": "pixels", "classes": ["imagenet"]}, "classes: .* got"),
    ):
        with pytest.raises(ConfigError, match=says):
            dit.encode("digits:test", out, **how)
    for holdout in (0.0, 0.1):
        with pytest.raises(UserError, match="/ is no place to write a result to: give a folder in it"):
            dit.encode("digits:test", "/", "pixels", holdout=holdout)
    with pytest.raises(UserError, match="images: expected a path, as text or a Path, got None"):
        dit.encode(None, out)  # type: ignore[arg-type]
    assert not out.exists()
    with pytest.raises(UserError, match="images: expected a path, as text or a Path, got ndarray"):
        dit.encode(np.zeros((4, 8, 8, 3)), tmp_path / "x", codec="pixels")  # type: ignore[arg-type]


# --- the parts ---------------------------------------------------------------------------------------------


def test_objective_and_network_train_in_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    data, label = torch.randn(32, 4, 8, 8), torch.randint(10, (32,))
    network = dit.DiTConfig(size="nano").build(input_size=8, channels=4, num_classes=10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses = []
    for step in range(30):
        draws = dit.Draws(seed=0, step=step, slots=torch.arange(32), batch=32)
        loss = dit.Objective().loss(network, data, {"label": label}, draws).mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(2.0, abs=0.2)  # a network that says 0 of eps - data
    assert sum(losses[-5:]) / 5 < 0.95 * losses[0]


@pytest.mark.parametrize(
    ("cond", "says"),
    [
        (None, "cond: expected a dictionary, .* got NoneType"),
        (torch.zeros(4, dtype=torch.int64), "cond: expected a dictionary, .* got Tensor"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, r"cond\['label'\] has the shape \(3,\), .* 4 samples"),
        ({"label": torch.tensor(0)}, r"cond\['label'\] has the shape \(\), .* 4 samples"),
        ({"label": torch.zeros(4)}, "label: expected whole numbers, as int64, got torch.float32"),
        ({"label": torch.full((4,), 10)}, "label 10: this model has classes 0 to 9"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"needs cond\['label'\]"),
    ],
)
def test_conditions_of_a_loop_of_ones_own_are_checked(cond: Any, says: str) -> None:
    network = dit.DiTConfig(size="nano").build(input_size=8, channels=4, num_classes=10)
    draws = dit.Draws(seed=0, step=0, slots=torch.arange(4), batch=4)
    with pytest.raises(ValueError, match=says):
        dit.Objective().loss(network, torch.zeros(4, 4, 8, 8), cond, draws)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: dit.Objective(path="liner"), "path: unknown path 'liner'; did you mean linear?"),
        (lambda: dit.Objective(pth="linear"), "pth: unknown key; did you mean path?"),
        (lambda: dit.DiTConfig(size="s"), "unknown size 's'; did you mean S?"),
        (lambda: dit.SamplerSpec(num_steps=0), "num_steps: expected 1 or more, got 0"),
    ],
)
def test_parts_are_refused_as_the_pages_say(make: Any, says: str) -> None:
    with pytest.raises(dit.UserError) as error:
        make()
    assert str(error.value) == says
