"""Between two logged steps the host waits for no device: the whole loop, with all that may be due after a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.ranks import group
from dit.train import loop
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.loop import Loop
from dit.train.meters import Meters
from dit.train.run import Run
from dit.train.stop import StopRequest
from dit.train.task import Samples
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import Values, built, column, values
from tests.train.waiting import NoWaiting, Place

# What is done at logged steps, at hooks and while saving waits; so does, once a step, whether the gradient is finite.
ALLOWED: frozenset[Place] = frozenset(
    {
        ("loop.py", "_log"),
        ("loop.py", "_show"),
        ("loop.py", "_check_first_loss"),
        ("recovery.py", "save"),
        ("run.py", "save_snapshot"),
        ("optim.py", "step"),
        ("predict.py", "check_labels"),  # of labels on a CPU alone
        ("rng.py", "_rounds_on_host"),  # of slots on a CPU alone
    }
)
STEPS = 7
TENSORS = ("moments", "label", "drop", "eps", "valid")  # of samples


def waiting(digits: Digits, folder: Path, **more: Any) -> Values:
    """A run with all that may look at numbers after a step, most of which falls on few of its steps."""
    made = values(
        digits,
        folder,
        train={"steps": STEPS, "log_every": 3, "micro_batch": 16},
        ema={"decay": 0.9, "also": [0.5], "power": [0.05, 0.1], "snapshot_every": 5},
        faults={"max_loss": 1e6, "spike": 100.0},
        objective={
            "times": "logit_normal",
            "spread": "stratified",
            "coupling": {"name": "sinkhorn", "group": 4},
        },
        data={"val": str(digits.moments_val)},
        val={"every": 4, "samples": 40},
        checkpoint={"every": 5},
    )
    return {**made, **more}


def on_device(run: Run) -> list[Tensor]:
    """What a GPU would hold before the first step."""
    averages = [t for tensors in run.ema.averages.values() for t in tensors]
    fragments = [f.weight for f in run.engine.fragments()]
    module = run.engine.module
    return [*module.parameters(), *module.buffers(), *averages, *fragments]


def guarded_run(given: Values) -> int:
    """Train under the guard; how many operations of the device it has seen."""
    with group.session():
        run = built(given)
        guard = NoWaiting(on_device(run), ALLOWED)
        before = loop.batch_samples

        def placed(*arguments: Any) -> tuple[Samples, Tensor]:
            samples, fingerprints = before(*arguments)
            copies: dict[
                str, Any
            ] = {  # of their own memory, as on a device: some are the stream's or the host's too
                name: part.clone() for name in TENSORS if (part := getattr(samples, name)) is not None
            }
            slots = samples.draws.slots.clone()
            guard.on_device.add([*copies.values(), slots])
            return replace(samples, **copies, draws=samples.draws.of(slots)), fingerprints

        loop.batch_samples = placed
        try:
            with guard:
                Loop(run).train(StopRequest())
        finally:
            loop.batch_samples = before
            run.engine.close()
        return guard.counted


def test_the_loop_waits_for_no_device_between_logged_steps(digits: Digits, tmp_path: Path) -> None:
    counted = guarded_run(waiting(digits, tmp_path, engine="local"))
    assert counted > STEPS * 200
    assert column(tmp_path, "step") == [3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nor_does_it_at_any_stage_of_zero(digits: Digits, ranks: Server, tmp_path: Path, stage: int) -> None:
    given = waiting(digits, tmp_path, zero={"stage": stage})
    assert min(ranks.run(2, guarded_run, given)) > STEPS * 100


def looks_at_the_loss(self: Meters, losses: Any, fingerprints: Tensor) -> None:
    float(losses[0].mean)


def lists_the_average(self: Ema) -> None:
    self.pieces[0].tolist()


def chooses_by_a_mask(self: Ema) -> None:
    piece = self.pieces[0]
    piece[piece > 0].sum()


def copies_to_the_host(self: Ema) -> None:
    self.pieces[0].to("cpu", copy=True)


@pytest.mark.parametrize(
    ("owner", "name", "fault", "words"),
    [
        (Meters, "add_step", looks_at_the_loss, "__float__.*looks_at_the_loss"),
        (Ema, "update", lists_the_average, "tolist.*lists_the_average"),
        (Ema, "update", chooses_by_a_mask, "index.*chooses_by_a_mask"),
        (Ema, "update", copies_to_the_host, "to in.*copies_to_the_host"),
    ],
)
def test_the_guard_finds_what_waits(
    digits: Digits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    fault: Callable[..., None],
    words: str,
) -> None:
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AssertionError, match=words):
        guarded_run(waiting(digits, tmp_path, engine="local"))


# --- on a GPU ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sync_mode(mode: str) -> Iterator[None]:
    """torch's own guard inside: "error" raises where the host would wait for a GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def free(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, where waiting is allowed."""

    def call(*given: Any, **named: Any) -> Any:
        with sync_mode("default"):
            return function(*given, **named)

    return call


def steps_without_waiting(given: Values) -> list[float]:
    """Steps of a run on a GPU, the first of them unguarded; DeepSpeed's own backward pass and update may wait."""
    with group.session() as world:
        assert world.device.type == "cuda"
        run = built(given)
        engine: Engine = run.engine
        engine.step = free(engine.step)  # type: ignore[method-assign]
        if given.get("engine") != "local":
            engine.backward = free(engine.backward)  # type: ignore[method-assign]
        trainer = Loop(run)
        trainer.train_step(trainer._next_batch())
        for _ in range(STEPS):
            batch = trainer._next_batch()
            with sync_mode("error"):
                trainer.train_step(batch)
        found = float(run.meters._reduced()["loss"])
        run.close()
        engine.close()
        return [found]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_a_step_on_a_gpu_waits_for_nothing_of_ours(
    digits: Digits, ranks: Server, tmp_path: Path, stage: int | None, compiled: bool
) -> None:
    made = waiting(digits, tmp_path, **({"engine": "local"} if stage is None else {"zero": {"stage": stage}}))
    made["train"] = {**made["train"], "compile": compiled, "steps": 2 + STEPS}
    (found,) = ranks.run(1, steps_without_waiting, made)
    assert found[0] > 0
