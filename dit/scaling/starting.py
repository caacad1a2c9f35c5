"""How a run of a plan is started as a process, and claimed, so that nobody else starts it too.

A claim is a lock on OUT/locks/NAME, which the run's process holds too: whoever else runs the same plan leaves the run
alone until that process has ended, even where the one who started it was killed. The run directory's own lock keeps
out whoever starts the run by other means.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import torch

from dit.errors import Notice
from dit.files import try_lock
from dit.ranks import group
from dit.scaling.plan import PlannedRun
from dit.scaling.planned import ScalingError

ROOT = Path(__file__).resolve().parents[2]
LOCKS = "locks"
NO_LOCK = (
    "{} lies on a file system without file locks: nothing keeps a second runner of this experiment from starting the "
    "same runs, and two would cut off each other's logs and checkpoints. Start one at a time, or plan it on another "
    "file system (Lustre has locks where it is mounted with -o flock)"
)


class Process(Protocol):
    """What `subprocess.Popen` is, as far as it is used here."""

    def poll(self) -> int | None:
        """Give the exit status; None while it runs."""

    def send_signal(self, number: int) -> None:
        """Send it a signal."""

    def kill(self) -> None:
        """End it at once."""


@dataclass(frozen=True)
class Start:
    """What a run is started with. lock: an open file that its process keeps open; env: over that of this process."""

    run: PlannedRun
    config: Path
    log: IO[bytes]
    lock: int
    ranks: int
    env: Mapping[str, str]

    @property
    def command(self) -> list[str]:
        """The command that trains it."""
        if self.ranks > 1:
            return [str(ROOT / "launch" / "local.sh"), str(self.config)]
        return [sys.executable, str(ROOT / "tools" / "train.py"), str(self.config)]


class Session(subprocess.Popen[bytes]):
    """A process in a session of its own, which is killed with all that it has started."""

    def kill(self) -> None:
        """End all of them at once."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


def start_process(start: Start) -> Process:
    """Start a run in a session of its own: a Ctrl-C reaches it through the runner alone."""
    return Session(
        start.command,
        stdin=subprocess.DEVNULL,
        stdout=start.log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **start.env},
        pass_fds=(start.lock,),
        start_new_session=True,
    )


def environment(slot: int, jobs: int, ranks: int) -> dict[str, str]:
    """Give run number `slot` of the `jobs` at a time its share of the machine's cores and GPUs."""
    env = {"PYTHON": sys.executable, "NPROC": str(ranks)} if ranks > 1 else {}
    if "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(max(1, group.cores() // (jobs * ranks)))
    devices = _devices()
    if devices and jobs > 1:
        mine = [devices[(slot * ranks + i) % len(devices)] for i in range(ranks)]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
    return env


def _devices() -> list[str]:
    """Name the GPUs that may be used here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [word for word in visible.split(",") if word]
    return [str(i) for i in range(torch.cuda.device_count())]


# --- claims ----------------------------------------------------------------------------------------------------


def claim_file(out: Path, name: str) -> Path:
    """Name the file whose lock says that somebody here is at a run."""
    return out / LOCKS / name


def claimed(path: Path) -> int | None:
    """Lock a file: its descriptor; None where somebody else holds it.

    On a file system without locks everybody gets it, and a Notice says so: the run directory has none there either.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    is_mine = try_lock(descriptor)
    if is_mine is False:
        os.close(descriptor)
        return None
    if is_mine is None:
        warnings.warn(NO_LOCK.format(path.parent), Notice, stacklevel=2)
    return descriptor


@contextlib.contextmanager
def no_runner(out: Path, names: Sequence[str]) -> Iterator[None]:
    """Hold the claims of runs, so that no runner here starts them meanwhile. ScalingError where one is at them."""
    held: list[int] = []
    (out / LOCKS).mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            lock = claimed(claim_file(out, name))
            if lock is None:
                raise ScalingError(f"{name} is being run here now: wait for its end, or stop that")
            held.append(lock)
        yield
    finally:
        for lock in held:
            os.close(lock)
