"""One model at several widths: as deep, with heads as wide, in one parametrization or another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dit.config import ConfigError
from dit.model.dit import DiTConfig
from dit.model.parametrization import PARAMETRIZATIONS, MuP, Parametrization


def at_width(model: DiTConfig, width: int) -> DiTConfig:
    """Give the model at another width, with as many blocks, and heads as wide as its own.

    ConfigError where the heads' width does not divide it.
    """
    dims = model.dims(model.patch, 1, 0)
    if width % dims.head_width or width < 1:
        raise ConfigError(
            f"width {width} is no multiple of {dims.head_width}, the width of the model's heads (width {dims.width} / "
            f"{dims.heads} heads), which is kept"
        )
    return replace(model, size=None, width=width, depth=dims.depth, heads=width // dims.head_width)


def parametrized(model: DiTConfig, name: str, base_width: int) -> Parametrization:
    """Give a parametrization by its name: the model's own where it is that one, or μP from `base_width`."""
    if name not in PARAMETRIZATIONS:
        PARAMETRIZATIONS[name]  # says which there are
    if PARAMETRIZATIONS.name_of(model.parametrization) == name:
        return model.parametrization
    return MuP(base_width=base_width) if PARAMETRIZATIONS[name] is MuP else PARAMETRIZATIONS[name]()


def base_of(model: DiTConfig, widths: Sequence[int], given: int | None) -> int:
    """Give the base width of μP: the one given, the model's own, or the least of the widths.

    ConfigError where the one given is not the model's own.
    """
    own = model.parametrization.base_width if isinstance(model.parametrization, MuP) else None
    if given is not None and own not in (None, given):
        raise ConfigError(
            f"base_width {given} is not the configuration's model.parametrization.base_width = {own}: leave one out"
        )
    return given or own or min(widths)


def checked_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Give widths in order; ConfigError for fewer than two."""
    found = tuple(sorted(set(widths)))
    if len(found) < 2:
        raise ConfigError(f"two or more widths are compared, got {list(widths)}")
    return found
