"""The loss on fixed synthetic samples: what a checkpoint's weights compute, with which loading it is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dit import dist
from dit.train.checkpoint import Checkpoint, CheckpointError
from dit.train.ema import Ema
from dit.train.fragments import Engine
from dit.train.task import Samples, Task

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative


@dataclass(frozen=True)
class Probe:
    """samples: the fixed batch. precision: of the engine. Every method is collective."""

    task: Task
    engine: Engine
    ema: Ema
    samples: Samples
    precision: str

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Of the live weights ("model") and of the main average ("ema")."""
        task = self.task.uncoupled()
        live = task.loss(self.engine, self.samples).mean.clone()
        with self.ema.swapped_in():
            average = task.loss(self.engine, self.samples).mean
        found = dist.gather_objects({"model": float(live), "ema": float(average)})
        self._compare(found)
        return found[0]

    def _compare(self, found: list[dict[str, float]]) -> None:
        """Refuse ranks whose weights have come apart: each computes the same samples."""
        for rank, losses in enumerate(found):
            for kind, value in losses.items():
                both_bad = not math.isfinite(value) and not math.isfinite(found[0][kind])
                if not (both_bad or self._is_same(value, found[0][kind], self.precision)):
                    raise CheckpointError(
                        f"the {kind} weights of rank {rank} compute a probe loss of {value:.8g}, those of rank 0 "
                        f"{found[0][kind]:.8g}: the ranks' weights have come apart, which memory or a device that errs "
                        "can do. Nothing was saved; start the same command again without that rank's machine."
                    )

    @staticmethod
    def _is_same(value: float, other: float, *precisions: str) -> bool:
        return math.isclose(value, other, rel_tol=max(TOLERANCE[p] for p in precisions))

    def record(self, losses: Mapping[str, float]) -> dict[str, str | float]:
        """What a checkpoint keeps of it."""
        return {"precision": self.precision, **losses}

    def check(self, found: Checkpoint) -> None:
        """Refuse weights that do not compute what they computed when they were saved, by CheckpointError."""
        saved = found.meta["probe"]
        for kind, value in self.losses().items():
            if not self._is_same(value, saved[kind], self.precision, saved["precision"]):
                raise CheckpointError(
                    f"{found.path}: the probe loss of the {kind} weights was {saved[kind]:.8g} and is {value:.8g} "
                    "after loading (allowed: 1e-5 relative, 2e-2 in bf16). The code or the libraries changed the model."
                )
