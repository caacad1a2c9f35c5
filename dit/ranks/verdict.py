"""Who holds a run up: judged from where each rank says that it is, and from which of them are heard of no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NAMED = 8  # ranks that a text names, at most


@dataclass(frozen=True)
class Phase:
    """What a rank is at between two steps done.

    order: ranks pass through phases in this order. is_limited: whether it may last no longer than the limit.
    """

    order: int
    is_limited: bool
    text: str


PHASES = {
    "hook": Phase(0, False, "in the held-out loss or the samples"),
    "save": Phase(0, False, "saving a checkpoint"),
    "data": Phase(1, True, "waiting for data"),
    "step": Phase(2, True, "in the training step"),
}


@dataclass
class Peer:
    """A rank as the judge knows it. Times are seconds of the judge's clock.

    began: steps done when its process began to train; the first step compiles, and has no limit.
    step, phase: where it is, since when. heard: of it last. left: in good order. gone: its connection ended.
    """

    rank: int
    host: str
    pid: int
    began: int
    heard: float
    step: int
    phase: str
    since: float
    left: bool = False
    gone: bool = False

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    @property
    def place(self) -> tuple[int, int]:
        """Grows as the rank gets on."""
        return self.step, PHASES[self.phase].order

    def move(self, step: int, phase: str, now: float) -> None:
        """Note that it was heard of, at this place."""
        self.heard = now
        if (step, phase) != (self.step, self.phase):
            self.step, self.phase, self.since = step, phase, now


@dataclass(frozen=True)
class Verdict:
    """Names the ranks that a run cannot go on with.

    text: which, and why. ranks: those. breaks: connections to them break, or soon will.
    """

    text: str
    ranks: tuple[int, ...]
    breaks: bool


@dataclass(frozen=True)
class Judge:
    """Judges by what was heard of each rank.

    silence: seconds that a rank may not be heard of. stall: seconds without progress in a limited phase.

    slack: seconds by which the last words of ranks that ended together may differ.
    """

    silence: float
    stall: float
    slack: float

    def verdict(self, peers: Sequence[Peer], now: float) -> Verdict | None:
        """Name the first there are of: ranks that ended without a word, are heard of no more, hold the others up."""
        there = [p for p in peers if not p.left]
        return self._gone(there) or self._silent(there, now) or self._stalled(there, now)

    def _gone(self, there: list[Peer]) -> Verdict | None:
        gone = [p for p in there if p.gone]
        if not gone:
            return None
        text = f"{_names(gone)} ended without a word, last heard of {_where(gone[0])}: killed or crashed"
        return Verdict(text, _ranks(gone), breaks=True)

    def _silent(self, there: list[Peer], now: float) -> Verdict | None:
        if not any(now - p.heard > self.silence for p in there):
            return None
        silent = [p for p in there if now - p.heard > self.silence - self.slack]
        return Verdict(
            f"{_names(silent)} {_have(silent)} not been heard of for {now - silent[0].heard:.0f} s, last "
            f"{_where(silent[0])}: stopped, or the node or its network is down",
            _ranks(silent),
            breaks=False,
        )

    def _stalled(self, there: list[Peer], now: float) -> Verdict | None:
        """Name the ranks that are furthest behind, if none of them has moved for the limit and none may rest there."""
        last = min((p.place for p in there), default=(0, 0))
        behind = [p for p in there if p.place == last]
        seconds = min((now - p.since for p in behind), default=0.0)
        if seconds <= self.stall or not all(PHASES[p.phase].is_limited and p.step > p.began for p in behind):
            return None
        place = f"{_where(behind[0])} for {seconds:.0f} s"
        if len(behind) < len(there) or len(there) == 1:
            ahead = len(there) - len(behind)
            waiting = f", and {ahead} other{'s' * (ahead > 1)} cannot go on without" if ahead else ""
            text = f"{_names(behind)} {_have(behind)} been {place}{waiting}"
        else:
            text = f"all {len(there)} ranks have been {place}: the network, or a collective that some take no part in"
        return Verdict(f"{text} (train.hang_timeout = {self.stall:g})", _ranks(behind), breaks=False)


def failed(peer: Peer, error: str) -> Verdict:
    """Make the verdict of what a rank says itself of why it ends."""
    return Verdict(f"{peer.name} failed {_where(peer)}: {error}", (peer.rank,), breaks=True)


def _names(peers: list[Peer]) -> str:
    more = f" and {len(peers) - NAMED} more" if len(peers) > NAMED else ""
    return ", ".join(p.name for p in peers[:NAMED]) + more


def _ranks(peers: list[Peer]) -> tuple[int, ...]:
    return tuple(p.rank for p in peers)


def _have(peers: list[Peer]) -> str:
    return "has" if len(peers) == 1 else "have"


def _where(peer: Peer) -> str:
    return f"{PHASES[peer.phase].text} after step {peer.step}"
