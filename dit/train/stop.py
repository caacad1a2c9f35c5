"""Ending early in good order: a signal to any rank is heard by all of them at the same step.

Schedulers send one before they end a job: SLURM that of --signal=USR1@N before the time limit, and SIGTERM before
the SIGKILL of a preemption or a cancellation. Ctrl-C (SIGINT) is heard likewise; a second one ends at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as td

from dit.errors import Interrupted
from dit.ranks.group import SIGNALS, World, on_signals

# With which urgency a rank was asked to end. Over ranks the greatest counts.
GO_ON, STOPPED, INTERRUPTED = range(3)
SAME = 2.0  # seconds within which signals are one: a terminal and the launchers under it may each send theirs
LEAVE = 3.0  # seconds until the process ends whatever it is at, after a Ctrl-C that ends it at once


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
        self.words: Callable[[], str] | None = (
            None  # what to say if steps end at once; None where none are done
        )
        self._presses = _Presses()

    @property
    def urgency(self) -> int:
        """GO_ON, STOPPED (by a scheduler) or INTERRUPTED (by Ctrl-C)."""
        if self.heard is None:
            return GO_ON
        return INTERRUPTED if self.heard == signal.SIGINT else STOPPED

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal, as its handler. Raises KeyboardInterrupt as the class says."""
        if number != signal.SIGINT:
            self.heard = self.heard or signal.Signals(number)
        elif self._presses.is_second() or self.words is None:
            raise KeyboardInterrupt
        elif self.heard != signal.SIGINT:
            self.heard = signal.SIGINT
            _print(
                "Ctrl-C: the run ends after this step, once it is saved; a second one ends it at once, unsaved"
            )

    @contextlib.contextmanager
    def is_heard_after_steps(self, words: Callable[[], str]) -> Iterator[None]:
        """Have the first Ctrl-C wait for the end of a step: there are steps inside.

        words: what to say of what there is, where a second one ends a process that hangs.
        """
        self.words = words
        try:
            yield
        finally:
            self.words = None


class _Presses:
    """Counts Ctrl-C: those that come within SAME seconds are one."""

    def __init__(self) -> None:
        self._last: float | None = None

    def is_second(self) -> bool:
        """Count one more, and tell whether it is another than the first."""
        now, before = time.monotonic(), self._last
        self._last = now
        return before is not None and now - before > SAME


class _Backstop(threading.Thread):
    """Ends the process after a Ctrl-C that asks for it, where the main thread sits in a call that no exception reaches.

    Python runs the handlers of signals in the main thread, between two of its own instructions: not while that waits
    for a device or another rank. This thread hears of signals as the system delivers them.
    """

    def __init__(self, request: StopRequest):
        super().__init__(name="backstop", daemon=True)
        self._request = request
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._end = threading.Timer(LEAVE, self._leave)
        self._end.daemon = True
        self._is_final, self._said = False, ""
        self._before: int | None = None  # what heard of signals until now, where this does instead

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:  # also where the thread has ended: the number may soon be another file's
            signal.set_wakeup_fd(self._before)
        self._writer.close()  # at which the thread ends, if it still listens
        if not self.is_alive():
            self._reader.close()
        if not self._is_final:  # else threads that still write may keep the process from ending
            self._end.cancel()

    def run(self) -> None:
        presses = _Presses()
        while number := self._reader.recv(1):
            if number[0] != signal.SIGINT:
                continue
            is_second, words = presses.is_second(), self._request.words
            if is_second or words is None:
                self._is_final = is_second
                self._end.start()  # first of all: the words look at a file system, which may be what hangs
                self._said = words() if words is not None else ""
                return
        self._reader.close()

    def _leave(self) -> None:
        if self._said:
            _print(f"ended at once: {self._said}")
        os._exit(Interrupted.status)


def _print(text: str) -> None:
    """Print on rank 0, in the middle of another print perhaps."""
    if World.from_env().is_main:
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())


@contextlib.contextmanager
def stop_request(may_exit: bool = True) -> Iterator[StopRequest]:
    """Hear the signals of schedulers and Ctrl-C inside.

    may_exit: whether a Ctrl-C that ends the run at once may end the process with it, where that hangs.
    """
    request = StopRequest()
    backstop = _Backstop(request) if may_exit else contextlib.nullcontext()
    with backstop, on_signals(request.hear, (*SIGNALS, signal.SIGINT)):
        yield request


@contextlib.contextmanager
def rank_flags(world: World) -> Iterator[RankFlags]:
    """Have the ranks compare numbers inside. Collective."""
    flags = RankFlags(world)
    try:
        yield flags
    finally:
        flags.close()
