"""What there is to type, as data: every tool's flags, every configuration key, every choice, with its meaning.

`schema.json` beside this file is written by `make schema` from the tools and classes themselves, and a test compares
the two. From it come stand-ins of them, without torch: config classes, registries and functions that have the same
keys, types, defaults and notes, and do nothing. What an error says of a key it says of the stand-in's in the same
words; what a class checks beyond the types of its keys, the class itself checks later.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import pydantic

from dit.commandline.argv import Tool
from dit.commandline.helptext import NOTES, Command, describe, summary
from dit.config import Registry, config, from_dict, one_or_more, to_dict
from dit.several import Plainest

FILE = Path(__file__).with_name("schema.json")
PLAIN: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "none": type(None),
    "...": Ellipsis,
}
KINDS = {
    "place": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "flag": inspect.Parameter.KEYWORD_ONLY,
    "rest": inspect.Parameter.VAR_KEYWORD,
}
LIMITS = ("annotated_types", "pydantic.fields")  # modules of what a value is checked by beyond its type

Data = dict[str, Any]


def schema_of(tools: Mapping[str, Tool]) -> Data:
    """The schema of these tools, as JSON has it. TypeError for a type or a check that it has no word for."""
    return _Writer(tools).data


def text_of(schema: Data) -> str:
    """The schema as its file holds it: a line a value, so that two changes of it merge."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


@functools.cache
def stand_ins() -> StandIns:
    """The stand-ins of everything in the schema's file."""
    return StandIns(json.loads(FILE.read_text(encoding="utf-8")))


# --- from the classes --------------------------------------------------------------------------------------


class _Writer:
    def __init__(self, tools: Mapping[str, Tool]):
        self.data: Data = {"tools": {}, "classes": {}, "registries": {}}
        self._axes: dict[str, Registry[Any]] = {}
        for name, tool in tools.items():
            self.data["tools"][name] = self._tool(tool)
        self.data["classes"] = dict(sorted(self.data["classes"].items()))
        self.data["registries"] = dict(sorted(self.data["registries"].items()))

    def _tool(self, tool: Tool) -> Data:
        many = {} if callable(tool.commands) else tool.commands
        return {
            "command": self._function(tool.commands) if callable(tool.commands) else None,
            "commands": {name: self._function(function) for name, function in many.items()},
            "default": tool.default,
            "config": None if tool.config is None else self._class(tool.config),
            "choices": {flag: self._registry(registry) for flag, registry in tool.choices.items()},
            "keys": {family: [self._class(c) for c in classes] for family, classes in tool.keys.items()},
        }

    def _function(self, function: Command) -> Data:
        hints = typing.get_type_hints(function, include_extras=True)
        kinds: dict[Any, str] = {kind: word for word, kind in KINDS.items()}
        parameters = []
        for p in inspect.signature(function).parameters.values():
            notes = [m for m in getattr(hints[p.name], "__metadata__", ()) if isinstance(m, str)]
            row = {"name": p.name, "kind": kinds[p.kind], "type": self._hint(hints[p.name])}
            row |= {} if p.default is p.empty else {"default": to_dict(p.default)}
            parameters.append(row | ({"note": notes[0]} if notes else {}))
        return {"doc": inspect.getdoc(function) or "", "parameters": parameters}

    def _class(self, cls: type) -> str:
        # a stand-in is known by the name of what it stands for
        name = str(vars(cls).get("__stands_for__", f"{cls.__module__}.{cls.__qualname__}"))
        if name not in self.data["classes"]:
            self.data["classes"][name] = {}  # a class may hold itself
            hints = typing.get_type_hints(cls, include_extras=True)
            fields = {f.name: self._field(cls, f, hints[f.name]) for f in dataclasses.fields(cls)}
            self.data["classes"][name] = {"doc": summary(cls), "fields": fields}
        return name

    def _field(self, cls: type, field: dataclasses.Field[Any], hint: Any) -> Data:
        row = {"type": self._hint(hint), "note": describe(cls, field.name)}
        if field.default_factory is not dataclasses.MISSING:
            return row | {"default": to_dict(field.default_factory())}
        return row if field.default is dataclasses.MISSING else row | {"default": to_dict(field.default)}

    def _registry(self, registry: Registry[Any]) -> str:
        axis = registry.axis
        if self._axes.setdefault(axis, registry) is not registry:
            raise TypeError(f"two registries are called '{axis}'")
        if axis not in self.data["registries"]:
            self.data["registries"][axis] = {}
            members = {name: self._class(member) for name, member in registry.items()}
            switch = {} if registry.switch is None else {"switch": registry.switch}
            self.data["registries"][axis] = {"default": registry.default, "members": members, **switch}
        return axis

    def _hint(self, hint: Any) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if hint in PLAIN.values():
            return next(word for word, plain in PLAIN.items() if plain is hint)
        if origin is Annotated:
            return self._annotated(args[0], hint.__metadata__)
        if origin is Literal:
            return {"literal": list(args)}
        if origin in (Union, types.UnionType, tuple, list, dict):
            word = "union" if origin in (Union, types.UnionType) else origin.__name__
            return {word: [self._hint(arg) for arg in args]}
        if dataclasses.is_dataclass(hint):
            return {"class": self._class(typing.cast(type, hint))}
        raise TypeError(f"dit/commandline/schema.py has no word for the type {hint}")

    def _annotated(self, inner: Any, notes: tuple[Any, ...]) -> Any:
        for note in notes:
            if isinstance(note, Registry):
                return {"axis": self._registry(note)}
        named = self._hint(inner)
        for note in notes:
            before = getattr(note, "func", None) if isinstance(note, pydantic.BeforeValidator) else None
            if before is one_or_more:
                named = {"one_or_more": named}
            elif isinstance(note, Plainest):
                named = {"plainest": named}
            elif not (self._is_read_alike(before) or self._only_limits(note)):
                raise TypeError(f"dit/commandline/schema.py does not know what {note} takes")
        return named

    def _is_read_alike(self, before: Any) -> bool:
        """Whether `config` gives a stand-in's field the same reader."""
        return getattr(before, "__module__", None) == "dit.scalars"

    def _only_limits(self, note: Any) -> bool:
        return isinstance(note, str | pydantic.AfterValidator) or type(note).__module__.startswith(LIMITS)


# --- from the file -----------------------------------------------------------------------------------------


class StandIns:
    """Tools, config classes and registries made of a schema: each is made when it is asked for, and once."""

    def __init__(self, schema: Data):
        self._schema = schema
        self._classes: dict[str, type] = {}
        self._registries: dict[str, Registry[Any]] = {}

    def names(self) -> list[str]:
        """The tools' names."""
        return list(self._schema["tools"])

    def tool(self, name: str) -> Tool:
        """The command line of tools/NAME.py; its functions do nothing. KeyError where there is none."""
        data = self._schema["tools"][name]
        many = {command: self._function(command, d) for command, d in data["commands"].items()}
        return Tool(
            many if data["command"] is None else self._function(name, data["command"]),
            None if data["config"] is None else self._class(data["config"]),
            {flag: self._registry(axis) for flag, axis in data["choices"].items()},
            {family: [self._class(c) for c in classes] for family, classes in data["keys"].items()},
            data["default"],
        )

    def _function(self, name: str, data: Data) -> Command:
        def stand_in(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"{name} stands in for a command, to be asked about")

        parameters, hints = [], {}
        for row in data["parameters"]:
            default = row.get("default", inspect.Parameter.empty)
            default = tuple(default) if isinstance(default, list) else default
            parameters.append(inspect.Parameter(row["name"], KINDS[row["kind"]], default=default))
            hint = self._hint(row["type"])
            hints[row["name"]] = Annotated[hint, row["note"]] if "note" in row else hint
        stand_in.__doc__, stand_in.__annotations__ = data["doc"], hints
        stand_in.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return stand_in

    def _class(self, name: str) -> type:
        if name not in self._classes:
            data = self._schema["classes"][name]
            hints = {field: self._hint(row["type"]) for field, row in data["fields"].items()}
            values = {
                field: self._default(hints[field], row["default"])
                for field, row in data["fields"].items()
                if "default" in row
            }
            notes = {field: row["note"] for field, row in data["fields"].items()}
            own = {"__annotations__": hints, "__doc__": data["doc"], "__module__": __name__, NOTES: notes}
            bare = type(name.rsplit(".", 1)[-1], (), {**values, **own, "__stands_for__": name})
            self._classes[name] = config(bare)
        return self._classes[name]

    def _default(self, hint: Any, value: Any) -> Any:
        """What a field has by default, from its plain form."""
        if isinstance(value, dict) and isinstance(hint, type):
            return from_dict(hint, value)
        if isinstance(value, dict | list):
            return pydantic.TypeAdapter(hint).validate_python(value)
        return value

    def _registry(self, axis: str) -> Registry[Any]:
        if axis not in self._registries:
            data = self._schema["registries"][axis]
            registry = self._registries[axis] = Registry(axis, data["default"], data.get("switch"))
            for name, member in data["members"].items():
                registry.register(name)(self._class(member))
        return self._registries[axis]

    def _hint(self, data: Any) -> Any:
        if isinstance(data, str):
            return PLAIN[data]
        ((word, inner),) = data.items()
        if word == "class":
            return self._class(inner)
        if word == "axis":
            return Annotated[Any, self._registry(inner)]
        if word == "literal":
            return Literal[tuple(inner)]
        if word == "one_or_more":
            return Annotated[self._hint(inner), pydantic.BeforeValidator(one_or_more)]
        if word == "plainest":
            return Annotated[self._hint(inner), Plainest()]
        made = tuple(self._hint(part) for part in inner)
        if word == "union":
            return Union[made]  # noqa: UP007
        many: Any = {"tuple": tuple, "list": list, "dict": dict}[word]
        return many[made]
