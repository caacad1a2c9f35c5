"""Ranks that watch each other while they train: one that dies, stops or stalls is named, and the others end.

Left alone, the others wait for it in a collective for as long as the backend likes (10 minutes and more), and then
say nothing about who it was. Here a thread of each rank (`dit.ranks.watch_threads`) tells rank 0's where its training
is, over a connection of its own; rank 0 judges (`dit.ranks.verdict`) and tells all. What the training thread pays is
one assignment a phase.
"""

from __future__ import annotations

import math
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from dit.errors import Stopped, UserError
from dit.ranks import group
from dit.ranks.group import PeerError, World
from dit.ranks.messages import connect, listener
from dit.ranks.verdict import Judge, Peer
from dit.ranks.watch_threads import PATIENCE, Hub, Post, Spoke, Watcher

CONNECT_SECONDS = 60.0
# Seconds. After a Ctrl-C gloo needs 7 until its groups are gone, and only then do the other ranks notice.
GRACE = 10.0
FOLDER = "hang"  # in the run directory: each rank's stacks


class WatchError(UserError):
    """The ranks cannot watch each other."""


class Watch:
    """Watches the ranks inside, a loop that all of them run; entering is collective.

    Inside, `at` says what this rank is at. Where a rank ends by an error of its own, the others' broken connections
    become a PeerError that names it and its error. Where nothing breaks, the watch ends the process (exit status 1),
    after it wrote the verdict to stderr and the stacks of all threads to RUN/hang/rank-XXXXX.txt.
    One rank alone is watched too: data that do not come should not keep a job's machine until its time limit.
    """

    def __init__(self, world: World, limit: float | None, run_dir: Path):
        """limit: seconds without progress in a step or in waiting for its data; None: no limit, also on silence."""
        stall = math.inf if limit is None else limit
        silence = min(60.0, stall / 2) if math.isfinite(stall) else stall
        beat = min(5.0, max(0.2, silence / 10))
        self.world = world
        judge = Judge(silence, stall, slack=2 * beat)
        self._post = Post(world.rank, beat, min(GRACE, stall), judge, run_dir / FOLDER)
        self._thread: Watcher | None = None

    def at(self, phase: str, step: int) -> None:
        """Note what this rank is at. phase: a key of verdict.PHASES. step: steps done."""
        self._post.place = (step, phase)

    def __enter__(self) -> Self:
        try:
            where = group.on_main(self._open)
            group.together(lambda: self._join(*where))
        except BaseException:
            self._leave(None)
            raise
        return self

    def _open(self) -> tuple[str, int, str, Peer]:
        """Begin on rank 0: give host and port where its watch listens, the word that opens it, and rank 0 itself."""
        server = None
        if self.world.size > 1:
            server = listener(self.world.size)
        token, me = secrets.token_hex(16), self._post.peer()
        self._thread = Hub(self._post, server, token)
        self._thread.start()
        # all ranks reach rank 0's node under this name, or they would form no group
        host = os.environ.get("MASTER_ADDR", me.host)
        return host, server.getsockname()[1] if server else 0, token, me

    def _join(self, host: str, port: int, token: str, main: Peer) -> None:
        """Begin on the other ranks, by connecting to rank 0's watch."""
        if self.world.is_main:
            return
        try:
            connection = connect(host, port, CONNECT_SECONDS)
            connection.send({"token": token, **asdict(self._post.peer())})
        except OSError as error:
            raise WatchError(
                f"rank {self.world.rank} on {group.node_name()} cannot reach rank 0's watch at {host}:{port} "
                f"({error}): allow connections to all ports between the nodes, which their collectives need as well"
            ) from error
        self._thread = Spoke(self._post, connection, main)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Stopped | PeerError):  # all ranks know of these
            self._leave(None)
        elif not group.is_broken_connection(error):
            name = type(error).__name__
            self._leave("interrupted" if isinstance(error, KeyboardInterrupt) else f"{name}: {error}"[:4000])
        else:
            verdict = self._thread.wait_for_verdict(PATIENCE) if self._thread else None
            self._leave(None if verdict else "lost its connection to another rank, which has not ended")
            if verdict is not None:
                raise PeerError(verdict.text) from error

    def _leave(self, why: str | None) -> None:
        if self._thread is not None:
            self._thread.leave(why)
            self._thread = None
