"""What takes turns in `dit/bench/speed/step.py`: a plain DiT's loop, our step on each engine, bare passes of both."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dit.bench.speed.plain import LABEL_DROP, PlainDiT, PlainLoop
from dit.config import ConfigError, config
from dit.data.codecs.norm import LatentNorm
from dit.data.loading.stream import Batch
from dit.flow.objective import Objective
from dit.model.cost import cost
from dit.model.dit import DiT, DiTConfig
from dit.model.fp8 import FP8
from dit.model.sdpa import Backend
from dit.model.stream import Residual
from dit.ranks.group import World
from dit.rng import Draws
from dit.train.ema import Ema, EmaConfig
from dit.train.engines.base import Engine
from dit.train.engines.local import LocalEngine
from dit.train.engines.plain import PlainEngine
from dit.train.engines.zero_config import Offload, Stage, ZeroConfig
from dit.train.meters import Meters
from dit.train.optim import OptimConfig
from dit.train.step import StepGraph, passes
from dit.train.task import LatentTask, batch_samples

CHANNELS, SIDE, CLASSES = 4, 32, 1000


@config
class StepBench:
    """Sizes. A turn is `steps` steps; on a GPU the first turn, which does not count, is to hold 20."""

    size: tuple[str, ...] = ("S",)  # of the models: S, B, L, XL; nano, micro, tiny
    patch: int = 2  # latent pixels of a patch, on a side
    batch: int = 8  # samples a step and rank
    micro_batch: int | None = None  # samples a forward pass; null = the batch, or on a GPU as many as fit
    precision: Literal["fp32", "bf16"] = "fp32"  # of every contender
    compile: bool = False  # ours with compiled blocks, and a compiled plain loop besides
    stages: tuple[Stage, ...] = (0, 1, 2, 3)  # of ZeRO, an engine each
    head_width: int | None = None  # channels of a head, of every contender; null = by size
    residual: Residual = "float32"  # of our residual stream; bfloat16 needs precision bf16
    attention: Backend = "auto"  # torch's kernel of our attention
    # our linear layers in float8: tensorwise, rowwise; needs precision bf16; emulated on a CPU; null = none
    fp8: Literal["tensorwise", "rowwise"] | None = None
    steps: int = 2  # training steps a turn
    repeats: int = 5  # turns of each contender

    def __post_init__(self) -> None:
        if min(self.steps, self.repeats, self.batch) < 1 or not self.size:
            raise ConfigError("steps, repeats and batch are at least 1, and a size is needed")
        for size in self.size:
            self.model(size)
        if self.precision != "bf16" and (self.residual == "bfloat16" or self.fp8):
            raise ConfigError(f"residual bfloat16 and fp8 need precision bf16, and it is {self.precision}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(
                f"micro_batch is {self.micro_batch}, expected 1 or more, or null for the whole batch"
            )
        if self.batch % (self.micro_batch or self.batch):
            raise ConfigError(f"micro_batch ({self.micro_batch}) must divide batch ({self.batch})")

    def model(self, size: str) -> DiTConfig:
        """Our network of a size."""
        return DiTConfig(
            size=size,
            patch=self.patch,
            head_width=self.head_width,
            residual=self.residual,
            attention=self.attention,
        )


class Stepper(Protocol):
    """A contender that was built. about: which engine and optimizer really run."""

    about: str

    def step(self) -> None:
        """Do one training step."""

    def close(self) -> None:
        """Give its memory back."""


class Setting:
    """One size of model on one device: the samples of every step, and how both networks are made."""

    def __init__(self, cfg: StepBench, size: str, world: World):
        self.cfg, self.world, self.device = cfg, world, world.device
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(cfg.batch, CHANNELS, SIDE, SIDE, generator=generator).to(self.device)
        self.label = (torch.arange(cfg.batch) % CLASSES).to(self.device)
        self.model = cfg.model(size)
        self.flops = cost(self.model, SIDE, CHANNELS, CLASSES).training_flops  # of a step, an image
        self.offload: Offload = "none"

    def ours(self) -> DiT:
        """Our network, its blocks compiled where that is asked for."""
        torch.manual_seed(0)
        module = self.model.build(SIDE, CHANNELS, CLASSES)
        if self.cfg.fp8 is not None:
            FP8[self.cfg.fp8](emulate=self.device.type == "cpu").convert(module)
        if self.cfg.compile:
            module.compile_blocks()
        return module.to(self.device)

    def plain(self) -> PlainDiT:
        """The plain network of the same shapes."""
        torch.manual_seed(0)
        position = self.model.build(SIDE, CHANNELS, CLASSES).position
        return PlainDiT(self.model.dims(SIDE, CHANNELS, CLASSES), position).to(self.device)


class PlainStep:
    """The plain loop."""

    def __init__(self, setting: Setting, micro: int, compiled: bool):
        self.setting, self.micro = setting, micro
        self.loop = PlainLoop(setting.plain(), setting.cfg.precision == "bf16", compiled)
        kind = type(self.loop.optimizer).__name__
        how = (
            "not fused" if setting.device.type == "cpu" else "not fused (foreach)"
        )  # torch's own choice there
        self.about = f"plain torch{', compiled' if compiled else ''}: {kind} {how}, average by parameter"

    def step(self) -> None:
        self.loop.step(self.setting.latents, self.setting.label, self.micro)

    def close(self) -> None:
        """Nothing to do: nobody else knows of it."""


class OurStep:
    """Our step: on an engine of a ZeRO stage, or without DeepSpeed (None), there by choice as a CUDA graph."""

    def __init__(self, setting: Setting, micro: int, stage: Stage | None, graph: bool = False):
        self.setting, self.micro, self.number = setting, micro, 0
        self.engine = _engine(setting, micro, stage)
        self.about = self.engine.about
        self.ema = Ema(self.engine, EmaConfig(warmup=True))
        norm = LatentNorm(mean=(0.0,) * CHANNELS, std=(1.0,) * CHANNELS)
        self.task = LatentTask(
            Objective(), norm, LABEL_DROP, has_unit_variance=True, compiled=setting.cfg.compile
        )
        self.graph = None
        if graph and isinstance(self.engine, PlainEngine):
            self.graph = StepGraph(self.task, self.engine, micro, None)
            self.about += ", a CUDA graph a step"
        self.meters = Meters(setting.device)
        slots = torch.arange(setting.cfg.batch) + setting.world.rank * setting.cfg.batch
        self.batch = Batch(
            setting.latents.unsqueeze(1), setting.label, slots, torch.zeros_like(slots), slots, 0
        )

    def step(self) -> None:
        """What Loop.train_step does."""
        draws = Draws(0, self.number, self.batch.slots, self.setting.cfg.batch * self.setting.world.size)
        samples, fingerprints = batch_samples(self.batch, self.task, draws, self.engine.device)
        if self.graph is not None:
            losses, applied = self.graph(samples, OptimConfig().lr)
        else:
            losses = passes(self.task, self.engine, samples, self.micro, None)
            applied = self.engine.step(OptimConfig().lr)
        if applied:
            self.ema.update()
        self.meters.add_step(losses, fingerprints)
        self.number += 1

    def close(self) -> None:
        if self.graph is not None:
            self.graph.close()
        self.engine.close()


class BareStep:
    """Forward and backward pass of a network alone, in plain torch: the mean square of what it says."""

    def __init__(self, setting: Setting, micro: int, is_ours: bool):
        self.setting, self.micro = setting, micro
        make = setting.ours if is_ours else setting.plain
        self.model: Any = make()
        if setting.cfg.compile and not is_ours:  # of ours the blocks are
            self.model.compile()
        self.about = "plain torch, nothing updated"
        self.is_ours = is_ours
        self.autocast = torch.autocast(
            setting.device.type, torch.bfloat16, enabled=setting.cfg.precision == "bf16"
        )

    def step(self) -> None:
        setting = self.setting
        for p in self.model.parameters():
            p.grad = None
        for x, label in zip(setting.latents.split(self.micro), setting.label.split(self.micro), strict=True):
            t = torch.full((len(x),), 500.0, device=setting.device)
            condition: Any = {"label": label} if self.is_ours else label
            with self.autocast:
                out: Tensor = self.model(x, t, condition)
            out.square().mean().backward()

    def close(self) -> None:
        """Nothing to do: nobody else knows of it."""


def _engine(setting: Setting, micro: int, stage: Stage | None) -> Engine:
    cfg, module = setting.cfg, setting.ours()
    many = cfg.batch // micro
    if stage is None:
        return LocalEngine(module, OptimConfig(), setting.world, accumulation=many, precision=cfg.precision)
    from dit.train.engines.zero_engine import DeepSpeedEngine  # takes seconds to import

    return DeepSpeedEngine(
        module,
        OptimConfig(),
        setting.world,
        zero=ZeroConfig(stage=stage, offload=setting.offload),
        global_batch=cfg.batch * setting.world.size,
        accumulation=many,
        precision=cfg.precision,
        leaf_modules=tuple({type(block) for block in module.blocks}),
    )
