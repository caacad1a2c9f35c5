"""Ending early in good order: a signal to any rank is heard by all of them at the same step.

Schedulers send one before they end a job: SLURM that of --signal=USR1@N before the time limit, and SIGTERM before
the SIGKILL of a preemption or a cancellation. Ctrl-C (SIGINT) is heard likewise; a second one ends at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as td

from dit.errors import Interrupted
from dit.ranks.group import SIGNALS, World, on_signals

# With which urgency a rank was asked to end. Over ranks the greatest counts.
GO_ON, STOPPED, INTERRUPTED = range(3)
SAME = 2.0  # seconds within which signals are one: a terminal and the launchers under it may each send theirs
LEAVE = 3.0  # seconds for the words of a second Ctrl-C, before the process ends whatever it is at


class RankFlags:
    """Compares small numbers of all ranks, of which the greatest counts. Nobody waits for the answer.

    The numbers of a step are compared while the next one is computed (over gloo, beside whatever the devices do), and
    so are known one step later.
    """

    def __init__(self, world: World):
        """Collective."""
        several = world.size > 1 and td.is_initialized()
        self._group: Any = td.new_group(backend="gloo") if several else None
        self._posted = torch.zeros(0)
        self._work: Any = None  # the comparison of the last step's numbers

    def exchange(self, *mine: int) -> Sequence[int]:
        """Give for each number the greatest of the step before, 0 at first. Once after every step, on every rank."""
        if self._group is None:
            return mine
        found = [0] * len(mine)
        if self._work is not None:
            self._work.wait()
            found = self._posted.tolist()
        self._posted = torch.tensor(mine)
        self._work = td.all_reduce(self._posted, td.ReduceOp.MAX, group=self._group, async_op=True)
        return found

    def close(self) -> None:
        """Wait for what is under way, before the process group goes."""
        if self._work is not None:
            with contextlib.suppress(RuntimeError):  # another rank is gone, and has said why
                self._work.wait()


class StopRequest:
    """Hears whether this rank is asked to end, and how urgently.

    A scheduler's signal is heard at the next step. So is the first Ctrl-C, while steps are being done; before, where
    there is nothing to save, it ends the process as ever, by a KeyboardInterrupt, and so does a second one.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self._between_steps = False
        self._last = -float("inf")  # when the last signal came, on time.monotonic's clock

    @property
    def urgency(self) -> int:
        """GO_ON, STOPPED (by a scheduler) or INTERRUPTED (by Ctrl-C)."""
        if self.heard is None:
            return GO_ON
        return INTERRUPTED if self.heard == signal.SIGINT else STOPPED

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal, as its handler. Raises KeyboardInterrupt as the class says."""
        now, before = time.monotonic(), self._last
        self._last = now
        if number != signal.SIGINT:
            self.heard = self.heard or signal.Signals(number)
        elif not self._between_steps:
            raise KeyboardInterrupt
        elif self.heard != signal.SIGINT:
            self.heard = signal.SIGINT
            _print(
                "Ctrl-C: the run ends after this step, once it is saved; a second one ends it at once, unsaved"
            )
        elif now - before > SAME:
            _end_soon()
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def is_heard_after_steps(self) -> Iterator[None]:
        """Have the first Ctrl-C wait for the end of a step: there are steps inside."""
        self._between_steps = True
        try:
            yield
        finally:
            self._between_steps = False


def _print(text: str) -> None:
    """Print from a signal's handler, which may have come in the middle of another print."""
    if World.from_env().is_main:
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


def _end_soon() -> None:
    """End the process though it may hang where no exception reaches, or its threads still write."""
    end = threading.Timer(LEAVE, os._exit, (Interrupted.status,))
    end.daemon = True
    end.start()


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Hear the signals of schedulers and Ctrl-C inside."""
    request = StopRequest()
    with on_signals(request.hear, (*SIGNALS, signal.SIGINT)):
        yield request


@contextlib.contextmanager
def rank_flags(world: World) -> Iterator[RankFlags]:
    """Have the ranks compare numbers inside. Collective."""
    flags = RankFlags(world)
    try:
        yield flags
    finally:
        flags.close()
