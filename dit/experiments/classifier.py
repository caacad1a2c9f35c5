"""The schema of a classifier of noisy latents, its task, and classifiers back from checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from dit.config import config, from_dict
from dit.data.codecs.norm import LatentNorm, latent_norm
from dit.data.shards.manifest import Manifest
from dit.experiments.about import named
from dit.experiments.latents import LatentsConfig, latent_contract
from dit.flow.loss import Loss
from dit.flow.path import PATHS, Linear, NoisePath
from dit.flow.predict import call_network
from dit.flow.spread import SPREADS, IndependentDraws, Spread
from dit.flow.times import TIMES, Times, Uniform
from dit.model.classifier import Classifier, ClassifierConfig
from dit.model.cost import counted_training_flops
from dit.ranks.group import World
from dit.rng import Purpose
from dit.sample.denoise import with_precision
from dit.sample.guide import LogitsFn
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import CheckpointError, Reader
from dit.train.held_out import held_out_hook
from dit.train.plan import Parts
from dit.train.settings import RunConfig
from dit.train.task import Network, PlainTask, Samples


@config
class Noise:
    """How noisy the latents are that are classified. The path must be that of the model to be guided."""

    path: Annotated[NoisePath, PATHS] = Linear()  # from data to noise: that of the model to be guided
    times: Annotated[Times, TIMES] = Uniform()  # how often each time is trained on
    spread: Annotated[Spread, SPREADS] = IndependentDraws()  # how times are drawn over the global batch


@config
class ClassifierExperiment(RunConfig):
    """A run of tools/train_classifier.py, on the latents of the model that it will guide."""

    classifier: ClassifierConfig = ClassifierConfig()  # the network, a transformer
    objective: Noise = Noise()  # how noisy the latents are that are classified
    latents: LatentsConfig = LatentsConfig()  # how stored latents become what the model sees

    def make_parts(self, manifest: Manifest, world: World) -> Parts:
        """Model, task and hooks for these data on this rank."""
        shape, classes = (manifest.channels, *manifest.input_size), len(manifest.classes)

        def build() -> Classifier:
            return self.classifier.build(manifest.input_size, manifest.channels, classes)

        with torch.device("meta"):
            module = build()
        norm = latent_norm(manifest, self.latents.norm)
        task = ClassifierTask(self.objective, norm, classes)
        return Parts(
            build=build,
            task=task,
            flops_per_image=counted_training_flops(module, torch.zeros(1, *shape), torch.zeros(1), {}),
            contract=latent_contract(manifest, norm),
            hooks=held_out_hook(self, manifest, task, world),
            leaf_modules=tuple({type(b) for b in module.blocks}),
            about={
                "model": f"classifier of {classes} classes",
                "objective": f"cross-entropy, {named(self.objective)}",
            },
        )


@dataclass(frozen=True)
class ClassifierTask(PlainTask):
    """Cross-entropy of the label given noisy latents, in nats (arXiv 2105.05233, section 4).

    Samples without a label count with loss 0. `accuracy`: the share of samples whose label is the likeliest.
    """

    noise: Noise
    norm: LatentNorm
    classes: int

    def loss(self, network: Network, samples: Samples) -> Loss:
        data = self.norm.draw(samples.moments, samples.draws)  # (B, C, H, W)
        path = self.noise.path
        u = self.noise.spread(samples.draws).double()  # in float32 a time depends on its place in the batch
        t = self.noise.times(u, path, data[0].numel()).to(data.dtype)  # (B,)
        x = path.coeffs(t).mix(data, samples.draws.normal(Purpose.EPS, data.shape[1:]))
        logits = call_network(network, path, x, t, {})  # (B, classes)
        each = F.cross_entropy(logits, samples.label.clamp(min=0), reduction="none")
        per_sample = torch.where(samples.label >= 0, each, 0.0)
        accuracy = (logits.argmax(1) == samples.label).float().mean()
        return Loss(per_sample.mean(), per_sample, t, {"accuracy": accuracy})

    def check_first_loss(self, losses: list[Loss], numel: int) -> str | None:
        """The first logits are 0, so every labelled sample's loss is ln(classes)."""
        found = torch.cat([loss.per_sample.detach() for loss in losses])
        found = found[torch.isfinite(found) & (found != 0)]
        want = math.log(self.classes)
        if not len(found) or bool((found / want - 1).abs().max() < 1e-2):
            return None
        return (
            f"the first loss is {float(found.mean()):.4g} and not ln({self.classes}) = {want:.4g}, that of a "
            "classifier which knows nothing: its last layer does not start at zero"
        )


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier from a checkpoint."""

    model: Classifier
    experiment: ClassifierExperiment
    contract: dict[str, Any]
    path: Path
    step: int
    device: torch.device
    digest: str  # of the checkpoint's content

    @classmethod
    def load(cls, run_or_checkpoint: str, weights: str, device: torch.device) -> TrainedClassifier:
        """From a run directory (its newest good checkpoint) or one checkpoint. weights: "ema" or "model".

        CheckpointError where there is none, or none of a classifier.
        """
        found = checkpoint.resolve(run_or_checkpoint)
        if "classifier" not in found.meta["config"]:
            raise CheckpointError(
                f"{found.path} holds no classifier of noisy latents; train one with tools/train_classifier.py"
            )
        experiment = from_dict(ClassifierExperiment, found.meta["config"])
        agreed = found.meta["contract"]
        channels, height, width = agreed["shape"]
        model = experiment.classifier.build((height, width), channels, len(agreed["classes"]))
        model.load_state_dict(Reader(found).state_dict(weights))
        model.to(device).eval().requires_grad_(False)
        return cls(model, experiment, agreed, found.path, found.step, device, found.digest)

    def logits(self, precision: str) -> LogitsFn:
        """(x (B, C, H, W), t (B,)) → logits (B, classes), differentiable in x. precision: fp32 or bf16."""
        model, path = with_precision(self.model, self.device, precision), self.experiment.objective.path
        return lambda x, t: call_network(model, path, x, t, {})
