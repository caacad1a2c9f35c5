"""One file of a run: what is in it, what it is refused for, and that it draws what its checkpoint draws."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit.config import ConfigError
from dit.experiments.trained import Trained
from dit.outputs import OutputError
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import CheckpointError, Reader
from dit.train.checkpoints.export import export
from tests.train.runs import STEPS, at_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_it_holds_the_weights_by_their_own_names_and_what_they_are_of(
    reference: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "new" / "weights.safetensors"
    written, off, is_new = export(str(reference), str(out), kind, None)
    assert (off, written.kind, written.meta["step"], is_new) == (None, kind, STEPS, True)
    expected = Reader(checkpoint.read(at_step(reference, STEPS))).state_dict(kind)
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    run, file = (Trained.load(str(source), kind, CPU) for source in (reference, out))
    assert (file.experiment, file.norm, file.contract, file.step) == (
        run.experiment,
        run.norm,
        run.contract,
        STEPS,
    )
    assert file.path == out
    x, t = torch.randn(2, *run.contract["shape"]), torch.tensor([0.3, 0.7])
    cond = {"label": torch.tensor([0, 1]), "drop": torch.tensor([False, True])}
    with torch.no_grad():
        assert torch.equal(run.model(x, t, cond), file.model(x, t, cond))


def test_other_weights_than_it_holds_are_refused(reference: Path, tmp_path: Path) -> None:
    export(str(at_step(reference, STEPS // 2)), str(tmp_path / "w.safetensors"), "model", None)
    assert (
        Trained.load(str(tmp_path / "w.safetensors"), "ema", CPU).weights == "model"
    )  # the default is the file's own
    with pytest.raises(CheckpointError, match=r"w.safetensors holds the weights model; got 'ema_0.5'"):
        Trained.load(str(tmp_path / "w.safetensors"), "ema_0.5", CPU)
    with pytest.raises(ConfigError, match="a width is of an average that is made now"):
        export(str(reference), str(tmp_path / "x.safetensors"), "model", 0.1)
    with pytest.raises(CheckpointError, match=r"holds the weights model, ema; got 'ema_0.5'"):
        export(str(reference), str(tmp_path / "x.safetensors"), "ema_0.5", None)


def test_nothing_is_written_over(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a file name that ends in .safetensors"):
        export(str(reference), str(tmp_path / "weights.pt"), "ema", None)
    (tmp_path / "w.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        export(str(reference), str(tmp_path / "w.safetensors"), "ema", None)
    assert (tmp_path / "w.safetensors").read_text() == "mine"
    export(str(reference), str(tmp_path / "w.safetensors"), "ema", None, overwrite=True)
    assert Trained.load(str(tmp_path / "w.safetensors"), "ema", CPU).step == STEPS


def test_the_same_export_is_there_and_another_is_not(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    assert export(str(reference), str(out), "ema", None).is_new
    before = out.stat().st_mtime_ns
    assert not export(str(at_step(reference, STEPS)), str(out), "ema", None).is_new
    for source, kind in ((reference, "model"), (at_step(reference, STEPS // 2), "ema")):
        with pytest.raises(OutputError, match="is there already, and holds something else: give --overwrite"):
            export(str(source), str(out), kind, None)
    assert out.stat().st_mtime_ns == before
    whole = out.read_bytes()
    out.write_bytes(whole[:-4] + bytes(b ^ 1 for b in whole[-4:]))  # a number, in its last place
    with pytest.raises(OutputError, match="holds something else"):
        export(str(reference), str(out), "ema", None)
    assert export(str(reference), str(out), "ema", None, overwrite=True).is_new
    assert out.read_bytes() == whole


def test_files_that_are_something_else_are_named(reference: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    shutil.copy(at_step(reference, STEPS) / "rank-00000.safetensors", tmp_path)
    for file in tmp_path.iterdir():
        with pytest.raises(CheckpointError, match=r"no weights that tools/convert.py export wrote"):
            checkpoint.resolve(file)
