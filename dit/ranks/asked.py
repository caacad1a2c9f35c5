"""An end that was asked for by a signal: heard at once, and acted on where the work says that it may be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import FrameType

from dit.errors import Stopped
from dit.ranks import group


class EndAsked:
    """Schedulers' signals, kept until `look`. Work that finds one is left where it is, with what is done kept."""

    def __init__(self) -> None:
        self._heard = False

    def look(self) -> None:
        """Raise Stopped where a signal has come to this rank."""
        if self._heard:
            raise Stopped

    @contextlib.contextmanager
    def listening(self) -> Iterator[EndAsked]:
        """Keep signals inside; those that came while Python was still importing, too."""
        with group.on_signals(self._hear):
            yield self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True


@contextlib.contextmanager
def telling(kept: Callable[[], str]) -> Iterator[None]:
    """Say on rank 0 what is kept, where the body raises Stopped (as ranks that act together do on all of them)."""
    try:
        yield
    except Stopped:
        if group.World.from_env().is_main:
            print(f"stopped: {kept()}", flush=True)
        raise
