"""Processes without the seconds that one needs to import torch and deepspeed: forked from a server that has.

Each is a process of its own, with its own id, signals and end. It differs from one that is started afresh in what
lies imported when it begins, and in nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "dit.experiments.diffusion",
    "dit.experiments.autoencoder",
    "dit.train.engines.zero_engine",
    "deepspeed.module_inject",  # imported by its first initialize(), as are those below
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "einops._torch_specific",
    "networkx",
    "torch._inductor.compile_fx",
    "torch._subclasses.schema_check_mode",
    "sklearn.datasets",
    "pytest",  # by every test's file
    "hypothesis",
    "tests.data.helpers",
    "tests.datasets",
    "tests.train.on_ranks",
    "tests.train.short_runs",
)


def context() -> ForkServerContext:
    """multiprocessing's, with its server running: its processes have imported PRELOADED."""
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


def as_if_alone() -> None:
    """Undo what multiprocessing changes in its processes: this one hears Ctrl-C, and may have children as any."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def end() -> None:
    """End the server, if it runs, at once: to take apart what it has imported would take seconds."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()
