"""Files of other projects: which weights they hold, statistics of latents, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dit.data.codecs.norm import LatentNorm
from dit.interop.files import read_stats, read_weights
from dit.interop.weights import StateDict, WeightsError
from tests.interop.reference import weights


def same(a: StateDict, b: StateDict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_files_that_the_projects_publish_and_their_training_saves(tmp_path: Path) -> None:
    """The official ones are plain; a training script's hold model, ema, opt and argparse's args."""
    live, average = weights(1), weights(2)
    held = {"model": live, "ema": average, "opt": {"state": {}}, "args": argparse.Namespace(epochs=3)}
    torch.save(held, tmp_path / "trained.pt")
    found = read_weights(tmp_path / "trained.pt")
    assert same(found["ema"], average)
    assert same(found["model"], live)
    torch.save({"ema": average}, tmp_path / "ema.pt")
    save_file(average, tmp_path / "plain.safetensors")
    torch.save({f"module._orig_mod.{name}": t for name, t in average.items()}, tmp_path / "wrapped.pt")
    torch.save(average, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("ema.pt", "plain.safetensors", "wrapped.pt", "old.pt"):
        found = read_weights(tmp_path / name)
        assert found["ema"] is found["model"]
        assert same(found["ema"], average), name


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("a pickle was trusted",))


def test_what_is_no_state_dict_is_refused_and_no_pickle_is_run(tmp_path: Path, capsys) -> None:
    held = {"number": {"ema": 3}, "list": [1], "empty": {}, "mixed": {"model": {"a": torch.zeros(1), "b": 2}}}
    for name, content in held.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(WeightsError, match=f"{name} holds no state dict"):
            read_weights(tmp_path / name)
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("evil.pt", "text.pt", "text.safetensors", "nowhere.pt", "nowhere.safetensors"):
        with pytest.raises(WeightsError, match=f"cannot read weights from .*{name}"):
            read_weights(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_lightnings_checkpoints_hold_both_under_prefixes(tmp_path: Path) -> None:
    """As DDT's training saves them: the network, its average, and what helps in training alone."""
    live, average = weights(1), weights(2)
    held = {f"denoiser.{name}": t for name, t in live.items()}
    held |= {f"ema_denoiser.{name}": t for name, t in average.items()}
    held["diffusion_trainer.proj.weight"] = torch.ones(1)
    torch.save({"state_dict": held, "epoch": 3}, tmp_path / "model.ckpt")
    save_file(held, tmp_path / "bare.safetensors")
    for name in ("model.ckpt", "bare.safetensors"):
        found = read_weights(tmp_path / name)
        assert same(found["ema"], average), name
        assert same(found["model"], live), name
    torch.save({"state_dict": average}, tmp_path / "plain.ckpt")
    assert same(read_weights(tmp_path / "plain.ckpt")["model"], average)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3,)])
def test_statistics_of_latents(tmp_path: Path, shape: tuple[int, ...]) -> None:
    given = {"mean": torch.tensor([0.5, -1.0, 0.0]), "std": torch.tensor([2.0, 0.25, 1.0])}
    torch.save({name: t.view(shape) for name, t in given.items()}, tmp_path / "stats.pt")
    expected = LatentNorm(mean=(0.5, -1.0, 0.0), std=(2.0, 0.25, 1.0))
    assert read_stats(str(tmp_path / "stats.pt"), 3) == expected


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (
            {"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)},
            "of 3 channels.*it holds .*mean: .1, 4",
        ),
        ({"mean": torch.zeros(3)}, "expected 'mean' and 'std'"),
        ({"mean": 0.0, "std": 1.0}, "expected 'mean' and 'std'"),
        ([torch.zeros(3)], "expected 'mean' and 'std'"),
        ({"mean": torch.zeros(3), "std": torch.zeros(3)}, "std above 0"),
    ],
)
def test_what_are_no_statistics_is_refused(tmp_path: Path, held: Any, says: str) -> None:
    torch.save(held, tmp_path / "stats.pt")
    with pytest.raises(WeightsError, match=says):
        read_stats(str(tmp_path / "stats.pt"), 3)


def test_statistics_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot read weights from .*nowhere\.pt"):
        read_stats(str(tmp_path / "nowhere.pt"), 3)
