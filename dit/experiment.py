"""The schema of a diffusion or flow experiment, and how its parts are made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, config, from_dict, to_dict
from dit.data import DataError
from dit.data.codec import (
    CODECS,
    Codec,
    CodecConfig,
    LatentNorm,
    Pixels,
    check_same_codec,
    latent_norm,
    parse_codec,
)
from dit.data.manifest import Manifest
from dit.dist import World
from dit.flow.objective import Objective
from dit.flow.predict import Cond
from dit.model.cost import Cost, cost
from dit.model.dit import MODELS, DiTConfig
from dit.sample.generate import Sampler, SamplerSpec, check_classes, image_grid, labels_for
from dit.train import checkpoint
from dit.train.checkpoint import Reader
from dit.train.fragments import Engine
from dit.train.hooks import Hook, SampleGrid, held_out_hook
from dit.train.settings import RunConfig, TrainConfig
from dit.train.start import Parts
from dit.train.task import LatentTask

Precision = Literal["fp32", "bf16"]


@config
class LatentsConfig:
    """How stored latents become what the model sees."""

    norm: Literal["dataset", "codec"] = (
        "dataset"  # the data's mean and std, or the codec's own scale (official DiT)
    )


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
        if self.model.learn_sigma:
            raise ConfigError("model.learn_sigma: no objective trains the variance channels; leave it false")

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
            contract={
                "norm": to_dict(norm),
                "codec": manifest.codec,
                "shape": [manifest.channels, *manifest.input_size],
                "image_size": manifest.image_size,
                "classes": list(manifest.classes),
            },
            hooks=self._hooks(manifest, norm, task, world),
            leaf_modules=tuple({type(b) for b in module.blocks}),
        )

    def task(self, manifest: Manifest, world: World) -> LatentTask:
        """What is trained on these data; ConfigError where coupled groups do not fit the micro-batch."""
        micro = self.train.micro(world)
        if micro % self.objective.coupling.group:
            raise ConfigError(
                f"a micro-batch of {micro} samples is no multiple of objective.coupling.group = "
                f"{self.objective.coupling.group}; change train.micro_batch or the group"
            )
        has_unit_variance = self.latents.norm == "dataset"
        return LatentTask(self.objective, self.norm(manifest), self.train.label_drop, has_unit_variance)

    def cost(self, manifest: Manifest) -> Cost:
        """Parameters, FLOPs and memory of the model on these data."""
        return cost(self.model, manifest.input_size, manifest.channels, len(manifest.classes))

    def norm(self, manifest: Manifest) -> LatentNorm:
        """The latents' normalisation."""
        return latent_norm(manifest, self.latents.norm)

    def _hooks(self, manifest: Manifest, norm: LatentNorm, task: LatentTask, world: World) -> list[Hook]:
        hooks = held_out_hook(self, manifest, task, world)
        if self.sample.every:
            codec = open_codec(self.codec, manifest.codec, f"{self.data.path}/manifest.json", world.device)
            draw = self._grid(manifest, lambda x: codec.decode(norm.invert(x)), world.device)
            hooks.append(SampleGrid(self.sample.every, draw, Path(self.run_dir) / "samples"))
        return hooks

    def _grid(
        self, manifest: Manifest, decode: Callable[[Tensor], Tensor], device: torch.device
    ) -> Callable[[Engine], np.ndarray]:
        classes = range(len(manifest.classes)) if manifest.classes else [-1]
        index = torch.arange(self.sample.count)
        shape = (manifest.channels, *manifest.input_size)

        def draw(engine: Engine) -> np.ndarray:
            path, prediction = self.objective.path, self.objective.prediction
            sampler = Sampler(engine, path, prediction, decode, shape, self.sample, device)
            return image_grid(
                sampler.images(index, labels_for(index, classes)), columns=min(10, len(classes))
            )

        return draw


def open_codec(
    choice: CodecConfig | None, identity: dict[str, Any], named: str, device: torch.device
) -> Codec:
    """The codec that made the data, to decode with. identity: of the data's codec, which `named` records.

    Pixels need no codec, whatever is set. ConfigError where it is not said where to find another one; DataError
    where it cannot be loaded or is not the one.
    """
    if identity["name"] == "pixels":
        return Pixels().build(device)
    if choice is None:
        raise ConfigError(
            f"the data's codec is '{identity['name']}' and nothing says where it is: set codec: {{name: "
            f"{identity['name']}, path: FOLDER}} (or --codec.path=FOLDER when sampling)"
        )
    try:
        codec = choice.build(device)
    except DataError as error:
        raise DataError(
            f"{error}. {named} needs the codec '{identity['name']}' that its data were made with: --codec.path=FOLDER"
        ) from None
    check_same_codec(identity, codec.identity(), named, "the codec given")
    return codec


@dataclass(frozen=True)
class Trained:
    """A model from a checkpoint, ready to sample."""

    model: torch.nn.Module
    experiment: Experiment
    norm: LatentNorm
    contract: dict[str, Any]
    step: int
    path: Path

    @classmethod
    def load(cls, run_or_checkpoint: str, weights: str, device: torch.device) -> Trained:
        """From a run directory (its newest good checkpoint) or one checkpoint. weights: "ema" or "model"."""
        found = checkpoint.resolve(run_or_checkpoint)
        experiment = from_dict(Experiment, found.meta["config"])
        contract = found.meta["contract"]
        channels, height, width = contract["shape"]
        model = experiment.model.build((height, width), channels, len(contract["classes"]))
        model.load_state_dict(Reader(found).state_dict(weights))
        norm = from_dict(LatentNorm, contract["norm"])
        return cls(model.to(device).eval(), experiment, norm, contract, found.step, found.path)

    def sampler(
        self, spec: SamplerSpec, codec_keys: Mapping[str, str], device: torch.device, precision: Precision
    ) -> Sampler:
        """A sampler with this spec. codec_keys: {"codec.path": ...}, over where training had the codec."""
        objective, contract, choice = self.experiment.objective, self.contract, self.experiment.codec
        if codec_keys:
            base, name = to_dict(choice) or {}, contract["codec"]["name"]
            choice = parse_codec(base if base.get("name") == name else {"name": name}, codec_keys)
        opened = open_codec(choice, contract["codec"], str(self.path), device)
        shape = tuple(contract["shape"])

        def network(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                return self.model(x, model_time, cond)  # type: ignore[no-any-return]

        return Sampler(
            network,
            objective.path,
            objective.prediction,
            lambda x: opened.decode(self.norm.invert(x)),
            (shape[0], shape[1], shape[2]),
            spec,
            device,
        )

    def classes(self, text: str) -> list[int]:
        """Class numbers from "all" or "0,3"; ConfigError where they are out of range."""
        count = len(self.contract["classes"])
        try:
            chosen = list(range(count)) or [-1] if text == "all" else [int(c) for c in text.split(",")]
        except ValueError:
            raise ConfigError(f"classes must be 'all' or numbers like 0,3; got '{text}'") from None
        check_classes(chosen, count)
        return chosen
