"""What a visitor of the page may ask for, checked: what cannot be is an error in words for the page."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from dit.config import ConfigError, config, from_dict
from dit.experiments.trained import Trained
from dit.sample.generate import SamplerSpec
from dit.sample.grid import GRIDS
from dit.sample.solve import SOLVERS

EVERY = "all"  # the classes in turn
NO_CLASS = "-1"


@config
class Limits:
    """What one visitor may have of the machine."""

    max_images: Annotated[int, Field(ge=1)] = 16  # most images of one drawing
    max_steps: Annotated[int, Field(ge=1)] = 250  # most steps of the solver
    max_seconds: Annotated[float, Field(gt=0)] = 120.0  # after which a drawing is given up
    max_waiting: Annotated[int, Field(ge=1)] = (
        32  # drawings that may wait; whoever comes then is told to come later
    )
    frames: Annotated[int, Field(ge=0)] = 16  # pictures of the way from noise, at most; 0 = none


@config
class Setting:
    """One drawing as the page asks for it."""

    classes: str = EVERY  # a class's number as text, NO_CLASS, or EVERY
    scale: float = 1.0  # of the guidance; 1 is none
    interval_from: Annotated[float, Field(ge=0, le=1)] = 0.0  # time at which guidance ends, near the image
    interval_to: Annotated[float, Field(ge=0, le=1)] = 1.0  # time at which it begins, near the noise
    solver: str = "heun"  # name of the method that steps
    grid: str = "uniform"  # name of the spacing of times
    steps: Annotated[int, Field(ge=1)] = 50  # steps of the solver
    seed: Annotated[int, Field(ge=0)] = 0  # of the noise; each image has its own
    images: Annotated[int, Field(ge=1)] = 8  # images in the grid

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise ConfigError(f"scale: expected a number of 0 or more (1 is no guidance), got {self.scale:g}")
        if not self.interval_from < self.interval_to:
            raise ConfigError(
                f"interval: expected times from < to, 0 being the image and 1 the noise, got {self.interval_from:g} to "
                f"{self.interval_to:g}"
            )

    @property
    def is_everywhere(self) -> bool:
        """Whether guidance holds at all times."""
        return (self.interval_from, self.interval_to) == (0.0, 1.0)

    def check(self, limits: Limits) -> None:
        """ConfigError for more than the limits allow."""
        for name, asked, most in (
            ("images", self.images, limits.max_images),
            ("steps", self.steps, limits.max_steps),
        ):
            if asked > most:
                raise ConfigError(f"{name}: at most {most} here, got {asked} (--max_{name} of the page)")

    def spec(self) -> SamplerSpec:
        """The sampler's spec. ConfigError for what is none."""
        values: dict[str, Any] = {
            "solver": self.solver,
            "grid": self.grid,
            "num_steps": self.steps,
            "seed": self.seed,
        }
        if self.is_everywhere or self.scale == 1.0:
            return from_dict(SamplerSpec, {**values, "cfg_scale": self.scale})
        interval = [self.interval_from, self.interval_to]
        guidance = {"name": "cfg", "scale": self.scale, "interval": interval}
        return from_dict(SamplerSpec, {**values, "guidance": [guidance]})


def class_choices(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """(what is shown, `Setting.classes`) of each choice; a name that several classes have is shown with its number."""
    shown = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    every = [("every class in turn", EVERY)] if names else []
    return [*every, *((text, str(number)) for number, text in enumerate(shown)), ("no class", NO_CLASS)]


def fitting(trained: Trained) -> tuple[list[str], list[str]]:
    """The solvers and the grids that can draw from this model, by name, the other choices being as they are."""
    objective = trained.experiment.objective
    fit: tuple[list[str], list[str]] = [], []
    for key, registry, names in (("solver", SOLVERS, fit[0]), ("grid", GRIDS, fit[1])):
        for name, _ in registry.items():
            try:
                spec = from_dict(SamplerSpec, {key: name})
                spec.check(objective.path, objective.prediction, trained.experiment.model.learn_sigma)
            except ConfigError:
                continue
            names.append(name)
    return fit
