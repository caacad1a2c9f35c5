"""A plan: the runs of a scaling experiment, what each costs and branches from, and what is left out.

N is the number of parameters in the blocks and the output layer; those that embed patches, time and labels are in
`params_total` alone. FLOPs are samples times those of a training step an image: 2 per multiply-add, 3 times a forward
pass, attention and modulation included (dit/model/cost.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dit.model.cost import Cost

PARAMS = (
    "parameters of the blocks and the output layer; those that embed patches, time and labels do not count"
)
FLOPS = (
    "samples x training FLOPs an image: 2 per multiply-add, 3 x forward, attention and modulation included"
)
TRUNK, BRANCH, SEPARATE = "trunk", "branch", "separate"


def params_of(cost: Cost) -> int:
    """Count N: numbers in the blocks, their modulation included, and in what comes after them."""
    return cost.parameters.blocks + cost.parameters.output


@dataclass(frozen=True)
class PlannedRun:
    """One run. kind: a trunk has branches, a branch begins as a trunk was at `branch_step`, others are separate.

    params: N; params_total: with what embeds patches, time and labels. samples: of the whole run, a branch's trunk
    included, as are tokens and flops; own_flops: what the run itself computes. hours: of those, on the named device.
    """

    name: str
    kind: str
    size: str
    width: int
    depth: int
    heads: int
    budget: float
    seed: int
    params: int
    params_total: int
    batch: int
    lr: float
    steps: int
    samples: int
    tokens: int
    epochs: float
    flops: float
    own_flops: float
    hours: float
    trunk: str | None = None
    branch_step: int | None = None

    @classmethod
    def alone(
        cls, name: str, size: str, cost: Cost, *, seed: int, batch: int, lr: float, steps: int, there_are: int
    ) -> PlannedRun:
        """Give a run of its own start, whose budget is what it comes to. there_are: samples of the data."""
        dims, samples = cost.dims, steps * batch
        flops = float(samples * cost.training_flops)
        return cls(
            name=name,
            kind=SEPARATE,
            size=size,
            width=dims.width,
            depth=dims.depth,
            heads=dims.heads,
            budget=flops,
            seed=seed,
            params=params_of(cost),
            params_total=cost.parameters.trainable,
            batch=batch,
            lr=lr,
            steps=steps,
            samples=samples,
            tokens=samples * dims.tokens,
            epochs=samples / there_are,
            flops=flops,
            own_flops=flops,
            hours=0.0,
        )

    @property
    def begins_at(self) -> int:
        """Steps done when the run itself begins."""
        return self.branch_step or 0


@dataclass(frozen=True)
class LeftOut:
    """A point of the experiment that is not run, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What a spec comes to. `values`: of the spec, as plain JSON values."""

    values: Mapping[str, Any]
    runs: Sequence[PlannedRun]
    left_out: Sequence[LeftOut]
    notes: Sequence[str]

    def __getitem__(self, name: str) -> PlannedRun:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, PlannedRun]:
        return {run.name: run for run in self.runs}

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def branches(self, trunk: str) -> list[PlannedRun]:
        """Give the runs that branch from one."""
        return [run for run in self.runs if run.trunk == trunk]

    @property
    def flops(self) -> float:
        """All that is computed."""
        return sum(run.own_flops for run in self.runs)

    @property
    def separate_flops(self) -> float:
        """What would be computed if every run began at its own start."""
        return sum(run.flops for run in self.runs)

    @property
    def hours(self) -> float:
        """Hours of one run after the other."""
        return sum(run.hours for run in self.runs)

    def as_json(self) -> dict[str, Any]:
        """Give what plan.json holds."""
        return {
            "spec": self.values,
            "params": PARAMS,
            "flops": FLOPS,
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "left_out": [dataclasses.asdict(one) for one in self.left_out],
            "notes": list(self.notes),
            "total": {
                "flops": self.flops,
                "separate_flops": self.separate_flops,
                "hours": self.hours,
            },
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Plan:
        """Read what `as_json` gave. KeyError or TypeError for anything else."""
        return cls(
            held["spec"],
            [PlannedRun(**row) for row in held["runs"]],
            [LeftOut(**row) for row in held["left_out"]],
            held["notes"],
        )
