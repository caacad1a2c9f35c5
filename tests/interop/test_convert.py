"""Foreign files as checkpoints and back: which weights, which contract, and training from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dit.config import ConfigError, from_dict, to_dict
from dit.configfile import load
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.experiments.diffusion import Experiment
from dit.experiments.trained import Trained
from dit.interop import convert, facebook_dit, sit
from dit.interop.convert import from_run, to_run
from dit.interop.facebook_dit import FacebookDiT
from dit.interop.format import Format
from dit.interop.latents import Choices
from dit.interop.sit import SiT
from dit.interop.weights import WeightsError
from dit.model.dit import DiTConfig
from dit.outputs import OutputError
from dit.train.checkpoints.checkpoint import CheckpointError, Reader, read
from tests.datasets import Digits
from tests.gaussian import normal
from tests.interop.reference import TINY, weights
from tests.train.runs import at_step, go, values

CPU = torch.device("cpu")
HEADS = Choices(num_heads=4)
FORMATS: dict[str, tuple[Format[Any], Any]] = {
    "facebook_dit": (FacebookDiT(), facebook_dit.from_state_dict),
    "sit": (SiT(), sit.from_state_dict),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(weights(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("table", [1.0, 1.001], ids=["computed", "drifted"])
def test_a_checkpoint_computes_what_the_weights_did(kind: str, table: float, file: Path) -> None:
    given = weights()
    given["pos_embed"] = given["pos_embed"] * table
    torch.save(given, file)
    format, from_state_dict = FORMATS[kind]
    done = to_run(file, file.parent / "out", format, HEADS)
    assert done.experiment.model == DiTConfig(
        width=32, depth=2, heads=4, learn_sigma=kind == "facebook_dit", stored_position=table != 1.0
    )
    expected = from_state_dict(given, **TINY)
    x, t, y = normal(2, 4, 8, 8).float(), torch.tensor([0.3, 0.7]), torch.tensor([3, 10])
    with torch.no_grad():
        out = expected.model(x, t, y)
        for which in ("ema", "model"):
            trained = Trained.load(str(done.folder), which, CPU)
            assert torch.equal(trained.model(x, t, {"label": torch.tensor([3, -1])}), out)
    objective = trained.experiment.objective
    assert (objective.path, objective.prediction) == (expected.path, expected.prediction)
    assert trained.experiment == done.experiment
    assert (trained.step, trained.classes("all")) == (0, list(range(10)))


def test_live_and_averaged_weights_stay_what_they_are(tmp_path: Path) -> None:
    torch.save({"model": weights(1), "ema": weights(2)}, tmp_path / "trained.pt")
    to_run(tmp_path / "trained.pt", tmp_path / "out", FacebookDiT(), HEADS)
    for seed, which in ((1, "model"), (2, "ema")):
        found = Trained.load(str(tmp_path / "out"), which, CPU).model.state_dict()
        assert torch.equal(found["output.proj.weight"], weights(seed)["final_layer.linear.weight"])


def test_the_contract_is_stable_diffusions_first_vae_unless_it_is_said(digits: Digits, file: Path) -> None:
    def contract(name: str, **choices: object) -> dict[str, Any]:
        chosen = from_dict(Choices, {"num_heads": 4, **choices})
        done = to_run(file, file.parent / name, FacebookDiT(), chosen)
        return Trained.load(str(done.folder), "ema", CPU).contract

    known = {"shape": [4, 8, 8], "classes": [f"class_{i}" for i in range(10)]}
    official = contract("official")
    assert {name: official[name] for name in known} == known
    assert from_dict(LatentNorm, official["norm"]) == LatentNorm(mean=(0.0,) * 4, std=(1 / 0.18215,) * 4)
    assert official["image_size"] == 64
    assert "sha256" not in official["codec"]
    scaled = contract("scaled", scaling_factor=0.25)
    assert from_dict(LatentNorm, scaled["norm"]) == LatentNorm(mean=(0.0,) * 4, std=(4.0,) * 4)
    assert scaled["codec"]["config"]["scaling_factor"] == 0.25
    manifest = Manifest.load(digits.moments)
    ours = contract("ours", codec={"name": "vae", "path": str(digits.vae)})
    assert (ours["codec"], ours["image_size"]) == (manifest.codec, manifest.image_size)
    assert {name: ours[name] for name in known} == known
    both = contract("both", codec={"name": "vae", "path": str(digits.vae)}, scaling_factor=0.25)
    assert (both["codec"], both["norm"]) == (manifest.codec, scaled["norm"])


def test_a_codec_of_other_channels_is_refused(digits: Digits, tmp_path: Path) -> None:
    torch.save(weights(in_channels=3), tmp_path / "w.pt")
    choices = from_dict(Choices, {"num_heads": 4, "codec": {"name": "vae", "path": str(digits.vae)}})
    with pytest.raises(ConfigError, match="the codec has 4 channels, the model 3"):
        to_run(tmp_path / "w.pt", tmp_path / "out", FacebookDiT(), choices)
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_out_is_a_new_folder_and_there_whole_or_not_at_all(file: Path, monkeypatch) -> None:
    out = file.parent / "out"
    (file.parent / "out.partial").mkdir()  # what a killed one left
    (file.parent / "out.partial" / "junk").touch()
    out.mkdir()
    to_run(file, out, FacebookDiT(), HEADS)
    assert sorted(p.name for p in file.parent.iterdir()) == ["out", "weights.pt"]
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "config.yaml"]
    for taken in (out, file):
        with pytest.raises(ConfigError, match="is there already"):
            to_run(file, taken, FacebookDiT(), HEADS)

    def full(*arguments: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(convert.saver, "_write", full)
    with pytest.raises(CheckpointError, match="no space"):
        to_run(file, file.parent / "other", FacebookDiT(), HEADS)
    assert not (file.parent / "other").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_training_starts_from_converted_weights(kind: str, digits: Digits, file: Path) -> None:
    codec = {"name": "vae", "path": str(digits.vae)}
    choices = from_dict(Choices, {"num_heads": 4, "codec": codec})
    format, _ = FORMATS[kind]
    done = to_run(file, file.parent / "out", format, choices)
    given = values(
        digits,
        file.parent / "run",
        engine="local",
        model={"size": None, **to_dict(done.experiment.model)},
        latents={"norm": "codec"},
        optim={"lr": 1e-12},
        train={"steps": 1},
        init={"from": str(done.folder)},
    )
    given["objective"] = to_dict(done.experiment.objective)
    go(given)
    before = state_of_weights(at_step(done.folder, 0))
    after = state_of_weights(at_step(file.parent / "run", 1))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    there, here = (Trained.load(str(f), "ema", CPU) for f in (done.folder, file.parent / "run"))
    assert (there.norm, there.contract["codec"]) == (here.norm, here.contract["codec"])
    # but it is no run to go on with
    with pytest.raises(ConfigError, match="holds a run with another config"):
        go({**given, "run_dir": str(done.folder), "init": {}})


def state_of_weights(folder: Path) -> dict[str, Tensor]:
    reader = Reader(read(folder))
    return {f"{kind}/{n}": t for kind in ("ema", "model") for n, t in reader.state_dict(kind).items()}


# --- out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_there_and_back_through_files(file: Path, suffix: str) -> None:
    torch.save({"model": weights(1), "ema": weights(2)}, file)
    to_run(file, file.parent / "out", FacebookDiT(), HEADS)
    for seed, which in ((1, "model"), (2, "ema")):
        back = file.parent / f"{which}.{suffix}"
        line, is_new = from_run(str(file.parent / "out"), back, FacebookDiT(), which)
        assert is_new
        assert not from_run(str(file.parent / "out"), back, FacebookDiT(), which)[1]
        assert line.startswith(f"weights: {which} of step 0, after 0 updates, from ")
        held = load_file(back) if suffix == "safetensors" else torch.load(back, weights_only=True)
        assert same(held, weights(seed))
    assert not list(file.parent.glob("*.partial"))
    with pytest.raises(OutputError, match="is there already, and holds something else"):
        from_run(str(file.parent / "out"), back, FacebookDiT(), "model")
    from_run(str(file.parent / "out"), back, FacebookDiT(), "model", overwrite=True)
    held = load_file(back) if suffix == "safetensors" else torch.load(back, weights_only=True)
    assert same(held, weights(1))


def test_a_sit_is_not_given_out_as_a_dit(file: Path) -> None:
    done = to_run(file, file.parent / "out", SiT(), HEADS)
    with pytest.raises(WeightsError, match="samples eps on"):
        from_run(str(done.folder), file.parent / "dit.pt", FacebookDiT(), "ema")
    assert not (file.parent / "dit.pt").exists()


def test_a_run_of_ours_can_be_given_out(digits: Digits, tmp_path: Path) -> None:
    objective = {"path": "ddpm", "prediction": "eps"}
    go(values(digits, tmp_path / "run", engine="local", train={"steps": 1}, objective=objective))
    out = tmp_path / "dit.pt"
    from_run(str(tmp_path / "run"), out, FacebookDiT(), "ema")
    held = torch.load(out, weights_only=True)
    arguments = {**TINY, "hidden_size": 64, "num_heads": 2, "learn_sigma": False}
    model = facebook_dit.from_state_dict(held, **arguments).model
    ours = Trained.load(str(tmp_path / "run"), "ema", CPU).model
    x, t = normal(2, 4, 8, 8).float(), torch.tensor([3.0, 500.0])
    assert same(model.dit.state_dict(), ours.state_dict())
    assert torch.equal(model(x, t, torch.tensor([1, 10])), ours(x, t, {"label": torch.tensor([1, -1])}))


def test_an_experiment_that_is_converted_reads_back(file: Path) -> None:
    done = to_run(file, file.parent / "out", SiT(path="GVP", prediction="score"), HEADS)
    assert load(Experiment, done.folder / "config.yaml") == done.experiment
