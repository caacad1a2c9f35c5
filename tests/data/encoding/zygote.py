"""Processes without the seconds that one needs to import torch: forked from a process that has imported it.

Unlike tests/rank_processes.py they join no process group: any of them may be killed at any moment, the others go on.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[3]
PRELOADED = ("dit.data.encoding.encode", "tests.data.helpers")


class Zygote:
    """As a context: starts functions in processes of their own, and ends what is left of them."""

    def __init__(self, folder: Path):
        """folder: for what they print."""
        self._folder, self._alive = folder, set[int]()

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.data.encoding.zygote", str(self._folder)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        for pid in list(self._alive):
            self.kill(pid)
        self._process.communicate()

    def _ask(self, **question: Any) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, function: str, *args: Any) -> int:
        """Call `module:function` with JSON values: the process's id."""
        pid = self._ask(start=function, args=args)
        self._alive.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """How a process ends: 0, 1 after an exception, -9 if it was killed."""
        self._alive.discard(pid)
        return os.waitstatus_to_exitcode(self._ask(wait=pid))

    def kill(self, pid: int) -> int:
        """SIGKILL, and wait."""
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def output(self, pid: int) -> str:
        """What it printed."""
        return (self._folder / f"{pid}.log").read_text()


def _child(function: str, args: list[Any], folder: Path) -> None:
    log = os.open(folder / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 0
    try:
        module, name = function.split(":")
        getattr(importlib.import_module(module), name)(*args)
    except BaseException:  # noqa: BLE001 (its text is in the log)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Answer a question a line."""
    for module in PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            answer = os.fork()
            if not answer:
                _child(question["start"], question["args"], Path(sys.argv[1]))
        else:
            answer = os.waitpid(question["wait"], 0)[1]
        print(answer, flush=True)


if __name__ == "__main__":
    main()
