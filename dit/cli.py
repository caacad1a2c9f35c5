"""The one wrapper of every command line: checks all arguments before Fire runs anything.

Fire by itself starts the work and complains about an unknown flag afterwards, takes `--help` behind a positional
for an argument, turns `--run_dir=2024` into a number and binds stray words to parameters. Here argv is checked
against the function's signature first, and `--help` only ever prints help; Fire then binds the words to parameters
and reads each value with a reader that is made of the parameter's type (text stays text), before it calls.

    def main(images: str, out: str, *, image_size: Annotated[int, "pixels a side"] = 256) -> None: ...
    run(main)                                  # or run({"verify": verify, "info": info})

A function with `**overrides: str` takes dotted configuration keys (`--train.steps=100`) as they were typed; one
with `**codec_keys: str` takes those of that family alone (`--codec.path=...`, or `--codec_path=...`), one with
`**solver_grid_keys: str` those of both families.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import io
import os
import re
import sys
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import fire
import pydantic
from fire.decorators import SetParseFn, SetParseFns

from dit.config import Registry, did_you_mean
from dit.errors import Notice, Stopped, UserError
from dit.helptext import Command, families, help_text, summary
from dit.progress import say
from dit.ranks.group import World
from dit.scalars import Scalar, is_scalar, typed

FULL = ": free space (or raise the quota) and start the same command again"


class UsageError(UserError):
    """The command line itself is wrong."""


def run(
    commands: Command | Mapping[str, Command],
    config: type | None = None,
    argv: list[str] | None = None,
    choices: Mapping[str, Registry[Any]] | None = None,
) -> None:
    """Check argv, then let Fire call the function. Exits: 0, 1 (failed), 2 (usage), 75 (stopped), 130 (Ctrl-C).

    config: the config class whose keys `--help` lists, for functions that take overrides. choices: flags whose
    values are members of a registry, which `--help` lists with their fields.
    """
    words = sys.argv[1:] if argv is None else argv
    _speak_in_any_locale()
    program = f"python {sys.argv[0]}"
    try:
        function, words, program = _choose(commands, words, program)
        if any(w in ("--help", "-h") for w in words):
            print(help_text(function, program, config, choices))
            return
        command = [f"--{name}={text}" for name, text in parse(function, words).items()]
        with _clean_notices():
            fire.Fire(_with_readers(function), command=command, name=program, serialize=lambda _: None)
    except UsageError as error:
        _fail(f"{error}\nSee: {program} --help", 2)
    except BrokenPipeError:  # what is printed is piped to a command that has read enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        raise SystemExit(1) from None
    except Stopped as stopped:
        status = stopped.status
    except UserError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error}{FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    else:
        return
    if argv is None:
        # all is saved and closed. A thread of some library's C++ that is still there when Python's own end is over
        # aborts the process now and then (status -6), and a scheduler then does not start the run again
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def _speak_in_any_locale() -> None:
    """Print what the terminal's encoding lacks as ?, and not as a traceback: help and names are not ASCII alone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


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
    listing = "\n".join(f"  {name:16s} {summary(f)}" for name, f in commands.items())
    if not words or words[0] in ("--help", "-h"):
        print(f"Usage: {program} COMMAND ...\n\n{listing}")
        raise SystemExit(0 if words else 2)
    if words[0] not in commands:
        raise UsageError(f"unknown command '{words[0]}'{did_you_mean(words[0], commands)}")
    return commands[words[0]], words[1:], f"{program} {words[0]}"


def parse(function: Command, words: list[str]) -> dict[str, str]:
    """{parameter: text}, which the signature knows and has all of. Raises UsageError for anything else."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    kinds = {p.name: p.kind for p in signature.parameters.values()}
    named = [n for n, k in kinds.items() if k is not inspect.Parameter.VAR_KEYWORD]
    places = [n for n in named if kinds[n] is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    switches = {n for n in named if _strip(hints.get(n)) is bool}
    loose, given = _split(words, switches, named, _family(kinds))
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


def _with_readers(function: Command) -> Command:
    """The function with a reader for each parameter, which Fire calls with the parameter's text; others stay text."""
    hints = typing.get_type_hints(function, include_extras=True)
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    readers = {name: functools.partial(_convert, name, hint=hints.get(name, str)) for name in names}

    @functools.wraps(function)
    def read(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return typing.cast(Command, SetParseFns(**readers)(SetParseFn(str)(read)))


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
    if plain is str or (str in options and typing.get_origin(plain) not in (list, tuple)):
        return text
    is_many = any(typing.get_origin(o) in (list, tuple) for o in (plain, *options))
    words = (
        [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
        if is_many
        else [text.strip()]
    )
    values: list[str] = [Scalar(word) if is_scalar(word) else word for word in words]
    value: Any = values if is_many else values[0]
    try:
        return pydantic.TypeAdapter(typed(hint)).validate_python(value)
    except pydantic.ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"--{name}={text}: {said[0].lower()}{said[1:]}") from None
