"""Items one after the other, each in a process of its own, within so many seconds.

A process that crashes, hangs or leaves the device unusable costs its own item alone; its memory is free before the
next one. What it has told when its time is up is kept.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from dit.bench.gpu.item import Found, Item, Place

Status = Literal["ok", "failed", "cut short", "not reached"]
SPARE = 3.0  # times its estimate that an item may take
MOST_TEXT = 4000  # characters of an error that are kept, the last


@dataclass(frozen=True)
class Outcome:
    """What became of an item. seconds: that it took. estimate: that it was taken to take."""

    status: Status
    estimate: float
    seconds: float = 0.0
    text: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


@dataclass
class Runner:
    """Runs items. until: when all must have ended, by time.monotonic.

    start: "fork", which has all imports done, or "spawn", where the device does not bear that; `run` finds out.
    """

    is_toy: bool
    out: Path
    until: float
    start: Literal["fork", "spawn"] = "fork"
    has_no_device: bool = field(default=False, init=False)  # the last item, in its process

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def run(self, item: Item, known: Callable[[Item, Outcome], object]) -> None:
        """Run an item if it fits into what is left; known: gets its outcome, first and again as it changes."""
        if item.seconds > self.left:
            known(item, Outcome("not reached", item.seconds))
            return
        outcome = self.one(item, partial(known, item))
        if self.has_no_device and self.start == "fork":  # as where something has used CUDA before the fork
            self.start = "spawn"
            outcome = self.one(item, partial(known, item))
        known(item, outcome)

    def one(self, item: Item, known: Callable[[Outcome], object]) -> Outcome:
        """Run one item to its end, or to the end of its time. known: what it has told so far."""
        self.has_no_device = False
        context: Any = multiprocessing.get_context(self.start)
        ours, theirs = context.Pipe(duplex=False)
        place = Place(self.is_toy, self.out)
        process = context.Process(target=_work, args=(item, place, theirs), name=item.name)
        begun = time.monotonic()
        until = min(self.until, begun + max(SPARE * item.seconds, 30.0))
        process.start()
        theirs.close()
        outcome = Outcome("cut short", item.seconds, error="its time was up")
        try:
            while (wait := until - time.monotonic()) > 0:
                if not ours.poll(wait):
                    break
                try:
                    kind, value = ours.recv()
                except EOFError:  # it has ended, or died
                    process.join()
                    error = f"its process ended with status {process.exitcode}, and said nothing more"
                    outcome = _told(outcome, begun, status="failed", error=error)
                    break
                if kind == "found":
                    outcome = _told(outcome, begun, text=value.text, figures=value.figures)
                    known(outcome)
                    continue
                if kind == "done":
                    outcome = _told(outcome, begun, "ok", value.text, value.figures, "")
                else:
                    self.has_no_device = kind == "no device"
                    outcome = _told(outcome, begun, status="failed", error=value)
                break
        finally:
            _end(process)
            ours.close()
        return _told(outcome, begun)


def _told(
    before: Outcome,
    begun: float,
    status: Status | None = None,
    text: str | None = None,
    figures: dict[str, Any] | None = None,
    error: str | None = None,
) -> Outcome:
    """What is known now: what is not given stays."""
    return Outcome(
        status or before.status,
        before.estimate,
        round(time.monotonic() - begun, 1),
        before.text if text is None else text,
        before.figures if figures is None else figures,
        before.error if error is None else error,
    )


def _end(process: Any) -> None:
    """Kill what is left of a process and of those that it started (compilers, tests)."""
    with contextlib.suppress(ProcessLookupError):  # it leads no group yet, or nobody is left in it
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _work(item: Item, place: Place, told: Connection) -> None:
    """The item, in its process."""
    os.setsid()
    if not place.is_toy:
        try:
            torch.cuda.init()  # or all would run on the CPU where that fails
        except (RuntimeError, AssertionError):
            told.send(("no device", traceback.format_exc()[-MOST_TEXT:]))
            return
    try:
        found = item.run(Place(place.is_toy, place.out, lambda so_far: told.send(("found", so_far))))
        told.send(("done", Found(found.text, found.figures)))
    except Exception:  # noqa: BLE001 (recorded, and told at the end)
        told.send(("failed", traceback.format_exc()[-MOST_TEXT:]))
