"""A drawing for the page: the sampler's images, pictures of the way to them, and the command that draws them again."""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dit.errors import Notice, UserError
from dit.experiments.drawing import check_labelled, spec_flags
from dit.experiments.loaded import TrainedModel
from dit.flow.predict import Cond, Model
from dit.sample.drawing import warn_if_far
from dit.sample.generate import Sampler, SamplerSpec, image_grid, labels_for
from dit.sample.trajectory import Frame, pictured, spaced, trajectory
from dit.serving.setting import Limits, Setting

COLUMNS = 8
Tell = Callable[[float], object]  # told the share of the work that is done, in [0, 1]


class TooLong(UserError):
    """A drawing that took all the time that a visitor may have."""


@dataclass(frozen=True)
class Drawn:
    """grid: uint8 (H, W, 3), the images row by row. way: pictures from noise to them, with captions. about: text."""

    grid: np.ndarray
    way: list[tuple[np.ndarray, str]]
    about: str


@dataclass
class _Clock:
    """Counts the network's evaluations, and gives a drawing up that takes too long."""

    limits: Limits
    tell: Tell
    expected: int | None
    done: int = 0
    start: float = field(default_factory=time.monotonic)

    def watch(self, model: Model) -> Model:
        """The same network, which looks at the clock first."""

        def network(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
            self.look()
            self.done += 1
            if self.expected:
                self.tell(min(1.0, self.done / self.expected))
            return model(x, model_time, cond)

        return network

    def look(self) -> None:
        """Raise TooLong where the time is up."""
        if time.monotonic() - self.start > self.limits.max_seconds:
            raise TooLong(
                f"given up after {self.limits.max_seconds:g} s (--max_seconds of the page): take fewer images or "
                "steps, or another solver"
            )


def draw(model: TrainedModel, setting: Setting, limits: Limits, tell: Tell = lambda share: None) -> Drawn:
    """Draw what a setting asks for, all its images in one batch.

    The images are those of `model.sample(images, classes, batch_size=images, ...)` to the bit. Solvers that choose
    their own steps have no pictures of the way. Raises UserError for what cannot be drawn, and for what takes too long.
    """
    setting.check(limits)
    spec, chosen = setting.spec(), model.trained.classes(setting.classes)
    check_labelled(spec, chosen, model.trained)
    plain = model.trained.sampler(spec, model.codec, model.device, model.precision)
    clock = _Clock(limits, tell, plain.nfe)
    sampler = replace(plain, model=clock.watch(plain.model))
    index = torch.arange(setting.images)
    label = labels_for(index, chosen)
    way: list[Frame] = []
    if limits.frames and plain.nfe is not None:
        way = trajectory(sampler, index, label)
        latents = way[-1].x
    else:
        latents = sampler.latents(index, label)
    images = sampler.pictures(latents, index, label)
    about = "\n".join([command(model, setting, spec), *_notes(latents)])
    columns = min(COLUMNS, setting.images)
    return Drawn(image_grid(images, columns), _pictures(way, limits.frames, sampler, clock), about)


def _pictures(way: list[Frame], most: int, sampler: Sampler, clock: _Clock) -> list[tuple[np.ndarray, str]]:
    """At most so many frames as pictures, with the time that each shows."""
    pictures = []
    for number in spaced(len(way), most):
        clock.look()
        pictures.append((pictured(way[number], sampler), f"t = {way[number].t:.3f}"))
    return pictures


def _notes(latents: Tensor) -> list[str]:
    """What a command would warn of."""
    with warnings.catch_warnings(record=True, category=Notice) as caught:
        warnings.simplefilter("always", Notice)
        warn_if_far(float(latents.abs().max()))
    return [f"warning: {notice.message}" for notice in caught]


def command(model: TrainedModel, setting: Setting, spec: SamplerSpec) -> str:
    """The command that draws the same images. RUN is the run, whose place on the machine is nobody's business."""
    own = {
        "classes": setting.classes,
        "num_samples": setting.images,
        "batch_size": setting.images,
        "seed": setting.seed,
        "weights": model.trained.weights,
        "precision": model.precision,
    }
    words = [f"--{name}={value}" for name, value in own.items()]
    words += shlex.split(" ".join(spec_flags(spec).values()))
    return shlex.join(["python", "tools/sample.py", "RUN", "--out=FOLDER", *words])
