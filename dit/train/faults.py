"""What goes wrong in the numbers: updates that are skipped, losses that leap, weights that are no numbers any more.

A sample whose loss is not finite, or above `faults.max_loss`, makes the gradient NaN, and an engine skips an update
whose gradient is not finite on any rank. What cannot be skipped away is a `Fault`: the run stops with it, or, where
`faults.returns` allows, goes back to the last checkpoint from before and on behind the steps since.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.config import ConfigError, config
from dit.errors import UserError
from dit.files import write_atomically
from dit.flow.loss import Loss


class TrainingError(UserError):
    """The run cannot go on; what is on disk is whole."""


@config
class FaultsConfig:
    """What counts as a fault in the numbers, and whether a run mends it by itself."""

    max_loss: float | None = None  # a sample's loss above which its step's update is skipped; null = none
    spike: float | None = None  # a logged loss so many times the median before it is a fault; null = none
    window: int = 20  # logged losses that median is of; none is judged before there are so many
    returns: int = 0  # times that a run goes back by itself, and leaves out the steps from there to the fault

    def __post_init__(self) -> None:
        if self.max_loss is not None and not self.max_loss > 0:
            raise ConfigError(f"faults.max_loss must be above 0 or null, got {self.max_loss}")
        if self.spike is not None and not self.spike > 1:
            raise ConfigError(f"faults.spike must be above 1 or null, got {self.spike}")
        if self.window < 3 or self.returns < 0:
            raise ConfigError(
                f"faults.window must be at least 3 and faults.returns at least 0, got {self.window} and {self.returns}"
            )


@dataclass(frozen=True)
class Fault:
    """Something that cannot be skipped away.

    good: steps done when all was well. why: what happened, and what to do. is_fatal: whether the run stops unless it
    may go back; else it says so and goes on.
    """

    good: int
    why: str
    is_fatal: bool = True


class Faults:
    """Counts and judges, the same on every rank, and remembers it through checkpoints."""

    def __init__(self, cfg: FaultsConfig, max_skipped: int, run_dir: Path, rank: int):
        self.cfg, self.max_skipped, self.run_dir, self.rank = cfg, max_skipped, run_dir, rank
        self.skipped_in_a_row = 0
        self.returned = 0  # times the run went back
        self.left_out: list[list[int]] = []  # [first, last] steps that were left out then, counted from 1
        self.recent: list[float] = []  # the last logged losses
        self.spikes = 0
        self.begun: int | None = None  # the first step since the last logged one
        self.has_skipped = False  # since then
        self.ids: dict[int, list[int]] = {}  # this rank's by step since then, where spikes are looked for

    # --- after a step --------------------------------------------------------------------------------------

    def watch_update(self, applied: bool, step: int, ids: Tensor, losses: Sequence[Loss]) -> Fault | None:
        """Judge step `step` (from 1); keep the ids of samples whose update was skipped. ids: (B,) int64."""
        self.begun = self.begun or step
        if self.cfg.spike is not None:
            self.ids[step] = ids.tolist()
        if applied:
            self.skipped_in_a_row = 0
            return None
        self.skipped_in_a_row += 1
        self.has_skipped = True
        per_sample = torch.cat([loss.per_sample.detach() for loss in losses]).cpu()
        bad = ~torch.isfinite(per_sample) | (per_sample > (self.cfg.max_loss or math.inf))
        losses_of_bad = [str(value) for value in per_sample[bad].tolist()]  # JSON has no NaN
        content = {"ids_with_bad_loss": ids[bad].tolist(), "their_losses": losses_of_bad}
        self._dump("nonfinite", step, {**content, "ids_in_batch": ids.tolist()})
        if self.skipped_in_a_row < self.max_skipped:
            return None
        return Fault(
            step - self.skipped_in_a_row,
            f"{self.skipped_in_a_row} updates in a row were skipped because {self.cause}, the last at step {step}. "
            f"The samples' ids are in {self.run_dir / 'nonfinite'}. Look at those samples (tools/shards.py verify). "
            f"The same command would meet them again: {self._way_back(step - self.skipped_in_a_row)}, or start a new "
            f"run_dir with init.from={self.run_dir} and a lower optim.lr, or with train.precision=fp32 "
            f"(train.max_skipped = {self.max_skipped}).",
        )

    @property
    def cause(self) -> str:
        """Say why updates are skipped."""
        bound = self.cfg.max_loss
        return "the gradient was not finite" + (
            f", or a loss above faults.max_loss = {bound:g}" if bound else ""
        )

    def _way_back(self, good: int) -> str:
        """What to do about it, or why a run that might go back does not."""
        if not self.cfg.returns:
            return "let it leave them out (--faults.returns=1)"
        if self.may_return:
            return f"there is no checkpoint of step {good} or before to go back to; save more often (checkpoint.every)"
        return (
            f"it has gone back faults.returns = {self.cfg.returns} times, raise that to let it leave more out"
        )

    def watch_loss(self, loss: float, step: int) -> Fault | None:
        """Judge the loss of a logged step. loss: mean since the last logged one, over all ranks."""
        begun, ids, is_judged = self.begun or step, self.ids, not self.has_skipped and math.isfinite(loss)
        self._begin_interval()
        if self.cfg.spike is None or not is_judged:
            return None  # what was skipped has changed nothing
        before, self.recent = self.recent, [*self.recent, loss][-self.cfg.window :]
        usual = statistics.median(before) if len(before) == self.cfg.window else math.inf
        if not (usual > 0 and loss > self.cfg.spike * usual):
            return None
        self.spikes += 1
        self._dump("spikes", step, {"loss": loss, "median": usual, "ids_by_step": ids})
        return Fault(
            begun - 1,
            f"the loss leapt to {loss:.4g} at step {step}, {loss / usual:.3g} times the median of the {len(before)} "
            f"logged before it (faults.spike = {self.cfg.spike:g}). The samples' ids are in {self.run_dir / 'spikes'}. "
            f"Lower optim.lr or optim.clip; to leave these steps out: {self._way_back(begun - 1)}.",
            is_fatal=False,
        )

    def watch_weights(self, complaint: str | None, step: int) -> Fault | None:
        """Judge the weights before they are saved. complaint: what is wrong with them; None: nothing."""
        if complaint is None:
            return None
        return Fault(
            step - self.skipped_in_a_row - 1,
            f"after step {step} {complaint}. Nothing was saved; the same command goes on from the last checkpoint. "
            f"To go back without that: {self._way_back(step - self.skipped_in_a_row - 1)}. A lower optim.lr or "
            "train.precision=fp32 may keep numbers finite.",
        )

    def _dump(self, folder: str, step: int, content: dict[str, Any]) -> None:
        place = self.run_dir / folder
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"step": step, "rank": self.rank, **content})
        write_atomically(place / f"step-{step:08d}-rank-{self.rank:05d}.json", text.encode())

    # --- going back ----------------------------------------------------------------------------------------

    @property
    def may_return(self) -> bool:
        """Whether the run may go back once more."""
        return self.returned < self.cfg.returns

    def leave_out(self, first: int, last: int, returned: int) -> None:
        """Note that steps were left out, and that it was the `returned`-th time."""
        self.left_out.append([first, last])
        self.returned = returned
        self.skipped_in_a_row = 0

    def counts(self) -> dict[str, int]:
        """Count spikes and returns for the log, where they are looked for."""
        spikes = {} if self.cfg.spike is None else {"spikes": self.spikes}
        return spikes | ({"returned": self.returned} if self.cfg.returns else {})

    def state(self) -> dict[str, Any]:
        """Give what it remembers, as JSON values for a checkpoint."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "returned": self.returned,
            "spikes": self.spikes,
            "left_out": self.left_out,
            "begun": self.begun,
            "has_skipped": self.has_skipped,
            "recent": self.recent,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint holds of it."""
        state = {**Faults(self.cfg, self.max_skipped, self.run_dir, self.rank).state(), **state}
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.returned, self.left_out = state["returned"], [list(pair) for pair in state["left_out"]]
        self.spikes, self.recent = state["spikes"], list(state["recent"])
        self.begun, self.has_skipped, self.ids = state["begun"], state["has_skipped"], {}

    def _begin_interval(self) -> None:
        self.begun, self.has_skipped, self.ids = None, False, {}
