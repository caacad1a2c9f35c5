"""Models loaded from checkpoints, to sample from or to guide others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dit.config import ConfigError, from_dict, to_dict
from dit.data.codecs.base import Codec
from dit.data.codecs.codec import parse_codec
from dit.data.codecs.norm import LatentNorm
from dit.errors import Notice
from dit.experiments.classifier import TrainedClassifier
from dit.experiments.diffusion import Experiment
from dit.experiments.latents import (
    check_same_latents,
    check_same_path,
    codec_doubts,
    open_codec,
)
from dit.flow.path import NoisePath
from dit.model.sharing import share_encoder
from dit.ranks import group
from dit.sample.classes import listed_classes
from dit.sample.denoise import DenoiseFn, Denoiser, with_precision
from dit.sample.generate import Sampler, SamplerSpec
from dit.sample.guide import LogitsFn
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import CheckpointError, Reader
from dit.train.checkpoints.nearby import MODEL, kind_of, suggestion
from dit.train.ema import MAIN, Average

Precision = Literal["fp32", "bf16"]


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
    updates: int = 0
    digest: str = ""  # of the checkpoint's content, wherever it lies
    average: Average = field(
        default_factory=lambda: Average("ema")
    )  # which one these are, and how much of the first weights it holds
    compiled: bool = False  # the blocks

    @classmethod
    def load(
        cls, run_or_checkpoint: str, weights: str, device: torch.device, *, compiled: bool = False
    ) -> Trained:
        """Load a run directory's newest good checkpoint, or one checkpoint. weights: "ema" or "model".

        compiled: the blocks are.
        """
        found = checkpoint.resolve(run_or_checkpoint)
        if not found.is_sharded and weights == MAIN:
            (weights,) = found.weights  # an exported file has one set, which is what is meant
        kind = kind_of(found.meta["config"])
        if kind != MODEL:
            above = (found.path.parents[1] if found.is_sharded else found.path).parent
            raise CheckpointError(f"{found.path} holds no model to draw from ({kind}){suggestion(above)}")
        try:
            experiment = from_dict(Experiment, found.meta["config"])
        except ConfigError as error:
            raise CheckpointError(
                f"{found.path} holds no model to draw from (not of tools/train.py): {error}"
            ) from None
        contract = found.meta["contract"]
        channels, height, width = contract["shape"]
        # the run's kernel of attention was chosen for another device and precision, perhaps; any computes the same
        model = replace(experiment.model, attention="auto").build(
            (height, width), channels, len(contract["classes"])
        )
        model.load_state_dict(Reader(found).state_dict(weights))
        norm = from_dict(LatentNorm, contract["norm"])
        model = model.to(device).eval()
        if compiled:
            model.compile_blocks()
        facts = (found.step, found.path, weights, found.updates, found.digest)
        average = Average.of_checkpoint(found.meta, weights)
        return cls(model, experiment, norm, contract, *facts, average, compiled)

    def denoiser(self, device: torch.device, precision: Precision) -> Denoiser:
        """The model as a denoiser of noisy latents, without gradients of its weights."""
        objective, model = self.experiment.objective, self.model.requires_grad_(False)
        return Denoiser(with_precision(model, device, precision), objective.path, objective.prediction)

    def sampler(
        self,
        spec: SamplerSpec,
        codec: Mapping[str, Any] | Codec | None,
        device: torch.device,
        precision: Precision,
        share: int = 1,
    ) -> Sampler:
        """A sampler with this spec. codec: one that is open, or {"codec.path": ...}, over where training had it.

        None: of latents alone. share: evaluations in a row that share what the encoder says; ConfigError without one.
        """
        objective, contract = self.experiment.objective, self.contract
        spec.check(objective.path, objective.prediction, self.experiment.model.learn_sigma)
        for guidance in spec.guidance:
            guidance.check(contract["shape"][0])
        if spec.needs_label and not contract["classes"]:
            raise ConfigError(
                f"{self.path} was trained without classes: guidance by class has no effect; scale 1 is none"
            )
        sharing = share_encoder(self.model, share) if share > 1 else None
        opened = codec if codec is None or isinstance(codec, Codec) else self.codec(codec, device)
        shape = tuple(contract["shape"])

        def decode(x: Tensor) -> Tensor:
            if opened is None:
                raise ValueError("this sampler was made without a codec: it has latents, and no images")
            return opened.decode(self.norm.invert(x))

        return Sampler(
            with_precision(sharing or self.model, device, precision),
            objective.path,
            objective.prediction,
            decode,
            (shape[0], shape[1], shape[2]),
            spec,
            device,
            Checkpoints(
                objective.path, contract, str(self.path), self.weights, device, precision, self.compiled
            ),
            model_advice="compute in float32 (--precision=fp32)" if precision == "bf16" else "",
            codec_advice="" if opened is None else opened.advice,
            classes=len(contract["classes"]),
            sharing=sharing,
        )

    def codec(self, keys: Mapping[str, Any], device: torch.device) -> Codec:
        """Open the codec of the latents. keys: {"codec.path": ...}, over where training had it.

        ConfigError where nothing says where it is; DataError where it cannot be loaded or is another one.
        """
        choice = self.experiment.codec
        doubts = codec_doubts(choice, self.contract["codec"], f"the run of {self.path}", reads=False)
        for doubt in doubts if group.is_main() else ():
            warnings.warn(doubt, Notice, stacklevel=2)
        if keys:
            base, name = to_dict(choice) or {}, self.contract["codec"]["name"]
            is_like_it = bool(base) and (base["name"] == "pixels") == (name == "pixels")
            choice = parse_codec(base if is_like_it else {"name": name}, keys)
        return open_codec(choice, self.contract["codec"], str(self.path), device)

    def precision(self, asked: str) -> Precision:
        """The precision that is asked for: that of training for "run". ConfigError for what is none."""
        known: dict[str, Precision] = {
            "run": self.experiment.train.precision,
            "fp32": "fp32",
            "bf16": "bf16",
        }
        if asked not in known:
            raise ConfigError(f"precision is {asked!r}, expected run (as in training), fp32 or bf16")
        return known[asked]

    def classes(self, asked: Any) -> list[int]:
        """Class numbers from "all", "0,3", names, or a list; ConfigError for what is none (`listed_classes`)."""
        return listed_classes(asked, self.contract["classes"])

    @property
    def run_dir(self) -> Path:
        """The run directory that the checkpoint lies in; the folder of an exported file."""
        return self.path.parents[1] if self.path.parent.name == "checkpoints" else self.path.parent

    def say_weights(self, head: str = "") -> None:
        """Print which weights these are; warn where they are an average that still holds much of the first ones."""
        print(f"{head}{self.weights_line()}")
        self.average.warn()

    def weights_line(self) -> str:
        """Which weights these are, in a line for a person."""
        which = str(self.average).removesuffix(" weights")
        return f"weights: {which} of step {self.step}, after {self.updates} updates, from {self.path}"


@dataclass(frozen=True)
class Checkpoints:
    """Opens other runs for guidance (`dit.sample.guide.Opener`); on other latents or another path they are refused.

    path, contract, named: of the model that is guided. weights: "ema" or "model", of what is opened. compiled: the
    blocks of models, as of the one that is guided.
    """

    path: NoisePath
    contract: Mapping[str, Any]
    named: str
    weights: str
    device: torch.device
    precision: Precision
    compiled: bool = False
    opened: dict[str, dict[str, Any]] = field(default_factory=dict)  # name as given -> what was found there
    held: dict[str, Any] = field(
        default_factory=dict
    )  # what was loaded, by name: once for all grids of a training

    def denoiser(self, run_or_checkpoint: str) -> DenoiseFn:
        """Open that of another run of tools/train.py, whatever it predicts."""
        if run_or_checkpoint not in self.held:
            other = Trained.load(run_or_checkpoint, self.weights, self.device, compiled=self.compiled)
            objective = other.experiment.objective
            self._take(run_or_checkpoint, objective.path, other)
            network = with_precision(other.model, self.device, self.precision)
            self.held[run_or_checkpoint] = Denoiser(network, objective.path, objective.prediction)
        return self.held[run_or_checkpoint]  # type: ignore[no-any-return]

    def classifier(self, run_or_checkpoint: str) -> LogitsFn:
        """Open that of a run of tools/train_classifier.py."""
        if run_or_checkpoint not in self.held:
            other = TrainedClassifier.load(run_or_checkpoint, self.weights, self.device)
            path = other.experiment.objective.path
            self._take(run_or_checkpoint, path, other)
            self.held[run_or_checkpoint] = other.logits(self.precision)
        return self.held[run_or_checkpoint]  # type: ignore[no-any-return]

    def _take(self, name: str, path: NoisePath, other: Trained | TrainedClassifier) -> None:
        """Check what was found, and note it: a run directory is another checkpoint after more training."""
        check_same_latents(self.contract, other.contract, self.named, str(other.path))
        check_same_path(self.path, path, self.named, str(other.path))
        self.opened[name] = {"checkpoint": str(other.path), "step": other.step, "digest": other.digest}
