"""The suite behaves as in a terminal of its own, also under a launcher, in an allocation or in the background."""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator

# What torchrun, SLURM, MPI and launch/ leave in the environment of what they start.
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "SLURM_",
    "SLURMD_",
    "PMI",
    "OMPI_",
    "DIT_",
    "NPROC",
    "DRY_RUN",
    "CONTAINER",
    "PREFLIGHT",
    "LIMIT",
)
KEPT = ("SLURM_CONF",)  # how a cluster is reached is no launcher's
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def forget() -> None:
    """Drop a launcher's variables from os.environ, and hear the signals that a parent had ignored or blocked.

    A shell's script starts what it puts in the background with SIGINT ignored, and so would be all that tests start.
    """
    for name in [n for n in os.environ if n.startswith(LAUNCHERS) and n not in KEPT]:
        del os.environ[name]
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            heard = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, heard)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Have the system refuse to write more than so many bytes to a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Hear signals afterwards as before: a command that ended in this process has left them as at its end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compile_apart() -> None:
    """Give torch.compile a cache of this process's own, which its ranks share and which goes with it.

    Two programs that compile into one folder at the same time, for different processors, spoil each other's headers.
    """
    folder = tempfile.mkdtemp(prefix="dit-tests-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
