"""Configs from files and command lines: YAML with `base:` inheritance and dotted overrides.

    cfg = load(Experiment, "configs/digits.yaml", {"train.steps": "100"})

Everything is checked before anything runs; an error names the file (or the command line) a key came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dit.config import (
    Complaint,
    ConfigError,
    annotation_at,
    class_at,
    flatten,
    from_dict,
    is_many,
    merge,
    parts_of,
    to_dict,
)
from dit.files import expand, read_text, write_atomically
from dit.scalars import resolved
from dit.yamlfile import YamlError, dump_yaml, parse_yaml

C = TypeVar("C")


def read_yaml(path: str | Path, _seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML file with its `base:` files merged below it, and for each dotted key the file it came from."""
    path = Path(expand(str(path)))
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: its base files lead back to itself")
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(f"{path}: no such config file" + "".join(f"; did you mean {n}.yaml?" for n in near))
    return _on_base(read_own(path), str(path), path.parent, (*_seen, path.resolve()))


def _on_base(
    own: dict[str, Any], named: str, folder: Path, seen: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values with those of the `base:` that they name below them, and where each is from: `named`, or a file.

    folder: that the name is relative to. seen: files that have led here.
    """
    base_name = resolved(own.pop("base", None))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if not isinstance(base_name, str | None):
        raise ConfigError(f"{named}: base: expected one file name, got {base_name!r}")
    if base_name is not None:
        values, sources = read_yaml(folder / expand(base_name), seen)
    sources = {**sources, **dict.fromkeys(flatten(own), named)}
    return merge(values, own), sources


def read_own(path: Path) -> dict[str, Any]:
    """The keys and values of one YAML file; numbers and truth values are words still, which `from_dict` understands."""
    text = read_text(path)
    try:
        own = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if own is not None and not isinstance(own, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(own).__name__}")
    return own or {}


def _from_text(cls: type, key: tuple[str, ...], text: str, values: Mapping[str, Any]) -> Any:
    """A command line's text as a value: kept as it is for text fields, else read as YAML ("{name: vp}", "[1, 2]").

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
    if "," in text and is_many(hint) and not text.startswith(("[", "{")):
        text = f"[{text}]"
    try:
        return parse_yaml(text)
    except YamlError as error:
        raise ConfigError(
            problems=[Complaint(key, f"cannot be read from the command line: {error}")]
        ) from None


def overridden(
    cls: type, values: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`values` with dotted overrides laid over them in turn, and what the overrides alone say.

    An override is text, as it would be typed on the command line, or a value of any other type, taken as it is.
    A choice's name goes before its fields, in whatever order they are given.
    """
    merged: dict[str, Any] = dict(values)
    alone: dict[str, Any] = {}
    for dotted, text in sorted(overrides.items(), key=lambda item: item[0].count(".")):
        key = tuple(dotted.split("."))
        nested: Any = _from_text(cls, key, text, merged) if isinstance(text, str) else to_dict(text)
        for part in reversed(key):
            nested = {part: nested}
        merged, alone = merge(merged, nested), merge(alone, nested)
    return merged, alone


def load(
    cls: type[C],
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    said: str = "the command line",
) -> C:
    """A checked config from a YAML file, or values like those of one, and dotted overrides ({"train.steps": "100"}).

    said: who gave the overrides (`overridden`), for messages. ConfigError for whatever is wrong, naming where it is
    from.
    """
    named = "the values given" if isinstance(source, Mapping) else str(source)
    if isinstance(source, Mapping):
        values, sources = _on_base(to_dict(dict(source)), named, Path())
    else:
        values, sources = read_yaml(source)
    values, from_text = overridden(cls, values, overrides or {})
    sources.update(dict.fromkeys(flatten(from_text), said))
    try:
        return from_dict(cls, values)
    except ConfigError as error:
        raise ConfigError(problems=[_with_source(p, sources, named) for p in error.problems]) from None


def _with_source(problem: Complaint, sources: Mapping[str, str], default: str) -> Complaint:
    dotted = ".".join(problem.key)
    named = [
        s
        for k, s in sources.items()
        if k == dotted or k.startswith(dotted + ".") or dotted.startswith(k + ".")
    ]
    return Complaint(problem.key, f"{problem.message} (in {named[-1] if named else default})")


def write_yaml(path: str | Path, cfg: Any) -> None:
    """Write a config, resolved in full, as YAML: whole or not at all, wherever the process is killed."""
    write_atomically(Path(path), dump_yaml(to_dict(cfg)).encode("utf-8"))
