"""The schema of a diffusion experiment, its parts, the shipped configs, and models back from checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit.config import ConfigError, from_dict, merge, to_dict
from dit.configfile import load
from dit.data import DataError
from dit.data.codecs.autoencoders import Vae, unknown_vae
from dit.data.codecs.codec import Pixels
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.experiments.autoencoder import AutoencoderExperiment
from dit.experiments.classifier import ClassifierExperiment
from dit.experiments.diffusion import Experiment
from dit.experiments.latents import open_codec
from dit.experiments.parts import make_parts
from dit.experiments.trained import Checkpoints, Trained
from dit.flow.couple import COUPLINGS
from dit.flow.path import PATHS
from dit.flow.predict import PREDICTIONS
from dit.flow.times import TIMES
from dit.flow.weight import WEIGHTS
from dit.model.dit import DiT
from dit.ranks.group import World
from dit.sample.generate import SamplerSpec
from dit.sample.grid import GRIDS
from dit.sample.solve import SOLVERS
from dit.stage1.autoencoder import Kl
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.optim import SCHEDULES
from dit.train.start import train
from tests.datasets import Digits
from tests.experiments.test_classifier import values as classifier_values
from tests.train.runs import go, values

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
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


# --- parts -------------------------------------------------------------------------------------------------


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
        ConfigError, match=r"micro-batch of 16 samples is no multiple of objective.coupling.group = 12"
    ):
        make_parts(cfg, manifest, World())
    make_parts(cfg, manifest, World(0, 4))  # 12 a rank


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


def test_the_codec_of_the_data_is_found_or_asked_for(digits: Digits, tmp_path: Path) -> None:
    identity = Manifest.load(digits.moments).codec
    assert open_codec(None, {"name": "pixels"}, "there", CPU).channels == 3
    assert open_codec(Vae(path=str(digits.vae)), identity, "there", CPU).factor == 2
    with pytest.raises(ConfigError, match=r"codec is 'vae' and nothing says where it is: set codec"):
        open_codec(None, identity, "there", CPU)
    torch.manual_seed(1)
    Kl(widths=(8, 8), groups=4).build().vae.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=r"there and the codec given come from different codecs \(sha256"):
        open_codec(Vae(path=str(tmp_path / "other")), identity, "there", CPU)


# --- back from a checkpoint --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    go(values(digits, folder, engine="local", train={"steps": 3}, checkpoint={"every": 1}))
    return folder


def test_a_trained_model_is_the_one_that_was_trained(digits: Digits, run: Path) -> None:
    trained = Trained.load(str(run), "ema", CPU)
    assert trained.step == 3
    assert trained.experiment == from_dict(
        Experiment,
        values(
            digits,
            run,
            engine="local",
            train={"steps": 3},
            checkpoint={"every": 1},
            ema={"warmup": True},  # which was left open
        ),
    )
    assert trained.norm == trained.experiment.norm(Manifest.load(digits.moments))
    assert not trained.model.training
    other = Trained.load(str(run / "checkpoints" / "step-00000002"), "model", CPU)
    assert other.step == 2
    weights = [t.model.state_dict()["output.proj.weight"] for t in (trained, other)]
    assert not torch.equal(*weights)


def test_its_sampler_decodes_with_the_datas_codec(digits: Digits, run: Path) -> None:
    trained = Trained.load(str(run), "ema", CPU)
    spec = from_dict(SamplerSpec, {"num_steps": 1, "solver": "euler"})
    sampler = trained.sampler(spec, {}, CPU, "fp32")
    assert sampler.shape == (4, 8, 8)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    codec = Vae(path=str(digits.vae)).build()
    assert torch.equal(sampler.decode(latents), codec.decode(trained.norm.invert(latents)))
    assert sampler.images(torch.arange(2), torch.tensor([0, 1])).shape == (2, 16, 16, 3)


# --- other checkpoints, for guidance -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    cfg = from_dict(ClassifierExperiment, classifier_values(digits, folder, train={"steps": 1}))
    train(cfg, ClassifierExperiment.make_parts)
    return folder


def opener(run: Path, **changes: object) -> Checkpoints:
    found = Trained.load(str(run), "ema", CPU).sampler(from_dict(SamplerSpec, {}), {}, CPU, "fp32").open
    assert isinstance(found, Checkpoints)
    return replace(found, **changes)


def test_a_weaker_checkpoint_is_opened_as_the_denoiser_that_it_is(run: Path) -> None:
    early = str(run / "checkpoints" / "step-00000001")
    weak = opener(run).denoiser(early)
    x, t, cond = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 0.9]), {"label": torch.tensor([1, 2, 3])}
    same = Trained.load(early, "ema", CPU).sampler(from_dict(SamplerSpec, {}), {}, CPU, "fp32")
    assert torch.equal(weak(x, t, cond).data, same.denoise(x, t, cond).data)
    live = opener(run, weights="model").denoiser(early)
    assert not torch.equal(live(x, t, cond).data, weak(x, t, cond).data)
    full, half = (opener(run, weights="model", precision=p).denoiser(str(run)) for p in ("fp32", "bf16"))
    assert not torch.equal(half(x, t, cond).data, full(x, t, cond).data)
    torch.testing.assert_close(half(x, t, cond).data, full(x, t, cond).data, rtol=0.05, atol=0.05)


def test_a_sampler_guides_with_both(run: Path, classifier: Path) -> None:
    weak = {"name": "autoguidance", "checkpoint": str(run / "checkpoints" / "step-00000001"), "scale": 3.0}
    classes = {"name": "classifier", "checkpoint": str(classifier), "scale": 9.0}
    latents = []
    for guidance in ([], [weak], [classes], [weak, classes]):
        spec = from_dict(SamplerSpec, {"num_steps": 2, "solver": "euler", "guidance": guidance})
        sampler = Trained.load(str(run), "ema", CPU).sampler(spec, {}, CPU, "fp32")
        latents.append(sampler.latents(torch.arange(2), torch.tensor([3, 4])))
        assert sampler.tally.per_image() == {"nfe": 2, "network_evaluations": 2 * (1 + len(guidance))}
    assert len({v.numpy().tobytes() for v in latents}) == 4


def test_what_does_not_fit_is_refused_with_both_sides_named(run: Path, classifier: Path) -> None:
    for open_it, other in ((opener(run).denoiser, run), (opener(run).classifier, classifier)):
        open_it(str(other))
    for change, says in (
        ({"path": PATHS["cosine"]()}, r"was trained on path Cosine.* and .* on Linear"),
        ({"contract": {**opener(run).contract, "classes": ["a", "b"]}}, "differ in the classes"),
        ({"contract": {**opener(run).contract, "codec": {"name": "pixels"}}}, "different codecs"),
    ):
        wrong = opener(run, named="OURS", **change)
        for open_it, other in ((wrong.denoiser, run), (wrong.classifier, classifier)):
            with pytest.raises((ConfigError, DataError), match=rf"(?s)OURS.*{says}|{says}.*OURS") as error:
                open_it(str(other))
            assert str(other) in str(error.value)


def test_a_checkpoint_of_another_kind_is_refused(run: Path, classifier: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"(?s)no model to draw from \(a classifier, for --guidance\).*runs in .*a model to draw from, step",
    ):
        opener(run).denoiser(str(classifier))
    with pytest.raises(CheckpointError, match="holds no classifier"):
        opener(run).classifier(str(run))


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


def test_guidance_by_label_needs_classes(run: Path) -> None:
    trained = Trained.load(str(run), "ema", CPU)
    unlabelled = replace(trained, contract={**trained.contract, "classes": []})
    for guided in ({"cfg_scale": 2}, {"guidance": [{"name": "cfg", "scale": 3}]}):
        with pytest.raises(ConfigError, match="was trained without classes"):
            unlabelled.sampler(from_dict(SamplerSpec, guided), {}, CPU, "fp32")
    unlabelled.sampler(from_dict(SamplerSpec, {"guidance": [{"name": "cfg", "scale": 1}]}), {}, CPU, "fp32")


def test_classes_from_text(run: Path) -> None:
    trained = Trained.load(str(run), "ema", CPU)
    assert trained.classes("all") == list(range(10))
    assert trained.classes("3,0") == [3, 0]
    assert trained.classes("-1") == [-1]
    for text, says in (
        ("0,10", r"\[10\] are out of range"),
        ("x", "must be 'all', numbers like 0,3 or names; no class is named 'x'"),
        ("", "must be 'all'"),
    ):
        with pytest.raises(ConfigError, match=says):
            trained.classes(text)
    unlabelled = replace(trained, contract={**trained.contract, "classes": []})
    assert unlabelled.classes("all") == [-1]


@pytest.mark.parametrize(("what", "weights"), [("nowhere", "ema"), ("", "emma")])
def test_what_cannot_be_loaded_is_an_error_for_the_user(run: Path, what: str, weights: str) -> None:
    with pytest.raises(CheckpointError):
        Trained.load(str(run / what), weights, CPU)


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


def test_pixels_need_no_codec_whatever_is_set_and_a_missing_one_names_what_it_is_for() -> None:
    nowhere = Vae(path="./nowhere")
    assert open_codec(nowhere, {"name": "pixels"}, "it", CPU).identity() == {"name": "pixels"}
    with pytest.raises(
        DataError, match=r"nowhere/config.json is missing.*it needs the codec 'vae'.*--codec.path"
    ):
        open_codec(nowhere, {"name": "vae"}, "it", CPU)


def test_any_vae_of_the_channels_is_taken_where_it_is_not_known_which(digits: Digits, capsys) -> None:
    given = Vae(path=str(digits.vae))
    assert open_codec(given, unknown_vae(4, 0.18215), "weights", CPU).factor == 2
    assert "note: weights does not say which vae it goes with" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"weights needs a codec 'vae' of 16 channels; .* 'vae' and has 4"):
        open_codec(given, unknown_vae(16, 0.18215), "weights", CPU)
    with pytest.raises(DataError, match=r"weights needs a codec 'vae' of 3 channels; .* 'pixels' and has 3"):
        open_codec(Pixels(), unknown_vae(3, 0.18215), "weights", CPU)
