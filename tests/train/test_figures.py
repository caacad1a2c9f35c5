"""Figures of samples during training: at every stage, on any ranks, and nothing of the run is another for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dit.config import ConfigError
from dit.data.shards.manifest import Manifest
from dit.errors import Notice, UserError
from dit.evals import record
from dit.evals.evaluation import Options, Order, evaluate
from dit.evals.features.spaces import PixelComponents
from dit.experiments.figures import SampleFigures
from dit.experiments.parts import make_parts
from dit.experiments.trained import Trained
from dit.ranks import group
from dit.ranks.group import World
from dit.sample.generate import labels_for
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import STEPS, at_step, column, differing, experiment, go, metrics, state, values

EVALUATE: dict[str, Any] = {
    "every": 10,
    "num_samples": 22,
    "batch_size": 8,
    "num_steps": 2,
    "solver": "euler",
    "cfg_scale": 2.0,
    "features": {"name": "pixels", "components": 4},
    "max_share": 1.0,
}


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Real images of the size that the digits' model draws, as a file of the ADM suite."""
    file = tmp_path_factory.mktemp("real") / "real.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    np.savez(file, arr_0=images)
    return str(file)


@pytest.fixture(scope="session")
def measured(
    digits: Digits, ranks: Server, hooked: dict, real: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """stage -> the run of two ranks at that ZeRO stage, as `sharded`, with figures of samples."""
    made: dict[int, Path] = {}

    def run(stage: int) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(f"measured{stage}")
            sections = {**hooked, "evaluate": {**EVALUATE, "reference": real}}
            ranks.run(2, go, values(digits, made[stage], zero={"stage": stage}, **sections))
        return made[stage]

    return run


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_with_figures_is_the_same_run(
    sharded: Callable[[int], Path], measured: Callable[[int], Path], stage: int
) -> None:
    assert column(measured(stage), "batch_hash") == column(sharded(stage), "batch_hash")
    assert column(measured(stage), "loss") == column(sharded(stage), "loss")
    assert differing(state(at_step(measured(stage), STEPS)), state(at_step(sharded(stage), STEPS))) == []


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_figures_are_those_of_images_drawn_from_the_checkpoint(
    measured: Callable[[int], Path], real: str, tmp_path: Path, stage: int
) -> None:
    """Drawn again by the average, in one block on one rank, and measured as tools/evaluate.py does."""
    rows = record.read(measured(stage))
    assert [(row["step"], row["weights"], row["by"]) for row in rows] == [
        (10, "ema", "training"),
        (20, "ema", "training"),
    ]
    trained = Trained.load(str(at_step(measured(stage), STEPS)), "ema", torch.device("cpu"))
    spec = trained.experiment.evaluate.spec
    index = torch.arange(22)
    images = trained.sampler(spec, {}, torch.device("cpu"), "fp32").images(
        index, labels_for(index, range(10))
    )
    np.savez(tmp_path / "drawn.npz", arr_0=images, arr_1=labels_for(index, range(10)).numpy())
    order = Order(
        str(tmp_path / "drawn.npz"), real, (PixelComponents(components=4),), Options(metrics="frechet,mind")
    )
    with group.session() as world:
        found = evaluate(order, world)
    assert found is not None
    (space,) = found.spaces
    assert rows[-1]["figures"] == pytest.approx(space.figures, rel=1e-3)
    assert rows[0]["figures"] != pytest.approx(space.figures, rel=1e-3)
    ours, theirs = rows[-1]["protocol"], space.protocol
    assert ours["reference"] == theirs["reference"]
    assert {**ours["samples"], "sampler": None} == theirs["samples"]
