"""Figures of samples during training: images of fixed noise and labels from the average, beside real ones.

They change nothing of the run: the weights come back bit for bit, and no draw of training's is taken.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from dit.config import to_dict
from dit.data import DataError
from dit.data.codecs.norm import LatentNorm
from dit.data.shards.manifest import Manifest
from dit.errors import Notice, UserError
from dit.evals import record
from dit.evals.evaluation import Compared, InSpace, in_space
from dit.evals.extraction import Kept, Pass, collect
from dit.evals.order import Order
from dit.evals.pictures.pictures import Pictures
from dit.evals.sides import Sides
from dit.experiments.against import Against
from dit.experiments.diffusion import EvaluateConfig, Experiment
from dit.experiments.drawer import Blocks, Drawer
from dit.progress import Bar, say
from dit.ranks import group
from dit.ranks.group import World
from dit.train.ema import Average, Ema
from dit.train.engines.base import Engine
from dit.train.hooks import Hook
from dit.train.meters import RunLog
from dit.version import code_version

FOLDER = "evaluation"  # in the run directory: statistics of reference images, each computed once
DRAWN = "drawn in training"  # what the images are called in messages and records


@dataclass(frozen=True)
class Drawn(Pictures):
    """Images that were drawn and measured block by block: none is kept."""

    count: int = 0

    def __len__(self) -> int:
        return self.count


@dataclass
class SampleFigures:
    """Draws images with the average and measures them; where that fails a Notice says so, and the run goes on.

    last: the step at which training ends, whose figures are never put off. about: their cost, in words. record: of
    tools/sample.py, so that its images are described alike. clock: seconds, of rank 0 alone.
    """

    cfg: EvaluateConfig
    drawer: Drawer
    against: Against
    last: int
    record: Mapping[str, Any]
    about: str = ""
    clock: Callable[[], float] = time.monotonic
    spent: float = 0.0
    begun: float = field(init=False)
    every: int = field(init=False)
    name: ClassVar[str] = "figures"

    def __post_init__(self) -> None:
        self.begun, self.every = self.clock(), self.cfg.every

    def __call__(self, step: int, engine: Engine, ema: Ema, log: RunLog) -> None:
        if group.on_main(lambda: self._is_put_off(step)):
            return
        used, began = ema.for_use(), self.clock()
        try:
            with _own_draws(engine.device):
                found, content = self._measured(engine, ema)
        except (
            UserError,
            np.linalg.LinAlgError,
        ) as error:  # the same of all ranks, after all they do together
            if engine.world.is_main:
                text = f"no figures of step {step}: {error}. The run goes on"
                warnings.warn(text, Notice, stacklevel=2)
            return
        finally:
            self.spent += self.clock() - began
        log.evaluated(step, self._rows(step, used, found, content))
        if engine.world.is_main:
            say(f"step {step}: {_told(found)} of {used}, {self.cfg.num_samples:,} samples")

    def _is_put_off(self, step: int) -> bool:
        """Whether figures have had more than their share of the time; it is said then. Called on rank 0."""
        share = self.spent / max(1e-9, self.clock() - self.begun)
        if step >= self.last or share <= self.cfg.max_share:
            return False
        say(
            f"step {step}: figures put off: they took {share:.1%} of the time since the start, more than "
            f"evaluate.max_share = {self.cfg.max_share:.3g}"
        )
        return True

    def _measured(self, engine: Engine, ema: Ema) -> tuple[list[InSpace], str]:
        """The figures in each space, on rank 0, and the hash of the images. Collective."""
        world, count = engine.world, self.cfg.num_samples
        sides = self.against.sides(world)
        sinks = {name: Kept(count) for name in sides}
        networks = {name: side.network for name, side in sides.items()}
        with (
            Bar[None](
                total=count, unit="image", desc="figures", hidden=not world.is_main, leave=False, delay=2
            ) as bar,
            ema.swapped_in(),
            torch.no_grad(),
        ):
            blocks = Blocks(self.drawer, engine, count, self.cfg.batch_size)
            how = Pass(self.cfg.batch_size)
            seen = collect(blocks.give, blocks.rounds, networks, sinks, how, world, bar)
        return group.on_main(lambda: self._figures(sides, sinks) if world.is_main else []), seen.content

    def _figures(self, sides: Mapping[str, Sides], sinks: Mapping[str, Kept]) -> list[InSpace]:
        """What is computed of the features. DataError for figures that are none."""
        labels = self.drawer.labels(torch.arange(self.cfg.num_samples)).numpy()
        held = None if labels[0] < 0 else labels
        drawn = Drawn(DRAWN, self.against.size, held, {}, spec=self.record, count=len(labels))
        index = np.arange(self.cfg.num_samples)
        order = Order(drawn.named, str(self.cfg.reference), self.cfg.features, self.against.options)
        found = [
            in_space(name, Compared(drawn, index, sinks[name].set(drawn.named), side), order)
            for name, side in sides.items()
        ]
        for space in found:
            for name, value in space.figures.items():
                if not math.isfinite(value):
                    raise DataError(f"{name} in {space.name} is {value}")
        return found

    def _rows(self, step: int, used: Average, found: Sequence[InSpace], content: str) -> list[dict[str, Any]]:
        """Rows of evaluations.jsonl. No digest: of the weights of this step no checkpoint need have been kept."""
        beside = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "by": record.TRAINING,
            "step": step,
            **used.row,
            "samples": {"named": DRAWN, "content": content},
            **record.drawn_by(self.record),
            "code": code_version(),
            "bootstrap": None,
        }
        return [{**beside, **space.as_json()} for space in found]


def _told(found: Sequence[InSpace]) -> str:
    """The figures, in a line."""
    texts = (
        f"{', '.join(f'{name} {value:.4g}' for name, value in space.figures.items())} in {space.name}"
        for space in found
    )
    return "; ".join(texts)


@contextlib.contextmanager
def _own_draws(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside from torch's own generators, which building a network does, is not missing outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def figures_hook(cfg: Experiment, manifest: Manifest, norm: LatentNorm, world: World) -> list[Hook]:
    """The figures of samples, if evaluate.every asks for them. Raises as `Against.open` and `Drawer.of`."""
    if not cfg.evaluate.every:
        return []
    wanted, side = cfg.evaluate, manifest.image_size
    with _own_draws(world.device):
        drawer = Drawer.of(cfg, wanted.spec, manifest, norm, world)
        against = Against.open(wanted, (side, side), cfg.folder / FOLDER, world.device)
    each = drawer.evaluations()
    how = {
        "sampler": to_dict(wanted.spec), "precision": cfg.train.precision, "classes": drawer.classes, record.COST: each,
    }  # fmt: skip
    about = _cost(cfg, manifest, each)
    return [SampleFigures(wanted, drawer, against, cfg.train.steps, how, about)]


def costs_of(hooks: Sequence[Hook]) -> dict[str, str]:
    """The row of the start's summary that tells what figures of samples cost, where there are any."""
    told = [hook.about for hook in hooks if isinstance(hook, SampleFigures)]
    return {"figures": told[0]} if told else {}


def _cost(cfg: Experiment, manifest: Manifest, each: float | None) -> str:
    wanted, cost = cfg.evaluate, cfg.cost(manifest)
    limit = f"put off while they have more than {wanted.max_share:.0%} of the run's time"
    if each is None:
        return f"{wanted.num_samples:,} images by a solver that chooses its steps, each time; {limit}"
    total = wanted.num_samples * each
    share = total * cost.forward_flops / (wanted.every * cfg.train.global_batch * cost.training_flops)
    return (
        f"{wanted.num_samples:,} images x {each:.4g} = {total:,.0f} evaluations each time, {share:.2g} of the FLOPs of "
        f"the {wanted.every:,} steps between (decoding, features not counted); {limit}"
    )
