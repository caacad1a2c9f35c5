"""Ending early in good order: a signal to any rank is heard by all of them at the same step.

Schedulers send one before they end a job: SLURM that of --signal=USR1@N before the time limit, and SIGTERM before
the SIGKILL of a preemption or a cancellation.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as td

from dit.ranks.group import World, on_signals


class RankFlags:
    """Small numbers of all ranks, of which the greatest counts. Nobody waits for the answer.

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
        """Once after every step, on every rank: for each number the greatest of the step before; 0 at first."""
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
    """Whether this rank was asked to end."""

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None

    def hear(self, number: int, frame: FrameType | None) -> None:
        """As a signal's handler."""
        self.heard = signal.Signals(number)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """One that hears the signals inside."""
    request = StopRequest()
    with on_signals(request.hear):
        yield request


@contextlib.contextmanager
def rank_flags(world: World) -> Iterator[RankFlags]:
    """Collective."""
    flags = RankFlags(world)
    try:
        yield flags
    finally:
        flags.close()
