"""Arguments of the library's functions: what may be given for how to draw, and how much, and what is said otherwise."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypedDict

from pydantic import Field

from dit.config import ConfigError, config, did_you_mean, from_dict, merge, to_dict
from dit.sample.drawing import default_batch
from dit.sample.generate import SamplerSpec
from dit.sample.grid import Grid
from dit.sample.guide import Guidance
from dit.sample.solve import Solver

Choice = str | Mapping[str, Any]  # a name, or {"name": ..., field: value}, as in a configuration file


def check_arguments(function: Callable[..., Any], options: type, given: Iterable[str]) -> None:
    """ConfigError for a keyword that is neither the function's own nor a field of the config class that takes the rest.

    The class by itself would look for what was meant among its own fields alone.
    """
    fields = [f.name for f in dataclasses.fields(options)]
    own = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is not p.VAR_KEYWORD and p.name != "self"
    ]
    for name in given:
        if name not in fields:
            raise ConfigError(f"{name}: unknown argument{did_you_mean(name, [*own, *fields])}")


class HowToDraw(TypedDict, total=False):
    """The fields of SamplerSpec, each with its default there: what decides about images besides the weights."""

    solver: Choice | Solver
    num_steps: int
    grid: Choice | Grid
    cfg_scale: float
    seed: int
    guidance: Choice | Guidance | Sequence[Choice | Guidance]


@config
class Amount:
    """How much is drawn."""

    num_samples: Annotated[int, Field(ge=1)]  # images in all
    batch_size: Annotated[int, Field(ge=1)] = 1  # images at a time


def amount_of(num_samples: int, batch_size: int | None) -> Amount:
    """How many in all, and at a time. ConfigError for what is no number from 1 on."""
    count = from_dict(Amount, {"num_samples": num_samples}).num_samples
    size = default_batch(count) if batch_size is None else batch_size
    return from_dict(Amount, {"num_samples": count, "batch_size": size})


def spec_of(how: Mapping[str, Any], shift: float | None) -> SamplerSpec:
    """The spec of what was given. ConfigError for what is none, and for a shift that is given twice."""
    values = dict(how)
    if shift is not None:
        grid = values.get("grid", SamplerSpec().grid)
        if isinstance(grid, Mapping) and "shift" in grid:
            raise ConfigError("shift is given twice: by itself and in grid; leave one of them out")
        values["grid"] = merge(to_dict(grid), {"shift": shift})
    return from_dict(SamplerSpec, values)
