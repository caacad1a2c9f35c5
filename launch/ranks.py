"""torchrun, for launch/local.sh: its arguments, its exit status, and one line where it has a traceback of itself.

What a rank says of its error, traceback or not, stays as the rank wrote it, and comes right before that line.
"""

from __future__ import annotations

import logging
import signal
import sys

# First of all: each of torchrun's loggers takes a level of its own when it is made.
logging.disable(logging.ERROR)

from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure  # noqa: E402
from torch.distributed.run import main  # noqa: E402

from dit.errors import Stopped  # noqa: E402


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


def run() -> int:
    """The exit status: torchrun's, and as shells have it after a signal."""
    try:
        main()
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode == Stopped.status:
            return Stopped.status
        print(f"launch/local.sh: {ended(*error.get_first_failure())}", file=sys.stderr, flush=True)
        return 1
    except SignalException as error:
        print(f"launch/local.sh: stopped by {signal.Signals(error.sigval).name}", file=sys.stderr, flush=True)
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
