"""The schema of a diffusion or flow experiment, and how its parts are made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dit.classify import TrainedClassifier
from dit.config import ConfigError, config, from_dict, to_dict
from dit.data.codecs.base import Codec, CodecConfig
from dit.data.codecs.codec import CODECS, parse_codec
from dit.data.codecs.norm import LatentNorm, latent_norm
from dit.data.manifest import Manifest
from dit.dist import World
from dit.flow.objective import Objective
from dit.flow.path import Path as NoisePath
from dit.flow.predict import Endpoints
from dit.model.cost import Cost, Memory, cost
from dit.model.dit import MODELS, DiTConfig
from dit.sample.denoise import DenoiseFn, Denoiser, with_precision
from dit.sample.generate import Sampler, SamplerSpec, check_classes, image_grid, labels_for
from dit.sample.guide import Context, LogitsFn
from dit.train import checkpoint
from dit.train.checkpoint import CheckpointError, Reader
from dit.train.ema import MAIN
from dit.train.fragments import Engine
from dit.train.hooks import Hook, SampleGrid, held_out_hook
from dit.train.latents import (
    LatentsConfig,
    check_noise,
    check_same_latents,
    check_same_path,
    latent_contract,
    open_codec,
)
from dit.train.optim import freeze
from dit.train.settings import RunConfig, TrainConfig
from dit.train.start import Parts
from dit.train.task import LatentTask

Precision = Literal["fp32", "bf16"]


@config
class SampleConfig(SamplerSpec):
    """The grids drawn during training."""

    every: Annotated[int, Field(ge=0)] = 0  # steps; 0 = never
    count: Annotated[int, Field(ge=1)] = 64  # images, one class after the other
    num_steps: Annotated[int, Field(ge=1)] = 25


@config
class DiffusionTrainConfig(TrainConfig):
    """How long, how large, how precise; and what only a conditional model of blocks has."""

    label_drop: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of labels replaced by the null condition
    compile: bool = False  # torch.compile each block


@config
class Experiment(RunConfig):
    """A run of tools/train.py."""

    train: DiffusionTrainConfig = DiffusionTrainConfig()
    model: Annotated[DiTConfig, MODELS] = DiTConfig()
    objective: Objective = Objective()
    latents: LatentsConfig = LatentsConfig()
    codec: Annotated[CodecConfig, CODECS] | None = None  # where the data's codec is, for pictures
    sample: SampleConfig = SampleConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective.check()
        if self.model.learn_sigma and not self.objective.uses_variance:
            raise ConfigError(
                "model.learn_sigma gives the network variance channels that objective.auxiliary does not train; "
                "set objective.auxiliary: learned_range, or model.learn_sigma: false"
            )
        if self.objective.uses_variance and not self.model.learn_sigma:
            raise ConfigError(
                "objective.auxiliary trains variance channels that the network lacks; "
                "set model.learn_sigma: true, or leave objective.auxiliary out"
            )
        if self.sample.every:
            try:
                self.sample.check(self.objective.path, self.objective.prediction, self.model.learn_sigma)
            except ConfigError as error:
                raise ConfigError(f"sample, the pictures drawn during training: {error}") from None

    def make_parts(self, manifest: Manifest, world: World) -> Parts:
        """Model, task and hooks for these data on this rank."""
        norm, task = self.norm(manifest), self.task(manifest, world)
        module = self.model.build(manifest.input_size, manifest.channels, len(manifest.classes))
        if self.train.compile:
            module.compile_blocks()
        return Parts(
            module=module,
            task=task,
            flops_per_image=self.cost(manifest).training_flops,
            contract=latent_contract(manifest, norm),
            hooks=self._hooks(manifest, norm, task, world),
            leaf_modules=tuple({type(b) for b in module.blocks}),
            memory=lambda stage, frozen: self.memory(manifest, world, stage, frozen),
        )

    def task(self, manifest: Manifest, world: World) -> LatentTask:
        """What is trained on these data; ConfigError where the coupling does not fit them or the micro-batch."""
        check_noise(self.objective.coupling, manifest, self.data.val if self.val.every else None)
        micro = self.train.micro(world)
        if micro % self.objective.coupling.group:
            raise ConfigError(
                f"a micro-batch of {micro} samples is no multiple of objective.coupling.group = "
                f"{self.objective.coupling.group}; change train.micro_batch or the group"
            )
        # the statistics of generated latents are not their own
        has_unit_variance = self.latents.norm == "dataset" and not manifest.eps
        return LatentTask(self.objective, self.norm(manifest), self.train.label_drop, has_unit_variance)

    def cost(self, manifest: Manifest) -> Cost:
        """Parameters, FLOPs and memory of the model on these data."""
        return cost(self.model, manifest.input_size, manifest.channels, len(manifest.classes))

    def memory(self, manifest: Manifest, world: World, stage: int, frozen: int = 0) -> Memory:
        """What a rank holds at a ZeRO stage. frozen: numbers in parameters that are not trained."""
        return self.cost(manifest).memory(
            self.train.micro(world),
            zero_stage=stage,
            world_size=world.size,
            precision=self.train.precision,
            averages=self.ema.count,
            frozen=frozen,
        )

    def frozen(self, manifest: Manifest) -> int:
        """Numbers in parameters that train.freeze keeps from training; ConfigError where a pattern fits none."""
        with torch.device("meta"):
            module = self.model.build(manifest.input_size, manifest.channels, len(manifest.classes))
        return freeze(module, self.train.freeze)

    def open_codec(self, manifest: Manifest, device: torch.device) -> Codec:
        """What decodes the pictures that training draws. Raises as `open_codec` of dit.train.latents does."""
        return open_codec(self.codec, manifest.codec, f"{self.data.name}/manifest.json", device)

    def norm(self, manifest: Manifest) -> LatentNorm:
        """The latents' normalisation."""
        return latent_norm(manifest, self.latents.norm)

    def _hooks(self, manifest: Manifest, norm: LatentNorm, task: LatentTask, world: World) -> list[Hook]:
        hooks = held_out_hook(self, manifest, task, world)
        if self.sample.every:
            codec = self.open_codec(manifest, world.device)
            agreed, device = latent_contract(manifest, norm), world.device
            opener = Checkpoints(
                self.objective.path, agreed, self.run_dir, "ema", device, self.train.precision
            )
            draw = self._grid(manifest, lambda x: codec.decode(norm.invert(x)), opener)
            hooks.append(SampleGrid(self.sample.every, draw, Path(self.run_dir) / "samples"))
        return hooks

    def _grid(
        self, manifest: Manifest, decode: Callable[[Tensor], Tensor], opener: Checkpoints
    ) -> Callable[[Engine], np.ndarray]:
        classes = range(len(manifest.classes)) if manifest.classes else [-1]
        index = torch.arange(self.sample.count)
        shape = (manifest.channels, *manifest.input_size)
        path, prediction = self.objective.path, self.objective.prediction
        for guidance in self.sample.guidance:  # what it names is opened now, and not after hours
            guidance(lambda x, t, cond: Endpoints(x, x), Context(path, opener))

        def draw(engine: Engine) -> np.ndarray:
            sampler = Sampler(engine, path, prediction, decode, shape, self.sample, opener.device, opener)
            return image_grid(
                sampler.images(index, labels_for(index, classes)), columns=min(10, len(classes))
            )

        return draw


@dataclass(frozen=True)
class Trained:
    """A model from a checkpoint, ready to sample."""

    model: torch.nn.Module
    experiment: Experiment
    norm: LatentNorm
    contract: dict[str, Any]
    step: int
    path: Path
    weights: str = "ema"  # or "model"

    @classmethod
    def load(cls, run_or_checkpoint: str, weights: str, device: torch.device) -> Trained:
        """From a run directory (its newest good checkpoint) or one checkpoint. weights: "ema" or "model"."""
        found = checkpoint.resolve(run_or_checkpoint)
        if not found.is_sharded and weights == MAIN:
            (weights,) = found.weights  # an exported file has one set, which is what is meant
        try:
            experiment = from_dict(Experiment, found.meta["config"])
        except ConfigError as error:
            kind = (
                "a classifier, for --guidance"
                if "classifier" in found.meta["config"]
                else "not of tools/train.py"
            )
            raise CheckpointError(f"{found.path} holds no model to draw from ({kind}): {error}") from None
        contract = found.meta["contract"]
        channels, height, width = contract["shape"]
        model = experiment.model.build((height, width), channels, len(contract["classes"]))
        model.load_state_dict(Reader(found).state_dict(weights))
        norm = from_dict(LatentNorm, contract["norm"])
        return cls(model.to(device).eval(), experiment, norm, contract, found.step, found.path, weights)

    def sampler(
        self,
        spec: SamplerSpec,
        codec_keys: Mapping[str, str] | None,
        device: torch.device,
        precision: Precision,
    ) -> Sampler:
        """A sampler with this spec. codec_keys: {"codec.path": ...}, over where training had the codec.

        None: of latents alone; it opens no codec and decodes nothing.
        """
        objective, contract = self.experiment.objective, self.contract
        spec.check(objective.path, objective.prediction, self.experiment.model.learn_sigma)
        for guidance in spec.guidance:
            guidance.check(contract["shape"][0])
        if spec.needs_label and not contract["classes"]:
            raise ConfigError(
                f"{self.path} was trained without classes: guidance by class has no effect; scale 1 is none"
            )
        opened = None if codec_keys is None else self._codec(codec_keys, device)
        shape = tuple(contract["shape"])

        def decode(x: Tensor) -> Tensor:
            if opened is None:
                raise ValueError("this sampler was made without a codec: it has latents, and no images")
            return opened.decode(self.norm.invert(x))

        return Sampler(
            with_precision(self.model, device, precision),
            objective.path,
            objective.prediction,
            decode,
            (shape[0], shape[1], shape[2]),
            spec,
            device,
            Checkpoints(objective.path, contract, str(self.path), self.weights, device, precision),
        )

    def _codec(self, keys: Mapping[str, str], device: torch.device) -> Codec:
        choice = self.experiment.codec
        if keys:
            base, name = to_dict(choice) or {}, self.contract["codec"]["name"]
            is_like_it = bool(base) and (base["name"] == "pixels") == (name == "pixels")
            choice = parse_codec(base if is_like_it else {"name": name}, keys)
        return open_codec(choice, self.contract["codec"], str(self.path), device)

    def classes(self, text: str) -> list[int]:
        """Class numbers from "all" or "0,3"; ConfigError where they are out of range."""
        count = len(self.contract["classes"])
        try:
            chosen = list(range(count)) or [-1] if text == "all" else [int(c) for c in text.split(",")]
        except ValueError:
            raise ConfigError(f"classes must be 'all' or numbers like 0,3; got '{text}'") from None
        check_classes(chosen, count)
        return chosen


@dataclass(frozen=True)
class Checkpoints:
    """Opens other runs for guidance (`dit.sample.guide.Opener`); on other latents or another path they are refused.

    path, contract, named: of the model that is guided. weights: "ema" or "model", of what is opened.
    """

    path: NoisePath
    contract: Mapping[str, Any]
    named: str
    weights: str
    device: torch.device
    precision: Precision
    opened: dict[str, dict[str, Any]] = field(default_factory=dict)  # name as given -> what was found there
    held: dict[str, Any] = field(
        default_factory=dict
    )  # what was loaded, by name: once for all grids of a training

    def denoiser(self, run_or_checkpoint: str) -> DenoiseFn:
        """Of another run of tools/train.py, whatever it predicts."""
        if run_or_checkpoint not in self.held:
            other = Trained.load(run_or_checkpoint, self.weights, self.device)
            objective = other.experiment.objective
            self._take(run_or_checkpoint, other.contract, objective.path, other.path, other.step)
            network = with_precision(other.model, self.device, self.precision)
            self.held[run_or_checkpoint] = Denoiser(network, objective.path, objective.prediction)
        return self.held[run_or_checkpoint]  # type: ignore[no-any-return]

    def classifier(self, run_or_checkpoint: str) -> LogitsFn:
        """Of a run of tools/train_classifier.py."""
        if run_or_checkpoint not in self.held:
            other = TrainedClassifier.load(run_or_checkpoint, self.weights, self.device)
            path = other.experiment.objective.path
            self._take(run_or_checkpoint, other.contract, path, other.path, other.step)
            self.held[run_or_checkpoint] = other.logits(self.precision)
        return self.held[run_or_checkpoint]  # type: ignore[no-any-return]

    def _take(self, name: str, theirs: Mapping[str, Any], path: NoisePath, found: Path, step: int) -> None:
        """Check what was found, and note it: a run directory is another checkpoint after more training."""
        check_same_latents(self.contract, theirs, self.named, str(found))
        check_same_path(self.path, path, self.named, str(found))
        self.opened[name] = {"checkpoint": str(found), "step": step}
