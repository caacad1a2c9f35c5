"""Classifiers of noisy latents by the same engine and loop: what is trained, resumed, and given back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit.config import ConfigError, from_dict, merge, to_dict
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.experiments.classifier import ClassifierExperiment, ClassifierTask, Noise, TrainedClassifier
from dit.flow.path import PATHS
from dit.flow.predict import Cond, call_network
from dit.flow.spread import SPREADS
from dit.flow.times import TIMES
from dit.model.classifier import Classifier
from dit.ranks.group import World
from dit.rng import Draws, Purpose
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.start import train
from dit.train.task import Samples
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import at_step, column, differing, state
from tests.train.runs import go as go_diffusion
from tests.train.runs import values as diffusion_values

STEPS, CLASSES, SHAPE = 12, 5, (2, 4, 4)
CPU = torch.device("cpu")
NORM = LatentNorm(mean=(0.5, -0.5), std=(2.0, 1.0))


def values(digits: Digits, run_dir: Path, **sections: Any) -> dict[str, Any]:
    base = {
        "data": {"path": str(digits.moments), "val": str(digits.moments_val), "lanes": 8},
        "run_dir": str(run_dir),
        "engine": "local",
        "classifier": {"size": "nano", "patch": 4},
        "objective": {"times": {"name": "logit_normal", "mean": -3}},  # where there is little noise
        "optim": {"lr": 5e-3},
        "ema": {"decay": 0.5},
        "train": {"steps": STEPS, "global_batch": 32, "micro_batch": 16, "log_every": 1},
        "checkpoint": {"every": 6, "keep": 0},
        "val": {"every": 6, "batches": 1},
    }
    return merge(base, sections)


def go(given: dict[str, Any]) -> None:
    cfg = from_dict(ClassifierExperiment, given)
    train(cfg, ClassifierExperiment.make_parts)


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    go(values(digits, folder))
    return folder


# --- the task ----------------------------------------------------------------------------------------------


def samples(label: Tensor, step: int = 3) -> Samples:
    n = len(label)
    moments = torch.randn(n, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Samples(moments, label, torch.zeros(n, dtype=torch.bool), Draws(1, step, torch.arange(n), n))


def network(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
    """Logits that depend on everything it is given."""
    weight = torch.randn(32, CLASSES, generator=torch.Generator().manual_seed(2))
    return x.flatten(1) @ weight + torch.sin(model_time).unsqueeze(1) * torch.arange(CLASSES)


@pytest.mark.parametrize("path", [cls() for _, cls in PATHS.items()], ids=PATHS.names())
def test_the_loss_is_the_cross_entropy_at_the_paths_noise(path: Any) -> None:
    label = torch.tensor([0, 4, 2, 3])
    task, given = ClassifierTask(Noise(path=path), NORM, CLASSES), samples(label)
    loss = task.loss(network, given)
    t = Noise().times(given.draws.uniform(Purpose.TIME).double(), path).float()
    data = (given.moments[:, 0] - torch.tensor([0.5, -0.5]).view(2, 1, 1)) / torch.tensor([2.0, 1.0]).view(
        2, 1, 1
    )
    x = path.coeffs(t).mix(data, given.draws.normal(Purpose.EPS, SHAPE))
    logits = call_network(network, path, x, t, {})
    want = -F.log_softmax(logits, 1)[torch.arange(4), label]
    torch.testing.assert_close(loss.per_sample, want)
    torch.testing.assert_close(loss.mean, want.mean())
    assert torch.equal(loss.t, t)
    assert float(loss.metrics["accuracy"]) == float((logits.argmax(1) == label).double().mean())


def test_samples_without_a_label_count_nothing() -> None:
    task = ClassifierTask(Noise(), NORM, CLASSES)
    whole = task.loss(network, samples(torch.tensor([1, 4, 2, 3])))
    some = task.loss(network, samples(torch.tensor([1, -1, 2, -1])))
    assert some.per_sample[[1, 3]].tolist() == [0.0, 0.0]
    assert torch.equal(some.per_sample[[0, 2]], whole.per_sample[[0, 2]])
    assert float(some.mean) == pytest.approx(float(whole.per_sample[[0, 2]].sum()) / 4)
    nothing = task.loss(network, samples(torch.full((4,), -1)))
    assert (float(nothing.mean), float(nothing.metrics["accuracy"])) == (0.0, 0.0)


@pytest.mark.parametrize(("axis", "name"), [("times", n) for n in TIMES] + [("spread", n) for n in SPREADS])
def test_every_way_to_draw_times_is_taken(axis: str, name: str) -> None:
    label = torch.zeros(64, dtype=torch.int64)
    noise = from_dict(Noise, {axis: name})
    found = ClassifierTask(noise, NORM, CLASSES).loss(network, samples(label)).t
    draws = samples(label).draws
    assert torch.equal(found, noise.times(noise.spread(draws).double(), noise.path).float())
    if name not in ("uniform", "independent"):
        assert not torch.equal(found, Noise().times(draws.uniform(Purpose.TIME), noise.path))


@pytest.mark.parametrize("name", TIMES.names())
def test_times_do_not_depend_on_the_micro_batch(name: str) -> None:
    """Bitwise: on a discrete path one rounding more would be another step."""
    label, noise = torch.zeros(128, dtype=torch.int64), from_dict(Noise, {"times": name})
    task, whole = ClassifierTask(noise, NORM, CLASSES), samples(torch.zeros(128, dtype=torch.int64))
    parts = [task.loss(network, part).t for part in whole.micro_batches(3)]
    assert torch.equal(torch.cat(parts), task.loss(network, samples(label)).t)


def test_no_label_is_dropped_and_samples_stand_alone() -> None:
    task = ClassifierTask(Noise(), NORM, CLASSES)
    assert not bool(task.drops(Draws(0, 0, torch.arange(50), 50)).any())
    assert (task.group, task.uncoupled()) == (1, task)


def test_a_classifier_that_starts_by_knowing_something_is_refused() -> None:
    task, given = ClassifierTask(Noise(), NORM, CLASSES), samples(torch.tensor([0, -1, 2, 3]))
    flat = task.loss(lambda x, t, cond: torch.zeros(len(x), CLASSES), given)
    assert flat.per_sample[0].item() == pytest.approx(math.log(CLASSES))
    assert task.check_first_loss([flat], 32) is None
    assert "not ln(5) = 1.609" in str(task.check_first_loss([task.loss(network, given)], 32))


# --- runs --------------------------------------------------------------------------------------------------


def test_it_learns_and_reports_its_accuracy(run: Path) -> None:
    loss = column(run, "loss")
    assert loss[0] == pytest.approx(math.log(10))
    assert sum(loss[-4:]) / 4 < 0.97 * loss[0]
    assert all(0 <= a <= 1 for a in column(run, "accuracy"))
    held_out = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in held_out] == [6, 12]
    assert {"loss", "accuracy", "loss_q1", "protocol"} <= set(held_out[0])


def test_a_run_that_was_cut_goes_on_bit_for_bit(digits: Digits, run: Path, tmp_path: Path) -> None:
    go(values(digits, tmp_path, train={"steps": 6}))
    go(values(digits, tmp_path))
    assert differing(state(at_step(tmp_path, STEPS)), state(at_step(run, STEPS))) == []


def test_two_ranks_at_stage_3_are_plain_torch(
    digits: Digits, ranks: Server, run: Path, tmp_path: Path
) -> None:
    ranks.run(2, go, values(digits, tmp_path, engine="deepspeed", zero={"stage": 3}))
    assert column(tmp_path, "batch_hash") == column(run, "batch_hash")
    np.testing.assert_allclose(column(tmp_path, "loss"), column(run, "loss"), rtol=1e-4)
    np.testing.assert_allclose(column(tmp_path, "accuracy"), column(run, "accuracy"))
    one, two = (json.loads((f / "held_out.jsonl").read_text().splitlines()[-1]) for f in (run, tmp_path))
    for name in ("protocol", "weights"):
        assert one.pop(name) == two.pop(name)
    assert two == pytest.approx(one, rel=1e-4)


def test_a_trained_one_is_the_one_that_was_trained(digits: Digits, run: Path) -> None:
    found = TrainedClassifier.load(str(run), "ema", CPU)
    assert isinstance(found.model, Classifier)
    assert found.experiment == from_dict(ClassifierExperiment, values(digits, run, ema={"warmup": True}))
    assert found.path == at_step(run, STEPS)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    logits = found.logits("fp32")(x, t)
    assert torch.equal(logits, found.model(x, 1000.0 * t, {}))
    assert not any(p.requires_grad for p in found.model.parameters())
    other = TrainedClassifier.load(str(at_step(run, 6)), "model", CPU)
    assert not torch.equal(other.logits("fp32")(x, t), logits)
    half = found.logits("bf16")(x, t)
    assert half.dtype == torch.float32
    assert not torch.equal(half, logits)
    torch.testing.assert_close(half, logits, rtol=0.1, atol=0.1)


def test_what_holds_no_classifier_is_refused(digits: Digits, tmp_path: Path) -> None:
    go_diffusion(diffusion_values(digits, tmp_path, engine="local", train={"steps": 1}))
    with pytest.raises(CheckpointError, match=r"holds no classifier of noisy latents; train one with"):
        TrainedClassifier.load(str(tmp_path), "ema", CPU)


def test_the_contract_is_the_guided_models(digits: Digits) -> None:
    """So that the two can be compared: see tests/experiments/test_latents.py."""
    from dit.experiments.parts import make_parts
    from tests.experiments.test_diffusion import experiment

    manifest = Manifest.load(digits.moments)
    cfg = from_dict(ClassifierExperiment, values(digits, Path("x")))
    guided = experiment(data={"path": str(digits.moments)}, model={"size": "nano"})
    parts = cfg.make_parts(manifest, World())
    assert parts.contract == make_parts(guided, manifest, World()).contract
    assert from_dict(ClassifierExperiment, to_dict(cfg)) == cfg


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"objective": {"prediction": "eps"}}, "objective.prediction: unknown key"),
        ({"objective": {"path": "liner"}}, "did you mean linear?"),
        ({"classifier": {"size": "nanno"}}, "did you mean nano?"),
        ({"model": {"size": "nano"}}, "model: unknown key"),
        ({"train": {"label_drop": 0.1}}, "train.label_drop: unknown key"),
        ({"val": {"every": 1}, "data": {"val": None}}, "val.every is set"),
    ],
)
def test_what_cannot_be_trained_is_refused(digits: Digits, tmp_path: Path, sections: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        go(values(digits, tmp_path / "run", **sections))
    assert says in str(error.value)
    assert not (tmp_path / "run").exists()
