"""What a tool can answer at once: --help, and that a flag or a key is mistyped. Torch and the rest take seconds.

A tool calls `answer(__file__)` before it imports anything heavy. What it says it says by the stand-ins of the
classes (`schema.py`), with the very code that checks the classes afterwards: that has the last word on values.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from dit.commandline.argv import Tool, choose, convert, fail, help_asked, parse, speak_in_any_locale
from dit.commandline.helptext import Command, UsageError, families, help_text
from dit.commandline.schema import FILE, stand_ins
from dit.config import ConfigError, Registry, config, did_you_mean, from_dict
from dit.configfile import load, overridden
from dit.errors import UserError

# The word that was refused, in an error's text.
REFUSED = re.compile(r"(?m)unknown [\w ]+ (?:--)?'?([\w.]+)|^([\w.]+): unknown key")


def answer(file: str) -> None:
    """Print help where that is asked for, or what is mistyped, and end the process; else return.

    file: the tool's own. Exits: 0 after help, 2 for a wrong command line, 1 for a wrong configuration file.
    """
    try:
        known = stand_ins().names()
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
    ):  # not there, or with the marks of a merge in it: the classes
        return  # answer, in seconds, and tools/schema.py can write it anew
    if (name := Path(file).stem) not in known:
        return
    tool, program = stand_ins().tool(name), f"python {sys.argv[0]}"
    speak_in_any_locale()
    try:
        function, words, program = choose(tool, sys.argv[1:], program)
        if (topic := help_asked(words)) is None:
            check(tool, function, parse(function, words))
            return
        print(help_text(function, program, tool.config_of(function), tool.choices, topic), flush=True)
    except UsageError as error:
        if may_be_new(str(error)):
            return
        fail(f"{error}\nSee: {program} --help", 2)
    except BrokenPipeError:  # what is printed is piped to a command that has read enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (UserError, OSError) as error:
        if may_be_new(str(error)):
            return
        fail(str(error), 1)
    raise SystemExit(0)


def may_be_new(said: str, root: Path = FILE.parents[2]) -> bool:
    """Whether what is refused stands in the source, and the schema is behind it: the classes then decide.

    said: the text of the error; root: of the source. Whoever adds a class or a key can use it at once, and may run
    `make schema` later.
    """
    known = FILE.read_text(encoding="utf-8")
    refused = {word for found in REFUSED.findall(said) for word in re.split(r"[.\s]+", "".join(found))}
    words = [re.escape(word) for word in refused if re.fullmatch(r"\w+", word) and f'"{word}"' not in known]
    if not words:
        return False
    any_of = f"({'|'.join(words)})"
    perhaps = re.compile(rf"""(?m)^\s+{any_of}_?\s*:|^def {any_of}\(|register\("{any_of}"\)""")
    for file in (file for part in ("dit", "tools") for file in (root / part).rglob("*.py")):
        text = file.read_text(
            encoding="utf-8"
        )  # any function's argument looks like a key: those files are parsed
        if perhaps.search(text) and not refused.isdisjoint(
            _declared(text, is_tool=file.parent == root / "tools")
        ):
            return True
    return False


def _declared(source: str, is_tool: bool) -> Iterator[str]:
    """The words that a file adds to command lines: keys and names of config classes, a tool's commands."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and any("config" in ast.unparse(m) for m in node.decorator_list):
            found = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            yield from (name.id.rstrip("_") for name in found if isinstance(name, ast.Name))
            inside = (part for mark in node.decorator_list for part in ast.walk(mark))
            yield from (str(part.value) for part in inside if isinstance(part, ast.Constant))
        elif isinstance(node, ast.FunctionDef) and is_tool:
            yield node.name
            yield from (argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))


def check(tool: Tool, function: Command, values: Mapping[str, str]) -> None:
    """Refuse keys and choices that there are not, and values of the wrong type.

    values: what was typed, {flag or key: text}. Raises UsageError where the command line is at fault, ConfigError
    where its configuration file is.
    """
    parameters = inspect.signature(function).parameters
    rest = [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    keys = {key: text for key, text in values.items() if key not in parameters}
    hints = typing.get_type_hints(function, include_extras=True)
    for name, text in values.items():
        if name in parameters:
            convert(name, text, hints.get(name, str))
    if (cls := tool.config_of(function)) is not None:
        _check_flags(cls, keys, parameters)
        if (file := values.get(next(iter(parameters)))) is not None:
            _check_config(cls, file, keys)
    elif rest:
        for family in families(rest[0]):
            start = re.compile(rf"{family}[._]")
            own = {
                start.sub(f"{family}.", key, count=1): text for key, text in keys.items() if start.match(key)
            }
            if family in tool.choices:
                chosen = values.get(family, parameters[family].default)
                _check_choice(family, tool.choices[family], chosen, own)
            elif family in tool.keys:
                _check_keys(own, tool.keys[family])


def _check_flags(cls: type, keys: Iterable[str], flags: Iterable[str]) -> None:
    """Refuse a key that there is not and that looks like a flag of the tool's own."""
    sections = {f.name.rstrip("_") for f in dataclasses.fields(cls)}
    for key in keys:
        near = difflib.get_close_matches(key, flags, n=1, cutoff=0.8)
        if near and key.split(".")[0] not in sections:
            raise UsageError(f"unknown flag --{key}; did you mean {near[0]}?")


def _check_config(cls: type, file: str, keys: Mapping[str, str]) -> None:
    try:
        load(cls, file, keys)
    except ConfigError as error:
        load(cls, file)  # raises where the file is wrong by itself
        raise UsageError(str(error)) from None


def _check_choice(flag: str, registry: Registry[Any], chosen: Any, keys: Mapping[str, str]) -> None:
    if chosen is inspect.Parameter.empty:
        return
    if chosen is None:  # which one there will be is decided later
        _check_keys(keys, [member for _, member in registry.items()])
        return
    holder: type = config(type("Flags", (), {"__annotations__": {flag: Annotated[Any, registry]}}))
    try:
        from_dict(holder, overridden(holder, {flag: chosen}, keys)[0])
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _check_keys(keys: Mapping[str, str], classes: Any) -> None:
    known = {"name", *(f.name.rstrip("_") for cls in classes for f in dataclasses.fields(cls))}
    for key in keys:
        family, name, *_ = key.split(".")
        if name not in known:
            near = did_you_mean(f"{family}.{name}", (f"{family}.{k}" for k in known))
            raise UsageError(f"unknown flag --{key}{near}")
