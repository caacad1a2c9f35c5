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
class Member:
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
        """It was heard of, at this place."""
        self.heard = now
        if (step, phase) != (self.step, self.phase):
            self.step, self.phase, self.since = step, phase, now


@dataclass(frozen=True)
class Verdict:
    """text: which ranks, and why. ranks: those. breaks: connections to them break, or soon will."""

    text: str
    ranks: tuple[int, ...]
    breaks: bool


@dataclass(frozen=True)
class Judge:
    """silence: seconds that a rank may not be heard of. stall: seconds without progress in a limited phase.

    slack: seconds by which the last words of ranks that ended together may differ.
    """

    silence: float
    stall: float
    slack: float

    def verdict(self, members: Sequence[Member], now: float) -> Verdict | None:
        """The first of: ranks that ended without a word, that are heard of no more, that hold the others up."""
        there = [m for m in members if not m.left]
        return self._gone(there) or self._silent(there, now) or self._stalled(there, now)

    def _gone(self, there: list[Member]) -> Verdict | None:
        gone = [m for m in there if m.gone]
        if not gone:
            return None
        text = f"{_names(gone)} ended without a word, last heard of {_where(gone[0])}: killed or crashed"
        return Verdict(text, _ranks(gone), breaks=True)

    def _silent(self, there: list[Member], now: float) -> Verdict | None:
        if not any(now - m.heard > self.silence for m in there):
            return None
        silent = [m for m in there if now - m.heard > self.silence - self.slack]
        return Verdict(
            f"{_names(silent)} {_have(silent)} not been heard of for {now - silent[0].heard:.0f} s, last "
            f"{_where(silent[0])}: stopped, or the node or its network is down",
            _ranks(silent),
            breaks=False,
        )

    def _stalled(self, there: list[Member], now: float) -> Verdict | None:
        """The ranks that are furthest behind, if none of them has moved for the limit and none may rest there."""
        last = min((m.place for m in there), default=(0, 0))
        behind = [m for m in there if m.place == last]
        seconds = min((now - m.since for m in behind), default=0.0)
        if seconds <= self.stall or not all(PHASES[m.phase].is_limited and m.step > m.began for m in behind):
            return None
        place = f"{_where(behind[0])} for {seconds:.0f} s"
        if len(behind) < len(there) or len(there) == 1:
            ahead = len(there) - len(behind)
            waiting = f", and {ahead} other{'s' * (ahead > 1)} cannot go on without" if ahead else ""
            text = f"{_names(behind)} {_have(behind)} been {place}{waiting}"
        else:
            text = f"all {len(there)} ranks have been {place}: the network, or a collective that some take no part in"
        return Verdict(f"{text} (train.hang_timeout = {self.stall:g})", _ranks(behind), breaks=False)


def failed(member: Member, error: str) -> Verdict:
    """A rank said itself why it ends."""
    return Verdict(f"{member.name} failed {_where(member)}: {error}", (member.rank,), breaks=True)


def _names(members: list[Member]) -> str:
    more = f" and {len(members) - NAMED} more" if len(members) > NAMED else ""
    return ", ".join(m.name for m in members[:NAMED]) + more


def _ranks(members: list[Member]) -> tuple[int, ...]:
    return tuple(m.rank for m in members)


def _have(members: list[Member]) -> str:
    return "has" if len(members) == 1 else "have"


def _where(member: Member) -> str:
    return f"{PHASES[member.phase].text} after step {member.step}"
