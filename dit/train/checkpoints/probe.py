"""The loss on fixed synthetic samples: what a checkpoint's weights compute, with which loading it is checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.ranks import group
from dit.train.checkpoints.checkpoint import Checkpoint, CheckpointError, State
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.task import Samples, Task

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative


@dataclass(frozen=True)
class Probe:
    """Computes the losses of a fixed batch, and compares them. Every method is collective.

    samples: that batch. precision: of the engine.
    """

    task: Task
    engine: Engine
    ema: Ema
    samples: Samples
    precision: str

    @torch.no_grad()
    def losses(self) -> list[dict[str, float]]:
        """Compute them on each rank, with the live weights ("model") and the main average ("ema")."""
        task = self.task.uncoupled()
        live = task.loss(self.engine, self.samples).mean.clone()
        with self.ema.swapped_in():
            average = task.loss(self.engine, self.samples).mean
        return group.gather_objects({"model": float(live), "ema": float(average)})

    def not_finite(self, state: State) -> str | None:
        """Say which of a rank's numbers are not finite, also those that the losses do not see yet; or None."""
        sizes: dict[str, list[Tensor]] = {}
        for _, kinds in state.pieces():
            for kind, tensor in kinds.items():
                sizes.setdefault(kind, []).append(tensor)
        bad = [
            kind
            for kind, tensors in sizes.items()
            if not math.isfinite(float(torch.stack(torch._foreach_norm(tensors, math.inf)).sum()))
        ]
        found = {rank: kinds for rank, kinds in enumerate(group.gather_objects(bad)) if kinds}
        if not found:
            return None
        text = "; ".join(f"rank {rank}: {', '.join(kinds)}" for rank, kinds in found.items())
        return f"numbers in the weights, their averages or the optimizer's state are not finite ({text})"

    def record(self, losses: list[dict[str, float]]) -> dict[str, str | float]:
        """Give what a checkpoint keeps of them."""
        return {"precision": self.precision, **losses[0]}

    def check(self, found: Checkpoint) -> None:
        """Refuse weights that do not compute what they computed when they were saved, by CheckpointError."""
        saved = found.meta["probe"]
        tolerance = max(TOLERANCE[saved["precision"]], TOLERANCE[self.precision])
        for rank, losses in enumerate(self.losses()):
            for kind, value in losses.items():
                if not math.isclose(value, saved[kind], rel_tol=tolerance):
                    raise CheckpointError(
                        f"{found.path}: the probe loss of the {kind} weights was {saved[kind]:.8g} and is {value:.8g} "
                        f"after loading, on rank {rank} (allowed: {tolerance:g} relative). The code or the libraries "
                        "changed the model."
                    )

    def apart(self, losses: list[dict[str, float]]) -> str | None:
        """Say what is wrong with these: weights that compute nothing, or ranks that do not hold the same; or None."""
        for rank, of_rank in enumerate(losses):
            for kind, value in of_rank.items():
                if not math.isfinite(value):
                    return f"the {kind} weights compute no finite loss any more on rank {rank}"
                if not math.isclose(value, losses[0][kind], rel_tol=TOLERANCE[self.precision]):
                    return (
                        f"the {kind} weights of rank {rank} compute a probe loss of {value:.8g}, those of rank 0 "
                        f"{losses[0][kind]:.8g}: the ranks' weights have come apart, as when memory or a device errs"
                    )
        return None
