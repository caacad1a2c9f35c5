"""How the ranks of a job find each other in a set time, and who is named when some do not come.

torch's own rendezvous waits as long as a collective may take, ten minutes and more, and then says that it waited. Here
each rank writes its node's name under its rank into rank 0's store, rank 0 waits for all, and tells every rank that
has come what it found.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as td

from dit.errors import UserError

SECONDS = "DIT_JOIN_SECONDS"  # the variable
Store = Any  # a torch.distributed.TCPStore, whose type torch hides from type checkers
GRACE = 5.0  # seconds at least, else a quarter, that others wait longer: rank 0 may have started after them


class JoinError(UserError):
    """The ranks of the job did not come together. The text names who is missing, or who cannot be reached."""


def patience() -> float:
    """Read how many seconds ranks wait for each other: DIT_JOIN_SECONDS, else 120. JoinError where that is none."""
    text = os.environ.get(SECONDS, "120")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise JoinError(f"{SECONDS}={text} is not a number of seconds above 0")
    return seconds


@dataclass(frozen=True)
class Meeting:
    """A rank at the place where the ranks of its job meet.

    node: the name of this rank's machine. job: what tells the job from others that may use the same port, the same
    on all ranks. address, port: rank 0's. nodes: names of all nodes of the job, or () where they are not known.
    """

    rank: int
    size: int
    node: str
    job: str
    address: str
    port: int
    nodes: tuple[str, ...] = ()

    def join(self) -> Store:
        """Give the store that all ranks share, once all have come. JoinError on every rank that is there, if not."""
        return self._host() if self.rank == 0 else self._visit()

    def _key(self, name: object) -> str:
        return f"dit/{self.job}/{name}"

    def _store(self, is_host: bool, seconds: float) -> Store:
        kind: Any = td.TCPStore  # type: ignore[attr-defined]
        return kind(
            self.address, self.port, self.size, is_host, timedelta(seconds=seconds), wait_for_workers=False
        )

    # --- rank 0 --------------------------------------------------------------------------------------------

    def _host(self) -> Store:
        seconds = patience()
        end = time.monotonic() + seconds
        store = self._listen(seconds)
        store.set(self._key(0), self.node)
        waited = list(range(1, self.size))
        while waited and time.monotonic() < end:
            if store.check([self._key(rank) for rank in waited]):
                waited = []
            else:
                time.sleep(0.05)
        missing = [rank for rank in waited if not store.check([self._key(rank)])]
        text = self._missing(store, missing, seconds) if missing else ""
        store.set(self._key("verdict"), text)
        if missing:
            self._until_read(store, self.size - len(missing) - 1)
            raise JoinError(text)
        return store

    def _listen(self, seconds: float) -> Store:
        try:
            return self._store(True, seconds)
        except RuntimeError as error:
            raise JoinError(
                f"rank 0 on {self.node} cannot serve at {self.address}:{self.port} ({_first_line(error)}): set "
                "MASTER_PORT to a port that is free, and MASTER_ADDR to a name of rank 0's node"
            ) from None

    def _missing(self, store: Store, missing: list[int], seconds: float) -> str:
        came: dict[str, list[int]] = {}
        for rank in sorted(set(range(self.size)) - set(missing)):
            came.setdefault(store.get(self._key(rank)).decode(), []).append(rank)
        there = "; ".join(f"{node} ({ranks_text(ranks)})" for node, ranks in came.items())
        silent = [node for node in self.nodes if node not in came]
        nobody = f" Nobody came from {', '.join(silent)}." if silent else ""
        return (
            f"{ranks_text(missing)} of {self.size} did not come to {self.address}:{self.port} within {seconds:g} s."
            f"{nobody} Came: {there}. Look for an error of their own above, and whether their nodes are up and reach "
            f"that port (firewall; another MASTER_PORT); {SECONDS}=N waits longer."
        )

    def _until_read(self, store: Store, others: int, seconds: float = 5.0) -> None:
        """The store goes with this process: stay until those that came have read why."""
        end = time.monotonic() + seconds
        while store.add(self._key("read"), 0) < others and time.monotonic() < end:
            time.sleep(0.05)

    # --- the others ----------------------------------------------------------------------------------------

    def _visit(self) -> Store:
        seconds = patience()
        end = time.monotonic() + seconds
        self._reach(seconds)
        try:
            store = self._store(False, max(1.0, end - time.monotonic()))
            store.set(self._key(self.rank), self.node)
            verdict = self._key("verdict")
            store.wait([verdict], timedelta(seconds=seconds + max(GRACE, seconds / 4)))
            text = store.get(verdict).decode()
            store.add(self._key("read"), 1)
        except RuntimeError as error:
            raise JoinError(
                f"{self._me()} reached {self.address}:{self.port}, and then heard nothing of rank 0 of this job "
                f"({_first_line(error)}): see rank 0's message, or another program has that port (MASTER_PORT)"
            ) from None
        if text:
            raise JoinError(text)
        return store

    def _reach(self, seconds: float) -> None:
        """Wait until somebody listens there. torch's own waiting takes twice its time and prints its call stack."""
        end = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection((self.address, self.port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise JoinError(
                        f"{self._me()} cannot reach rank 0 at {self.address}:{self.port} within {seconds:g} s "
                        f"({error.strerror or error}): see whether rank 0 has an error of its own, its node is up and "
                        f"the port open between the nodes; {SECONDS}=N waits longer"
                    ) from None
            time.sleep(0.1)

    def _me(self) -> str:
        return f"rank {self.rank} on {self.node}"


def ranks_text(ranks: Iterable[int]) -> str:
    """ "rank 3", "ranks 0-3, 7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return f"rank{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {shown}"


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
