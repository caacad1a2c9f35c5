"""The threads by which ranks watch each other: rank 0's hears them all and judges, theirs tell it and listen."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import selectors
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dit.ranks import group
from dit.ranks.messages import Connection, Message
from dit.ranks.verdict import PHASES, Judge, Peer, Verdict, failed

PATIENCE = 5.0  # seconds that a rank that leaves waits for the others' watches, at most
LINGER = 1.0  # seconds for the others to take the verdict


@dataclass
class Post:
    """Holds what a rank's two threads share. place: (steps done, phase), of which the training thread keeps track.

    beat: seconds between two words to rank 0. grace: seconds for a broken connection to show in the training thread,
    which then ends the process in good order. folder: for the stacks.
    """

    rank: int
    beat: float
    grace: float
    judge: Judge
    folder: Path
    place: tuple[int, str] = (0, "data")

    def peer(self) -> Peer:
        """Describe this rank for the judge."""
        step, phase = self.place
        return Peer(self.rank, group.node_name(), os.getpid(), step, 0.0, step, phase, 0.0)


class _Clock:
    """Counts the seconds in which this process ran: one that was suspended with its job must find nobody late."""

    def __init__(self, most: float):
        """most: seconds between two looks that count."""
        self._most, self._seconds, self._last = most, 0.0, time.monotonic()

    def now(self) -> float:
        now = time.monotonic()
        self._seconds += min(self._most, now - self._last)
        self._last = now
        return self._seconds


class Watcher(threading.Thread):
    """Watches the other ranks, in a thread of this one."""

    def __init__(self, post: Post):
        super().__init__(name="watch", daemon=True)  # never what keeps a process alive
        self.post, self.clock = post, _Clock(2 * post.beat)
        self.verdict: Verdict | None = None
        self.speaks = post.rank == 0  # prints the verdict if it ends the process
        self._judged, self._leaving = threading.Event(), threading.Event()

    # --- for the training thread ---

    def wait_for_verdict(self, seconds: float) -> Verdict | None:
        """Give the verdict, if there is one within `seconds`."""
        self._judged.wait(seconds)
        return self.verdict

    def leave(self, why: str | None) -> None:
        """End the watch. why: what ended this rank alone, for the others; None: nothing that they need to hear of."""
        raise NotImplementedError

    # --- in the thread ---

    def end(self, verdict: Verdict) -> None:
        """Give the training thread time to leave by itself; end the process if it does not."""
        begun = time.monotonic()
        self.verdict = verdict
        self._judged.set()
        while not self._leaving.is_set():
            self.listen_on(0.1)
            if time.monotonic() - begun > (self.post.grace if verdict.breaks else LINGER):
                words = threading.Thread(target=self._last_words, args=(verdict,), daemon=True)
                words.start()
                words.join(PATIENCE)  # a file system that hangs may be the very cause
                os._exit(1)  # the training thread sits in a collective, where no exception reaches it
        self.linger(begun + LINGER)

    def listen_on(self, seconds: float) -> None:
        """Wait after the verdict."""
        self._leaving.wait(seconds)

    def linger(self, end: float) -> None:
        """Stay for the other ranks until `end` (of time.monotonic) where the training thread leaves by itself."""

    def _last_words(self, verdict: Verdict) -> None:
        rank, folder = self.post.rank, self.post.folder
        if self.speaks or rank in verdict.ranks:
            print(f"\nerror (rank {rank}): {verdict.text}. Stacks: {folder}", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        step, phase = self.post.place
        with (folder / f"rank-{rank:05d}.txt").open("w", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {verdict.text}\n")
            file.write(f"rank {rank} on {group.node_name()}: {PHASES[phase].text} after step {step}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _verdict(message: Message) -> Verdict:
    found = message["verdict"]
    return Verdict(found["text"], tuple(found["ranks"]), found["breaks"])


class Spoke(Watcher):
    """Says where a rank other than 0 is, and listens to rank 0."""

    def __init__(self, post: Post, connection: Connection, main: Peer):
        """main: rank 0."""
        super().__init__(post)
        self._connection, self._main = connection, main
        self._main.heard = self.clock.now()

    def leave(self, why: str | None) -> None:
        with contextlib.suppress(OSError):  # then rank 0 is gone, and has no use for it
            self._connection.send({"left": True} if why is None else {"failed": why, **self._place()})
        self._leaving.set()
        self.join(PATIENCE)

    def _place(self) -> Message:
        step, phase = self.post.place
        return {"step": step, "phase": phase}

    def run(self) -> None:
        try:
            verdict = self._watch()
            if verdict is not None:
                self.end(verdict)
        finally:
            self._connection.close()

    def _watch(self) -> Verdict | None:
        """Listen until there is a verdict, or None: until this rank or rank 0 leaves in good order."""
        judge = Judge(self.post.judge.silence, math.inf, 0.0)
        while True:
            try:
                self._connection.send(self._place())
                for message in self._beat():
                    if "left" in message:
                        return None
                    if "verdict" in message:
                        return _verdict(message)
                    self._main.move(message["step"], message["phase"], self.clock.now())
            except OSError:
                self._main.gone = True
            verdict = judge.verdict([self._main], self.clock.now())
            if verdict is not None:
                if self._leaving.is_set():
                    return None
                self.speaks = True  # nobody else can tell; rank 0 finds it if it was only stopped and wakes
                with contextlib.suppress(OSError):
                    self._connection.send({"verdict": asdict(verdict)})
                return verdict

    def _beat(self) -> list[Message]:
        """Hear all that rank 0 says within a beat, or until it says the last it has to say."""
        heard: list[Message] = []
        end = time.monotonic() + self.post.beat
        while time.monotonic() < end and not any({"verdict", "left"} & m.keys() for m in heard):
            heard += self._connection.receive(end - time.monotonic())
        return heard


class Hub(Watcher):
    """Hears all ranks on rank 0, judges, and tells them."""

    def __init__(self, post: Post, server: socket.socket | None, token: str):
        """server: where the others connect; None where there are none. token: by which they are known."""
        super().__init__(post)
        self._me, self._server, self._token = post.peer(), server, token
        self._peers = {self._me.rank: self._me}
        self._whose: dict[Connection, int | None] = {}  # None: has not said who it is
        self._failure: Verdict | None = None
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()  # wakes the thread
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        if server is not None:
            self._selector.register(server, selectors.EVENT_READ)

    def leave(self, why: str | None) -> None:
        if why is not None:
            step, phase = self.post.place
            self._failure = failed(replace(self._me, step=step, phase=phase), why)
        self._leaving.set()
        with contextlib.suppress(OSError):  # the thread has ended already
            self._wake_sender.send(b"!")
        self.join(PATIENCE)

    def run(self) -> None:
        try:
            verdict = self._watch()
            self._tell({"left": True} if verdict is None else {"verdict": asdict(verdict)})
            if verdict is not None:
                self.end(verdict)
        finally:
            for connection in list(self._whose):
                self._drop(connection)
            for thing in (self._server, self._wake_receiver, self._wake_sender, self._selector):
                if thing is not None:
                    thing.close()

    def _watch(self) -> Verdict | None:
        """Listen until there is a verdict, or None: until all have left in good order."""
        left = math.inf
        while True:
            turn = time.monotonic() + min(self.post.beat, 0.5)  # to judge after every word would take a core
            while time.monotonic() < turn and not self._leaving.is_set() and self._failure is None:
                self._serve(max(0.0, turn - time.monotonic()))
            if self._leaving.is_set() and self._whose:
                self._serve(0.1)
            now = self.clock.now()
            self._me.move(*self.post.place, now)
            self._me.left = self._leaving.is_set() and self._failure is None
            verdict = self._failure or self.post.judge.verdict(list(self._peers.values()), now)
            if verdict is not None:
                return verdict
            if self._me.left:
                left = min(left, now)
                if all(m.left for m in self._peers.values()) or now - left > PATIENCE / 2:
                    return None

    def listen_on(self, seconds: float) -> None:
        self._serve(seconds)

    def linger(self, end: float) -> None:
        """Stay until the others have taken the verdict: closing before their words are read would take it back."""
        while self._whose and time.monotonic() < end:
            self._serve(0.1)

    def _serve(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._wake_receiver:
                self._wake_receiver.recv(64)
            elif key.fileobj is self._server:
                self._accept(self._server)
            elif isinstance(key.fileobj, Connection):
                self._hear(key.fileobj)

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # who asked has gone again, or there is no file left for one more
            connection = Connection(server.accept()[0])
            self._whose[connection] = None
            self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: Connection) -> None:
        """Take all that came, then answer: whoever has left in the meantime had his last words in it."""
        try:
            for message in connection.receive(0.0):
                rank = self._whose[connection]
                if rank is None:
                    self._admit(connection, message)
                else:
                    self._take(self._peers[rank], message)
            rank = self._whose[connection]
            if rank is not None:
                step, phase = self.post.place
                mine = {"left": True} if self._peers[rank].left else {"step": step, "phase": phase}
                connection.send(mine)
        except OSError:
            self._drop(connection)

    def _admit(self, connection: Connection, message: Message) -> None:
        """Admit a rank of this run; whatever else has found the port is sent away."""
        if message.pop("token", None) != self._token:
            raise ConnectionError("a stranger")
        peer = Peer(**message)
        peer.heard = peer.since = self.clock.now()
        self._peers[peer.rank], self._whose[connection] = peer, peer.rank

    def _take(self, peer: Peer, message: Message) -> None:
        if "step" in message:
            peer.move(message["step"], message["phase"], self.clock.now())
        if "failed" in message:
            self._failure = self._failure or failed(peer, message["failed"])
        if "verdict" in message:
            self._failure = self._failure or _verdict(message)
        peer.left |= "left" in message

    def _drop(self, connection: Connection) -> None:
        self._selector.unregister(connection)
        connection.close()
        rank = self._whose.pop(connection)
        if rank is not None:
            self._peers[rank].gone = True

    def _tell(self, message: Message) -> None:
        for connection in list(self._whose):
            try:
                connection.send(message)
            except OSError:
                self._drop(connection)
