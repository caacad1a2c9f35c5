"""The schema of a diffusion experiment, and the shipped configs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit.config import ConfigError, from_dict, merge, to_dict
from dit.configfile import load
from dit.data import DataError
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.experiments.autoencoder import AutoencoderExperiment
from dit.experiments.classifier import ClassifierExperiment
from dit.experiments.diffusion import Experiment
from dit.flow.couple import COUPLINGS
from dit.flow.path import PATHS
from dit.flow.predict import PREDICTIONS
from dit.flow.times import TIMES
from dit.flow.weight import WEIGHTS
from dit.ranks.group import World
from dit.sample.grid import GRIDS
from dit.sample.solve import SOLVERS
from dit.train.optim import SCHEDULES
from tests.datasets import Digits

ROOT = Path(__file__).parents[2]
# specs of many runs, which tests/scaling loads
SPECS = [ROOT / "configs" / name for name in ("scaling", "ablations")]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent not in SPECS)
CPU = torch.device("cpu")


def experiment(**sections: object) -> Experiment:
    return from_dict(Experiment, merge({"data": {"path": "x"}}, sections))


# --- the schema --------------------------------------------------------------------------------------------


def test_defaults_round_trip() -> None:
    cfg = experiment()
    assert from_dict(Experiment, to_dict(cfg)) == cfg


MEMBERS = [
    (axis, section, name)
    for axis, registry, section in [
        ("path", PATHS, "objective"),
        ("prediction", PREDICTIONS, "objective"),
        ("times", TIMES, "objective"),
        ("weight", WEIGHTS, "objective"),
        ("coupling", COUPLINGS, "objective"),
        ("schedule", SCHEDULES, "optim"),
        ("solver", SOLVERS, "sample"),
        ("grid", GRIDS, "sample"),
    ]
    for name in registry
]


@pytest.mark.parametrize(("axis", "section", "name"), MEMBERS, ids=[f"{a}-{n}" for a, _, n in MEMBERS])
def test_every_choice_on_every_axis_is_a_config_that_round_trips(axis: str, section: str, name: str) -> None:
    wanted = {axis: name}
    if axis == "prediction":
        wanted["path"] = "ddpm"  # never ends in pure noise, so all but the velocity train on it
    if (axis, name) == ("prediction", "velocity"):
        wanted["path"] = "linear"
    cfg = experiment(**{section: wanted})
    assert to_dict(cfg)[section][axis]["name"] == name
    assert from_dict(Experiment, to_dict(cfg)) == cfg


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"objective": {"path": {"name": "vp", "beta_max": 0.2}}}, "does not reach from data to noise"),
        ({"objective": {"path": "liner"}}, "did you mean linear?"),
        ({"model": {"size": "XXL"}}, "did you mean"),
        ({"model": {"heads": 3}}, "without `size`, give width, depth and heads"),
        ({"latents": {"norm": "none"}}, "latents.norm"),
        ({"sample": {"every": -1}}, "sample.every"),
        ({"sample": {"solver": "rk9"}}, "sample.solver"),
        ({"sample": {"guidance": ["treshold"]}}, "did you mean threshold?"),
        ({"sample": {"cfg_scale": 2, "guidance": [{"name": "cfg", "scale": 3}]}}, "set cfg_scale to 1"),
        ({"sample": {"guidance": [{"name": "cfg", "scale": 2}] * 2}}, "guide twice"),
        (
            {"sample": {"every": 5, "solver": {"name": "ddpm", "variance": "learned"}}},
            "sample, the pictures drawn during training: solver",
        ),
        ({"sample": {"every": 5, "grid": "respaced"}}, "is for discrete paths"),
        (
            {"model": {"residual": "bfloat16"}},
            "rounds nothing at train.precision: fp32; set train.precision: bf16",
        ),
        ({"model": {"attention": "flesh"}}, "model.attention"),
        ({"sample": {"count": 0}}, "sample.count"),
        ({"codec": {"name": "vae", "pth": "x"}}, "codec.pth"),
        ({"traim": {}}, "did you mean train?"),
        ({"train": {"stepps": 1}}, "did you mean train.steps?"),
    ],
)
def test_impossible_experiments_are_refused(sections: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        experiment(**sections)
    assert says in str(error.value)


# --- the shipped configs -----------------------------------------------------------------------------------


def schema_of(path: Path) -> type:
    """The schema a config is for: by a section in it, or in its base, that the others lack."""
    from dit.configfile import read_yaml

    special = {"autoencoder": AutoencoderExperiment, "classifier": ClassifierExperiment}
    found = [schema for section, schema in special.items() if section in read_yaml(path)[0]]
    return found[0] if found else Experiment


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=[str(p.relative_to(ROOT)) for p in CONFIGS])
def test_every_config_loads_and_its_model_builds(path: Path) -> None:
    """On the meta device: shapes only, so that XL costs nothing."""
    cfg = load(schema_of(path), path)
    assert from_dict(type(cfg), to_dict(cfg)) == cfg
    cfg.train.micro(World())
    with torch.device("meta"):
        if isinstance(cfg, AutoencoderExperiment):
            module = cfg.autoencoder.build()
            images = torch.zeros(2, 3, 32, 32)
            side = 32 // cfg.autoencoder.factor
            output, mean, *_ = module(images, torch.zeros(2, cfg.autoencoder.latent_channels, side, side))
            assert output.shape == images.shape
            assert mean.shape[1] == cfg.autoencoder.latent_channels
        elif isinstance(cfg, ClassifierExperiment):
            module = cfg.classifier.build(16, 4, 1000)
            assert module(torch.zeros(2, 4, 16, 16), torch.zeros(2), {}).shape == (2, 1000)
        else:
            side = 32 if cfg.codec is None or cfg.codec.registered_name == "pixels" else 16
            module = cfg.model.build(
                side, 4, 1000 if cfg.model.num_classes is None else cfg.model.num_classes
            )
            x = torch.zeros(2, 4, side, side)
            cond = {"label": torch.zeros(2, dtype=torch.int64)}
            out = module(x, torch.zeros(2), cond)
            assert out.shape == (2, 8 if cfg.model.learn_sigma else 4, side, side)
            assert cfg.train.micro(World()) % cfg.objective.coupling.group == 0
    assert all(p.is_meta for p in module.parameters())


def test_the_norm_is_the_data_sets_or_the_codecs(digits: Digits) -> None:
    manifest = Manifest.load(digits.moments)
    assert experiment().norm(manifest) == LatentNorm(mean=manifest.mean, std=manifest.std)
    official = {
        **manifest.codec,
        "config": {**manifest.codec["config"], "scaling_factor": 0.125, "shift_factor": 0.5},
    }
    by_codec = experiment(latents={"norm": "codec"}).norm(replace(manifest, codec=official))
    assert by_codec == LatentNorm(mean=(0.5,) * 4, std=(8.0,) * 4)
    latents = torch.full((1, 1, 4, 2, 2), 2.5)
    from dit.rng import Draws

    assert float(by_codec.draw(latents, Draws(0, 0, torch.zeros(1).long(), 1)).max()) == (2.5 - 0.5) * 0.125


def test_statistics_that_cannot_normalise_are_an_error_for_the_user(digits: Digits) -> None:
    manifest = Manifest.load(digits.pixels)
    flat = replace(manifest, std=(0.0, 1.0, 1.0))
    with pytest.raises(DataError, match="cannot be normalised by their statistics"):
        experiment().norm(flat)


def test_keys_that_would_do_nothing_are_refused() -> None:
    base = {"data": {"path": "x"}}
    for name in ("label_drop", "compile"):
        with pytest.raises(ConfigError, match=rf"train\.{name}: unknown key"):
            from_dict(AutoencoderExperiment, {**base, "train": {name: 0}})
    for share in (1.0, -0.1):
        with pytest.raises(ConfigError, match=r"train\.label_drop"):
            from_dict(Experiment, {**base, "train": {"label_drop": share}})


def test_variance_channels_and_what_trains_them_come_together() -> None:
    """Either without the other names both keys."""
    learned = {"path": "ddpm", "prediction": "eps", "auxiliary": "learned_range"}
    both = {"data": {"path": "x"}, "model": {"learn_sigma": True}, "objective": learned}
    assert from_dict(Experiment, both).objective.uses_variance
    for without in ("model", "objective"):
        with pytest.raises(ConfigError, match=r"model\.learn_sigma") as refused:
            from_dict(Experiment, {k: v for k, v in both.items() if k != without})
        assert "objective.auxiliary" in str(refused.value)
    with pytest.raises(ConfigError, match="learned_range needs a path"):
        from_dict(Experiment, {**both, "objective": {**learned, "path": "vp"}})
    several = {**both, "objective": {**learned, "auxiliary": ["direction", "learned_range"]}}
    assert from_dict(Experiment, several).objective.uses_variance


def test_a_term_that_looks_behind_blocks_needs_them() -> None:
    deep = {"data": {"path": "x"}, "model": {"size": "XL"}, "objective": {"auxiliary": ["layersync"]}}
    from_dict(Experiment, deep)
    with pytest.raises(
        ConfigError, match="layersync looks behind block 16, and the network has 12: set early and late"
    ):
        from_dict(Experiment, {**deep, "model": {"size": "S"}})
