"""Checked configuration classes: frozen pydantic dataclasses and the registries that are their choices.

An unknown key, a wrong type or an impossible value ends in one `ConfigError` that names each key and the
nearest valid one. `dit/configfile.py` reads them from YAML and the command line.

    @config
    class Linear(Path): ...                    # a stateless component is its own configuration

    PATHS: Registry[Path] = Registry("path")   # an axis of choice
    @PATHS.register("linear")                  # `path: linear` or `path: {name: linear, ...}` in YAML

    cfg = from_dict(Experiment, {"objective": {"path": "linear"}})
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, dataclass_transform

import pydantic
from pydantic_core import core_schema

from dit.errors import UserError, shown
from dit.scalars import Scalar, refusal, typed

NO_TEXT = (
    "expected text, and null (~ alone, or nothing) is none; the home folder is ~/, a file of that name ./null"
)
T = TypeVar("T")
C = TypeVar("C")


@dataclass(frozen=True)
class Complaint:
    """One thing wrong with a configuration: the dotted key's parts and what to say about it."""

    key: tuple[str, ...]
    message: str


class ConfigError(UserError):
    """Bad configuration. `problems` lists every key at fault; the text says what, where and how to mend it."""

    def __init__(self, message: str | None = None, *, problems: list[Complaint] | None = None):
        self.problems = problems if problems is not None else [Complaint((), message or "bad configuration")]
        super().__init__("\n".join(_line(p) for p in self.problems))


def _line(problem: Complaint) -> str:
    return f"{'.'.join(problem.key)}: {problem.message}" if problem.key else problem.message


# --- config classes ----------------------------------------------------------------------------------------


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[C]) -> type[C]:
    """Make `cls` a frozen, keyword-only, hashable pydantic dataclass that forbids unknown keys.

    Numbers may be written as text ("1e-4": scalars.py); truth values are never taken for numbers. A field named
    after a Python keyword is spelled with a trailing underscore (`from_`) and is `from` in YAML. Values that are wrong
    raise ConfigError, however the class is called.
    """
    own = inspect.get_annotations(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    cls.__annotations__ = {name: typed(hints[name]) for name in own}
    settings = pydantic.ConfigDict(
        extra="forbid", alias_generator=_key_of, populate_by_name=True, protected_namespaces=()
    )
    decorate = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=settings)
    return cast(type[C], _in_our_words(decorate(cls)))


def _in_our_words(cls: Any) -> Any:
    """The class, whose `__init__` says what is wrong as a ConfigError: whoever calls it need not know pydantic."""
    plain = cls.__init__

    @functools.wraps(plain)
    def init(self: Any, /, *args: Any, **values: Any) -> None:
        try:
            plain(self, *args, **values)
        except pydantic.ValidationError as error:
            raise ConfigError(problems=[p for e in error.errors() for p in _problems(cls, e)]) from None

    cls.__init__ = init
    return cls


def _key_of(field_name: str) -> str:
    return field_name.rstrip("_")


def _is_config(thing: Any) -> bool:
    return dataclasses.is_dataclass(thing) and hasattr(thing, "__pydantic_config__")


class Registry(Generic[T]):
    """The named choices on one axis. As a field type: `path: Annotated[Path, PATHS] = Linear()`."""

    def __init__(self, axis: str, default: str | None = None, switch: tuple[str, str] | None = None):
        """default: the member that a mapping without a name means.

        switch: the members that `false` and `true` mean, on an axis that was a switch before there was a choice.
        """
        self.axis, self.default, self.switch = axis, default, switch
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[C]], type[C]]:
        """Class decorator: put a `@config` class on this axis under `name`."""

        def add(cls: type[C]) -> type[C]:
            if name in self._classes:
                raise ConfigError(f"{self.axis} '{name}' is registered twice")
            self._classes[name] = cast(type[T], cls)
            cls.registered_name = name  # type: ignore[attr-defined]
            return cls

        return add

    def names(self) -> list[str]:
        """Registered names, in order of registration."""
        return list(self._classes)

    def items(self) -> list[tuple[str, type[T]]]:
        """(name, class) pairs, in order of registration."""
        return list(self._classes.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            raise ConfigError(f"unknown {self.axis} '{name}'{did_you_mean(name, self._classes)}")
        return self._classes[name]

    def name_of(self, instance: T) -> str:
        """The registered name of an instance."""
        return type(instance).registered_name  # type: ignore[attr-defined,no-any-return]

    def parse(self, value: Any) -> T:
        """An instance from an instance, a name, or {"name": name, field: value, ...}."""
        if isinstance(value, tuple(self._classes.values())):
            return cast(T, value)
        if self.switch is not None and str(value).lower() in ("false", "true"):
            value = self.switch[str(value).lower() == "true"]
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping) and self.default is not None:
            value = {"name": self.default, **value}
        if not isinstance(value, Mapping) or "name" not in value:
            raise ConfigError(
                f"expected the name of a {self.axis} or {{name: ..., ...}}, got {shown(value)}; "
                f"choices: {', '.join(self._classes)}"
            )
        fields = {k: v for k, v in value.items() if k != "name"}
        return from_dict(self[str(value["name"])], fields)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)

    def __hash__(self) -> int:
        return id(self)


# --- dictionaries ------------------------------------------------------------------------------------------


def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
    """Build a config class from plain values, or raise one `ConfigError` naming every key at fault."""
    return cls(**values)


def _problems(cls: type, error: Any) -> list[Complaint]:
    """Pydantic's account of one error in our words; errors of nested registry members keep their own keys."""
    loc = tuple(str(part) for part in error["loc"] if not str(part).startswith(("function-", "literal[")))
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return [Complaint(loc + p.key, p.message) for p in cause.problems]
    if error["type"] == "unexpected_keyword_argument":
        return [Complaint(loc, f"unknown key{_nearest_key(cls, loc)}")]
    if error["type"] == "missing":
        return [Complaint(loc, "is required and was not given")]
    if shape := {"dataclass_type": "{}", "tuple_type": "a list, [{}]"}.get(error["type"]):
        expected = shape.format(_syntax(class_at(cls, loc)))
        return [Complaint(loc, f"expected {expected}, got {shown(error['input'])}")]
    if error["type"] == "string_type" and error["input"] is None:
        return [Complaint(loc, NO_TEXT)]
    return [Complaint(loc, f"{refusal(error)}, got {shown(error['input'])}")]


def _syntax(cls: type | None) -> str:
    """How a section is written: {path: ..., ...}, with the keys that it must have, or its first; a value: ..."""
    fields = dataclasses.fields(cls) if cls is not None else ()
    needed = [f for f in fields if f.default is f.default_factory is dataclasses.MISSING] or fields[:1]
    more = ", ..." if len(fields) > len(needed) else ""
    return f"{{{', '.join(f'{_key_of(f.name)}: ...' for f in needed)}{more}}}" if cls is not None else "..."


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of an error message: "; did you mean X?" for the nearest choice, else what is valid."""
    choices = sorted(choices)
    alike = {choice.casefold(): choice for choice in choices}
    if near := difflib.get_close_matches(word.casefold(), alike, n=1, cutoff=0.5):
        return f"; did you mean {alike[near[0]]}?"
    return f"; valid here: {', '.join(choices)}" if choices else ""


def _nearest_key(cls: type, key: tuple[str, ...]) -> str:
    """What an unknown key may have meant: a sibling, else a key of that name elsewhere, else the siblings."""
    parent = class_at(cls, key[:-1]) or cls
    prefix = ".".join(key[:-1])
    siblings = {_key_of(f.name): f"{prefix}.{_key_of(f.name)}".strip(".") for f in dataclasses.fields(parent)}
    elsewhere = {k.rsplit(".", 1)[-1]: k for k in keys_of(cls)}
    for names in (siblings, elsewhere):
        if near := difflib.get_close_matches(key[-1], names, n=1, cutoff=0.6):
            return f"; did you mean {names[near[0]]}?"
    if not siblings:
        return f"; {getattr(parent, 'registered_name', prefix)} has no keys"
    return f"; valid here: {', '.join(siblings)}"


def annotation_at(cls: type, key: str) -> Any:
    for field in dataclasses.fields(cls):
        if _key_of(field.name) == key:
            return typing.get_type_hints(cls, include_extras=True)[field.name]
    return None


def parts_of(hint: Any) -> Iterator[Any]:
    """Every type and every annotation inside a type hint."""
    yield hint
    for arg in [*typing.get_args(hint), *getattr(hint, "__metadata__", ())]:
        if arg is not hint:
            yield from parts_of(arg)


def is_many(hint: Any) -> bool:
    """Whether a type hint is of a list."""
    return any(typing.get_origin(part) in (tuple, list) for part in parts_of(hint))


def one_or_more(value: Any) -> Any:
    """A list of one from a single member, for a BeforeValidator of a list: one alone needs no brackets."""
    return (value,) if isinstance(value, str | Mapping) or _is_config(value) else value


def class_at(cls: type, key: tuple[str, ...], values: Any = None) -> type | None:
    """The config class that holds the keys below `key`; None where a plain value or an open choice stands.

    values: a configuration's plain values, which say what was chosen where there is a choice. Of a list the place of
    an item may stand in the key, and need not.
    """
    rest = list(key)
    while rest:
        part = rest.pop(0)
        hint = annotation_at(cls, part)
        values = values.get(part) if isinstance(values, Mapping) else None
        if rest and rest[0].isdigit() and is_many(hint):
            place = int(rest.pop(0))
            values = values[place] if isinstance(values, list | tuple) and place < len(values) else None
        name = values.get("name") if isinstance(values, Mapping) else values
        inner = [p for p in parts_of(hint) if isinstance(p, type) and _is_config(p)]
        axes = [p for p in parts_of(hint) if isinstance(p, Registry)]
        if axes:
            inner = [axis[n] for axis in axes for n in axis if n == (name or axis.default)]
        if not inner:
            return None
        cls = inner[0]
    return cls


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config class, registries and lists as one key."""
    for field in dataclasses.fields(cls):
        key = prefix + _key_of(field.name)
        yield key
        inner = class_at(cls, (_key_of(field.name),))
        if inner is not None and inner is not cls and not is_many(annotation_at(cls, _key_of(field.name))):
            yield from keys_of(inner, key + ".")


def to_dict(value: Any) -> Any:
    """The plain YAML form of a config: registry members as {"name": ..., ...}, tuples as lists."""
    if _is_config(value):
        name = getattr(type(value), "registered_name", None)
        fields = {_key_of(f.name): to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return fields if name is None else {"name": name, **fields}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_dict(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(values, Mapping):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings merge key by key; a change of a member's `name` replaces it whole."""
    if not isinstance(over, Mapping):
        return over
    if isinstance(base, str) and not isinstance(base, Scalar):
        base = {"name": base}
    if not isinstance(base, Mapping) or over.get("name", base.get("name")) != base.get("name"):
        base = {}
    return {**base, **{k: merge(base.get(k), v) for k, v in over.items()}}
