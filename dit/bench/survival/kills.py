"""The kill test: SIGKILLs at random moments of a run's life, the same command after each, and the same run at the end.

An undisturbed run of the same command comes first: it says what must come out, and how long a start, a step and a
checkpoint take on this machine. A kill hits one rank alone, which launch/local.sh then has to notice, or all of them.
Its moment is uniform in one of three times: from the ranks' birth to their first step, some steps from there on, or
while the start's first checkpoint is written. What the run was really doing is looked at right before the kill.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dit.bench.survival.launched import (
    GLOBAL_BATCH,
    Ended,
    Launched,
    claim,
    last_logged,
    launch_to_end,
    read_lines,
)
from dit.bench.survival.moments import Aim, ObservedStart, Pace, aims, window
from dit.bench.survival.same import checkpoint_problems, figure_problems, leftovers, step_problems
from dit.config import ConfigError, config, to_dict
from dit.errors import UserError
from dit.files import read_text
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import CheckpointError


@config
class SurvivalBench:
    """kills: how many. steps, every: of the run and between its checkpoints. seed: of the moments and the ranks hit."""

    kills: int = 100  # SIGKILLs, each followed by the same command again
    steps: int = 300  # of the whole run
    every: int = 5  # steps between checkpoints
    ranks: int = 2  # processes, on the CPU
    stage: Literal[0, 1, 2, 3] = 2  # of ZeRO: 0 to 3
    seed: int = 0  # of the moments, and of the ranks hit

    def __post_init__(self) -> None:
        if self.kills < 1 or self.every < 1 or self.steps < 4 * self.every or self.seed < 0:
            raise ConfigError(
                f"kills must be at least 1, seed at least 0 and steps at least four times every; got "
                f"kills {self.kills}, seed {self.seed}, steps {self.steps}, every {self.every}"
            )
        if self.ranks < 1 or GLOBAL_BATCH % self.ranks:
            raise ConfigError(f"ranks must divide the global batch of {GLOBAL_BATCH}, got {self.ranks}")


@dataclass(frozen=True)
class Bench:
    """A benchmark in its folder."""

    folder: Path
    cfg: SurvivalBench

    def run(self, progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Do all of it, or what is left where it was interrupted: {"problems": [...], "kills": [...], ...}."""
        claim(self.folder, to_dict(self.cfg))
        pace, kills = self._undisturbed(), read_lines(self._log)
        planned = aims(self.cfg.kills, self.cfg.ranks, self.cfg.seed)
        for _ in kills:
            progress()
        for number, aim in enumerate(planned[len(kills) :], len(kills)):
            # the undisturbed run's start is a cold one
            start = next((k["started"] for k in reversed(kills) if k["started"]), pace.start)
            before = kills[-1]["checkpoint"] if kills else None
            kills.append(self._kill(number, aim, replace(pace, start=start), before))
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(kills[-1]) + "\n")
            progress()
        launch_to_end(self._words("killed"), self.cfg.ranks, self.folder / "logs" / "last.log")
        return self._figures(pace, kills)

    @property
    def _log(self) -> Path:
        return self.folder / "kills.jsonl"

    def _words(self, name: str) -> list[str]:
        """The command of a run in the folder."""
        cfg = self.cfg
        return [
            str(self.folder / "experiment.yaml"),
            f"--run_dir={self.folder / name}",
            f"--train.steps={cfg.steps}",
            f"--checkpoint.every={cfg.every}",
            f"--zero.stage={cfg.stage}",
            "--optim.schedule=cosine",
        ]

    def _undisturbed(self) -> Pace:
        """Run it without a kill, unless that was done before."""
        run_dir, kept = self.folder / "undisturbed", self.folder / "pace.json"
        if kept.is_file():
            return Pace(**json.loads(read_text(kept)))
        if run_dir.exists():
            raise UserError(f"{run_dir} was interrupted: remove {self.folder}, or give another --folder")
        log = self.folder / "logs" / "undisturbed.log"
        with Launched(self._words("undisturbed"), self.cfg.ranks, log) as job:
            pace = ObservedStart(job, run_dir, 0, self.cfg.steps).pace()
            if status := job.end():
                raise UserError(f"the undisturbed run failed (exit status {status}): {job.tail()}")
        kept.write_text(json.dumps(asdict(pace)), encoding="utf-8")
        return pace

    # --- one kill ---

    def _kill(self, number: int, aim: Aim, pace: Pace, before: int | None) -> dict[str, Any]:
        """Start, kill at the moment, wait for the end, look at what is there. before: the newest checkpoint's step.

        Raises UserError where the run ended before its kill, or left no checkpoint that can be loaded.
        """
        cfg, run_dir = self.cfg, self.folder / "killed"
        history = len(read_lines(run_dir / "history.jsonl"))
        span = window(cfg.steps - (before or 0), cfg.kills - number, cfg.every)
        log = self.folder / "logs" / f"kill-{number:04d}.log"
        with Launched(self._words("killed"), cfg.ranks, log) as job:
            start = ObservedStart(job, run_dir, before or 0, cfg.steps)
            try:
                seconds = start.moment(aim, pace, span)
                phase = start.phase()  # right before, or it would be another
                job.kill(aim.ranks)
            except Ended as error:
                raise UserError(self._too_early(number, error)) from None
            killed = time.monotonic()
            status = job.end()
            ended = time.monotonic() - killed
        step, problems = self._look(number, before)
        lines = len(read_lines(run_dir / "history.jsonl")) - history
        if lines != 1 and (phase != "start" or lines != 0):
            problems.append(f"history.jsonl has {lines} new lines of one start")
        if status == 0:
            problems.append("launch/local.sh ended with status 0 after its ranks were killed")
        return {
            "kill": number,
            **asdict(aim),
            "window_steps": round(span, 2),
            "seconds": round(seconds, 3),
            "started": start.started,
            "phase": phase,
            "resumed_at": before,
            "logged": start.logged(),
            "status": status,
            "end_seconds": round(ended, 2),
            "checkpoint": step,
            "problems": problems,
        }

    def _look(self, number: int, before: int | None) -> tuple[int | None, list[str]]:
        """(newest loadable checkpoint's step, what is wrong with what is there)."""
        broken: list[str] = []
        try:
            found = checkpoint.latest(self.folder / "killed" / "checkpoints", broken.append)
        except CheckpointError as error:
            raise UserError(f"kill {number} left no checkpoint that can be loaded: {error}") from None
        step = None if found is None else found.step
        if before is not None and (step is None or step < before):
            broken.append(f"the newest checkpoint was of step {before} and is of step {step}")
        return step, broken

    def _too_early(self, number: int, error: Ended) -> str:
        done = last_logged(self.folder / "killed")[1]
        if done < self.cfg.steps:
            return f"start {number} failed before it was killed: {error}"
        return (
            f"the run finished its {done} steps after {number} of {self.cfg.kills} kills: this machine has become much "
            "quicker than it was in the undisturbed run. Use another --folder, more --steps or fewer --kills"
        )

    # --- the end ---

    def _figures(self, pace: Pace, kills: list[dict[str, Any]]) -> dict[str, Any]:
        """What came of it."""
        killed, calm = self.folder / "killed", self.folder / "undisturbed"
        rows, reference = (read_lines(d / "metrics.jsonl") for d in (killed, calm))
        tensors, found = checkpoint_problems(*(checkpoint.resolve(d) for d in (killed, calm)))
        of_kills = [f"kill {k['kill']}: {problem}" for k in kills for problem in k["problems"]]
        of_log = step_problems(rows, self.cfg.steps) + figure_problems(rows, reference)
        found = [*of_kills, *leftovers(killed), *of_log, *found]
        resumed = sum(1 for k in kills if k["checkpoint"] is not None)  # each by the start that follows
        if not resumed:
            found.append(
                "no kill came after the first checkpoint: nothing was resumed; take more kills or steps"
            )
        done = sum(max(0, k["logged"] - (k["resumed_at"] or 0)) for k in kills)
        done += self.cfg.steps - (kills[-1]["checkpoint"] or 0)
        return {
            "problems": found,
            "phases": {
                hit: dict(Counter(k["phase"] for k in kills if (len(k["ranks"]) == 1) == alone))
                for hit, alone in (("one rank", True), ("all ranks", False))
            },
            "tensors": tensors,
            "starts": len(kills) + 1,
            "resumed": resumed,
            "steps_done": done,
            "pace": asdict(pace),
            "end_seconds": {
                "median": statistics.median(k["end_seconds"] for k in kills),
                "most": max(k["end_seconds"] for k in kills),
            },
            "kills": kills,
        }


def table(found: dict[str, Any]) -> str:
    """Show the figures of `run` to people."""
    phases = ("start", "steps", "saving", "removing")
    rows = [f"{'killed while':12s} " + " ".join(f"{p:>9s}" for p in phases)]
    for hit, counts in found["phases"].items():
        rows.append(f"{hit:12s} " + " ".join(f"{counts.get(p, 0):>9d}" for p in phases))
    last, pace, end = found["kills"][-1], found["pace"], found["end_seconds"]
    verdict = f"{len(found['problems'])} problems" if found["problems"] else "as if nobody had disturbed it"
    rows += [
        f"{found['starts']} starts, {found['resumed']} of them from a checkpoint, did {found['steps_done']} steps; the "
        f"last kill left the checkpoint of step {last['checkpoint']}",
        f"a start takes {pace['start']:.1f} s to its first step, a step {1e3 * pace['steps']:.0f} ms, a checkpoint "
        f"{1e3 * pace['saving']:.0f} ms; after a kill all had ended within {end['median']:.1f} s (at most "
        f"{end['most']:.1f} s)",
        f"{found['tensors']} tensors and every logged figure compared: {verdict}",
    ]
    return "\n".join(rows)
