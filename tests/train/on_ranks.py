"""What tests have real ranks do; each function is run by every rank of a job and returns plain values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.ranks import group
from dit.train.engines.base import Fragment
from dit.train.loop import Loop
from dit.train.run import Run
from tests.train.runs import Values, built


def full_weights(run: Run) -> dict[str, Tensor]:
    """Every parameter whole, as the forward pass sees it; knows nothing of fragments."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(run.engine.module.parameters())):
        return {name: p.detach().clone() for name, p in run.engine.module.named_parameters()}


def assembled(
    run: Run, pieces: list[Tensor], chosen: Callable[[Fragment], bool] = lambda f: True
) -> dict[str, Tensor]:
    """Pieces that lie beside the engine's fragments, of all ranks, as whole parameters; of the chosen fragments.

    ValueError where the ranks' fragments leave a gap or overlap.
    """
    mine = [
        (f.name, f.shape, f.offset, piece.clone())
        for f, piece in zip(run.engine.fragments(), pieces, strict=True)
        if f.is_owned and chosen(f)
    ]
    whole: dict[str, Tensor] = {}
    covered: dict[str, Tensor] = {}
    for name, shape, offset, piece in [p for of_rank in group.gather_objects(mine) for p in of_rank]:
        flat = whole.setdefault(name, torch.zeros(shape).flatten())
        count = covered.setdefault(name, torch.zeros(flat.shape, dtype=torch.int64))
        flat[offset : offset + len(piece)] = piece
        count[offset : offset + len(piece)] += 1
        whole[name] = flat
    wrong = [name for name, count in covered.items() if not bool((count == 1).all())]
    if wrong:
        raise ValueError(f"fragments do not cover {wrong} exactly once")
    shapes = {f[0]: f[1] for of_rank in group.gather_objects(mine) for f in of_rank}
    return {name: flat.view(shapes[name]) for name, flat in whole.items()}


def live(run: Run) -> list[Tensor]:
    return [f.weight for f in run.engine.fragments()]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def resave(chain: list[tuple[Values, str]]) -> list[dict[str, Any]]:
    """Load each run's newest checkpoint and save it again in another run directory; look at the engine between.

    chain: (values of the run to load, run directory to save in), one after the other.
    """
    return [_look(given, Path(out)) for given, out in chain]


def _look(given: Values, out: Path) -> dict[str, Any]:
    run = built(given)
    resumed = run.resume()
    weights, averages = full_weights(run), assembled(run, run.ema.pieces)
    found: dict[str, Any] = {"resumed": resumed, "step": run.step, "updates": run.engine.updates}
    found["fragments are the weights"] = same(weights, assembled(run, live(run)))
    found["average differs from weights"] = not same(weights, averages)
    with torch.no_grad():
        probe = float(run.task.loss(run.engine, run.archive.probe.samples).mean)
    with contextlib.suppress(ZeroDivisionError), run.ema.swapped_in(), torch.no_grad():
        found["model has the average inside"] = same(full_weights(run), averages)
        inside = float(run.task.loss(run.engine, run.archive.probe.samples).mean)
        raise ZeroDivisionError  # leaving by an error restores too
    found["average computes something else"] = inside != probe
    found["fragments restored"] = same(weights, assembled(run, live(run)))
    found["weights restored"] = same(weights, full_weights(run))
    found["average restored"] = same(averages, assembled(run, run.ema.pieces))
    with torch.no_grad():
        found["probe restored"] = probe == float(run.task.loss(run.engine, run.archive.probe.samples).mean)
    run.archive.checkpoints.folder = out / "checkpoints"
    run.save()
    run.complete()
    return found


def steps_beside_reference(runs: list[Values], steps: int) -> list[list[dict[str, Any]]]:
    """For each run and each of its first `steps` steps: what happened, beside an unsharded fp32 average."""
    return [_steps(built(given), steps) for given in runs]


def _steps(run: Run, steps: int) -> list[dict[str, Any]]:
    weights = full_weights(run)
    average = {name: w.clone() for name, w in weights.items()}
    found = []
    for step in range(steps):
        updates, held = run.engine.updates, assembled(run, run.ema.pieces)
        Loop(run).train_step(run.feed.stream.batch(step))
        after = full_weights(run)
        applied = run.engine.updates > updates
        if applied:
            n, ema = run.engine.updates, run.ema.cfg
            decay = min(ema.decay, (1 + n) / (10 + n)) if ema.warmup else ema.decay
            for name, w in after.items():
                average[name].lerp_(w, 1 - decay)
        now = assembled(run, run.ema.pieces)
        found.append(
            {
                "applied": applied,
                "grad_norm": run.engine.grad_norm(),
                "skipped": run.engine.skipped,
                "in a row": run.faults.skipped_in_a_row,
                "weights changed": not same(weights, after),
                "average changed": not same(held, now),
                "average is the reference": same(now, average),
            }
        )
        weights = after
    return found


def train_steps(given: Values, first: int, last: int) -> list[float]:
    """Mean losses of steps [first, last) of a run, without writing anything; this rank's."""
    run = built(given)
    losses = []
    for step in range(first, last):
        run.step = step
        Loop(run).train_step(run.feed.stream.batch(step))
        losses.append(float(run.meters._reduced()["loss"]))
        run.meters.clear()
    return losses
