"""tools/convert.py: foreign weights in, images from them, the weights out again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tools.convert
import tools.sample
from dit.commandline.cli import run
from dit.experiments.trained import Trained
from dit.interop import facebook_dit, sit
from dit.rng import Draws, Purpose
from dit.sample.generate import Sampler, SamplerSpec
from tests.commands import call, execute
from tests.datasets import Digits
from tests.interop.goldens import GOLDENS
from tests.interop.random_models import DDPM, random_run
from tests.interop.reference import TINY, weights
from tests.train.runs import go, values

DRAW = ("--num_samples=3", "--classes=0,3", "--num_steps=2", "--cfg_scale=2")
READ_BY = {"lightningdit": "hustvl/LightningDiT", "ddt": "MCG-NJU/DDT"}
READERS = {"facebook-dit": facebook_dit.from_state_dict, "sit": sit.from_state_dict}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(weights(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def convert(*words: object) -> int:
    """The tool with these words on its command line: the exit code."""
    try:
        run(tools.convert.COMMANDS, argv=[str(w) for w in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def images(out: Path) -> np.ndarray:
    with np.load(out / "samples.npz") as held:
        return held["arr_0"]


@pytest.mark.parametrize("kind", READERS)
def test_images_of_converted_weights_are_those_of_the_reference(
    kind: str, digits: Digits, file: Path, capsys
) -> None:
    """By the tools, and by dit.sample with what from_state_dict gives."""
    out, drawn = file.parent / "out", file.parent / "drawn"
    assert convert(kind, file, out, "--num_heads=4", f"--codec.path={digits.vae}") == 0
    assert f"python tools/sample.py {out} --out=SAMPLES\n" in capsys.readouterr().out
    assert call(tools.sample.main, out, *DRAW, f"--out={drawn}") == 0
    assert "does not say which" not in capsys.readouterr().out
    spec = json.loads((drawn / "spec.json").read_text())
    assert (spec["step"], spec["precision"], spec["classes"]) == (0, "fp32", [0, 3])

    made = READERS[kind](weights(), **TINY)
    decode = (
        Trained.load(str(out), "ema", torch.device("cpu"))
        .sampler(SamplerSpec(), {}, torch.device("cpu"), "fp32")
        .decode
    )
    sampler = Sampler(
        made.model,
        made.path,
        made.prediction,
        decode,
        (4, 8, 8),
        SamplerSpec(num_steps=2, cfg_scale=2.0),
        torch.device("cpu"),
    )
    expected = sampler.images(torch.arange(3), torch.tensor([0, 3, 0]))
    assert expected.std() > 1
    assert (images(drawn) == expected).all()


@pytest.mark.parametrize("name", GOLDENS)
def test_a_run_of_theirs_draws_as_a_loop_over_their_network_does(
    name: str, digits: Digits, tmp_path: Path, capsys
) -> None:
    """Euler in their own time: from noise at 0 to data at 1, along the velocity that the network says."""
    golden, run, drawn, steps = GOLDENS[name], tmp_path / "run", tmp_path / "drawn", 4
    torch.save({"ema": {f"module.{k}": t for k, t in golden.state().items()}}, tmp_path / "in.pt")
    assert convert(golden.command, tmp_path / "in.pt", run, *golden.flags, f"--codec.path={digits.vae}") == 0
    words = ("--solver=euler", f"--num_steps={steps}", "--num_samples=3", "--classes=0,3", "--save_latents")
    assert call(tools.sample.main, run, *words, f"--out={drawn}") == 0
    made = golden.network()
    x = Draws(SamplerSpec().seed, 0, torch.arange(3), 1).normal(Purpose.PRIOR, (4, 8, 8))
    with torch.no_grad():
        for step in range(steps):
            x = x + made.model(x, torch.full((3,), step / steps), torch.tensor([0, 3, 0])) / steps
    with np.load(drawn / "latents.npz") as held:
        torch.testing.assert_close(torch.from_numpy(held["arr_0"]), x, rtol=0, atol=1e-5)
    assert x.std() > 0.5
    capsys.readouterr()
    assert convert(f"to-{golden.command}", run, tmp_path / "out.safetensors") == 0
    assert f"a state dict for {READ_BY[golden.command]}" in capsys.readouterr().out
    assert READ_BY[golden.command] in (tmp_path / "out.md").read_text()


def test_what_their_weights_do_not_tell_is_said_or_asked_for(tmp_path: Path, capsys) -> None:
    for golden in GOLDENS.values():
        torch.save(golden.state(), tmp_path / f"{golden.command}.pt")
    assert convert("ddt", tmp_path / "ddt.pt", tmp_path / "ddt") == 1
    assert "give --num_encoder_blocks" in capsys.readouterr().err
    held = {"mean": torch.zeros(1, 4, 1, 1), "std": 2 * torch.ones(1, 4, 1, 1)}
    torch.save(held, tmp_path / "latents_stats.pt")
    stats = f"--latents_stats={tmp_path / 'latents_stats.pt'}"
    assert convert("lightningdit", tmp_path / "lightningdit.pt", tmp_path / "a") == 0
    assert "--latents_stats=FILE" in capsys.readouterr().err
    assert convert("lightningdit", tmp_path / "lightningdit.pt", tmp_path / "b", stats, "--factor=4") == 0
    assert capsys.readouterr().err == ""
    trained = Trained.load(str(tmp_path / "b"), "ema", torch.device("cpu"))
    assert (trained.norm.std, trained.contract["image_size"]) == ((2.0,) * 4, 32)
    assert trained.experiment.latents.norm == "dataset"
    assert convert("to-sit", tmp_path / "b", tmp_path / "no.pt") == 1
    assert "it differs in block" in capsys.readouterr().err


def test_a_codec_that_was_not_said_is_asked_for_and_taken(digits: Digits, file: Path, capsys) -> None:
    out, drawn = file.parent / "out", file.parent / "drawn"
    assert convert("sit", file, out, "--num_heads=4") == 0
    assert f"python tools/sample.py {out} --out=SAMPLES --codec.path=VAE" in capsys.readouterr().out
    assert call(tools.sample.main, out, *DRAW, f"--out={drawn}") == 1
    assert "--codec.path=FOLDER when sampling" in capsys.readouterr().err
    assert call(tools.sample.main, out, *DRAW, f"--out={drawn}", f"--codec.path={digits.vae}") == 0
    said = capsys.readouterr().out
    assert f"note: {out}/checkpoints/step-00000000 does not say which vae it goes with" in said
    assert images(drawn).shape == (3, 16, 16, 3)


def test_its_path_and_prediction_matter(digits: Digits, file: Path) -> None:
    flags = ("--num_heads=4", f"--codec.path={digits.vae}")
    drawn = []
    for i, words in enumerate([(), ("--path=GVP",), ("--prediction=score",)]):
        out = file.parent / str(i)
        assert convert("sit", file, out, *flags, *words) == 0
        assert call(tools.sample.main, out, *DRAW, f"--out={out}-drawn") == 0
        drawn.append(images(Path(f"{out}-drawn")).tobytes())
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_out_again(file: Path, learn_sigma: bool, capsys) -> None:
    assert convert("facebook-dit", file, file.parent / "dit", "--num_heads=4") == 0
    assert convert("to-facebook-dit", file.parent / "dit", file.parent / "dit.pt") == 0
    back = torch.load(file.parent / "dit.pt", weights_only=True)
    assert back.keys() == weights().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights().items())
    assert convert("sit", file, file.parent / "sit", "--num_heads=4") == 0
    words = ("to-sit", file.parent / "sit", file.parent / "sit.pt", "--weights=model")
    assert convert(*words, f"--learn_sigma={learn_sigma}") == 0
    back = torch.load(file.parent / "sit.pt", weights_only=True)
    x, s, y = torch.ones(2, 4, 8, 8), torch.tensor([0.25, 1.0]), torch.tensor([3, 10])
    there, here = (
        sit.from_state_dict(state, **{**TINY, "learn_sigma": learns}).model(x, s, y)
        for state, learns in ((weights(), True), (back, learn_sigma))
    )
    assert torch.equal(there, here)
    assert convert("to-facebook-dit", file.parent / "sit", file.parent / "no.pt") == 1
    assert "samples eps on" in capsys.readouterr().err


def test_what_is_worth_knowing_is_said(file: Path, capsys) -> None:
    given = weights()
    given["pos_embed"] = given["pos_embed"] + 1e-3
    given["y_embedder.embedding_table.weight"] = given["y_embedder.embedding_table.weight"][:10]
    torch.save(given, file)
    assert convert("sit", file, file.parent / "out", "--num_heads=4", "--num_classes=10") == 0
    said = capsys.readouterr().out
    assert "model.stored_position=true" in said
    assert "--cfg_scale=1" in said


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 1, "width 32 is not known: give --num_heads"),
        (("--num_heads=5",), 1, "not a multiple of heads 5"),
        (("--num_heads=0",), 1, "num_heads"),
        (("--num_heads=4", "--num_classes=20"), 1, "is (11, 32), expected (21, 32)"),
        (("--num_heads=4", "--scaling_factor=0"), 1, "scaling_factor"),
        (("--num_heads=4", "--codec.path=./nowhere"), 1, "nowhere/config.json is missing"),
        (("--num_heads=4", "--path=linear"), 2, "--path=linear"),
        (("--num_head=4",), 2, "did you mean num_heads?"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    file: Path, words: tuple[str, ...], code: int, says: str, capsys
) -> None:
    assert convert("sit", file, file.parent / "out", *words) == code
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert [p.name for p in file.parent.iterdir()] == ["weights.pt"]


def test_as_a_command(file: Path) -> None:
    done = execute("convert.py", "sit", file, "2024", "--num_heads=4", cwd=file.parent)
    assert done.returncode == 0, done.stderr
    assert (file.parent / "2024" / "checkpoints" / "step-00000000" / "COMPLETE").is_file()


def test_an_exported_file_draws_the_same_images_and_so_can_an_average_made_afterwards(
    digits: Digits, tmp_path: Path, capsys
) -> None:
    run_dir = tmp_path / "run"
    ema = {"decay": 0.9, "also": [0.5], "power": [0.05, 0.1], "snapshot_every": 2}
    go(values(digits, run_dir, engine="local", train={"steps": 4}, ema=ema))
    for words in ((), ("--weights=ema_0.5",), ("--width=0.08",)):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        assert convert("export", run_dir, file, *words) == 0
    said = capsys.readouterr().out
    assert "ema (decay 0.9" in said
    assert " of step 4, after 4 updates" in said
    assert "ema_0.5 (decay 0.5" in said
    assert (
        "ema (width 0.08, made afterwards; 0% of the first weights left) of step 4, after 4 updates (profile off by"
        in said
    )
    plain, other, wide = sorted(tmp_path.glob("*.safetensors"))
    for file, weights_of in ((plain, "ema"), (other, "ema_0.5"), (wide, "ema")):
        assert call(tools.sample.main, file, *DRAW, f"--weights={weights_of}", f"--out={file}.drawn") == 0
    assert call(tools.sample.main, run_dir, *DRAW, f"--out={tmp_path / 'drawn'}") == 0
    drawn = {file: images(Path(f"{file}.drawn")) for file in (plain, other, wide)}
    assert (drawn[plain] == images(tmp_path / "drawn")).all()
    assert json.loads(Path(f"{wide}.drawn/spec.json").read_text())["step"] == 4
    capsys.readouterr()
    assert convert("export", run_dir, plain) == 0
    assert "; the same export is there already, nothing was written" in capsys.readouterr().out
    assert convert("export", run_dir, wide, "--width=0.08") == 0
    assert "; the same export is there already" in capsys.readouterr().out
    assert convert("export", run_dir, plain, "--weights=model") == 1
    assert "is there already, and holds something else: give --overwrite" in capsys.readouterr().err


def test_help_lists_what_there_is(capsys) -> None:
    assert convert("--help") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("facebook-dit", "sit", "to-facebook-dit", "to-sit"))
    assert convert("sit", "--help") == 0
    assert "--scaling_factor" in capsys.readouterr().out


def test_a_folder_for_diffusers_and_back_by_the_tools(digits: Digits, tmp_path: Path, capsys) -> None:
    run = random_run(tmp_path / "run", digits, DDPM)
    assert convert("to-diffusers", run, tmp_path / "folder", "--num_steps=10") == 0
    said = capsys.readouterr().out
    assert "weights: ema of step 0" in said
    assert "note: diffusers' sinusoids of time are others" in said
    assert convert("to-diffusers", run, tmp_path / "folder", "--num_steps=10") == 0
    assert "the same export is there already" in capsys.readouterr().out
    assert convert("diffusers", tmp_path / "folder", tmp_path / "back") == 0
    assert f"python tools/sample.py {tmp_path / 'back'} --out=SAMPLES\n" in capsys.readouterr().out
    how = (*DRAW[:2], "--num_steps=10", "--solver=ddim", "--grid=respaced", "--grid.stride=ddim")
    for name in ("run", "back"):
        assert call(tools.sample.main, tmp_path / name, *how, f"--out={tmp_path / name}-drawn") == 0
    there, here = (images(tmp_path / f"{name}-drawn").astype(int) for name in ("run", "back"))
    assert np.abs(there - here).max() <= 1
    assert there.std() > 1
    assert convert("to-diffusers", run, tmp_path / "folder", "--num_steps=0") == 1
    assert "num_steps must be at least 1" in capsys.readouterr().err
    assert convert("to-diffusers", run, tmp_path / "other", "--num_steps=10", "--codec.path=nowhere") == 1
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_each_model_that_is_given_out_has_a_card(digits: Digits, tmp_path: Path, capsys) -> None:
    run = random_run(tmp_path / "run", digits, DDPM)
    for words, name in ((("export", "a.safetensors"), "dit"), (("to-facebook-dit", "b.pt"), "pytorch")):
        assert convert(words[0], run, tmp_path / words[1]) == 0
        assert f"library_name: {name}\n" in (tmp_path / words[1]).with_suffix(".md").read_text()
    assert convert("export", run, tmp_path / "c.safetensors", "--push=nobody") == 1
    assert "expected owner/name" in capsys.readouterr().err
    assert not (tmp_path / "c.safetensors").exists()
