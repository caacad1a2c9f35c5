"""Processes without the seconds that one needs to import torch and deepspeed: forked from a server that has.

Each is a process of its own, with its own id, signals and end. It differs from one that is started afresh in what
lies imported when it begins, and in nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def context() -> ForkServerContext:
    """multiprocessing's, with its server running: its processes have imported tests/preloaded.py."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.preloaded"])
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([known] if known else [])])
    try:
        forkserver.ensure_running()
    finally:
        if known is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = known
    return found


def print_to(stdout: str | Path, stderr: str | Path) -> None:
    """What this process prints goes to these files from here on, of which both may be the same."""
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        stream.flush()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, stream.fileno())
        os.close(file)


def end() -> None:
    """End the server, which waits for its children."""
    stop = getattr(forkserver._forkserver, "_stop", None)
    if stop is not None:
        stop()
