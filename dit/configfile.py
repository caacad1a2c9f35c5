"""Configs from files and command lines: YAML with `base:` inheritance and dotted overrides.

    cfg = load(Experiment, "configs/digits.yaml", {"train.steps": "100"})

Everything is checked before anything runs; an error names the file (or the command line) a key came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dit.config import (
    ConfigError,
    Problem,
    annotation_at,
    class_at,
    flatten,
    from_dict,
    is_many,
    merge,
    parts_of,
    to_dict,
)
from dit.files import write_atomically

C = TypeVar("C")


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error and not silently the last one, and keys are text (`on` is not)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise ConfigError(
                    f"expected a key, got {key!r} (line {line}); quote it if it is meant as text"
                )
            if key in seen:
                raise ConfigError(f"key '{key}' is given twice (line {line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, _seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML file with its `base:` files merged below it, and for each dotted key the file it came from."""
    path = Path(path)
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: its base files lead back to itself")
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(f"{path}: no such config file" + "".join(f"; did you mean {n}.yaml?" for n in near))
    try:
        own = yaml.load(path.read_text(), Loader=_StrictLoader) or {}
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(own).__name__}")
    base_name = own.pop("base", None)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if not isinstance(base_name, str | None):
        raise ConfigError(f"{path}: base: expected one file name, got {base_name!r}")
    if base_name is not None:
        values, sources = read_yaml(path.parent / base_name, (*_seen, path.resolve()))
    sources = {**sources, **dict.fromkeys(flatten(own), str(path))}
    return merge(values, own), sources


def _from_text(cls: type, key: tuple[str, ...], text: str, values: Mapping[str, Any]) -> Any:
    """A command line's text as a value: kept as it is for text fields, else read as YAML ("1e-4", "[1, 2]").

    values: what is configured so far.
    """
    parent = class_at(cls, key[:-1], values)
    hint = annotation_at(parent, key[-1]) if parent else None
    plain = {p for p in parts_of(hint) if isinstance(p, type)}
    if (
        str in plain and not plain & {int, float, bool} and is_many(hint)
    ):  # as typed: YAML reads * as an alias
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        return [part.strip().strip("\"'") for part in inner.split(",") if part.strip()]
    if str in plain and not plain & {int, float, bool}:
        return None if text in ("null", "None") and type(None) in plain else text
    if "," in text and not text.startswith(("[", "{")):
        text = f"[{text}]"
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(problems=[Problem(key, f"cannot be read from the command line: {error}")]) from None


def overridden(
    cls: type, values: Mapping[str, Any], overrides: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`values` with dotted overrides (text as typed) laid over them in turn, and what the overrides alone say.

    A choice's name goes before its fields, in whatever order they are given.
    """
    merged: dict[str, Any] = dict(values)
    alone: dict[str, Any] = {}
    for dotted, text in sorted(overrides.items(), key=lambda item: item[0].count(".")):
        key = tuple(dotted.split("."))
        nested: Any = _from_text(cls, key, text, merged)
        for part in reversed(key):
            nested = {part: nested}
        merged, alone = merge(merged, nested), merge(alone, nested)
    return merged, alone


def load(cls: type[C], path: str | Path, overrides: Mapping[str, str] | None = None) -> C:
    """A checked config from a YAML file and dotted overrides ({"train.steps": "100"}, text as typed)."""
    values, sources = read_yaml(path)
    values, from_text = overridden(cls, values, overrides or {})
    sources.update(dict.fromkeys(flatten(from_text), "the command line"))
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        raise ConfigError(problems=[_with_source(p, sources, str(path)) for p in error.problems]) from None


def _with_source(problem: Problem, sources: Mapping[str, str], default: str) -> Problem:
    dotted = ".".join(problem.key)
    named = [
        s
        for k, s in sources.items()
        if k == dotted or k.startswith(dotted + ".") or dotted.startswith(k + ".")
    ]
    return Problem(problem.key, f"{problem.message} (in {named[-1] if named else default})")


def write_yaml(path: str | Path, cfg: Any) -> None:
    """Write a config, resolved in full, as YAML: whole or not at all, wherever the process is killed."""
    write_atomically(Path(path), yaml.safe_dump(to_dict(cfg), sort_keys=False).encode())
