"""torchrun, for launch/local.sh: its arguments; the ranks' exit status; one line where it has a traceback of itself.

What a rank says of its error, traceback or not, stays as the rank wrote it, and comes right before that line. Signals
are passed on to the ranks, which save and end (status 75, after Ctrl-C 130); torchrun by itself would kill those that
take longer than 30 s for it, and end with a status of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

SAME = 2.0  # seconds within which signals are one: a terminal and who started this may each send theirs


class PassOn:
    """Sends this process's signals to the ranks, its children, and waits for their end as if nothing had come.

    A second Ctrl-C (SIGINT) is passed on too, and then torchrun ends the ranks in its own way: SIGKILL after 30 s.
    """

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.heard: list[int] = []
        self._last = -float("inf")

    def begin(self) -> None:
        """Pass signals on from here on."""
        for number in self.numbers:
            signal.signal(number, self.hear)
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # those that are left to torchrun

    def hear(self, number: int, frame: FrameType | None) -> None:
        ranks = _children()
        if not ranks:  # torch is still being imported
            os.write(2, f"launch/local.sh: stopped by {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number) if os.getpgid(pid) == pid else os.kill(pid, number)
        now, before = time.monotonic(), self._last
        is_second = number == signal.SIGINT in self.heard and now - before > SAME
        self._last = now
        self.heard.append(number)
        if is_second:
            raise SignalException("a second Ctrl-C", signal.SIGINT)


def _children() -> list[int]:
    """List this process's children that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state not in "ZX":
                found.append(int(path.parent.name))
    return found


passed = PassOn()
if __name__ == "__main__" and Path("/proc/self/stat").is_file():
    passed.begin()  # first of all: importing torch takes seconds
# Each of torchrun's loggers takes a level of its own when it is made.
logging.disable(logging.ERROR)

from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure  # noqa: E402
from torch.distributed.run import main  # noqa: E402

from dit.errors import Interrupted, Stopped  # noqa: E402


def ended(rank: int, failure: ProcessFailure) -> str:
    """How a rank ended."""
    if failure.exitcode >= 0:
        return f"rank {rank} failed (exit status {failure.exitcode}): see its error above"
    try:
        name = signal.Signals(-failure.exitcode).name
    except ValueError:
        name = f"signal {-failure.exitcode}"
    hint = "; out of memory?" if name == "SIGKILL" else ""
    return f"rank {rank} was killed by {name}{hint}"


def stopped_by(number: int) -> int:
    """Say which signal ended all, and give the exit status that shells have after it."""
    print(f"launch/local.sh: stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    return 128 + number


def run() -> int:
    """The exit status: the ranks', or torchrun's, and as shells have it after a signal."""
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (Stopped.status, Interrupted.status):
            return failure.exitcode
        if -failure.exitcode in passed.heard:  # a program that knows nothing of signals
            return stopped_by(-failure.exitcode)
        print(f"launch/local.sh: {ended(rank, failure)}", file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        return stopped_by(error.sigval)
    except KeyboardInterrupt:
        return Interrupted.status
    return 0


if __name__ == "__main__":
    sys.exit(run())
