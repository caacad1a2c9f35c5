"""What all tests share: one thread a process, small data sets of real digits, a server that real ranks fork from."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch: several ranks share the cores
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # where more are asked for, none spins on a core that others need

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import forks
from tests.datasets import Digits, encode_digits
from tests.rank_processes import Server
from tests.surroundings import SIGNALS, compile_apart, forget

settings.register_profile("dit", deadline=None)  # an example's time says how busy the machine is, and no more
settings.load_profile("dit")
forget()
compile_apart()


@pytest.fixture(scope="session", autouse=True)
def _the_server_ends() -> Iterator[None]:
    """The one that processes are forked from, after all that may have started it."""
    yield
    forks.end()


@pytest.fixture(autouse=True)
def _signals_are_left_as_they_were() -> Iterator[None]:
    """Or a test far behind fails, whose processes ignore what this one did."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    after = [signal.getsignal(number) for number in SIGNALS]
    assert after == before, "signals are heard otherwise than before; see surroundings.signals_kept"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return encode_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`ranks.run(2, function, ...)` runs a function on real ranks; see tests/rank_processes.py."""
    server = Server(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()
