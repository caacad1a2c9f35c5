"""The one wrapper of every command line: checks all arguments before Fire runs anything.

Fire by itself starts the work and complains about an unknown flag afterwards, takes `--help` behind a positional
for an argument, turns `--run_dir=2024` into a number and binds stray words to parameters. Here argv is checked
against the function's signature first, and `--help` only ever prints help; Fire then binds the words to parameters
and reads each value with a reader that is made of the parameter's type (text stays text), before it calls.

    def main(images: str, out: str, *, image_size: Annotated[int, "pixels a side"] = 256) -> None: ...
    run(main)                                  # or run({"verify": verify, "info": info}), or a Tool

A function with `**overrides: str` takes dotted configuration keys (`--train.steps=100`) as they were typed; one
with `**codec_keys: str` takes those of that family alone (`--codec.path=...`, or `--codec_path=...`), one with
`**solver_grid_keys: str` those of both families.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import os
import sys
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import fire
from fire.decorators import SetParseFn, SetParseFns

from dit.commandline.argv import (
    Tool,
    choose,
    convert,
    fail,
    help_asked,
    parse,
    speak_in_any_locale,
    where,
)
from dit.commandline.helptext import Command, UsageError, help_text
from dit.config import Registry
from dit.errors import Interrupted, InterruptTold, Notice, Stopped, UserError
from dit.progress import say
from dit.ranks import early

FULL = ": free space (or raise the quota) and start the same command again"


def run(
    commands: Tool | Command | Mapping[str, Command],
    config: type | None = None,
    argv: list[str] | None = None,
    choices: Mapping[str, Registry[Any]] | None = None,
) -> None:
    """Check argv, then let Fire call the function. Exits: 0, 1 (failed), 2 (usage), 75 (stopped), 130 (Ctrl-C).

    commands: a Tool, or its commands, with config and choices beside them. argv: instead of the process's own.
    """
    tool = commands if isinstance(commands, Tool) else Tool(commands, config, choices or {})
    words = sys.argv[1:] if argv is None else argv
    speak_in_any_locale()
    program = f"python {sys.argv[0]}"
    try:
        early.end_imports()
        function, words, program = choose(tool, words, program)
        if (topic := help_asked(words)) is not None:
            print(help_text(function, program, tool.config_of(function), tool.choices, topic))
            return
        command = [f"--{name}={text}" for name, text in parse(function, words).items()]
        with _clean_notices():
            fire.Fire(_with_readers(function), command=command, name=program, serialize=lambda _: None)
    except UsageError as error:
        fail(f"{error}\nSee: {program} --help", 2)
    except BrokenPipeError:  # what is printed is piped to a command that has read enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        raise SystemExit(1) from None
    except Stopped as stopped:
        status = stopped.status
    except UserError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(f"{error}{FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else ''}", 1)
    except InterruptTold:
        raise SystemExit(Interrupted.status) from None
    except KeyboardInterrupt:
        fail("interrupted", Interrupted.status)
    else:
        return
    if argv is None:
        _leave(status)
    raise SystemExit(status)


def _leave(status: int) -> typing.NoReturn:
    """End the process once all is saved and closed.

    A thread of some library's C++ that is still there when Python's own end is over aborts the process now and then
    (status -6), and a scheduler then does not start the run again.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _clean_notices() -> Iterator[None]:
    """Print a Notice as one line beside any bar, without the line of source that gave it; other warnings as ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        others = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                say(f"warning{where()}: {message}", sys.stderr)
            else:
                others(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _with_readers(function: Command) -> Command:
    """The function with a reader for each parameter, which Fire calls with the parameter's text; others stay text."""
    hints = typing.get_type_hints(function, include_extras=True)
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    readers = {name: functools.partial(convert, name, hint=hints.get(name, str)) for name in names}

    @functools.wraps(function)
    def read(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return typing.cast(Command, SetParseFns(**readers)(SetParseFn(str)(read)))
