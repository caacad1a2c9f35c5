"""What an experiment of diffusion brings to the training loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit.config import ConfigError, from_dict, merge
from dit.data.shards.manifest import Manifest
from dit.experiments.diffusion import Experiment
from dit.experiments.parts import make_parts
from dit.model.dit import DiT
from dit.ranks.group import World
from dit.train.checkpoints.checkpoint import CheckpointError
from tests.datasets import Digits
from tests.train.runs import go, values


def experiment(**sections: object) -> Experiment:
    return from_dict(Experiment, merge({"data": {"path": "x"}}, sections))


def test_parts_for_real_data(digits: Digits) -> None:
    manifest = Manifest.load(digits.moments)
    cfg = experiment(data={"path": str(digits.moments)}, model={"size": "nano"}, train={"global_batch": 32})
    parts = make_parts(cfg, manifest, World())
    module = parts.build()
    assert isinstance(module, DiT)
    assert module(torch.zeros(2, 4, 8, 8), torch.zeros(2), {"label": torch.tensor([0, 9])}).shape == (
        2,
        4,
        8,
        8,
    )
    assert parts.leaf_modules == (type(module.blocks[0]),)
    assert parts.flops_per_image == cfg.cost(manifest).training_flops > 0
    assert cfg.cost(manifest).parameters.trainable == sum(p.numel() for p in module.parameters())
    assert parts.contract["classes"] == [str(i) for i in range(10)]


def test_a_group_of_the_coupling_must_divide_the_micro_batch(digits: Digits) -> None:
    manifest = Manifest.load(digits.moments)
    cfg = experiment(
        model={"size": "nano"},
        objective={"coupling": {"name": "ot", "group": 12}},
        train={"global_batch": 48, "micro_batch": 16},
    )
    with pytest.raises(
        ConfigError, match=r"micro-batch of 16 samples is no multiple of 12, the group of objective.coupling"
    ):
        make_parts(cfg, manifest, World())
    make_parts(cfg, manifest, World(0, 4))  # 12 a rank


def test_a_kernel_that_the_device_lacks_is_refused_before_anything_is_built(digits: Digits) -> None:
    manifest = Manifest.load(digits.moments)
    for model in ({"size": "nano"}, {"name": "ddt", "size": "nano"}):
        cfg = experiment(model={**model, "attention": "cudnn"}, train={"precision": "bf16"})
        with pytest.raises(
            ConfigError, match=r"cudnn cannot compute .* cpu in bfloat16 .* 32 channels and 16 tok"
        ):
            make_parts(cfg, manifest, World())


def test_kernels_that_cannot_run_on_the_device_are_refused(digits: Digits) -> None:
    manifest = Manifest.load(digits.moments)
    for kernels in ("auto", "plain"):
        make_parts(experiment(model={"size": "nano", "kernels": kernels}), manifest, World())
    with pytest.raises(
        ConfigError, match=r"model\.kernels: triton cannot run here: .*choose model\.kernels: auto"
    ):
        make_parts(experiment(model={"size": "nano", "kernels": "triton"}), manifest, World())


def test_guidance_of_the_grids_is_opened_before_training_starts(
    digits: Digits, run: Path, tmp_path: Path
) -> None:
    weak = {"name": "autoguidance", "scale": 2.0, "checkpoint": str(tmp_path / "nowhere")}
    sections = {"engine": "local", "train": {"steps": 1}, "sample": {"every": 1, "count": 2, "num_steps": 1}}
    given = values(digits, tmp_path / "run", **sections)
    with pytest.raises(CheckpointError, match="nowhere is missing"):
        go(merge(given, {"sample": {"guidance": [weak]}}))
    assert not (tmp_path / "run").exists()
    go(merge(given, {"sample": {"guidance": [{**weak, "checkpoint": str(run)}]}}))
    assert (tmp_path / "run" / "samples" / "step-00000001.png").is_file()
