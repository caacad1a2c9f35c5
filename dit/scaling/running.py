"""Running a plan here: each run a process of tools/train.py, trunks before their branches, several at a time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dit.errors import Interrupted, Stopped, plural
from dit.files import write_atomically
from dit.progress import Bar, say
from dit.ranks import group
from dit.scaling.configs import config_file
from dit.scaling.plan import Plan, PlannedRun
from dit.scaling.planned import ScalingError
from dit.scaling.starting import LOCKS, Process, Start, claim_file, claimed, environment, start_process
from dit.scaling.states import LOGS, RunState, failure_file, log_file

POLL = 0.2  # seconds between two looks at the processes
LOOK = 2.0  # seconds between two looks at how far they are
TOLD = 15  # lines of a failed run's log that are shown
ENDED_EARLY = (Stopped.status, Interrupted.status)


class RunsFailed(ScalingError):
    """Some runs ended with an error of their own, as the text says; all others are complete, or wait for them."""


@dataclass(frozen=True)
class Orders:
    """How a plan is run. only: names of runs; none = all. jobs: at a time. ranks: processes of each."""

    jobs: int = 1
    only: Sequence[str] = ()
    ranks: int = 1
    starter: Callable[[Start], Process] = start_process


@dataclass
class _Active:
    run: PlannedRun
    process: Process
    lock: int
    slot: int
    begun: float = field(default_factory=time.monotonic)


def run_plan(out: Path, plan: Plan, orders: Orders) -> None:
    """Run what is not complete. Raises ScalingError at the end where a run failed, Stopped where a signal ended it.

    The same command again goes on: complete runs are left alone, and others resume.
    """
    if orders.jobs < 1:
        raise ScalingError(f"jobs must be at least 1, got {orders.jobs}")
    runner = _Runner(out, chosen(out, plan, orders.only), orders)
    with group.on_signals(runner.hear, (*group.SIGNALS, signal.SIGINT)):
        runner.go()


def chosen(out: Path, plan: Plan, only: Sequence[str]) -> list[PlannedRun]:
    """Give the runs of these names, in the order of the plan, trunks first; all of them where none is named."""
    if other := [name for name in only if name not in plan]:
        raise ScalingError(
            f"there is no run {other[0]}; the plan has {', '.join(run.name for run in plan.runs)}"
        )
    runs = [run for run in plan.runs if not only or run.name in only]
    names = {run.name for run in runs}
    for run in runs:
        state = RunState(out, run)
        if run.trunk not in (None, *names) and not (state.is_complete or state.can_begin):
            raise ScalingError(
                f"{run.name} branches from {run.trunk} at a step that is not saved: run that too"
            )
    return sorted(runs, key=lambda run: run.trunk is not None)


class _Runner:
    """Starts runs as places become free, and looks after them."""

    def __init__(self, out: Path, runs: Sequence[PlannedRun], orders: Orders):
        self.out, self.runs, self.orders = out, list(runs), orders
        self.open = {run.name: run for run in runs}  # neither complete nor given up
        self.failed: dict[str, str] = {}
        self.active: list[_Active] = []
        self.asked: int | None = None  # the signal by which an end was asked for

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal; a second Ctrl-C ends the runs at once."""
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    # --- the course ----------------------------------------------------------------------------------------

    def go(self) -> None:
        """Run everything; raises as `run_plan`."""
        for folder in (LOCKS, LOGS):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        self._drop_complete()
        total = sum(run.own_flops for run in self.runs)
        if not self.open:
            say(f"complete already: {plural(len(self.runs), 'run')}; everything is in {self.out / 'runs'}")
            return
        try:
            with Bar[None](total=total, initial=self._done(), unit="FLOP", desc="runs", scale=True) as bar:
                self._course(bar)
        except KeyboardInterrupt:
            for active in self.active:
                active.process.kill()
            raise
        except BaseException:  # a full disk, say, on which nothing can be noted: no run is left to itself
            self._end()
            raise
        if self.asked is not None:
            self._stopped()
        if self.failed:
            raise RunsFailed(
                "\n".join(f"{name}: {why}" for name, why in self.failed.items())
                + f"\n{len(self.failed)} of {plural(len(self.runs), 'run')} failed; the same command tries them again"
            )
        say(f"complete: {plural(len(self.runs), 'run')}; everything is in {self.out / 'runs'}")

    def _course(self, bar: Bar[None]) -> None:
        looked = 0.0
        while self.open and self.asked is None:
            self._reap()
            self._start_ready()
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                bar.note(self._note())
                bar.update(max(0.0, self._done() - bar.n))
            if self.open:
                time.sleep(POLL)
        if self.asked is not None:
            self._terminate()
        while self.active:
            self._reap()
            time.sleep(POLL)
        bar.update(max(0.0, self._done() - bar.n))

    def _note(self) -> str:
        if self.active:
            return ", ".join(active.run.name for active in self.active)
        return "waiting for runs that others are at" if self.open else ""

    def _done(self) -> float:
        return sum(RunState(self.out, run).flops_done for run in self.runs)

    def _stopped(self) -> None:
        interrupted = self.asked == signal.SIGINT
        words = f"{'interrupted' if interrupted else 'stopped by a signal'}: what ran is saved, and the same command"
        say(f"{words} goes on")
        raise (Interrupted if interrupted else Stopped)(words)

    # --- starting ------------------------------------------------------------------------------------------

    def _drop_complete(self) -> None:
        for name, run in list(self.open.items()):
            if RunState(self.out, run).is_complete:
                failure_file(self.out, name).unlink(missing_ok=True)
                del self.open[name]

    def _start_ready(self) -> None:
        """Start what may be, as long as there is a free place."""
        running = {active.run.name for active in self.active}
        for name, run in list(self.open.items()):
            if len(self.active) >= self.orders.jobs:
                return
            if name not in running:
                self._consider(run)

    def _consider(self, run: PlannedRun) -> None:
        state = RunState(self.out, run)
        if state.is_complete:  # by somebody else
            del self.open[run.name]
        elif not state.can_begin:
            self._give_up_without_trunk(run)
        elif not state.is_running and (lock := claimed(claim_file(self.out, run.name))) is not None:
            if RunState(self.out, run).is_complete:  # between the two looks
                os.close(lock)
                del self.open[run.name]
            else:
                self._start(run, lock)

    def _give_up_without_trunk(self, run: PlannedRun) -> None:
        """Give up a branch whose trunk failed, or has nothing to branch from."""
        assert run.trunk is not None
        if run.trunk in self.failed:
            self._fail(run, f"not started, for its trunk {run.trunk} failed")
        elif run.trunk not in self.open and not RunState(self.out, run).can_begin:
            self._fail(
                run, f"{run.trunk} has no complete checkpoint of step {run.branch_step} to branch from"
            )

    def _start(self, run: PlannedRun, lock: int) -> None:
        failure_file(self.out, run.name).unlink(missing_ok=True)
        slot = min(set(range(self.orders.jobs)) - {active.slot for active in self.active})
        env = environment(slot, self.orders.jobs, self.orders.ranks)
        with log_file(self.out, run.name).open("ab") as log:
            start = Start(run, config_file(self.out, run.name), log, lock, self.orders.ranks, env)
            self.active.append(_Active(run, self.orders.starter(start), lock, slot))

    # --- ending --------------------------------------------------------------------------------------------

    def _terminate(self) -> None:
        """Have all runs save and end."""
        for active in self.active:
            active.process.send_signal(signal.SIGTERM)

    def _end(self) -> None:
        """Do so and wait for them, without a word of what becomes of each."""
        self._terminate()
        while any(active.process.poll() is None for active in self.active):
            time.sleep(POLL)

    def _reap(self) -> None:
        for active in list(self.active):
            status = active.process.poll()
            if status is not None:
                self.active.remove(active)
                os.close(active.lock)
                self._ended(active, status)

    def _ended(self, active: _Active, status: int) -> None:
        run, taken = active.run, time.monotonic() - active.begun
        if RunState(self.out, run).is_complete:
            del self.open[run.name]
            say(f"{run.name}: {run.steps} steps are done, after {taken:.0f} s")
        elif self.asked is not None and status in (*ENDED_EARLY, -signal.SIGTERM, 128 + signal.SIGTERM):
            say(f"{run.name}: stopped at step {RunState(self.out, run).step}")
        else:
            self._fail(run, self._why(run, status))

    def _why(self, run: PlannedRun, status: int) -> str:
        log = log_file(self.out, run.name)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TOLD:]
        how = f"by {_signal_name(-status)}" if status < 0 else f"with status {status}"
        said = [f"    {line}" for line in lines] or ["    it has said nothing"]
        return "\n".join([f"ended {how} before its last step ({log}):", *said])

    def _fail(self, run: PlannedRun, why: str) -> None:
        self.failed[run.name] = why
        del self.open[run.name]
        say(f"{run.name}: {why}")
        write_atomically(failure_file(self.out, run.name), why.encode())


def _signal_name(number: int) -> str:
    """As SIGKILL, with what it is a sign of where nobody here gave it."""
    name = signal.Signals(number).name if number in [*signal.Signals] else f"signal {number}"
    return f"{name} (for want of memory, if nobody sent it)" if number == signal.SIGKILL else name
