"""Signals that come while Python still imports torch and the rest, which takes seconds: none is lost.

Every tool calls `listen` before it imports anything heavy: Ctrl-C then ends the process with a word instead of a
traceback of the import. Schedulers' signals are kept, for tools that save when one comes, until the run hears them
(`dit.ranks.group.on_signals`); other tools end by them as ever. `dit.commandline.cli.run` says when imports are over.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

# Those by which schedulers ask a job to end in good order, before they end it themselves.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_kept: list[int] = []
_before: dict[int, Any] = {}  # the handlers that were there; empty while nobody listens


def listen(keep: Sequence[int] = SIGNALS) -> None:
    """End with a word at Ctrl-C, and keep other signals, from here on. keep: none, for tools that do not hear them."""
    for number in keep:
        _before[number] = signal.signal(number, _keep)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # which says that it runs in the background
        _before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)


def end_imports() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: something may have begun. What is kept stays so."""
    if signal.SIGINT in _before:
        signal.signal(signal.SIGINT, _before.pop(signal.SIGINT))


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
