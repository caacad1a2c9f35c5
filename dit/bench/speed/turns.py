"""Contenders in turns (A B C, C B A, ...): figures of one run, on one machine, with their spread."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from dit.version import code_version


@dataclass(frozen=True)
class Contender:
    """run(repeat) does the work of one turn and returns how many items it handled."""

    name: str
    run: Callable[[int], int]


@dataclass
class TurnFigures:
    """One contender's figures, a value a turn: items a second, and microseconds of CPU (all threads) an item."""

    rate: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, items: int, seconds: float, cpu_seconds: float) -> None:
        """Take in a turn."""
        self.rate.append(items / seconds)
        self.cpu.append(1e6 * cpu_seconds / items)


def take_turns(
    contenders: Sequence[Contender],
    repeats: int = 5,
    warmup: int = 1,
    progress: Callable[[], object] = lambda: None,
    after_round: Callable[[dict[str, TurnFigures]], object] = lambda found: None,
) -> dict[str, TurnFigures]:
    """Run each contender `repeats` times after `warmup` turns that do not count, in alternating order.

    progress: called after every turn. after_round: gets the figures so far once each has had a turn that counts.
    """
    found = {c.name: TurnFigures() for c in contenders}
    for turn in range(warmup + repeats):
        for contender in contenders if turn % 2 == 0 else reversed(contenders):
            start, cpu = time.perf_counter(), time.process_time()
            items = contender.run(turn)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
            if turn >= warmup:
                found[contender.name].add(items, seconds, cpu_seconds)
            progress()
        if turn >= warmup:
            after_round(found)
    return found


@dataclass(frozen=True)
class MedianRange:
    """Median, least and greatest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> MedianRange:
        """Sum up values, at least one."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> MedianRange:
    """Compare values of the same turns."""
    return MedianRange.of([a / b for a, b in zip(ours, theirs, strict=True)])


def protocol(**settings: Any) -> dict[str, Any]:
    """Say what a figure depends on: the settings given, and the machine and versions it was measured on."""
    return {
        **settings,
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "numpy": version("numpy"),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 2),
    }
