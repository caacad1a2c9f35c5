"""Functions in processes of their own, forked from the tests' server (tests/forks.py).

Unlike tests/rank_processes.py they join no process group: any of them may be killed at any moment, the others go on.
"""

from __future__ import annotations

import importlib
import os
import signal
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

from tests import forks


class Zygote:
    """As a context: starts functions in processes of their own, and ends what is left of them."""

    def __init__(self, folder: Path):
        """folder: for what they print."""
        self._folder, self._alive = folder, dict[int, ForkServerProcess]()

    def __enter__(self) -> Self:
        self._context = forks.context()
        return self

    def __exit__(self, *error: object) -> None:
        for pid in list(self._alive):
            self.kill(pid)

    def start(self, function: str, *args: Any) -> int:
        """Call `module:function` with values that can be pickled: the process's id."""
        process = self._context.Process(target=_child, args=(function, args, self._folder), daemon=True)
        process.start()
        assert process.pid
        self._alive[process.pid] = process
        return process.pid

    def wait(self, pid: int) -> int:
        """How a process ends: 0, 1 after an exception, -9 if it was killed."""
        process = self._alive.pop(pid)
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def kill(self, pid: int) -> int:
        """SIGKILL, unless it has ended, and wait."""
        if self._alive[pid].exitcode is None:
            os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def output(self, pid: int) -> str:
        """What it printed."""
        return (self._folder / f"{pid}.log").read_text()


def _child(function: str, args: tuple[Any, ...], folder: Path) -> None:
    log = folder / f"{os.getpid()}.log"
    forks.print_to(log, log)
    forks.as_if_alone()
    try:
        module, name = function.split(":")
        getattr(importlib.import_module(module), name)(*args)
    except BaseException:  # noqa: BLE001 (its text is in the log)
        traceback.print_exc()
        raise SystemExit(1) from None
