"""Runs on this machine's CPU as a user starts them, by launch/local.sh: real processes, watched from outside.

What is watched is what any user sees: the processes (Linux's /proc), metrics.jsonl and the folder of checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from dit.errors import UserError
from dit.files import read_text, write_atomically

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[3]
LOCAL, ENCODE = ROOT / "launch" / "local.sh", ROOT / "tools" / "encode.py"
POLL = 0.005  # seconds between two looks
PATIENCE = 300.0  # seconds for anything that a healthy run does in some ten
GLOBAL_BATCH = 32  # samples
# A nano DiT on the digits' pixels; what stays at its default is left out.
EXPERIMENT: dict[str, Any] = {
    "data": {"lanes": 8},
    "model": {"size": "nano", "patch": 1},
    "objective": {"times": "logit_normal"},
    "optim": {"lr": 1e-3, "weight_decay": 0.01},
    "ema": {"decay": 0.99},
    "train": {"global_batch": GLOBAL_BATCH, "log_every": 1, "precision": "fp32"},
}


class Ended(UserError):
    """A start ended before what was waited for."""


def claim(folder: Path, settings: dict[str, Any]) -> Path:
    """Make the folder of a benchmark, or go on in one of the same settings: the experiment's file in it.

    The digits are encoded into it once. Raises UserError where it holds something of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine, text = folder / "settings.json", json.dumps(settings, indent=1) + "\n"
    if mine.is_file() and read_text(mine) != text:
        raise UserError(
            f"{folder} holds a benchmark of other settings: {json.dumps(json.loads(read_text(mine)))} there, "
            f"{json.dumps(settings)} now; give those, or another --folder"
        )
    write_atomically(mine, text.encode())
    data = folder / "data"
    if not (data / "manifest.json").is_file():
        _encode(data)
    experiment = folder / "experiment.yaml"  # JSON is YAML
    content = {**EXPERIMENT, "data": {**EXPERIMENT["data"], "path": str(data.resolve())}}
    experiment.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return experiment


def _encode(folder: Path) -> None:
    """The digits' training split as 8 x 8 pixels, in two views, by the project's command."""
    words = [sys.executable, str(ENCODE), "digits:train", str(folder), "--codec=pixels", "--image_size=8"]
    done = subprocess.run([*words, "--block=64"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"encoding the digits failed (exit status {done.returncode}): {done.stderr[-2000:]}")


# --- processes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process by its id, and by when it began: ids are used again. began: clock ticks since the machine started."""

    pid: int
    began: int

    def lives(self) -> bool:
        """Whether it has not ended; one whose end nobody has asked for yet has."""
        found = _stat(self.pid)
        return found is not None and found[0] not in "ZX" and found[2] == self.began


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent's id, began) of a process; None where there is none (any more)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    _, _, rest = text.rpartition(")")  # a name in brackets, which may hold anything, stands before the fields
    fields = rest.split()
    return fields[0], int(fields[1]), int(fields[19])


def _rank(pid: int) -> int | None:
    """The rank that torchrun told a child of its; None before the child has its program."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)


class Launched:
    """launch/local.sh with these words on `ranks` CPU ranks, under way; as a context what is left is killed at the end.

    Its output goes to `log`. Raises UserError where the machine or the checkout lacks what that needs.
    """

    def __init__(self, words: Sequence[str], ranks: int, log: Path):
        if not LOCAL.is_file() or not Path("/proc/self/stat").is_file():
            raise UserError(f"this needs a checkout of the project ({LOCAL}) and Linux (/proc)")
        self.size, self.log = ranks, log
        self.ranks: list[Process] = []  # once `wait_for_ranks` has found them
        log.parent.mkdir(parents=True, exist_ok=True)
        own = {
            "NPROC": str(ranks),
            "PYTHON": sys.executable,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        with log.open("wb") as output:
            self.launcher = subprocess.Popen(
                ["bash", str(LOCAL), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own, "DIT_ENTRY": "", "DRY_RUN": "0"},
                start_new_session=True,  # an interrupt at the terminal is for us, who end it
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.launcher.send_signal(signal.SIGSTOP)  # or it starts ranks while others are looked for
        for process in {*self.ranks, *self._children()}:
            if process.lives():
                with contextlib.suppress(ProcessLookupError):  # it has ended just now
                    os.kill(process.pid, signal.SIGKILL)
        self.launcher.kill()
        self.launcher.wait()

    def _children(self) -> list[Process]:
        """The processes that the launcher has started and that live."""
        found = []
        for pid in [int(p.name) for p in Path("/proc").glob("[0-9]*")]:
            stat = _stat(pid)
            if stat is not None and stat[1] == self.launcher.pid and stat[0] not in "ZX":
                found.append(Process(pid, stat[2]))
        return found

    def wait_for_ranks(self) -> None:
        """Wait until all ranks are there. Raises Ended."""

        def all_there() -> list[Process] | None:
            found = {_rank(process.pid): process for process in self._children()}
            return [found[r] for r in range(self.size)] if found.keys() >= set(range(self.size)) else None

        self.ranks = self.until(all_there, f"{self.size} ranks", poll=10 * POLL)

    def until(self, look: Callable[[], T | None], what: str, poll: float = POLL) -> T:
        """Return what `look` finds, once it finds something.

        Raises Ended; UserError where for PATIENCE seconds nothing was printed (a run that goes on draws its bar).
        """
        printed, since = 0, time.monotonic()
        while True:
            over = self.launcher.poll() is not None  # asked first: what it did last is still looked at
            found = look()
            if found is not None:
                return found
            if over:
                raise Ended(f"it ended (exit status {self.launcher.returncode}) before {what}: {self.tail()}")
            size = self.log.stat().st_size
            if size != printed:
                printed, since = size, time.monotonic()
            if time.monotonic() > since + PATIENCE:
                raise UserError(f"nothing happened for {PATIENCE:g} s before {what}: {self.tail()}")
            time.sleep(poll)

    def kill(self, ranks: Iterable[int]) -> None:
        """Send SIGKILL to them, one right after the other. Raises Ended where one has ended by itself."""
        for rank in ranks:
            if not self.ranks[rank].lives():
                raise Ended(f"rank {rank} ended before its kill: {self.tail()}")
            os.kill(self.ranks[rank].pid, signal.SIGKILL)

    def end(self) -> int:
        """Wait until the launcher and every rank have ended: the launcher's exit status. Raises UserError."""
        status = self.until(self.launcher.poll, "its end")
        late = time.monotonic() + 10
        while left := [p.pid for p in self.ranks if p.lives()]:
            if time.monotonic() > late:
                raise UserError(f"launch/local.sh has ended and left processes {left} alive: {self.tail()}")
            time.sleep(POLL)
        return status

    def tail(self) -> str:
        """Return the end of what it printed."""
        return f"...{self.log.read_text(encoding='utf-8', errors='replace')[-1500:]} (all of it: {self.log})"


def launch_to_end(words: Sequence[str], ranks: int, log: Path) -> None:
    """Run to the end. Raises UserError where the exit status is not 0."""
    with Launched(words, ranks, log) as job:
        job.wait_for_ranks()
        if status := job.end():
            raise UserError(f"a start that nobody disturbed failed (exit status {status}): {job.tail()}")


# --- what is logged ----------------------------------------------------------------------------------------


def last_logged(run_dir: Path) -> tuple[int, int]:
    """Find (number of the file, last whole line's step) of metrics.jsonl; (0, 0) where there is none or it is empty.

    A start that resumes cuts the file to its checkpoint by putting a new one in its place, with another number.
    """
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(0, status.st_size - 8192))
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, int(json.loads(whole.rpartition(b"\n")[2])["step"]) if whole else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a .jsonl file, none where there is no file. Raises UserError naming a line that is none."""
    found = []
    for number, line in enumerate(read_text(path).splitlines() if path.is_file() else [], 1):
        try:
            found.append(dict(json.loads(line)))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not a JSON object ({error})") from None
    return found
