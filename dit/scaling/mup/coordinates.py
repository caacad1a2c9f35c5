"""The coordinate check: how large every layer's activations are against the width, after a few steps of training.

By maximal updates (`model.parametrization: mup`) activations and their changes are as large at any width; in the
standard parametrization changes grow with it (arXiv 2203.03466, figure 5 and appendix D.1). Whatever is scaled wrongly
shows here as a line that is not flat, in seconds and before any long run.

What starts at zero (the last layer, the modulations) has activations of zero before the first step, and what stands
behind a gate of zero no gradient until that has opened: a layer's change counts from the step on where there is one.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dit.config import ConfigError, config
from dit.data.codecs.norm import LatentNorm
from dit.data.loading.stream import Stream
from dit.experiments.diffusion import Experiment
from dit.flow.objective import Objective
from dit.model.dit import DiTConfig
from dit.progress import Bar
from dit.ranks.group import World
from dit.rng import Draws
from dit.scaling.mup.widths import at_width, base_of, checked_widths, parametrized
from dit.train.engines.local import LocalEngine
from dit.train.optim import ConstantRate, OptimConfig
from dit.train.task import LatentTask, Samples, Task, batch_samples, synthetic_samples

FLAT, GROWS = 0.2, 0.4  # slopes up to which a layer is flat, and from which on it grows
SHAPE, CLASSES = (4, 8, 8), 10  # of the made-up latents: (C, H, W)


@config
class Check:
    """What is measured."""

    widths: tuple[int, ...] = (64, 128, 256, 512)  # of the model; its heads stay as wide, its depth as it is
    steps: tuple[int, ...] = (1, 2, 4)  # of training, after which activations are looked at
    seeds: tuple[int, ...] = (0, 1, 2)  # of the initial weights
    parametrizations: tuple[str, ...] = ("standard", "mup")  # that are compared
    base_width: Annotated[int, Field(ge=4)] | None = None  # of mup; null = the configuration's, or the least
    batch: Annotated[int, Field(ge=1)] = 16  # samples, the same at every step, width and seed
    lr: Annotated[float, Field(gt=0)] | None = None  # at every step; null = the configuration's, or 0.003

    def __post_init__(self) -> None:
        checked_widths(self.widths)
        if not self.steps or min(self.steps) < 1 or not self.seeds or not self.parametrizations:
            raise ConfigError(
                f"expected steps of 1 or more, and seeds and parametrizations, got steps {list(self.steps)}, "
                f"seeds {list(self.seeds)}, parametrizations {list(self.parametrizations)}"
            )


@dataclass(frozen=True)
class Setting:
    """What is trained, and on which samples."""

    model: DiTConfig
    optim: OptimConfig
    task: Task
    samples: Samples
    shape: tuple[int, int, int]  # (C, H, W) of a latent
    classes: int
    world: World
    data: str  # what the samples are of

    @staticmethod
    def synthetic(check: Check) -> Setting:
        """Give a nano DiT on normal random latents."""
        world = World.from_env()
        norm = LatentNorm(mean=(0.0,) * SHAPE[0], std=(1.0,) * SHAPE[0])
        task = LatentTask(Objective(), norm, label_drop=0.1, has_unit_variance=True)
        samples = synthetic_samples((1, *SHAPE), CLASSES, world.device, check.batch)
        optim = OptimConfig(lr=check.lr or 0.003)
        return Setting(
            DiTConfig(size="nano"), optim, task.uncoupled(), samples, SHAPE, CLASSES, world, "random"
        )

    @staticmethod
    def of(cfg: Experiment, check: Check) -> Setting:
        """Give a configuration's model, objective and optimizer, and the first batch of its data.

        DataError and ConfigError as its training has them.
        """
        world, mixture = World.from_env(), cfg.data.open()
        manifest = mixture.manifest
        task = cfg.task(manifest, world).uncoupled()
        with contextlib.closing(
            Stream(mixture, cfg.seed, check.batch, lanes=cfg.data.lanes, window=1)
        ) as stream:
            stored = stream.batch(0)
        samples, _ = batch_samples(stored, task, Draws(cfg.seed, 0, stored.slots, check.batch), world.device)
        optim = replace(cfg.optim, lr=check.lr or cfg.optim.lr, warmup=0, schedule=ConstantRate())
        shape = (manifest.channels, *manifest.input_size)
        return Setting(cfg.model, optim, task, samples, shape, len(manifest.classes), world, manifest.digest)


@dataclass(frozen=True)
class Size:
    """How large one kind of layer's activations are: root mean squares over samples, tokens, channels and blocks."""

    parametrization: str
    width: int
    seed: int
    step: int
    layer: str  # as its module is named, with * for the number of the block
    rms: float
    change: float  # the same of the difference from before the first step


@dataclass(frozen=True)
class Slope:
    """How the change of a kind of layer goes with the width: as width to the power of `change`."""

    parametrization: str
    layer: str
    step: int
    change: float | None  # None where it is zero at some width
    rms: float | None  # of the activations themselves


@dataclass(frozen=True)
class Coordinates:
    """What was measured, and the slopes of log(mean over seeds) over log(width), by least squares."""

    check: Check
    sizes: Sequence[Size] = field(repr=False)

    @property
    def slopes(self) -> list[Slope]:
        """One for each parametrization, layer and step."""
        keys = dict.fromkeys((s.parametrization, s.layer, s.step) for s in self.sizes)
        found = []
        for key in keys:
            own = [s for s in self.sizes if (s.parametrization, s.layer, s.step) == key]
            change, rms = (slope_of([(s.width, getattr(s, name)) for s in own]) for name in ("change", "rms"))
            found.append(Slope(*key, change, rms))
        return found

    def steepest(self, parametrization: str, step: int | None = None) -> Slope:
        """Give the layer whose change depends most on the width, after a step (None: the last).

        ConfigError where nothing changed at all.
        """
        at = max(self.check.steps) if step is None else step
        own = [
            s
            for s in self.slopes
            if (s.parametrization, s.step) == (parametrization, at) and s.change is not None
        ]
        if not own:
            raise ConfigError(
                f"after {at} steps no activation has changed at every width: raise lr, or steps"
            )
        return max(own, key=lambda slope: abs(slope.change or 0.0))

    def verdict(self, parametrization: str) -> str:
        """Say whether changes are as large at any width after the last step."""
        top = self.steepest(parametrization)
        slope = top.change or 0.0
        kind = (
            "flat"
            if abs(slope) <= FLAT
            else "growing"
            if slope >= GROWS
            else "neither flat nor clearly growing"
        )
        return (
            f"{parametrization}: {kind}; farthest from flat after {top.step} steps is {top.layer}, "
            f"whose change goes as width^{slope:+.2f}"
        )


def slope_of(points: Iterable[tuple[int, float]]) -> float | None:
    """Fit log y = slope · log x + c to the mean y at each x; None where one is 0 or no finite number."""
    by_x: dict[int, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    means = {x: float(np.mean(ys)) for x, ys in by_x.items()}
    if len(means) < 2 or not all(0 < y < math.inf for y in means.values()):
        return None
    return float(np.polyfit(np.log(list(means)), np.log(list(means.values())), 1)[0])


def measure(setting: Setting, check: Check) -> Coordinates:
    """Train at every width, seed and parametrization for a few steps, and look at all activations.

    ConfigError where a width does not go with the model.
    """
    widths = checked_widths(check.widths)
    base = base_of(setting.model, widths, check.base_width)
    cells = [
        (name, width, seed) for name in check.parametrizations for width in widths for seed in check.seeds
    ]
    models = {
        (name, width): at_width(
            replace(setting.model, parametrization=parametrized(setting.model, name, base)), width
        )
        for name in check.parametrizations
        for width in widths
    }
    channels, height, breadth = setting.shape
    sizes: list[Size] = []
    with Bar[None](total=len(cells), unit="model", desc="coordinates") as bar:
        for name, width, seed in cells:
            torch.manual_seed(seed)
            module = models[name, width].build((height, breadth), channels, setting.classes)
            for step, found in _trained(module, setting, check.steps):
                sizes += [Size(name, width, seed, step, layer, *both) for layer, both in found.items()]
            bar.update()
    return Coordinates(check, sizes)


def _trained(
    module: nn.Module, setting: Setting, steps: Sequence[int]
) -> Iterator[tuple[int, dict[str, tuple[float, float]]]]:
    """After each of `steps`, by kind of layer: root mean squares of activations, and of what they have changed by."""
    engine = LocalEngine(module, setting.optim, setting.world)
    first = _activations(engine, setting)
    for step in range(1, max(steps) + 1):
        engine.backward(setting.task.loss(engine, setting.samples).mean)
        engine.step(setting.optim.lr)
        if step in steps:
            yield step, _sizes(_activations(engine, setting), first)


class _Hooked(Protocol):
    def remove(self) -> None: ...


@torch.no_grad()
def _activations(engine: LocalEngine, setting: Setting) -> dict[str, Tensor]:
    """What linear layers, embeddings and blocks give out for the samples, by the module's name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Tensor | tuple[Tensor, ...]) -> None:
            tokens = out[0] if isinstance(out, tuple) else out  # a block may hand on more than its tokens
            found[name] = tokens.detach().float()

        return hook

    hooks: list[_Hooked] = [
        module.register_forward_hook(keep(name))
        for name, module in engine.module.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) or re.fullmatch(r"(output\.)?blocks\.\d+", name)
    ]
    try:
        setting.task.loss(engine, setting.samples)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _sizes(now: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Root mean squares by kind of layer, of activations and of their differences from the first ones."""
    squares: dict[str, list[tuple[float, float]]] = {}
    for name, there in now.items():
        kind = re.sub(r"\.\d+", ".*", name)
        squares.setdefault(kind, []).append(
            (float(there.square().mean()), float((there - first[name]).square().mean()))
        )
    return {
        kind: (math.sqrt(np.mean([a for a, _ in own])), math.sqrt(np.mean([b for _, b in own])))
        for kind, own in squares.items()
    }
