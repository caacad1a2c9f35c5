"""The fields of a config class as flags of a command, so that no command restates the options it hands on.

    @options_as_flags
    def index(path: str, out: str, *, codec: str, options: IndexOptions) -> None: ...

takes --array, --scale and so on, with the types, defaults and comments of IndexOptions' fields.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from dit.commandline.helptext import describe
from dit.config import from_dict

Command = Callable[..., Any]


def options_as_flags(function: Command) -> Command:
    """Wrap a function: each parameter whose type is a config class is built from keywords named like its fields.

    A field that the function has a parameter for itself is left to it. The wrapper's signature has the fields in the
    place of the class, each with the comment beside it, and raises ConfigError for what the class refuses.
    """
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    classes = {n: hints[n] for n in signature.parameters if dataclasses.is_dataclass(hints.get(n))}

    def own(cls: Any) -> list[dataclasses.Field[Any]]:
        return [f for f in dataclasses.fields(cls) if f.name not in signature.parameters]

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> Any:
        built = {}
        for name, cls in classes.items():
            values = {f.name: given.pop(f.name) for f in own(cls) if f.name in given}
            built[name] = from_dict(cls, values)
        return function(*args, **given, **built)

    def parameters() -> Iterator[inspect.Parameter]:
        for parameter in signature.parameters.values():
            if parameter.name not in classes:
                yield parameter
                continue
            for field in own(classes[parameter.name]):
                yield inspect.Parameter(field.name, parameter.kind, default=_default(field))

    types = {name: hint for name, hint in hints.items() if name not in classes}
    for cls in classes.values():
        plain = typing.get_type_hints(cls)  # from_dict checks the rest
        notes = {f.name: describe(cls, f.name) for f in own(cls)}
        types |= {name: Annotated[plain[name], note] if note else plain[name] for name, note in notes.items()}
    command.__annotations__ = types
    command.__signature__ = signature.replace(parameters=list(parameters()))  # type: ignore[attr-defined]
    return command


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
