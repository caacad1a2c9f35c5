"""What `--help` prints: usage, arguments and configuration keys, each with type, default and meaning.

The meaning of a key is the comment beside its field, in the source: on any line of the field, or in the lines above
it, so that wrapping a long line loses nothing. A field without one that holds a section has the section's meaning.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Callable, Mapping
from typing import Any

from dit.config import Registry, annotation_at, class_at, is_many, keys_of, parts_of, to_dict

Command = Callable[..., Any]


def summary(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def families(name: str) -> list[str]:
    """The families of flags that a `**a_b_keys` parameter takes."""
    return name.removesuffix("_keys").split("_")


def help_text(
    function: Command,
    program: str,
    config: type | None = None,
    choices: Mapping[str, Registry[Any]] | None = None,
) -> str:
    """Usage, the docstring, and every argument with type, default and meaning."""
    hints = typing.get_type_hints(function, include_extras=True)
    usage, rows = [program], []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            kinds = families(p.name) if p.name.endswith("_keys") else ["key"]
            usage += [f"[--{kind}.sub=value ...]" for kind in kinds]
            continue
        notes = [m for m in getattr(hints.get(p.name), "__metadata__", ()) if isinstance(m, str)]
        is_place = p.kind is p.POSITIONAL_OR_KEYWORD
        usage.append(p.name.upper() if is_place and p.default is p.empty else f"[--{p.name}]")
        default = "required" if p.default is p.empty else f"default {p.default!r}"
        label = p.name.upper() if is_place and p.default is p.empty else f"--{p.name}"
        rows.append(
            f"  {label:22s} {_type_name(hints.get(p.name, str))}, {default}{'; ' + notes[0] if notes else ''}"
        )
    lines = [f"Usage: {' '.join(usage)}", "", inspect.getdoc(function) or "", "", "Arguments:", *rows]
    if config is not None:
        lines += ["", "Configuration keys (in CONFIG.yaml, or --key.sub=value):", *_key_rows(config)]
        for keys, registry in _axes(config):
            lines += ["", f"Choices of {', '.join(keys)}:", *_choice_rows(registry)]
    for flag, registry in (choices or {}).items():
        lines += ["", f"Choices of --{flag}:", *_choice_rows(registry)]
    return "\n".join(lines)


def _type_name(hint: Any) -> str:
    plain = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    is_class = isinstance(plain, type) and not typing.get_args(plain)
    return plain.__name__ if is_class else str(plain).replace("typing.", "")


def _key_rows(config: type) -> list[str]:
    """One line a key: default, meaning, and the words that it takes where these are few and listed nowhere else."""
    rows = []
    for key in keys_of(config):
        *above, name = key.split(".")
        parent = class_at(config, tuple(above))
        if parent is None:
            continue
        if class_at(config, (*above, name)) is not None and not is_many(annotation_at(parent, name)):
            continue
        field = next(f for f in dataclasses.fields(parent) if f.name.rstrip("_") == name)
        default = "" if field.default is dataclasses.MISSING else f"= {_short(to_dict(field.default))}"
        note = describe(parent, field.name)
        words = [str(w) for p in parts_of(annotation_at(parent, name)) for w in _words(p)]
        if any(word not in note for word in words):
            note += f" ({' | '.join(words)})"
        rows.append(f"  {key:28s} {default:24s} {note}".rstrip())
    return rows


def _words(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def _axes(config: type) -> list[tuple[list[str], Registry[Any]]]:
    """The registries with several members among a config's keys, each with the keys that it has the choices of."""
    found: dict[Registry[Any], list[str]] = {}
    for key in keys_of(config):
        *above, name = key.split(".")
        parent = class_at(config, tuple(above))
        for part in parts_of(annotation_at(parent, name)) if parent is not None else ():
            if isinstance(part, Registry) and len(part.names()) > 1 and key not in found.setdefault(part, []):
                found[part].append(key)
    return [(keys, registry) for registry, keys in found.items()]


def _choice_rows(registry: Registry[Any]) -> list[str]:
    """Each member with the first line of its docstring, and its fields with default and meaning below it."""
    rows = []
    for name, member in registry.items():
        rows.append(f"  {name:20s} {summary(member)}".rstrip())
        rows += ["  " + row for row in _key_rows(member)]
    return rows


def _short(value: Any) -> str:
    return str(value.get("name", value)) if isinstance(value, dict) else str(value)


# --- what a key means --------------------------------------------------------------------------------------


def describe(cls: type, field: str) -> str:
    """What a field of a config class means, in a line; "" where nobody said it."""
    owner = next((c for c in cls.__mro__ if field in inspect.get_annotations(c)), cls)
    if note := _notes(owner).get(field):
        return note
    section = class_at(cls, (field.rstrip("_"),))
    registries = [p for p in parts_of(annotation_at(cls, field.rstrip("_"))) if isinstance(p, Registry)]
    return summary(section) if section is not None and not registries else ""


@functools.cache
def _notes(cls: type) -> dict[str, str]:
    """Each field's comment: all those on the lines of its statement, else the lines of comment right above it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # a class without a file: an interactive session
        return {}
    beside, alone = _comments(source)
    notes, (tree,) = {}, ast.parse(source).body
    for node in tree.body if isinstance(tree, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found = [text for line in lines if (text := beside.get(line) or alone.get(line))]
            above = node.lineno - 1
            while not beside.keys() & set(lines) and above in alone:
                found.insert(0, alone[above])
                above -= 1
            notes[node.target.id] = " ".join(found)
    return notes


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """{line: comment} of those behind code, and of those that have a line of their own; lines count from 1."""
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ").rstrip()
            if not text.startswith(("noqa", "fmt:", "type:", "pragma:")):  # these are for other readers
                (alone if token.line.lstrip().startswith("#") else beside)[token.start[0]] = text
    return beside, alone
