"""configs/objectives: each differs from its base in the objective alone, trains through the real loop, and draws."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dit.config import flatten, from_dict, merge, to_dict
from dit.configfile import load, read_yaml
from dit.experiments.diffusion import Experiment, SampleConfig
from dit.experiments.trained import Trained
from tests.datasets import Digits
from tests.train.runs import column, go, values

FOLDER = Path(__file__).parents[1] / "configs" / "objectives"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
CPU = torch.device("cpu")
# besides the objective: where the run goes, the channels that a learned variance needs, how pictures are drawn
FREE = ("objective", "run_dir", "model.learn_sigma", "sample")

every_objective = pytest.mark.parametrize("path", CONFIGS, ids=[p.stem for p in CONFIGS])


def test_there_is_a_config_for_every_kind_of_objective() -> None:
    chosen = [load(Experiment, path).objective for path in CONFIGS]
    assert len({str(to_dict(c)) for c in chosen}) == len(CONFIGS)
    names = {word for c in chosen for word in flatten(to_dict(c)).values()}
    assert {"linear", "cosine", "vp", "ddpm", "iddpm", "ve", "ot", "sinkhorn", "min_snr", "sigmoid"} <= names


@every_objective
def test_it_differs_from_its_base_in_the_objective_alone(path: Path) -> None:
    own = load(Experiment, path)
    base = load(Experiment, FOLDER.parent / "digits.yaml")
    ours, theirs = flatten(to_dict(own)), flatten(to_dict(base))
    other = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert {key for key in other if not key.startswith(FREE)} == set()
    assert own.objective != base.objective


@every_objective
def test_it_trains_and_draws(path: Path, digits: Digits, tmp_path: Path) -> None:
    """Three real steps, then two pictures by the config's own sampler and by Heun's method."""
    chosen = {key: read_yaml(path)[0][key] for key in ("objective", "sample")}
    learned = {"learn_sigma": load(Experiment, path).model.learn_sigma}
    run = values(digits, tmp_path, engine="local", train={"steps": 3, "micro_batch": 32}, model=learned)
    go(merge(run, {**chosen, "sample": {**chosen["sample"], "every": 0}}))
    assert all(math.isfinite(loss) for loss in column(tmp_path, "loss"))
    assert column(tmp_path, "grad_norm")[-1] > 0
    trained = Trained.load(str(tmp_path), "ema", CPU)
    for spec in ({}, {"solver": "heun", "grid": "uniform"}):
        asked = merge(chosen["sample"] | {"num_steps": 3, "cfg_scale": 1.5, "every": 0}, spec)
        sampler = trained.sampler(from_dict(SampleConfig, asked), {}, CPU, "fp32")
        latents = sampler.latents(torch.arange(2), torch.tensor([3, 7]))
        assert latents.shape == (2, 4, 8, 8)
        assert bool(latents.isfinite().all())
