"""Arguments of the library's functions that are fields of a config class: a mistyped name is told all there are."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from dit.config import ConfigError, did_you_mean


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
