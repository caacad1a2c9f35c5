"""Configs from files and command lines: YAML with `base:` inheritance and dotted overrides.

    cfg = load(Experiment, "configs/digits.yaml", {"train.steps": "100"})

Everything is checked before anything runs; an error names the file (or the command line) a key came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dit.config import (
    Complaint,
    ConfigError,
    Registry,
    annotation_at,
    class_at,
    flatten,
    from_dict,
    is_many,
    merge,
    parts_of,
    to_dict,
)
from dit.errors import shown
from dit.files import expand, read_text, write_atomically
from dit.scalars import NULL, resolved
from dit.yamlfile import YamlError, dump_yaml, parse_yaml

C = TypeVar("C")


def read_yaml(
    path: str | Path, _seen: tuple[Path, ...] = (), cls: type | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML file with its `base:` files merged below it, and for each dotted key the file it came from.

    cls: the config class that the files are of, where that is known (`merge_as`).
    """
    path = Path(expand(str(path)))
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: its base files lead back to itself")
    if path.is_dir():
        there = sorted(path.glob("*.yaml"))
        such = "".join(f", such as {file}" for file in there[:1])
        raise ConfigError(f"{path} is a folder, expected a YAML file{such}")
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(f"{path}: no such config file" + "".join(f"; did you mean {n}.yaml?" for n in near))
    return _on_base(read_own(path), str(path), path.parent, cls, (*_seen, path.resolve()))


def _on_base(
    own: dict[str, Any], named: str, folder: Path, cls: type | None, seen: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values with those of the `base:` that they name below them, and where each is from: `named`, or a file.

    folder: that the name is relative to. seen: files that have led here.
    """
    base_name = resolved(own.pop("base", None))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if not isinstance(base_name, str | None):
        raise ConfigError(f"{named}: base: expected one file name, got {shown(base_name)}")
    if base_name is not None:
        values, sources = read_yaml(folder / expand(base_name), seen, cls)
    return merge_as(cls, values, own), _over(sources, own, named)


def merge_as(cls: type | None, base: Any, over: Any) -> Any:
    """As `merge`; in a config class's own sections, of which there is no choice, `name` is a key like any other."""
    if cls is None or not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return merge(base, over)
    return {**base, **{key: merge_as(_section(cls, key), base.get(key), own) for key, own in over.items()}}


def _section(cls: type, key: str) -> type | None:
    """The config class of a key; None where there is none, or a choice of several."""
    hint = annotation_at(cls, key)
    is_open = is_many(hint) or any(isinstance(part, Registry) for part in parts_of(hint))
    return None if is_open else class_at(cls, (key,))


def _over(sources: Mapping[str, str], values: Mapping[str, Any], source: str) -> dict[str, str]:
    """Where each dotted key came from, once values of another source lie over the others."""
    own = flatten(values)
    kept: dict[str, str] = {}
    for key, place in sources.items():
        if any(k.startswith(f"{key}.") for k in own):  # a name alone, whose fields are laid over it
            kept[f"{key}.name"] = place
        elif not any(f"{key}.".startswith(f"{k}.") for k in own):
            kept[key] = place
    return {**{k: s for k, s in kept.items() if k not in own}, **dict.fromkeys(own, source)}


def read_own(path: Path) -> dict[str, Any]:
    """The keys and values of one YAML file; numbers and truth values are words still, which `from_dict` understands."""
    text = read_text(path)
    try:
        own = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if own is not None and not isinstance(own, dict):
        what = (
            "a list" if isinstance(own, list) else shown(textwrap.shorten(str(own), 60, placeholder=" ..."))
        )
        raise ConfigError(f"{path}: expected keys and values, got {what}")
    return own or {}


def _from_text(cls: type, key: tuple[str, ...], text: str, values: Mapping[str, Any]) -> Any:
    """A command line's text as a value: read as YAML ("{name: vp}", "[1, 2]"), but where the key wants text.

    That is kept as it is, but for a null; items of lists of text, too: YAML reads * as an alias.
    values: what is configured so far.
    """
    parent = class_at(cls, key[:-1], values)
    hint = annotation_at(parent, key[-1]) if parent else None
    plain = {p for p in parts_of(hint) if isinstance(p, type)}
    if str in plain and not plain & {int, float, bool}:
        if text in NULL or (text == "None" and type(None) in plain):
            return (
                None  # as in a file: refused where the key wants text, for nobody means a folder of that name
            )
        if not is_many(hint):
            return text
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        return [part.strip().strip("\"'") for part in inner.split(",") if part.strip()]
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
        merged, alone = merge_as(cls, merged, nested), merge_as(cls, alone, nested)
    return merged, alone


def listed(cls: type, key: str, text: str) -> list[dict[str, Any]]:
    """Members of a key that takes several, {name: ..., field: ...} each, as they are typed on a command line.

    That is names with commas between them, or a list in YAML, whose brackets may be left out. ConfigError for neither.
    """
    bare = text.strip()
    members: list[Any] = [name.strip() for name in bare.split(",") if name.strip()]
    if bare.startswith(("[", "{")):
        members = overridden(cls, {}, {key: bare if bare.startswith("[") else f"[{bare}]"})[0][key]
    if not members or any(not isinstance(one, str | dict) for one in members):
        raise ConfigError(
            f"{key}: expected names with commas between them, or '[{{name: ..., ...}}, ...]', got '{text}'"
        )
    return [{"name": one} if isinstance(one, str) else one for one in members]


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
        values, sources = _on_base(to_dict(dict(source)), named, Path(), cls)
    else:
        values, sources = read_yaml(source, cls=cls)
    values, from_text = overridden(cls, values, overrides or {})
    sources = _over(sources, from_text, said)
    problems = _empty_texts(cls, values)
    try:
        cfg = from_dict(cls, values)
        if not problems:
            return cfg
    except ConfigError as error:
        keys = {p.key for p in error.problems}
        problems = [*error.problems, *(p for p in problems if p.key not in keys)]
    places = [_places(p, sources) or [named] for p in problems]
    raise ConfigError(
        problems=[
            Complaint(p.key, f"{p.message} (in {' and '.join(found)})")
            for p, found in zip(problems, places, strict=True)
        ]
    )


def _empty_texts(cls: type, values: Mapping[str, Any]) -> list[Complaint]:
    """Texts of no character, for keys that are not so by default."""
    why = "is empty, which a shell makes of a variable that is not set"
    found = []
    for dotted in (key for key, value in flatten(values).items() if value == ""):
        *above, name = dotted.split(".")
        section = class_at(cls, tuple(above), values)
        defaults = {f.name.rstrip("_"): f.default for f in dataclasses.fields(section)} if section else {}
        if section and defaults.get(name, "") != "":
            is_optional = type(None) in parts_of(annotation_at(section, name))
            found.append(Complaint((*above, name), why + "; null is none" * is_optional))
    return found


def _places(problem: Complaint, sources: Mapping[str, str]) -> list[str]:
    """The sources of the keys that a problem is about: its own, or else those that its words name, or all below it."""
    dotted = ".".join(problem.key)
    if own := [k for k in sources if k == dotted or dotted.startswith(f"{k}.")]:
        return [sources[max(own, key=len)]]
    below = [k for k in sources if not dotted or k.startswith(f"{dotted}.")]

    def named(key: str) -> bool:
        return bool(re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", problem.message))

    about = [k for k in below if named(k)] or [k for k in below if named(k.removeprefix(f"{dotted}."))]
    return list(dict.fromkeys(sources[k] for k in about or below))


def write_yaml(path: str | Path, cfg: Any) -> None:
    """Write a config, resolved in full, as YAML: whole or not at all, wherever the process is killed."""
    write_atomically(Path(path), dump_yaml(to_dict(cfg)).encode("utf-8"))
