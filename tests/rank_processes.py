"""Real ranks without the seconds that a process needs to import torch and deepspeed.

A fork server imports them once (tests/forks.py); every job then is N fresh processes, each forked from it with
torchrun's variables set, that join a gloo group, run one importable function and leave. They can be killed like any
other.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from dit.ranks import group
from tests import forks


class RanksFailed(AssertionError):
    """A function failed on some rank. errors: rank -> (exception class's name, its text)."""

    def __init__(self, errors: dict[int, tuple[str, str]], details: str):
        self.errors = errors
        super().__init__(details)


@dataclass
class Job:
    """A function under way on some ranks; as a context it is killed at the end, if it has not ended before."""

    processes: list[Any]
    pipes: list[Connection]
    logs: list[Path]

    def kill(self) -> None:
        """SIGKILL every rank."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def output(self, rank: int = 0) -> str:
        """What a rank wrote to stdout and stderr."""
        return self.logs[rank].read_text()

    def wait(self, timeout: float = 250) -> list[Any]:
        """Each rank's result. RanksFailed if one failed, died or took longer than `timeout` seconds."""
        errors: dict[int, tuple[str, str]] = {}
        results: list[Any] = [None] * len(self.pipes)
        end, details = time.monotonic() + timeout, ""
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    errors[rank] = ("TimeoutError", f"no result after {timeout} s")
                    continue
                kind, value, trace = pickle.loads(pipe.recv_bytes())
            except EOFError:
                errors[rank] = ("Died", f"exit code {self.processes[rank].exitcode}")
                continue
            if kind == "ok":
                results[rank] = value
            else:
                errors[rank], details = (kind, value), details + trace
        if any(kind == "TimeoutError" for kind, _ in errors.values()):
            self.kill()
        for process in self.processes:
            process.join()
        if errors:
            logs = "".join(f"--- rank {r}\n{self.output(r)}" for r in errors)
            raise RanksFailed(errors, f"{errors}\n{details}\n{logs}")
        return results


class Server:
    """Starts jobs."""

    def __init__(self, folder: Path):
        """folder: for what the ranks print."""
        self._folder = folder
        self._jobs: list[Job] = []
        self._context = forks.context()

    def start(self, size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Job:
        """Begin function(*args, **kwargs) on `size` ranks. It must be importable by name, all values picklable."""
        return self._start(size, True, function, args, kwargs)

    def start_apart(self, size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Job:
        """As start, but the processes have not joined a group: to look at how they do, or at one that does not."""
        return self._start(size, False, function, args, kwargs)

    def _start(
        self,
        size: int,
        joined: bool,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Job:
        port = group.free_port()
        processes, pipes, logs = [], [], []
        for rank in range(size):
            here, there = self._context.Pipe(duplex=False)
            log = self._folder / f"job-{len(self._jobs):04d}-rank-{rank}.log"
            process = self._context.Process(
                target=_rank,
                args=(rank, size, port, there, str(log), joined, function, args, kwargs),
                daemon=True,
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
            logs.append(log)
        self._jobs.append(Job(processes, pipes, logs))
        return self._jobs[-1]

    def run(self, size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """start and wait: each rank's result."""
        return self.start(size, function, *args, **kwargs).wait()

    def close(self) -> None:
        """End what a failed test left."""
        for job in self._jobs:
            job.kill()


def _rank(
    rank: int,
    size: int,
    port: int,
    pipe: Connection,
    log: str,
    joined: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    forks.print_to(log, log)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with group.session() if joined else contextlib.nullcontext():
            result = ("ok", function(*args, **kwargs), "")
    except BaseException as error:  # noqa: BLE001 (sent to the test, which raises it)
        result = (type(error).__name__, str(error), traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        pipe.send_bytes(
            pickle.dumps(result)
        )  # not send(): it would share tensors' memory with a dead process
    pipe.close()
