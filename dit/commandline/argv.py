"""The command line as text: which command, is help asked for, is each flag known. Nothing here needs torch.

`cli.py` calls the command afterwards; `quick.py` is done before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from dit.commandline.helptext import Command, UsageError, families, is_row, summary
from dit.config import NO_TEXT, Registry, did_you_mean
from dit.errors import UserError
from dit.files import expand, sought
from dit.ranks.world import World
from dit.scalars import NULL, Scalar, is_scalar, refusal, typed

HELP = ("--help", "-h")
SEVERAL = "\n"  # between the words that one parameter takes


@dataclass(frozen=True)
class Tool:
    """A tool's command line: a function, or {name: function} of several commands.

    config: the config class whose keys a `**overrides` parameter takes, over those of the file that the first
    argument names. choices: flags whose values are members of a registry, which `--help` lists with their fields.
    keys: for families of flags of which no flag says the member ("codec"), the classes that may have them.
    default: the command whose name may be left out, as its first argument is a file or folder.
    """

    commands: Command | Mapping[str, Command]
    config: type | None = None
    choices: Mapping[str, Registry[Any]] = field(default_factory=dict)
    keys: Mapping[str, Sequence[type]] = field(default_factory=dict)
    default: str | None = None

    def config_of(self, command: Command) -> type | None:
        """Give `config` for a command that takes `**overrides`; None for one that has no configuration."""
        kinds = {p.name: p.kind for p in inspect.signature(command).parameters.values()}
        rest = [name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD]
        return self.config if rest and not rest[0].endswith("_keys") else None


def speak_in_any_locale() -> None:
    """Print what the terminal's encoding lacks as ?, and not as a traceback: help and names are not ASCII alone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def fail(text: str, code: int) -> typing.NoReturn:
    """End the process with a line on stderr, which tells the rank where there are several."""
    print(f"error{where()}: {text}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def where() -> str:
    """Which rank says it, where there are several."""
    world = World()
    with contextlib.suppress(UserError):  # half a launcher's variables may be what it failed at
        world = World.from_env()
    return f" (rank {world.rank})" if world.size > 1 else ""


def choose(tool: Tool, words: list[str], program: str) -> tuple[Command, list[str], str]:
    """The function to run, the words left for it, and the program's name with the subcommand."""
    commands = tool.commands
    if callable(commands):
        return commands, words, program
    if words[:1] and words[0] in HELP and words[1:] and words[1] in commands:  # --help COMMAND
        words = [words[1], words[0], *words[2:]]
    if not words or words[0] in HELP:
        print(_listing(commands, tool.default, program))
        raise SystemExit(0 if words else 2)
    if words[0] in commands:
        return commands[words[0]], words[1:], f"{program} {words[0]}"
    near = did_you_mean(words[0], commands)
    if tool.default is None:
        raise UsageError(f"unknown command '{words[0]}'{near}")
    if not (words[0].startswith("-") or _may_lead_somewhere(words[0])):
        raise UsageError(
            f"'{words[0]}' is neither a command nor a file or folder that is there{near}{sought(words[0])}"
        )
    return commands[tool.default], words, program


def _listing(commands: Mapping[str, Command], default: str | None, program: str) -> str:
    """What `--help` says of a tool with several commands."""
    lines = [f"Usage: {program} COMMAND ..."]
    if default is not None:
        first = next(iter(inspect.signature(commands[default]).parameters)).upper()
        lines.append(f"       {program} {first} ...   for {program} {default} {first} ...")
    lines += ["", *(f"  {name:16s} {summary(f)}" for name, f in commands.items())]
    return "\n".join([*lines, "", f"More: {program} COMMAND --help"])


def _may_lead_somewhere(word: str) -> bool:
    """Whether a word is a path that is there, or a URL, a pattern or a named source, which others look up.

    Raises UserError for a path with a variable that is not set.
    """
    return bool(re.search(r"[:*?\[{]", word)) or Path(expand(word)).exists()


def parse(function: Command, words: list[str]) -> dict[str, str]:
    """{parameter: text}, which the signature knows and has all of. Raises UsageError for anything else."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    kinds = {p.name: p.kind for p in signature.parameters.values()}
    named = [n for n, k in kinds.items() if k is not inspect.Parameter.VAR_KEYWORD]
    places = [n for n in named if kinds[n] is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    switches = {n for n in named if strip(hints.get(n)) is bool}
    loose, given = _split(words, switches, named, _family(kinds))
    if places and is_row(hints.get(places[-1])) and loose[len(places) - 1 :]:
        loose[len(places) - 1 :] = [SEVERAL.join(loose[len(places) - 1 :])]
    if len(loose) > len(places):
        raise UsageError(f"unexpected argument '{loose[len(places)]}' (a flag is written --name=value)")
    values = dict(zip(places, loose, strict=False))
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
    return values


def help_asked(words: Sequence[str]) -> str | None:
    """The topic that help is asked for, "" for no certain one; None where nobody asks for help."""
    at = next((i for i, word in enumerate(words) if word in HELP or word.startswith("--help=")), None)
    if at is None:
        return None
    if words[at].startswith("--help="):
        return words[at].partition("=")[2]
    return next((word for word in words[at + 1 : at + 2] if not word.startswith("-")), "")


def _family(kinds: Mapping[str, Any]) -> str:
    """A pattern of the flags that a `**name` parameter takes: any for `**overrides`, none without one."""
    rest = [n for n, k in kinds.items() if k is inspect.Parameter.VAR_KEYWORD]
    if not rest:
        return r"(?!)"
    return rf"({'|'.join(families(rest[0]))})[._].+" if rest[0].endswith("_keys") else r".*"


def _split(
    words: list[str], switches: set[str], known: list[str], family: str
) -> tuple[list[str], dict[str, str]]:
    """Loose words, and flags as {name: text}; `--name value` and `--name=value` are the same, `--no-name` is false.

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
        if key not in known and not equals and key.removeprefix("no_") in switches:
            key, equals, text = key.removeprefix("no_"), "=", "false"
        if key not in known and not re.fullmatch(family, key):
            raise UsageError(f"unknown flag --{key}{did_you_mean(key, known)}")
        if not equals:
            if key in switches:
                text = "true"
            elif rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            else:
                meant = "" if key in known else did_you_mean(key, known)
                raise UsageError(f"--{key} needs a value: --{key}=...{meant}")
        if key in given:
            raise UsageError(f"--{key} is given twice")
        given[key] = text
    return loose, given


def strip(hint: Any) -> Any:
    """A type hint without its annotations."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def convert(name: str, text: str, hint: Any) -> Any:
    """The text of a flag as the parameter's type; text stays text. Raises UsageError for what is none."""
    plain = strip(hint)
    options = typing.get_args(plain)
    if type(None) in options and (text in NULL or text.lower() in ("none", "null")):
        return None
    if plain is str or (str in options and typing.get_origin(plain) not in (list, tuple)):
        if text in NULL:  # no text in files either, and ~ alone is no home: shells fill that in
            raise UsageError(f"--{name}={text}: {NO_TEXT}")
        return text
    is_many = any(typing.get_origin(o) in (list, tuple) for o in (plain, *options))
    parts = text.split(SEVERAL) if SEVERAL in text else text.strip("[]()").split(",")
    words = [part.strip() for part in parts if part.strip()] if is_many else [text.strip()]
    values: list[str] = [Scalar(word) if is_scalar(word) else word for word in words]
    value: Any = values if is_many else values[0]
    try:
        return pydantic.TypeAdapter(typed(hint)).validate_python(value)
    except pydantic.ValidationError as error:
        raise UsageError(f"--{name}={text}: {refusal(error.errors()[0])}") from None
