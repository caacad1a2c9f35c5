"""Ending early in good order: a signal to any rank is heard by all of them at the same step.

Schedulers send one before they end a job: SLURM that of --signal=USR1@N before the time limit, and SIGTERM before
the SIGKILL of a preemption or a cancellation.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as td

from dit.dist import World, on_signals


class StopRequest:
    """Whether any rank was asked to end. Nobody waits for the answer.

    The flags of a step are added up while the next one is computed (over gloo, beside whatever the devices do), and so
    are known one step later.
    """

    def __init__(self, world: World):
        """Collective."""
        self.heard: signal.Signals | None = None  # on this rank
        several = world.size > 1 and td.is_initialized()
        self._group: Any = td.new_group(backend="gloo") if several else None
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None  # the adding up of the last step's flags

    def hear(self, number: int, frame: FrameType | None) -> None:
        """As a signal's handler."""
        self.heard = signal.Signals(number)

    def agreed(self) -> bool:
        """Once after every step, on every rank: whether any rank had heard a signal by the step before."""
        if self._group is None:
            return self.heard is not None
        found = False
        if self._work is not None:
            self._work.wait()
            found = bool(self._flag.item())
        self._flag = torch.tensor([int(self.heard is not None)])
        self._work = td.all_reduce(self._flag, td.ReduceOp.MAX, group=self._group, async_op=True)
        return found

    def close(self) -> None:
        """Wait for what is under way, before the process group goes."""
        if self._work is not None:
            with contextlib.suppress(RuntimeError):  # another rank is gone, and has said why
                self._work.wait()


@contextlib.contextmanager
def stop_request(world: World) -> Iterator[StopRequest]:
    """One that hears the signals inside. Collective."""
    request = StopRequest(world)
    with on_signals(request.hear):
        try:
            yield request
        finally:
            request.close()
