"""Signals that come while Python still imports torch and the rest, which takes seconds: none is lost.

A tool that trains calls `listen` before it imports anything heavy. Schedulers' signals are kept until the run hears
them (`dit.ranks.group.on_signals`); Ctrl-C ends the process with a word instead of a traceback of the import.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

_kept: list[int] = []
_before: dict[int, Any] = {}  # the handlers that were there; empty while nobody listens


def listen() -> None:
    """Keep schedulers' signals from here on."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        _before[number] = signal.signal(number, _keep)
    _before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)


def stop_listening() -> list[int]:
    """Give the signals back to the handlers that they had, and return those that came meanwhile, each once."""
    for number, handler in _before.items():
        signal.signal(number, handler)
    _before.clear()
    kept = list(dict.fromkeys(_kept))
    _kept.clear()
    return kept


def end_if_asked() -> None:
    """Stop listening, for a command that saves nothing: a signal that came ends it now, as it would have then."""
    for number in stop_listening():
        signal.raise_signal(number)


def _keep(number: int, frame: FrameType | None) -> None:
    _kept.append(number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted while starting: nothing has begun, nothing was changed\n")
    os._exit(130)  # an exception may be lost in the middle of an import
