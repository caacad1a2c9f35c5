"""Models back from checkpoints: what was trained, to sample from and to guide others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit.config import ConfigError, from_dict
from dit.data import DataError
from dit.data.codecs.autoencoders import Vae
from dit.data.shards.manifest import Manifest
from dit.experiments.classifier import ClassifierExperiment
from dit.experiments.diffusion import Experiment
from dit.experiments.trained import Checkpoints, Trained
from dit.flow.path import PATHS
from dit.sample.generate import SamplerSpec
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.start import train
from tests.datasets import Digits
from tests.experiments.test_classifier import values as classifier_values
from tests.train.runs import sign, values

CPU = torch.device("cpu")


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


def test_a_run_is_drawn_from_where_its_kernel_of_attention_is_not(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoints" / "step-00000003", folder)
    sign(folder, lambda meta: meta["config"]["model"].update(attention="cudnn"))
    here, there = (Trained.load(str(path), "ema", CPU) for path in (run, folder))
    assert there.experiment.model.attention == "cudnn"
    x, t, cond = torch.ones(1, 4, 8, 8), torch.full((1,), 0.5), {"label": torch.tensor([3])}
    assert torch.equal(here.model(x, t, cond), there.model(x, t, cond))


def test_its_sampler_decodes_with_the_datas_codec(digits: Digits, run: Path) -> None:
    trained = Trained.load(str(run), "ema", CPU)
    spec = from_dict(SamplerSpec, {"num_steps": 1, "solver": "euler"})
    sampler = trained.sampler(spec, {}, CPU, "fp32")
    assert sampler.shape == (4, 8, 8)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    codec = Vae(path=str(digits.vae)).build()
    assert torch.equal(sampler.decode(latents), codec.decode(trained.norm.invert(latents)))
    assert sampler.images(torch.arange(2), torch.tensor([0, 1])).shape == (2, 16, 16, 3)


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
