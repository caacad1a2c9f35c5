"""What ends or accompanies a command: errors and warnings whose text alone is printed, and stops in good order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


class Notice(UserWarning):
    """Something that does not stop the work, and that its user should know: a command prints its text, on one line."""


class Stopped(Exception):
    """The run was asked to end, has saved and has said so. It goes on when the same command is started again."""

    status = 75  # that the command line exits with: EX_TEMPFAIL of sysexits.h, "try again"


class Interrupted(Stopped):
    """The same by Ctrl-C: whoever pressed it does not want the run to be started again for it."""

    status = 130  # of shells after SIGINT


class InterruptTold(KeyboardInterrupt):
    """A Ctrl-C that ended the work at once, of which all has been said: the command ends with no more words."""


class UserError(ValueError):
    """Something outside the code is wrong. The text says what came, what was expected and how to mend it."""


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: 1 run, 2 runs."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shown(value: Any) -> str:
    """Write a value as a message shows it: text in quotes, all else as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {shown(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return repr(str(value)) if isinstance(value, PurePath) else repr(value)
