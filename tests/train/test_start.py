"""From a config to a loop: weights from another run, what checkpoints record, and the device's peak."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import dit
from dit.config import merge, to_dict
from dit.data.shards.manifest import Manifest
from dit.ranks import group
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import CheckpointError, Reader
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.on_ranks import full_weights
from tests.train.runs import (
    STEPS,
    Values,
    at_step,
    built,
    column,
    experiment,
    go,
    metrics,
    rewrite_tensors,
    state,
    values,
)


def initial(given: Values) -> dict[str, torch.Tensor]:
    """A run's weights before its first step."""
    with group.session():
        return full_weights(built(given))


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_init_from_starts_at_another_runs_weights(
    digits: Digits, reference: Path, tmp_path: Path, weights: str
) -> None:
    given = values(digits, tmp_path, engine="local", init={"from": str(reference), "weights": weights})
    found, source = initial(given), state(at_step(reference, STEPS))
    assert all(torch.equal(w, source[f"{weights}/{name}"]) for name, w in found.items())
    one = values(
        digits, tmp_path / "2", engine="local", init={"from": str(at_step(reference, 10)), "weights": weights}
    )
    source = state(at_step(reference, 10))
    assert all(torch.equal(w, source[f"{weights}/{name}"]) for name, w in initial(one).items())


def test_init_from_under_zero_3(digits: Digits, ranks: Server, reference: Path, tmp_path: Path) -> None:
    given = values(digits, tmp_path, zero={"stage": 3}, init={"from": str(reference)})
    source = state(at_step(reference, STEPS))
    for found in ranks.run(2, initial, given):
        assert all(torch.equal(w, source[f"ema/{name}"]) for name, w in found.items())


def test_such_a_run_is_a_new_one_and_resumes_itself(digits: Digits, reference: Path, tmp_path: Path) -> None:
    """Its steps and schedule begin at 0, a trained model's first loss is no error, and its own checkpoints win."""
    given = values(
        digits, tmp_path / "run", engine="local", init={"from": str(reference)},
        train={"steps": 4}, checkpoint={"every": 2},
    )  # fmt: skip
    go(given)
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4]
    assert column(tmp_path / "run", "loss")[0] < column(reference, "loss")[0] - 0.05
    assert column(tmp_path / "run", "updates") == [1, 2, 3, 4]
    final = state(at_step(tmp_path / "run", 4))
    shutil.rmtree(at_step(tmp_path / "run", 4))
    before = metrics(tmp_path / "run")
    go(given)
    assert metrics(tmp_path / "run")[:2] == before[:2]
    again = state(at_step(tmp_path / "run", 4))
    assert all(torch.equal(final[name], again[name]) for name in final)


def test_a_first_loss_far_from_a_new_models_is_no_error_then(
    digits: Digits, reference: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(at_step(reference, 10), tmp_path / "source"))
    rewrite_tensors(source, lambda tensors: tensors["ema/output.proj.bias"].add_(3.0))
    go(values(digits, tmp_path / "run", engine="local", init={"from": str(source)}, train={"steps": 1}))
    assert column(tmp_path / "run", "loss")[0] > 5


def test_a_killed_first_save_does_not_lose_init_from(digits: Digits, reference: Path, tmp_path: Path) -> None:
    """What a kill just before the last rename leaves is no checkpoint: the run begins anew, at init.from."""
    given = values(digits, tmp_path, engine="local", init={"from": str(reference), "weights": "model"})
    left = tmp_path / "checkpoints" / "step-00000010.partial"
    shutil.copytree(at_step(reference, 10), left)
    source = state(at_step(reference, STEPS))
    assert all(torch.equal(w, source[f"model/{name}"]) for name, w in initial(given).items())


def test_weights_that_are_not_there_or_do_not_fit_are_refused(
    digits: Digits, reference: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is missing"):
        initial(values(digits, tmp_path / "1", engine="local", init={"from": str(tmp_path / "nowhere")}))
    wider = {"size": None, "width": 32, "depth": 2, "heads": 2}
    with pytest.raises(CheckpointError, match=r"init.from: .*step-00000020 does not fit this model"):
        initial(values(digits, tmp_path / "2", engine="local", init={"from": str(reference)}, model=wider))
    assert not (tmp_path / "1").exists()
    assert not (tmp_path / "2").exists()


def test_the_seed_decides_about_the_first_weights(digits: Digits, tmp_path: Path) -> None:
    runs = [
        initial(values(digits, tmp_path / str(i), engine="local", seed=s)) for i, s in enumerate((0, 0, 1))
    ]
    name = "blocks.0.attention.qkv.weight"
    assert torch.equal(runs[0][name], runs[1][name])
    assert not torch.equal(runs[0][name], runs[2][name])


def test_a_checkpoint_says_all_about_its_run(digits: Digits, reference: Path, hooked: Values) -> None:
    meta = checkpoint.read(at_step(reference, 10)).meta
    manifest = Manifest.load(digits.moments)
    cfg = experiment(values(digits, reference, engine="local", **hooked))
    assert meta["config"] == merge(to_dict(cfg), {"ema": {"warmup": True}})  # what was left open is decided
    assert (meta["step"], meta["updates"], meta["skipped"]) == (10, 10, 0)
    assert meta["samples"] == 10 * cfg.train.global_batch
    assert meta["data"] == {"digest": manifest.digest, "samples": 160, "classes": list(manifest.classes)}
    assert meta["contract"]["codec"] == manifest.codec
    assert meta["contract"]["norm"] == {"mean": list(manifest.mean), "std": list(manifest.std)}
    assert meta["contract"]["shape"] == [4, 8, 8]
    assert meta["code"].startswith(dit.__version__)
    assert meta["torch"] == torch.__version__
    probe = meta["probe"]
    assert probe["precision"] == "fp32"
    assert 0 < probe["ema"] != probe["model"] > 0
    assert not Reader(checkpoint.read(at_step(reference, 10))).buffers()  # the position table is made anew


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_losses(
    digits: Digits, ranks: Server, reference: Path, tmp_path: Path
) -> None:
    for stage in (2, 3):
        given = values(
            digits, tmp_path / str(stage), zero={"stage": stage}, train={"compile": True, "steps": 4}
        )
        given["optim"] = {"lr": 1e-9}  # the losses of the first weights: no schedule in the comparison
        plain = {
            **given,
            "run_dir": str(tmp_path / f"plain{stage}"),
            "train": {**given["train"], "compile": False},
        }
        with ranks.start(1, go, given) as job:
            job.wait(timeout=280)
            assert "training step: compiled 5 graph(s)" in job.output()
            assert "torch compiled" not in job.output()  # none later
        ranks.run(1, go, plain)
        for name in ("batch_hash", "step"):  # slots, samples, views and dropped labels, to the bit
            assert column(Path(given["run_dir"]), name) == column(Path(plain["run_dir"]), name)
        assert column(Path(given["run_dir"]), "loss") == pytest.approx(
            column(Path(plain["run_dir"]), "loss"), rel=1e-5
        )
