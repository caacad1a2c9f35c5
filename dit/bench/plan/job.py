"""What is to be trained, as a plan sees it: a configuration, and the shape of data that need not be there."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dit.config import ConfigError, config
from dit.data.codecs.codec import Pixels
from dit.data.loading.mixture import PartConfig
from dit.data.shards.manifest import FILE
from dit.experiments.diffusion import Experiment
from dit.files import expand
from dit.model.cost import Cost, Memory, cost
from dit.model.dit import DiTConfig
from dit.model.recompute import Recompute
from dit.train.engines.zero_config import ZeroConfig
from dit.train.optim import freeze
from dit.train.plan import stored_shape
from dit.train.settings import CheckpointConfig

# ImageNet at 256 pixels, through an autoencoder that makes 4 channels of an eighth of the side.
CHANNELS, SIDE, CLASSES, FACTOR = 4, 32, 1000, 8


@dataclass(frozen=True)
class Shape:
    """Of a sample as the network sees it. side: (height, width). stored: bytes a sample on disk. origin: in words."""

    channels: int
    side: tuple[int, int]
    classes: int
    stored: int
    origin: str


@config
class Asked:
    """What a plan is for, beside the configuration."""

    device: str  # h100, h200, a100, b200, or cpu: one core of this machine a rank
    gpus: int  # devices in all, one a rank
    batch: int | None = None  # samples a step over all ranks; train.global_batch if not given
    samples: int | None = None  # to train on, repeats included; all of the config's steps if not given
    price: float | None = None  # of a device's hour
    # pixels a side; the network sees an eighth of them, or all where the codec is pixels
    image_size: int | None = None
    input_size: int | None = None  # of what the network sees, a side; 32 if neither this nor the data say
    channels: int | None = None  # of what the network sees; 4 if neither this nor the data say
    num_classes: int | None = None  # of labels; 1000 if neither this, the data nor model.num_classes say
    measured: str | None = None  # figures of `step` (its --json_file), beside those in benchmarks/

    def __post_init__(self) -> None:
        for name in ("gpus", "batch", "samples", "image_size", "input_size", "channels"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ConfigError(f"--{name} must be at least 1, got {given}")
        if (self.num_classes or 0) < 0 or (self.price or 0) < 0:
            raise ConfigError(
                f"--num_classes and --price must be 0 or more, got {self.num_classes} and {self.price}"
            )
        if self.image_size and self.input_size:
            raise ConfigError("--image_size and --input_size say the same twice: leave one of them out")

    @property
    def has_shape(self) -> bool:
        """Whether flags say anything of the data."""
        return any(
            value is not None for value in (self.image_size, self.input_size, self.channels, self.num_classes)
        )


@dataclass(frozen=True)
class Job:
    """A run. batch: over all ranks. cap: of the micro-batch. group: that a micro-batch is a multiple of. frozen:
    numbers that are not trained. sample_bytes: that are read for a sample."""

    cost: Cost
    batch: int
    precision: str = "fp32"
    compiled: bool = False
    averages: int = 1
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cap: int | None = None
    group: int = 1
    frozen: int = 0
    is_local: bool = False
    is_plain: bool = False
    sample_bytes: int = 0
    samples: int = 0
    data: str = ""
    budget: int | None = None  # bytes a rank, within which activations are computed again

    def memory(
        self, micro: int, stage: int, ranks: int, accumulation: int = 1, recompute: Recompute | None = None
    ) -> Memory:
        """What a rank holds, as the trainer reckons it. recompute: in place of what the configuration says."""
        found = self.cost.memory(
            micro,
            zero_stage=stage,
            world_size=ranks,
            precision=self.precision,
            averages=self.averages,
            frozen=self.frozen,
            accumulation=accumulation,
            recompute=recompute,
        )
        stay = found.gradients_stay or (self.is_plain and ranks > 1)  # in the plain engine's buckets
        return replace(found, gradients_stay=stay)


def job_of(cfg: Experiment, asked: Asked) -> Job:
    """Make a job of a configuration. ConfigError for what it cannot be."""
    shape = shape_of(cfg, asked)
    return Job(
        cost=cost(cfg.model, shape.side, shape.channels, shape.classes),
        batch=asked.batch or cfg.train.global_batch,
        precision=cfg.train.precision,
        compiled=cfg.train.compile,
        averages=cfg.ema.count,
        zero=cfg.zero,
        checkpoint=cfg.checkpoint,
        cap=cfg.train.micro_batch,
        group=cfg.objective.group,
        frozen=_frozen(cfg.model, shape, cfg.train.freeze),
        is_local=cfg.engine == "local",
        is_plain=cfg.is_plain,
        sample_bytes=shape.stored,
        samples=asked.samples or cfg.train.steps * cfg.train.global_batch,
        data=shape.origin,
        budget=None if cfg.train.memory_gb is None else int(1e9 * cfg.train.memory_gb),
    )


def shape_of(cfg: Experiment, asked: Asked) -> Shape:
    """Find the data's shape: what flags say, else the data where they lie here, else ImageNet-256's latents."""
    if not asked.has_shape and all(_is_here(part) for part in _parts(cfg)):
        manifest = cfg.data.open().manifest
        height, width = manifest.input_size
        numbers = int(torch.Size(stored_shape(manifest)).numel())
        stored = numbers * (2 if manifest.dtype == "float16" else 4)
        words = f"{manifest.channels} x {height} x {width}, {len(manifest.classes)} classes, as {cfg.data.name} says"
        return Shape(manifest.channels, (height, width), len(manifest.classes), stored, words)
    is_pixels = isinstance(cfg.codec, Pixels)
    channels = asked.channels or (3 if is_pixels else CHANNELS)
    side = asked.input_size or SIDE
    if asked.image_size:
        if not is_pixels and asked.image_size % FACTOR:
            raise ConfigError(
                f"--image_size={asked.image_size} is no multiple of {FACTOR}, the codec's factor"
            )
        side = asked.image_size if is_pixels else asked.image_size // FACTOR
    known = cfg.model.num_classes
    classes = asked.num_classes if asked.num_classes is not None else CLASSES if known is None else known
    why = "as flags say" if asked.has_shape else "as ImageNet-256's latents are, for the data are not here"
    moments = 1 if is_pixels else 2  # a mean and a standard deviation of each latent
    words = f"{channels} x {side} x {side}, {classes} classes, {why}"
    return Shape(channels, (side, side), classes, moments * 2 * channels * side**2, words)


def _parts(cfg: Experiment) -> tuple[PartConfig, ...]:
    return cfg.data.mix or (PartConfig(path=str(cfg.data.path)),)


def _is_here(part: PartConfig) -> bool:
    """Whether a data set lies in a folder of this machine."""
    return (Path(expand(os.fspath(part.path))) / FILE).is_file()


def _frozen(model: DiTConfig, shape: Shape, patterns: tuple[str, ...]) -> int:
    if not patterns:
        return 0
    with torch.device("meta"):
        module = model.build(shape.side, shape.channels, shape.classes)
    return freeze(module, patterns)
