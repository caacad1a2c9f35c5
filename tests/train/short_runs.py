"""A few steps of many runs, one after the other in one job: starting a job costs more than the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit.train.engines.base import ADAM_STATE
from dit.train.loop import Loop
from dit.train.run import Run
from tests.train.on_ranks import assembled, full_weights
from tests.train.runs import Values, built


@dataclass(frozen=True)
class Short:
    """What some steps left. states: "model/name", "exp_avg/name", ...; weights: as the forward pass sees them.

    state_dtypes: of master weights and Adam's moments. applied: whether each step's update was.
    """

    losses: list[float]
    norms: list[float]
    states: dict[str, Tensor]
    weights: dict[str, Tensor]
    state_dtypes: set[torch.dtype]
    state_devices: set[str]
    applied: list[bool]


def short_runs(runs: list[Values], steps: int) -> list[Short]:
    """The first `steps` steps of each; nothing but config.yaml is written."""
    return [_short(built(given), steps) for given in runs]


def _short(run: Run, steps: int) -> Short:
    losses, norms, applied = [], [], []
    for step in range(steps):
        updates = run.engine.updates
        Loop(run).train_step(run.feed.stream.batch(step))
        row: dict[str, Any] = run.meters._reduced()
        losses.append(float(row["loss"]))
        run.meters.clear()
        norms.append(run.engine.grad_norm())
        applied.append(run.engine.updates == updates + 1)
    run.feed.stream.close()
    pieces = [t for f in run.engine.fragments() for t in (f.weight, *f.state.values())]
    return Short(
        losses,
        norms,
        states(run),
        full_weights(run),
        {t.dtype for t in pieces},
        {t.device.type for t in pieces},
        applied,
    )


def states(run: Run) -> dict[str, Tensor]:
    """Master weights, averages and Adam's moments of all ranks, whole; nothing where a parameter is frozen."""
    fragments = run.engine.fragments()
    kinds = {"model": [f.weight for f in fragments], "ema": run.ema.pieces}
    found = {f"{kind}/{name}": t for kind, p in kinds.items() for name, t in assembled(run, p).items()}
    empty = torch.zeros(0)
    for kind in ADAM_STATE:
        whole = assembled(run, [f.state.get(kind, empty) for f in fragments], lambda f: bool(f.state))
        found |= {f"{kind}/{name}": t for name, t in whole.items()}
    return found
