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
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union

from dit.config import Registry, annotation_at, class_at, did_you_mean, is_many, keys_of, parts_of, to_dict
from dit.errors import UserError, shown

Command = Callable[..., Any]
Axes = list[tuple[list[str], Registry[Any]]]
ALL = "all"
NOTES = (
    "__notes__"  # what a class has instead of comments where it is made without a source: {field: meaning}
)
BASE = """\
Inheritance (base):
  `base: other.yaml` in CONFIG takes that file's keys (its path is relative to CONFIG). CONFIG's own keys lie over them,
  key by key; a choice of another name begins anew. A base may name a base. Of defaults, base, CONFIG and command line
  the later counts. RUN_DIR/config.yaml has what came out."""


class UsageError(UserError):
    """The command line itself is wrong."""


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
    topic: str = "",
) -> str:
    """Usage, the docstring, and every argument and key with type, default and meaning; choices by their names.

    topic: the group of keys, the key or the flag to tell about alone, with the fields of its choices; "all": these of
    everything. Raises UsageError for a topic that there is not.
    """
    axes = _axes(config) if config is not None else []
    axes = [*axes, *(([flag], registry) for flag, registry in (choices or {}).items())]
    if topic not in ("", ALL):
        return "\n".join(_about(topic.strip("-"), config, axes))
    lines = [_usage(function, program), "", inspect.getdoc(function) or ""]
    if arguments := _arguments(function):
        lines += ["", "Arguments:", *arguments]
    if config is not None:
        lines += [
            "",
            "Configuration keys (in CONFIG.yaml, or --key.sub=value):",
            *_grouped(config),
            "",
            BASE,
        ]
    dashes = "--" if config is None else ""
    if config is not None and topic != ALL:
        rows = [f"  {', '.join(keys):28s} {' | '.join(registry.names())}" for keys, registry in axes]
        lines += ["", "Choices:", *rows]
    else:
        for keys, registry in axes:
            rows = _choice_rows(registry, fields=topic == ALL)
            lines += ["", f"Choices of {', '.join(dashes + key for key in keys)}:", *rows]
    if topics := _topics(config, axes):
        listed = textwrap.fill(", ".join(topics), 112, initial_indent="  ", subsequent_indent="  ")
        lines += ["", "--help=NAME tells about one of these alone, with the fields of its choices:", listed]
    return "\n".join(lines)


def _usage(function: Command, program: str) -> str:
    words, hints = [program], typing.get_type_hints(function, include_extras=True)
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            kinds = families(p.name) if p.name.endswith("_keys") else ["key"]
            words += [f"[--{kind}.sub=value ...]" for kind in kinds]
        else:
            words.append(p.name.upper() if _is_place(p) else f"[--{p.name}]")
            words += ["..."] if _is_place(p) and is_row(hints.get(p.name)) else []
    return f"Usage: {' '.join(words)}"


def _is_place(p: inspect.Parameter) -> bool:
    return p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty


def _arguments(function: Command) -> list[str]:
    hints = typing.get_type_hints(function, include_extras=True)
    rows = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is not p.VAR_KEYWORD:
            notes = [m for m in getattr(hints.get(p.name), "__metadata__", ()) if isinstance(m, str)]
            default = "required" if p.default is p.empty else f"default {shown(p.default)}"
            label = p.name.upper() if _is_place(p) else f"--{p.name}"
            note = f"; {notes[0]}" if notes else ""
            rows.append(f"  {label:22s} {type_name(hints.get(p.name, str))}, {default}{note}")
    return rows


def is_row(hint: Any) -> bool:
    """Whether a parameter takes several values in a row; the last place that does takes all the words that are left."""
    plain = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return typing.get_origin(plain) in (list, tuple)


def type_name(hint: Any) -> str:
    """A type hint as help writes it: "int | None", "slow | fast"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " | ".join(map(type_name, args))
    if hint in (None, type(None), Ellipsis):
        return "..." if hint is Ellipsis else "null"
    name = getattr(hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(type_name, args))}]" if args else name


# --- keys in groups ----------------------------------------------------------------------------------------


def _group_notes(config: type) -> dict[str, str]:
    """The top-level keys that hold others, with what each is about."""
    found = {}
    for field in dataclasses.fields(config):
        key = field.name.rstrip("_")
        if is_group(config, key):
            found[key] = describe(config, field.name) or summary(class_at(config, (key,)))
    return found


def is_group(config: type, key: str) -> bool:
    """Whether a top-level key is a section or a choice with fields."""
    hint = annotation_at(config, key)
    return class_at(config, (key,)) is not None or any(isinstance(p, Registry) for p in parts_of(hint))


def _under(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _grouped(config: type) -> list[str]:
    """Keys without a section, then each section's under a line that says what it is about."""
    sections = {
        key: note for key, note in _group_notes(config).items() if class_at(config, (key,)) is not None
    }
    rows = {row.split()[0]: row for row in _key_rows(config)}
    lines = [row for key, row in rows.items() if key.split(".")[0] not in sections]
    for section, note in sections.items():
        lines += ["", f"  {section}: {note}", *(row for key, row in rows.items() if _under(key, section))]
    return lines


def _topics(config: type | None, axes: Axes) -> list[str]:
    """What help can be asked about: groups, flags with choices, and all."""
    groups = list(_group_notes(config)) if config is not None else []
    flags = [key for keys, _ in axes for key in keys if "." not in key and key not in groups]
    return [*groups, *flags, ALL] if groups or flags else []


def _about(topic: str, config: type | None, axes: Axes) -> list[str]:
    """The keys under a topic and the choices that they have, with their fields. UsageError where it is none."""
    rows = [row for row in _key_rows(config) if _under(row.split()[0], topic)] if config is not None else []
    inner = [(keys, registry) for keys, registry in axes if any(_under(key, topic) for key in keys)]
    if not rows and not inner:
        topics = _topics(config, axes)
        near = did_you_mean(topic, topics) if topics else "; --help alone has all there is"
        raise UsageError(f"--help={topic}: nothing of that name{near}")
    note = _group_notes(config).get(topic, "") if config is not None else ""
    lines = [f"{topic}: {note}".rstrip(": ")]
    lines += ["", f"Keys (in CONFIG.yaml, or --{rows[0].split()[0]}=value):", *rows] if rows else []
    for keys, registry in inner:
        below = [key for key in keys if _under(key, topic)]
        lines += ["", f"Choices of {', '.join(below)}:", *_choice_rows(registry)]
    return lines


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


def _axes(config: type) -> Axes:
    """The registries with several members among a config's keys, each with the keys that it has the choices of.

    Those among the fields of members too: `sample.solver.diffusion`.
    """
    found: dict[Registry[Any], list[str]] = {}

    def look(cls: type, prefix: str, seen: tuple[Any, ...]) -> None:
        for key in keys_of(cls):
            *above, name = key.split(".")
            parent = class_at(cls, tuple(above))
            for part in parts_of(annotation_at(parent, name)) if parent is not None else ():
                if not isinstance(part, Registry) or part in seen:
                    continue
                if len(part.names()) > 1 and prefix + key not in found.setdefault(part, []):
                    found[part].append(prefix + key)
                for _, member in part.items():
                    look(member, f"{prefix}{key}.", (*seen, part))

    look(config, "", ())
    return [(keys, registry) for registry, keys in found.items()]


def _choice_rows(registry: Registry[Any], fields: bool = True) -> list[str]:
    """Each member with the first line of its docstring, and its fields with default and meaning below it."""
    rows = []
    for name, member in registry.items():
        rows.append(f"  {name:20s} {summary(member)}".rstrip())
        rows += ["  " + row for row in _key_rows(member)] if fields else []
    return rows


def _short(value: Any) -> str:
    """A default as one types it in YAML; of a choice its name."""
    value = value.get("name", value) if isinstance(value, dict) else value
    return value if isinstance(value, str) else shown(value)


# --- what a key means --------------------------------------------------------------------------------------


def describe(cls: type, field: str) -> str:
    """What a field of a config class means, in a line; "" where nobody said it."""
    if (given := vars(cls).get(NOTES)) is not None:
        return str(given[field])
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
