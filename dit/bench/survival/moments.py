"""When to kill a run, and what it is doing then: moments drawn before anything runs, and a start seen from outside."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dit.bench.survival.launched import Launched, last_logged

STARTING = 0.25  # of the kills fall between the ranks' birth and their first step
SAVING = 0.2  # of them from the beginning of a start's first checkpoint on; the others anywhere after its first step
POLL = 0.001  # seconds: a checkpoint is written in some ten
USED = 0.75  # of the steps that are left shall be done by the starts that are left to be killed

During = Literal["start", "steps", "saving"]


@dataclass(frozen=True)
class Aim:
    """A kill, as drawn before anything runs. moment: in [0, 1), of the time that `during` takes. ranks: those hit."""

    during: During
    moment: float
    ranks: tuple[int, ...]


def aims(kills: int, size: int, seed: int) -> list[Aim]:
    """Draw `kills` of them at `size` ranks, shares STARTING and SAVING during those, half of them at one rank alone."""
    draws = np.random.default_rng(seed)
    starting, saving = round(STARTING * kills), round(SAVING * kills)
    counts: dict[During, int] = {"start": starting, "saving": saving, "steps": kills - starting - saving}
    during = [name for name, count in counts.items() for _ in range(count)]
    order = draws.permutation(kills)
    alone = draws.permutation(kills) % 2 == 0
    moments, ranks = draws.random(kills), draws.integers(size, size=kills)
    return [
        Aim(
            during[order[i]],
            float(moments[i]),
            (int(ranks[i]),) if alone[i] else tuple(range(size)),
        )
        for i in range(kills)
    ]


def window(steps_left: int, kills_left: int, every: int) -> float:
    """Return over how many steps after a start's first a kill is spread, so that the kills left fit into the run.

    A start killed d steps after its first keeps d + 1 steps, less every / 2 on average that no checkpoint holds.
    At most half of what is left, as the steps may be quicker than they were.
    """
    progress = USED * steps_left / (kills_left * (1 - STARTING - SAVING))
    return float(min(2 * (progress + every / 2 - 1), steps_left / 2))


@dataclass(frozen=True)
class Pace:
    """Seconds: from the ranks' birth to the first step logged, from one step to the next, writing a checkpoint."""

    start: float
    steps: float
    saving: float


class ObservedStart:
    """A start of a run that goes on at step `resumes`, seen from outside."""

    def __init__(self, job: Launched, run_dir: Path, resumes: int, steps: int):
        """Begin before anything of the start is written."""
        self.job, self.run_dir, self.resumes, self.steps = job, run_dir, resumes, steps
        # seconds from the ranks' birth to the first step, where that was seen
        self.started: float | None = None
        self._file = last_logged(run_dir)[0]
        self._partial = self._partials()

    def logged(self) -> int:
        """Return the last step that this start has logged; the step it resumes at where it has logged none."""
        file, step = last_logged(self.run_dir)
        return step if file != self._file and step > self.resumes else self.resumes

    def moment(self, aim: Aim, pace: Pace, span: float) -> float:
        """Wait for the moment of a kill; returns the seconds since the ranks were there. Raises Ended.

        It comes at the latest with the first step, where it was to be before it, or two steps before the run's end.
        """
        self.job.wait_for_ranks()
        born = time.monotonic()
        if aim.during != "start":
            self.job.until(self._steps, "its first step", POLL)
            self.started = time.monotonic() - born
        if aim.during == "saving":
            self.job.until(
                lambda: self._ends() or self.phase() == "saving" or None, "its first checkpoint", POLL
            )
        takes = {"start": pace.start, "steps": span * pace.steps, "saving": pace.saving}
        due = time.monotonic() + aim.moment * takes[aim.during]
        late = self._steps if aim.during == "start" else self._ends
        self.job.until(lambda: late() or time.monotonic() > due or None, "its kill", POLL)
        return time.monotonic() - born

    def pace(self) -> Pace:
        """Measure the pace of a run that nobody disturbs, to its last step. Raises Ended."""
        self.job.wait_for_ranks()
        born = time.monotonic()
        self.job.until(self._steps, "the first step", POLL)
        first, began = self.logged(), time.monotonic()
        seen = began
        saving, saves = 0.0, set()

        def last() -> bool | None:
            nonlocal seen, saving
            before, seen = seen, time.monotonic()
            if self.phase() == "saving":
                saving += seen - before
                saves.add(max(self._ours(), default=""))
            return self.logged() >= self.steps or None

        self.job.until(last, "the last step", POLL)
        return Pace(
            began - born, (time.monotonic() - began) / max(1, self.steps - first), saving / max(1, len(saves))
        )

    def _steps(self) -> bool | None:
        """Whether it has logged a step."""
        return self.logged() > self.resumes or None

    def _ends(self) -> bool | None:
        """Whether the run is about to be done."""
        return self.logged() >= self.steps - 2 or None

    def phase(self) -> str:
        """Say what the run is doing: start, steps, saving (a checkpoint), removing (an old one)."""
        ours = self._ours()
        if ours:
            newest = max((p.name for p in (self.run_dir / "checkpoints").glob("step-*[0-9]")), default="")
            return "saving" if max(ours) > newest else "removing"
        return "steps" if self.logged() > self.resumes else "start"

    def _ours(self) -> set[str]:
        """Unfinished checkpoints that this start writes or removes."""
        return {name for name, _ in self._partials() - self._partial}

    def _partials(self) -> set[tuple[str, int]]:
        """Unfinished checkpoints, and when each last changed: a start clears away what others have left."""
        found = set()
        for path in (self.run_dir / "checkpoints").glob("*.partial"):
            try:
                found.add((path.name, path.stat().st_ctime_ns))
            except FileNotFoundError:  # finished, or cleared away, just now
                continue
        return found
