"""What a sweep goes through: weights, guidance, solvers, steps and seeds, and how many steps a budget allows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any

from pydantic import Field

from dit.config import ConfigError, config, to_dict
from dit.sample.generate import Sampler, SamplerSpec
from dit.sample.grid import GRIDS, Grid, UniformGrid
from dit.sample.guide import GUIDANCES, ClassifierFree
from dit.sample.solve import SOLVERS, Heun, Solver

ALWAYS = (0.0, 1.0)  # the interval that holds all times
PLAIN = "cfg"  # the guidance that cfg_scale is short for


@config
class Axes:
    """The values of each axis. A scale of 1 is no guidance, so that intervals make no difference to it."""

    weights: tuple[str, ...] = ("ema",)  # ema, model, or other averages, as ema_0.999
    cfg_scale: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)  # of guidance; 1 = none
    interval: tuple[tuple[float, float], ...] = (ALWAYS,)  # of t, in which there is guidance
    guidance: tuple[str, ...] = (PLAIN,)  # cfg, cfg_zero: what scale and interval are of
    solver: tuple[Annotated[Solver, SOLVERS], ...] = (Heun(),)  # how steps are taken
    num_steps: tuple[Annotated[int, Field(ge=1)], ...] = (50,)  # of the solver
    nfe: tuple[Annotated[int, Field(ge=1)], ...] = ()  # evaluations an image, in place of steps
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)  # of the noise
    grid: Annotated[Grid, GRIDS] = UniformGrid()  # which times are visited

    def __post_init__(self) -> None:
        for axis in dataclasses.fields(self):
            values = getattr(self, axis.name)
            if not isinstance(values, tuple):
                continue
            if not values and axis.name != "nfe":
                raise ConfigError(f"{axis.name} has no value")
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ConfigError(f"{axis.name} has {twice[0]} twice")
        for interval in self.interval:
            ClassifierFree(scale=2.0, interval=interval)  # which checks it
        for name in self.guidance:
            guidance_class(name)

    def settings(self) -> Iterator[Setting]:
        """Every point but for the seed."""
        guided = list(product(self.interval, self.guidance))
        ways = [(s, *way) for s in self.cfg_scale for way in (guided if s != 1.0 else [(ALWAYS, PLAIN)])]
        budgets = self.nfe or self.num_steps
        for weights, way, solver, steps in product(self.weights, ways, self.solver, budgets):
            scale, interval, name = way
            yield Setting(weights, scale, interval, solver, steps, bool(self.nfe), name)


def guidance_class(name: str) -> type[ClassifierFree]:
    """The guidance of this name. ConfigError unless it takes a scale and an interval, as cfg does."""
    found = GUIDANCES[name]
    if not issubclass(found, ClassifierFree):
        fit = ", ".join(key for key, cls in GUIDANCES.items() if issubclass(cls, ClassifierFree))
        raise ConfigError(f"guidance {name} does not take a scale and an interval; choices: {fit}")
    return found


def read_intervals(text: str) -> tuple[tuple[float, float], ...]:
    """The intervals in "0:1,0.2:0.7". ConfigError for anything else."""
    try:
        pairs = [word.strip().strip("[]()").split(":") for word in text.split(",")]
        return tuple((float(low), float(high)) for low, high in pairs)
    except ValueError:
        raise ConfigError(
            f"interval: expected LOW:HIGH, such as 0.2:0.7, with commas between several; got {text}"
        ) from None


@dataclass(frozen=True)
class Setting:
    """One point of the axes. steps: the solver's, or (is_budget) evaluations of the guided denoiser an image.

    guidance: the name of what scale and interval are of, its other fields being as they are by default.
    """

    weights: str
    scale: float
    interval: tuple[float, float]
    solver: Solver
    steps: int
    is_budget: bool = False
    guidance: str = PLAIN

    def spec(self, num_steps: int, grid: Grid, seed: int) -> SamplerSpec:
        """What draws it. ConfigError where guidance and solver do not go together."""
        spec = SamplerSpec(solver=self.solver, num_steps=num_steps, grid=grid, seed=seed)
        if self.scale == 1.0 or (self.interval, self.guidance) == (ALWAYS, PLAIN):
            return replace(spec, cfg_scale=self.scale)
        guide = guidance_class(self.guidance)
        return replace(spec, guidance=(guide(scale=self.scale, interval=self.interval),))

    @property
    def words(self) -> dict[str, str]:
        """The values of the axes for a person, by the axes' names; an interval of all times is empty."""
        low, high = self.interval
        return {
            "weights": self.weights,
            "cfg_scale": f"{self.scale:g}",
            "interval": "" if self.scale == 1.0 or self.interval == ALWAYS else f"{low:g}:{high:g}",
            "guidance": "" if self.scale == 1.0 or self.guidance == PLAIN else self.guidance,
            "solver": solver_words(self.solver),
        }


def solver_words(solver: Solver) -> str:
    """A solver's name, and its fields that are not as they are by default."""
    values = to_dict(solver)
    name, defaults = values.pop("name"), to_dict(type(solver)())
    other = [f"{key}={_plain(value)}" for key, value in values.items() if value != defaults[key]]
    return " ".join([name, *other])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def most_steps(sampler: Sampler, budget: int) -> Sampler | None:
    """The sampler with as many steps as `budget` evaluations allow; None where they do not allow one.

    ConfigError for a solver that chooses its own steps.
    """
    best = None
    for num_steps in range(1, budget + 1):
        tried = replace(sampler, spec=replace(sampler.spec, num_steps=num_steps))
        if tried.nfe is None:
            raise ConfigError(
                f"{solver_words(sampler.spec.solver)} chooses its own steps: it cannot be given a budget"
            )
        if tried.nfe <= budget:
            best = tried
    return best
