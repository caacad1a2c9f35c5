"""What a run reports: metrics.jsonl and TensorBoard, from sums kept on the device until a step is logged."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dit.evals import record
from dit.evals.valloss import QUARTERS, sums_by_quarter
from dit.flow.loss import Loss
from dit.ranks import group
from dit.train.rows import HELD_OUT, METRICS, truncate

_MASK63 = (1 << 63) - 1
# Figures of a row that tell how fast the machine was; all others are the same in every repetition of a run.
SPEEDS = (
    "images_per_s", "step_ms", "mfu", "forward_ms", "forward_ms_max", "slowest_rank", "data_wait", "data_wait_max"
)  # fmt: skip


class HostTimer:
    """Measures how long something took in all, by this process's clock."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Count what is inside."""
        begun = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begun

    def take(self) -> float:
        """Give the seconds measured since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class DeviceTimer:
    """Measures the same by the GPU's clock. Nothing waits for it but `take`."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # recorded
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Count what is launched inside."""
        begin, end = self._spare.pop() if self._spare else (_event(), _event())
        begin.record()
        yield
        end.record()
        self._pairs.append((begin, end))

    def take(self) -> float:
        """Give the seconds measured since the last call."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
        milliseconds = math.fsum(begin.elapsed_time(end) for begin, end in self._pairs)
        self._spare, self._pairs = self._spare + self._pairs, []
        return 1e-3 * milliseconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


@dataclass(frozen=True)
class RankInterval:
    """What a rank tells the others of its logging interval. Times are seconds."""

    batch_hash: int
    forward: float
    wait: float


class Meters:
    """Sums the figures of the steps since the last logged one. Nothing here waits for the device except `take`."""

    def __init__(self, device: torch.device):
        self.device = device
        # of forward passes: at ZeRO stages 0 to 2 nothing in them waits for another rank, as backward passes do
        self.forward = DeviceTimer() if device.type == "cuda" else HostTimer()
        self._sums: dict[str, Tensor] = {}
        self.batch_hash = 0  # sum mod 2^63 of this rank's slots' fingerprints
        self.reset_clock()
        self.clear()

    def clear(self) -> None:
        """Start a new logging interval."""
        self._sums = {}
        self.batch_hash = 0
        self.wait_seconds = 0.0
        self.forward.take()

    def reset_clock(self) -> None:
        """Count time from now (after compiling, sampling or saving, which are not training)."""
        self._since = time.perf_counter()
        self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """Leave out seconds that were not spent on training."""
        self._paused += seconds

    def add_step(self, losses: Iterable[Loss], fingerprints: Tensor) -> None:
        """Add a step: the losses of its micro-batches, and the (B,) int64 fingerprints of its slots, on the CPU."""
        for loss in losses:
            self.add(loss)
        self.add_hash(fingerprints)

    def add(self, loss: Loss) -> None:
        """Add one micro-batch, by its samples: how the batch was cut does not show."""
        count = len(loss.per_sample)
        present = loss.mean.new_full((), float(count)) if loss.valid is None else loss.valid.sum()
        terms = {
            "loss": count * loss.mean.detach().float(),
            "count": present.float(),
            "slots": loss.mean.new_full((), float(count)).float(),
        }
        if loss.t is not None:
            terms["quarters"] = sums_by_quarter(loss)
        terms |= {f"metric/{name}": count * value.detach().float() for name, value in loss.metrics.items()}
        for name, value in terms.items():  # float64: the sum is the same wherever a checkpoint cut it in two
            self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()

    def add_hash(self, fingerprints: Tensor) -> None:
        """Add the fingerprints of a step's slots: (B,) int64 on the CPU."""
        self.batch_hash = (self.batch_hash + int(fingerprints.sum())) & _MASK63

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint between two logged steps must keep; collective."""
        return {
            "sums": {k: v.tolist() for k, v in self._reduced().items()},
            "batch_hash": _total(group.gather_objects(self.batch_hash)),
        }

    def load_state(self, state: dict[str, Any], is_main: bool) -> None:
        """Go on from a checkpoint's sums; rank 0 carries them, whatever the ranks were."""
        self.clear()
        if is_main:
            self._sums = {
                k: torch.tensor(v, dtype=torch.float64, device=self.device) for k, v in state["sums"].items()
            }
            self.batch_hash = int(state["batch_hash"])

    def _reduced(self) -> dict[str, Tensor]:
        """Sum over ranks, by one all-reduce for all of them. Ranks may hold different names (after a resume)."""
        names = sorted({n for found in group.gather_objects(sorted(self._sums)) for n in found})
        shapes = {n: (2, QUARTERS) if n == "quarters" else () for n in names}
        parts = [
            self._sums.get(n, torch.zeros(shapes[n], dtype=torch.float64, device=self.device)).flatten()
            for n in names
        ]
        if not parts:
            return {}
        flat = group.all_sum(torch.cat(parts))
        pieces = flat.split([p.numel() for p in parts])
        return {n: p.view(shapes[n]).cpu() for n, p in zip(names, pieces, strict=True)}

    def take(self, steps: int, samples: int) -> dict[str, float | int | None]:
        """Give the figures of the interval, and start a new one; collective.

        steps, samples: since the last call, on the clock. Keys as in metrics.jsonl; loss_q1..q4 are the means over
        t in [0, 1/4), ..., [3/4, 1], None where no t fell there. Losses are means over the samples that are not
        missing; the tasks' own metrics are over all slots, missing ones (zeros) too. forward_ms is the median over
        ranks of the time of a step's forward passes, forward_ms_max that of slowest_rank; data_wait is rank 0's,
        data_wait_max the longest of all ranks.
        """
        sums = self._reduced()
        shares = group.gather_objects(RankInterval(self.batch_hash, self.forward.take(), self.wait_seconds))
        elapsed = max(1e-9, time.perf_counter() - self._since - self._paused)
        count = max(1.0, float(sums["count"]))  # none where every sample was missing
        row: dict[str, float | int | None] = {"loss": float(sums["loss"]) / count}
        for i, (total, n) in enumerate(sums["quarters"].T.tolist() if "quarters" in sums else ()):
            row[f"loss_q{i + 1}"] = total / n if n else None
        row |= {
            n.removeprefix("metric/"): float(v) / float(sums["slots"])
            for n, v in sums.items()
            if n.startswith("metric/")
        }
        row |= {"images_per_s": samples / elapsed, "step_ms": 1e3 * elapsed / max(1, steps)}
        row |= {"data_wait": self.wait_seconds / elapsed, "batch_hash": _total(r.batch_hash for r in shares)}
        forward = [1e3 * r.forward / max(1, steps) for r in shares]
        row |= {"forward_ms": median(forward), "forward_ms_max": max(forward)}
        row |= {"slowest_rank": forward.index(max(forward))}
        row |= {"data_wait_max": max(r.wait for r in shares) / elapsed}
        self.clear()
        self.reset_clock()
        return row


def _total(hashes: Iterable[int]) -> int:
    return sum(hashes) & _MASK63


class RunLog:
    """Writes RUN/metrics.jsonl and RUN/tensorboard, on rank 0 alone; nothing before `open`."""

    def __init__(self, run_dir: Path, is_main: bool):
        self.run_dir, self.is_main = run_dir, is_main
        self.path, self.held_out_path = run_dir / METRICS, run_dir / HELD_OUT
        self._writer: SummaryWriter | None = None

    def open(self, step: int, hooks_step: int | None = None) -> None:
        """Begin to write behind `step` steps done; what was logged beyond (by a run that was killed later) is cut off.

        hooks_step: the steps done whose hooks have been called, where they are not as many.
        """
        if not self.is_main:
            return
        for path, last in (
            (self.path, step),
            (self.held_out_path, step if hooks_step is None else hooks_step),
        ):
            if path.is_file():
                truncate(path, last)
        record.take_back(self.run_dir, step if hooks_step is None else hooks_step)
        self._writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step + 1)

    def cut(self, step: int) -> None:
        """Take back what was logged beyond a step."""
        if self._writer is not None:
            self._writer.close()
            self.open(step)

    def point(self, step: int, name: str, value: float) -> None:
        """Write a point on a curve of TensorBoard alone."""
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)

    def scalars(self, step: int, row: dict[str, Any]) -> None:
        """Write one line in metrics.jsonl and a point on each curve."""
        if self._writer is None:
            return
        self._append(self.path, step, row)
        for name, value in row.items():
            if isinstance(value, int | float) and name != "batch_hash":
                self._writer.add_scalar(group_of(name), value, step)

    def held_out(self, step: int, row: dict[str, Any]) -> None:
        """Write one line in held_out.jsonl and a point on each curve."""
        if self._writer is not None:
            self._append(self.held_out_path, step, row)
            for name, value in row.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"held_out/{name}", value, step)

    def evaluated(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to evaluations.jsonl (`dit.evals.record`), and a point on each curve: a group of its own."""
        if self._writer is None:
            return
        record.append(self.run_dir, rows)
        for row in rows:
            for name, value in record.curves(row).items():
                self._writer.add_scalar(f"evaluation/{name}", value, step)

    @staticmethod
    def _append(path: Path, step: int, row: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: _finite(v) for k, v in row.items()}}) + "\n")

    def image(self, step: int, name: str, grid: np.ndarray, title: str = "") -> None:
        """Write a picture for TensorBoard: (H, W, 3) uint8. title: what it shows, among the texts."""
        if self._writer is not None:
            self._writer.add_image(name, grid, step, dataformats="HWC")
            if title:
                self._writer.add_text(name, title, step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


def _finite(value: Any) -> Any:
    """Make a figure that is not finite null, for JSON has no NaN (`skipped` and nonfinite/ say why)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def group_of(name: str) -> str:
    """Name TensorBoard's tab of a scalar: health first, then speed, then the loss by time."""
    groups = dict.fromkeys(SPEEDS, "speed")
    groups |= {
        "lr": "optim",
        "grad_norm": "optim",
        "updates": "optim",
        "skipped": "optim",
        "samples": "optim",
        "spikes": "optim",
        "returned": "optim",
        "ema_start_share": "optim",
    }
    groups |= {f"loss_q{i + 1}": "loss_by_t" for i in range(QUARTERS)}
    return f"{groups.get(name, 'train')}/{name}"
