"""Held-out losses and sample grids during training: with the average, at fixed draws, at every stage."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import ConfigError
from dit.data import DataError
from dit.data.loading.stream import Batch, Stream
from dit.data.shards.manifest import Manifest
from dit.errors import Notice
from dit.evals.valloss import held_out_loss
from dit.experiments.parts import make_parts
from dit.experiments.trained import Trained
from dit.ranks.group import World
from dit.rng import Draws
from dit.train import held_out
from dit.train.held_out import SEED, held_out_hook, open_held_out
from dit.train.task import LatentTask, batch_samples
from tests.data.helpers import edit_manifest
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import STEPS, Values, at_step, experiment, go, values
from tests.train.test_loop import curve

NAMES = ("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_held_out_loss_does_not_depend_on_ranks_or_stage(
    reference: Path, sharded: Callable[[int], Path], stage: int, name: str
) -> None:
    expected = curve(reference, f"held_out/{name}")
    assert [step for step, _ in expected] == [STEPS // 2, STEPS]
    for (_, a), (_, b) in zip(curve(sharded(stage), f"held_out/{name}"), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_the_held_out_loss_is_that_of_the_averaged_weights(digits: Digits, reference: Path) -> None:
    """Computed again from the checkpoint: all 48 samples, in one batch, at draws of a seed of their own."""
    found = dict(curve(reference, "held_out/loss"))[STEPS]
    losses = {}
    for weights in ("ema", "model"):
        trained = Trained.load(str(at_step(reference, STEPS)), weights, torch.device("cpu"))
        cfg = trained.experiment
        task = LatentTask(cfg.objective, trained.norm, cfg.train.label_drop, has_unit_variance=True)
        stream = Stream(Manifest.load(digits.moments_val), SEED, 48, lanes=8, window=1)
        with torch.no_grad():
            batch = stream.batch(0)
            draws = Draws(SEED, 0, batch.slots, 48)
            samples, _ = batch_samples(batch, task, draws, torch.device("cpu"))
            losses[weights] = held_out_loss([task.loss(trained.model, samples)])["loss"]
        stream.close()
    assert found == pytest.approx(losses["ema"], rel=1e-5)
    assert abs(losses["model"] / losses["ema"] - 1) > 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_grids_are_the_same_at_every_stage(
    reference: Path, sharded: Callable[[int], Path], stage: int
) -> None:
    for step in (10, 20):
        images = [
            np.asarray(Image.open(run / "samples" / f"step-{step:08d}.png")).astype(int)
            for run in (reference, sharded(stage))
        ]
        assert images[0].shape == (2 + 18, 2 + 10 * 18, 3)  # ten classes of 16x16 in a row
        assert np.abs(images[0] - images[1]).max() <= 1
        assert images[0][2:-2, 2:-2].std() > 1
    assert len(list((reference / "samples").iterdir())) == 2


def test_small_held_out_data_are_one_smaller_batch(digits: Digits, tmp_path: Path) -> None:
    data = {"path": str(digits.pixels), "val": str(digits.pixels_val)}
    given = values(
        digits, tmp_path, data=data, codec={"name": "pixels"}, val={"every": 1, "batches": 5}, engine="local"
    )
    given["train"] |= {"steps": 1, "global_batch": 64, "micro_batch": 32}
    go(given)
    assert len(curve(tmp_path, "held_out/loss")) == 1


def held_out_rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "held_out.jsonl").read_text().splitlines()]


def held_out_losses(given: Values) -> None:
    """The held-out loss of a model from scratch, in batches of 16, as a row of held_out.jsonl."""
    held_out.GRID = 16
    go(given)


def test_the_held_out_loss_is_the_same_on_any_ranks_in_any_batch(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    """Three batches of 16 on 1, 2 and 4 ranks: there some have nothing left to do in the last round."""
    found = {}
    for size, stage, batch, micro in ((1, 0, 32, 8), (2, 3, 96, 12), (4, 1, 96, 24)):
        sizes = {"steps": 1, "global_batch": batch, "micro_batch": micro}
        rest = {"data": {"val": str(digits.moments_val)}, "val": {"every": 1}, "optim": {"lr": 1e-30}}
        folder = tmp_path / str(size)
        ranks.run(size, held_out_losses, values(digits, folder, train=sizes, zero={"stage": stage}, **rest))
        (found[size],) = held_out_rows(folder)
    assert len(found[1]["protocol"]) == 12
    for size in (2, 4):
        assert found[size]["protocol"] == found[1]["protocol"]
        for name in ("loss", *(f"loss_q{i}" for i in (1, 2, 3, 4))):
            assert found[size][name] == pytest.approx(found[1][name], rel=1e-6)


def test_each_sample_of_the_grid_counts_once_whatever_the_ranks(digits: Digits, tmp_path: Path) -> None:
    cfg = experiment(
        values(
            digits,
            tmp_path,
            data={"val": str(digits.moments_val)},
            val={"every": 1, "samples": 40},
            train={"global_batch": 48, "micro_batch": 4},
        )
    )
    manifest = Manifest.load(digits.moments)
    task, engine = cfg.task(manifest, World()), SimpleNamespace(device=torch.device("cpu"))
    found = {}
    for size in (1, 2, 3):
        shares = []
        for rank in range(size):
            part = replace(open_held_out(cfg, manifest, task, World(rank, size)), grid=8, steps=5, micro=4)
            calls: list[int] = []
            taken = part.each(task, engine, "", lambda s, calls=calls: calls.append(1) or s.moments)
            shares += [*taken]
            assert len(calls) == -(-5 // size) * 2  # as often as the others
        found[size] = torch.cat(shares).flatten(1).sort(dim=0).values
        assert len(found[size]) == 40
    assert torch.equal(found[1], found[2])
    assert torch.equal(found[1], found[3])


def test_held_out_data_with_other_classes_are_refused(digits: Digits, tmp_path: Path) -> None:
    other = shutil.copytree(digits.moments_val, tmp_path / "other")
    edit_manifest(other, classes=[f"digit {c}" for c in Manifest.load(other).classes])
    given = values(digits, tmp_path / "run", data={"val": str(other)}, val={"every": 1}, engine="local")
    with pytest.raises(
        DataError, match=r"differ in classes, 10 against 10: .* alone has '0', '1', .* and 5 more; .*'digit"
    ):
        go(given)
    edit_manifest(other, classes=list("012345678"), class_counts=[*[5] * 8, 8])
    with pytest.raises(DataError, match=r"9 against 10: .* alone has '9'; encode both"):
        go(given)


def test_held_out_classes_in_another_order_are_matched_by_name(digits: Digits, tmp_path: Path) -> None:
    manifest, val = Manifest.load(digits.moments), Manifest.load(digits.moments_val)
    other = shutil.copytree(digits.moments_val, tmp_path / "other")
    edit_manifest(other, classes=list(val.classes[::-1]))
    found = []
    for data in (digits.moments_val, other):
        cfg = experiment(values(digits, tmp_path, data={"val": str(data)}, val={"every": 1}))
        task = LatentTask(cfg.objective, cfg.norm(manifest), 0.1, has_unit_variance=True)
        data_held_out = open_held_out(cfg, manifest, task, World())
        assert data_held_out is not None
        parts = data_held_out.micro_batches(task, 0, torch.device("cpu"))
        found.append(torch.cat([part.label for part in parts]))
    assert found[0].unique().numel() > 5
    assert torch.equal(found[1], 9 - found[0])


def test_held_out_data_of_another_codec_are_refused(digits: Digits, tmp_path: Path) -> None:
    given = values(
        digits, tmp_path / "run", data={"val": str(digits.pixels_val)}, val={"every": 1}, engine="local"
    )
    with pytest.raises(DataError, match="come from different codecs"):
        go(given)
    assert not (tmp_path / "run").exists()


def test_held_out_data_of_fewer_than_a_group_are_refused(digits: Digits, tmp_path: Path) -> None:
    cfg = experiment(
        values(
            digits,
            tmp_path,
            data={"val": str(digits.moments_val)},
            val={"every": 1},
            objective={"coupling": {"name": "ot", "group": 64}},
            train={"global_batch": 256, "micro_batch": 64},
        )
    )
    manifest = Manifest.load(digits.moments)
    task = LatentTask(cfg.objective, cfg.norm(manifest), 0.1, has_unit_variance=True)
    with pytest.raises(
        ConfigError, match=r"48 samples of .* are fewer than the 64 that the objective takes together"
    ):
        held_out_hook(cfg, manifest, task, World(0, 2))


def test_without_a_cadence_there_is_no_hook(digits: Digits, tmp_path: Path) -> None:
    cfg = experiment(values(digits, tmp_path))
    manifest = Manifest.load(digits.moments)
    parts = make_parts(cfg, manifest, World())
    assert parts.hooks == []
    assert held_out_hook(cfg, manifest, parts.task, World()) == []


def test_a_picture_that_is_none_is_left_out_and_the_run_goes_on(digits: Digits, tmp_path: Path) -> None:
    sections = {"engine": "local", "train": {"steps": 3}, "checkpoint": {"every": 3}}
    grid = {"every": 2, "count": 2, "num_steps": 1, "solver": "euler", "cfg_scale": 1e38}
    with pytest.warns(Notice, match=r"no picture of step 2: image 0 \(class 0\): .*; lower cfg_scale"):
        go(values(digits, tmp_path / "run", sample=grid, **sections))
    assert not (tmp_path / "run" / "samples").exists()
    assert at_step(tmp_path / "run", 3).is_dir()


def test_held_out_batches_are_read_ahead_and_are_the_same(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = experiment(
        values(digits, tmp_path, data={"val": str(digits.moments_val)}, val={"every": 1, "samples": 48})
    )
    manifest = Manifest.load(digits.moments)
    task = LatentTask(cfg.objective, cfg.norm(manifest), 0.1, has_unit_variance=True)
    monkeypatch.setattr(held_out, "GRID", 16)
    there = open_held_out(cfg, manifest, task, World())
    assert there is not None
    assert there.steps >= 2
    device, readers = torch.device("cpu"), list[str]()
    one_by_one = [p for step in range(there.steps) for p in there.micro_batches(task, step, device)]
    read = there._stream.batch

    def seen(step: int) -> Batch:
        readers.append(threading.current_thread().name)
        return read(step)

    monkeypatch.setattr(there._stream, "batch", seen)
    engine = SimpleNamespace(device=device)
    found = list(there.each(task, engine, "held-out", lambda part: part))  # type: ignore[arg-type]
    assert len(found) == len(one_by_one)
    for mine, theirs in zip(found, one_by_one, strict=True):
        for name, value in vars(theirs).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(mine, name), value), name
    assert len(readers) == there.steps
    assert all(name.startswith("dit-held-out") for name in readers)
