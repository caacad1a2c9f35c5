"""The one wrapper of every command line: checks all arguments before Fire runs anything.

Fire by itself starts the work and complains about an unknown flag afterwards, takes `--help` behind a positional
for an argument, turns `--run_dir=2024` into a number and binds stray words to parameters. Here argv is checked
against the function's signature first, text fields keep their text, and `--help` only ever prints help.

    def main(images: str, out: str, *, image_size: Annotated[int, "pixels a side"] = 256) -> None: ...
    run(main)                                  # or run({"verify": verify, "info": info})

A function with `**overrides: str` takes dotted configuration keys (`--train.steps=100`) as they were typed; one
with `**codec_keys: str` takes those of that family alone (`--codec.path=...`, or `--codec_path=...`), one with
`**solver_grid_keys: str` those of both families.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fire
import pydantic

from dit.config import Registry, annotation_at, class_at, did_you_mean, is_many, keys_of, parts_of, to_dict
from dit.errors import Notice, Stopped, UserError
from dit.progress import say
from dit.ranks.group import World

Command = Callable[..., Any]


class UsageError(UserError):
    """The command line itself is wrong."""


def run(
    commands: Command | Mapping[str, Command],
    config: type | None = None,
    argv: list[str] | None = None,
    choices: Mapping[str, Registry[Any]] | None = None,
) -> None:
    """Check argv, then let Fire call the function. Ends the process with 0, 1 (failed), 2 (usage) or 75 (stopped).

    config: the config class whose keys `--help` lists, for functions that take overrides. choices: flags whose
    values are members of a registry, which `--help` lists with their fields.
    """
    words = sys.argv[1:] if argv is None else argv
    program = f"python {sys.argv[0]}"
    try:
        function, words, program = _choose(commands, words, program)
        if any(w in ("--help", "-h") for w in words):
            print(help_text(function, program, config, choices))
            return
        positional, flags = parse(function, words)
        command = [repr(v) for v in positional] + [f"--{k}={v!r}" for k, v in flags.items()]
        with _clean_notices():
            fire.Fire(function, command=command, name=program, serialize=lambda _: None)
    except UsageError as error:
        _fail(f"{error}\nSee: {program} --help", 2)
    except BrokenPipeError:  # what is printed is piped to a command that has read enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        raise SystemExit(1) from None
    except Stopped as stopped:
        raise SystemExit(stopped.status) from None
    except (UserError, OSError) as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(text: str, code: int) -> typing.NoReturn:
    print(f"error{_where()}: {text}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _where() -> str:
    """Which rank says it, where there are several."""
    world = World()
    with contextlib.suppress(UserError):  # half a launcher's variables may be what it failed at
        world = World.from_env()
    return f" (rank {world.rank})" if world.size > 1 else ""


@contextlib.contextmanager
def _clean_notices() -> Iterator[None]:
    """Print a Notice as one line beside any bar, without the line of source that gave it; other warnings as ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        others = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                say(f"warning{_where()}: {message}", sys.stderr)
            else:
                others(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _choose(
    commands: Command | Mapping[str, Command], words: list[str], program: str
) -> tuple[Command, list[str], str]:
    """The function to run, the words left for it, and the program's name with the subcommand."""
    if callable(commands):
        return commands, words, program
    listing = "\n".join(f"  {name:16s} {_summary(f)}" for name, f in commands.items())
    if not words or words[0] in ("--help", "-h"):
        print(f"Usage: {program} COMMAND ...\n\n{listing}")
        raise SystemExit(0 if words else 2)
    if words[0] not in commands:
        raise UsageError(f"unknown command '{words[0]}'{did_you_mean(words[0], commands)}")
    return commands[words[0]], words[1:], f"{program} {words[0]}"


def parse(function: Command, words: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Checked positional values and flags. Raises UsageError for anything the signature does not know."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    kinds = {p.name: p.kind for p in signature.parameters.values()}
    named = [n for n, k in kinds.items() if k is not inspect.Parameter.VAR_KEYWORD]
    places = [n for n in named if kinds[n] is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    switches = {n for n in named if _strip(hints.get(n)) is bool}
    loose, given = _split(words, switches, named, _family(kinds))
    if len(loose) > len(places):
        raise UsageError(f"unexpected argument '{loose[len(places)]}' (a flag is written --name=value)")
    values: dict[str, Any] = dict(zip(places, loose, strict=False))
    for key, text in given.items():
        if key in values:
            raise UsageError(f"{key} is given twice")
        values[key] = text
    missing = [
        p.name
        for p in signature.parameters.values()
        if p.name in named and p.default is p.empty and p.name not in values
    ]
    if missing:
        raise UsageError(f"missing {', '.join(m.upper() if m in places else '--' + m for m in missing)}")
    typed = {k: _convert(k, v, hints.get(k, str)) if k in named else v for k, v in values.items()}
    return [], typed


def _family(kinds: Mapping[str, Any]) -> str:
    """A pattern of the flags that a `**name` parameter takes: any for `**overrides`, none without one."""
    rest = [n for n, k in kinds.items() if k is inspect.Parameter.VAR_KEYWORD]
    if not rest:
        return r"(?!)"
    return rf"({'|'.join(_families(rest[0]))})[._].+" if rest[0].endswith("_keys") else r".*"


def _families(name: str) -> list[str]:
    """The families of flags that a `**a_b_keys` parameter takes."""
    return name.removesuffix("_keys").split("_")


def _split(
    words: list[str], switches: set[str], known: list[str], family: str
) -> tuple[list[str], dict[str, str]]:
    """Loose words, and flags as {name: text}; `--name value` and `--name=value` are the same.

    known: the flags there are; family: a pattern of others that may be given.
    """
    loose: list[str] = []
    given: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not re.match(r"-{1,2}[A-Za-z]", word):
            loose.append(word)
            continue
        key, equals, text = word.lstrip("-").partition("=")
        key = key.replace("-", "_")
        if key not in known and not re.fullmatch(family, key):
            raise UsageError(f"unknown flag --{key}{did_you_mean(key, known)}")
        if not equals:
            if key in switches:
                text = "true"
            elif rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            else:
                raise UsageError(f"--{key} needs a value: --{key}=...")
        if key in given:
            raise UsageError(f"--{key} is given twice")
        given[key] = text
    return loose, given


def _strip(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _convert(name: str, text: str, hint: Any) -> Any:
    """The text as the parameter's type; text stays text."""
    plain = _strip(hint)
    options = typing.get_args(plain)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if plain is str or str in options:
        return text
    is_many = any(typing.get_origin(o) in (list, tuple) for o in (plain, *options))
    value: Any = [part.strip() for part in text.strip("[]()").split(",") if part.strip()] if is_many else text
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        raise UsageError(f"--{name}={text}: {error.errors()[0]['msg'].lower()}") from None


# --- help --------------------------------------------------------------------------------------------------


def _summary(function: Command) -> str:
    return (inspect.getdoc(function) or "").split("\n", 1)[0]


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
            families = _families(p.name) if p.name.endswith("_keys") else ["key"]
            usage += [f"[--{family}.sub=value ...]" for family in families]
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
    plain = _strip(hint)
    return (
        plain.__name__
        if isinstance(plain, type) and not typing.get_args(plain)
        else str(plain).replace("typing.", "")
    )


def _key_rows(config: type) -> list[str]:
    """One line a key: default, and the comment that stands behind the field in the source."""
    rows = []
    for key in keys_of(config):
        parts = tuple(key.split("."))
        parent = class_at(config, parts[:-1])
        if parent is None:
            continue
        if class_at(config, parts) is not None and not is_many(annotation_at(parent, parts[-1])):
            continue
        field = next(f for f in dataclasses.fields(parent) if f.name.rstrip("_") == parts[-1])
        default = "" if field.default is dataclasses.MISSING else f"= {_short(to_dict(field.default))}"
        names = [
            m.names()
            for m in getattr(annotation_at(parent, parts[-1]), "__metadata__", ())
            if hasattr(m, "names")
        ]
        note = _comment(parent, field.name) or (" | ".join(names[0]) if names else "")
        rows.append(f"  {key:28s} {default:24s} {note}".rstrip())
    return rows


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
    """Each member with the first line of its docstring, and its fields with default and comment below it."""
    rows = []
    for name, member in registry.items():
        rows.append(f"  {name:20s} {_summary(member)}".rstrip())
        rows += ["  " + row for row in _key_rows(member)]
    return rows


def _short(value: Any) -> str:
    return str(value.get("name", value)) if isinstance(value, dict) else str(value)


def _comment(cls: type, field: str) -> str:
    for owner in cls.__mro__:
        if field in inspect.get_annotations(owner):
            found = re.search(rf"^    {field}:.*?  # (.*)$", inspect.getsource(owner), re.MULTILINE)
            return found.group(1) if found else ""
    return ""
