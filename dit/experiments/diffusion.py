"""The schema of a diffusion or flow experiment, and how its parts are made from it."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field

from dit.config import ConfigError, config, one_or_more
from dit.data.codecs.base import Codec, CodecConfig
from dit.data.codecs.codec import CODECS
from dit.data.codecs.norm import LatentNorm, latent_norm
from dit.data.shards.manifest import Manifest
from dit.evals.features.network import FeatureSpace
from dit.evals.features.spaces import FEATURES, PixelComponents
from dit.experiments.latents import (
    LatentsConfig,
    check_noise,
    open_codec,
)
from dit.flow.auxiliary import AUXILIARIES
from dit.flow.objective import Objective
from dit.model import sdpa
from dit.model.cost import Cost, Memory, cost
from dit.model.fp8 import FP8, Fp8
from dit.model.models import MODELS, DiTConfig
from dit.model.recompute import Recompute
from dit.ranks.group import World
from dit.sample.generate import SamplerSpec
from dit.train.optim import freeze
from dit.train.settings import RunConfig, TrainConfig
from dit.train.task import LatentTask

Precision = Literal["fp32", "bf16"]


@config
class SampleConfig(SamplerSpec):
    """The grids drawn during training."""

    every: Annotated[int, Field(ge=0)] = 0  # steps between grids of images; 0 = never
    count: Annotated[int, Field(ge=1)] = 64  # images in a grid, one class after the other
    num_steps: Annotated[int, Field(ge=1)] = 25  # steps of the solver for each image


@config
class EvaluateConfig(SamplerSpec):
    """The figures of images drawn during training, always of the same noise and labels."""

    every: Annotated[int, Field(ge=0)] = 0  # steps between figures; 0 = never; needs evaluate.reference
    num_samples: Annotated[int, Field(ge=2)] = (
        1000  # images that are drawn each time, one class after the other
    )
    num_steps: Annotated[int, Field(ge=1)] = 25  # steps of the solver for each image
    batch_size: Annotated[int, Field(ge=1)] = 64  # images that a rank draws at a time
    # real images, as tools/evaluate.py takes them, or a statistics file of its `reference`
    reference: str | None = None
    image_size: Annotated[int, Field(ge=1)] | None = (
        None  # pixels a side that the reference's files are cropped and resized to; null = as they are
    )
    # networks in whose features images are compared; one alone needs no brackets
    features: Annotated[tuple[Annotated[FeatureSpace, FEATURES], ...], BeforeValidator(one_or_more)] = (
        PixelComponents(),
    )
    metrics: str = "frechet,mind"  # figures or metrics, comma-separated; all = those that can be computed
    # share of the run's time; where figures have taken more of it so far, they are put off to a later step
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.05

    @property
    def spec(self) -> SamplerSpec:
        """What decides about the images, without the rest."""
        return SamplerSpec(**{field.name: getattr(self, field.name) for field in fields(SamplerSpec)})


@config
class DiffusionTrainConfig(TrainConfig):
    """How long, how large, how precise; and what only a conditional model of blocks has."""

    label_drop: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of labels replaced by the null condition
    # by torch.compile: each block, the draws' integers (the same bits), the loss around the network
    compile: bool = False
    # multiply the blocks' linear layers in float8 (torchao): tensorwise, rowwise; needs bf16; pays compiled alone
    fp8: Annotated[Fp8, FP8] | None = None
    # GB (1e9 bytes) a rank may fill: as few activations as fit are computed again; null = no budget
    memory_gb: Annotated[float, Field(gt=0)] | None = None


@config
class Experiment(RunConfig):
    """A run of tools/train.py."""

    train: DiffusionTrainConfig = DiffusionTrainConfig()
    model: Annotated[DiTConfig, MODELS] = DiTConfig()  # the network that is trained
    objective: Objective = Objective()
    latents: LatentsConfig = LatentsConfig()
    # where the data's codec is, for pictures; null = as the data say
    codec: Annotated[CodecConfig, CODECS] | None = None
    sample: SampleConfig = SampleConfig()  # grids of images drawn during training
    evaluate: EvaluateConfig = EvaluateConfig()  # figures of images drawn during training

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective.check()
        if self.train.memory_gb is not None and self.model.checkpoint_blocks:
            raise ConfigError(
                "train.memory_gb decides which blocks are computed again, and model.checkpoint_blocks says it too: "
                "leave one of them out"
            )
        self.objective.check_depth(self.model.dims(self.model.patch, 1, 0).depth)
        if self.model.learn_sigma and not self.objective.uses_variance:
            raise ConfigError(
                "model.learn_sigma gives the network variance channels that objective.auxiliary does not train; "
                "name learned_range in objective.auxiliary, or set model.learn_sigma: false"
            )
        if self.objective.uses_variance and not self.model.learn_sigma:
            raise ConfigError(
                "objective.auxiliary trains variance channels that the network lacks; "
                "set model.learn_sigma: true, or leave learned_range out of objective.auxiliary"
            )
        self._check_terms()
        if self.model.residual == "bfloat16" and self.train.precision != "bf16":
            raise ConfigError(
                f"model.residual: bfloat16 rounds nothing at train.precision: {self.train.precision}; set "
                "train.precision: bf16, or leave it out"
            )
        if self.train.fp8 is not None and self.train.precision != "bf16":
            raise ConfigError(
                f"train.fp8 is for train.precision: bf16, and it is {self.train.precision}; set one of the two"
            )
        drawn: dict[str, SampleConfig | EvaluateConfig] = {"sample": self.sample, "evaluate": self.evaluate}
        for name, spec in drawn.items():
            if spec.every:
                try:
                    spec.check(self.objective.path, self.objective.prediction, self.model.learn_sigma)
                except ConfigError as error:
                    raise ConfigError(f"{name}, the pictures drawn during training: {error}") from None
        if self.evaluate.every and self.evaluate.reference is None:
            raise ConfigError(
                "evaluate.every is set, but evaluate.reference (real images, or a statistics file) is not"
            )

    def _check_terms(self) -> None:
        """Refuse, by ConfigError, terms that would compare a network with itself."""
        needing = [AUXILIARIES.name_of(term) for term in self.objective.terms if term.needs_drop]
        if needing and not self.train.label_drop:
            raise ConfigError(
                f"objective.auxiliary {needing[0]} needs a network that knows the dropped condition too, and "
                "train.label_drop is 0; set it to 0.1"
            )
        if needing and not self.model.cond:
            raise ConfigError(f"objective.auxiliary {needing[0]} needs a condition, and model.cond is empty")

    def task(self, manifest: Manifest, world: World) -> LatentTask:
        """What is trained on these data; ConfigError where the coupling does not fit them or the micro-batch."""
        self.objective.check(math.prod((manifest.channels, *manifest.input_size)))
        check_noise(self.objective.coupling, manifest, self.data.val if self.val.every else None)
        micro = self.train.micro(world)
        if micro % self.objective.group:
            raise ConfigError(
                f"a micro-batch of {micro} samples is no multiple of {self.objective.group}, the group of "
                "objective.coupling or objective.auxiliary; change train.micro_batch or the group"
            )
        if not manifest.classes and any(term.needs_drop for term in self.objective.terms):
            raise ConfigError(
                f"{self.data.name} has no classes, and objective.auxiliary has a term that compares what the network "
                "says with and without one: take it out, or encode the images with their labels"
            )
        # the statistics of generated latents are not their own
        has_unit_variance = self.latents.norm == "dataset" and not manifest.eps
        return LatentTask(self.objective, self.norm(manifest), self.train.label_drop, has_unit_variance)

    def check_device(self, manifest: Manifest, world: World) -> None:
        """ConfigError where model.kernels, model.attention or train.fp8 name what cannot run on the rank's device."""
        self.model.kernels.check(world.device)
        dtype = torch.bfloat16 if self.train.precision == "bf16" else torch.float32
        dims = self.model.dims(manifest.input_size, manifest.channels, len(manifest.classes))
        for stack in self.model.stacks(dims):
            sdpa.check(self.model.attention, world.device, dtype, stack.head_width, stack.sequence)
            if self.train.fp8 is not None:
                self.train.fp8.check(world.device, self.train.micro(world) * stack.sequence)

    def cost(self, manifest: Manifest) -> Cost:
        """Parameters, FLOPs and memory of the model on these data."""
        model = cost(self.model, manifest.input_size, manifest.channels, len(manifest.classes))
        return replace(model, forwards=self.objective.forwards)

    def memory(
        self,
        manifest: Manifest,
        world: World,
        stage: int,
        frozen: int = 0,
        recompute: Recompute | None = None,
    ) -> Memory:
        """What a rank holds at a ZeRO stage. frozen: numbers in parameters that are not trained.

        recompute: in place of what the model says.
        """
        micro = self.train.micro(world)
        return self.cost(manifest).memory(
            micro,
            zero_stage=stage,
            world_size=world.size,
            precision=self.train.precision,
            averages=self.ema.count,
            frozen=frozen,
            accumulation=self.train.local_batch(world) // micro,
            recompute=recompute,
        )

    def frozen(self, manifest: Manifest) -> int:
        """Numbers in parameters that train.freeze keeps from training; ConfigError where a pattern fits none."""
        with torch.device("meta"):
            module = self.model.build(manifest.input_size, manifest.channels, len(manifest.classes))
        return freeze(module, self.train.freeze)

    def open_codec(self, manifest: Manifest, device: torch.device) -> Codec:
        """What decodes the pictures that training draws. Raises as `open_codec` of dit.experiments.latents does."""
        return open_codec(self.codec, manifest.codec, f"{self.data.name}/manifest.json", device)

    def norm(self, manifest: Manifest) -> LatentNorm:
        """The latents' normalisation."""
        return latent_norm(manifest, self.latents.norm)
