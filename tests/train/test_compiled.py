"""A compiled run through cycles of steps, log, checkpoint, held-out loss and pictures: few graphs, none late."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from dit import rng
from dit.compiling import CompileWatch
from dit.flow import objective
from dit.train.loop import Loop
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import Values, column, go, metrics, values

CYCLE = 3  # steps from one held-out loss, picture and checkpoint to the next
BLOCK, NUMBERS = "AdaLNZeroBlock.forward", {"_polar_of": 1, "_words_of": 1}
LOSS = {"Objective.noised": 1, "Objective.weighted": 1}


@dataclass
class Seen:
    """Graphs by the function that they are of; those after each step; graph breaks; what was told."""

    graphs: dict[str, int] = field(default_factory=dict)
    after: list[int] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


def compiled_by(name: str, seen: Counter[str]) -> Callable[..., Any]:
    """torch.compile with another backend, of the name given, which counts graphs by function."""
    compile_, backend = torch.compile, lookup_backend(name)

    @functools.cache  # torch shares no graph between backends
    def counting(function: str) -> Callable[..., Any]:
        def counted(graph: Any, inputs: Any) -> Any:
            seen[function] += 1
            return backend(graph, inputs)

        return counted

    def compiled(function: Any, **options: Any) -> Any:
        return compile_(function, **{**options, "backend": counting(function.__qualname__)})

    return compiled


def cycle(given: Values, name: str) -> Seen:
    """Train through the cycles of a configuration, by a backend of torch.compile, and say what was compiled."""
    torch.compiler.reset()
    rng._compiled.cache_clear()
    objective._compiled.cache_clear()
    counters.clear()
    seen, found = Counter[str](), Seen()
    before = torch.compile, Loop.train_step, CompileWatch.look

    def stepped(self: Loop, batch: Any) -> Any:
        fault = before[1](self, batch)
        found.after.append(sum(seen.values()))
        return fault

    def looked(self: CompileWatch, part: str) -> float:
        told = sum(seen.values()) - sum(Counter(found.graphs).values())
        found.graphs = dict(seen)
        found.parts += [part] * bool(told)
        return before[2](self, part)

    torch.compile, Loop.train_step, CompileWatch.look = compiled_by(name, seen), stepped, looked  # type: ignore[misc]
    try:
        go(given)
    finally:
        torch.compile, Loop.train_step, CompileWatch.look = before  # type: ignore[misc]
        rng._compiled.cache_clear()
        objective._compiled.cache_clear()
    found.breaks = dict(counters["graph_break"])
    return found


def cycling(digits: Digits, folder: Path, **more: Any) -> Values:
    """A compiled run of two cycles and a step, whose held-out loss and pictures are of other sizes than its batches."""
    made = values(
        digits,
        folder,
        train={"compile": True, "steps": 2 * CYCLE + 1, "micro_batch": 16, "log_every": CYCLE},
        data={"val": str(digits.moments_val)},
        val={"every": CYCLE, "samples": 40},
        sample={"every": CYCLE, "count": 10, "num_steps": 2, "cfg_scale": 2.0},
        checkpoint={"every": CYCLE},
    )
    for section, found in more.items():
        made[section] = {**made.get(section, {}), **found} if isinstance(found, dict) else found
    return made


def few_graphs(seen: Seen, first: int = CYCLE) -> None:
    """first: steps after which all is compiled."""
    assert not seen.breaks
    assert seen.graphs.pop(BLOCK) == 2  # of all blocks: a training batch's, and one for all without gradients
    assert seen.graphs == {**NUMBERS, **LOSS}
    assert len(seen.after) > first
    assert len(set(seen.after[first:])) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def test_a_run_compiles_few_graphs_in_its_first_cycle_and_none_later(
    digits: Digits, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = cycling(digits, folder, engine="local")
    seen = cycle(given, "eager")
    assert seen.parts == ["training step", "held-out loss"]
    assert seen.after[:CYCLE] == [5] * CYCLE
    few_graphs(seen)
    told = capfd.readouterr().out
    assert "compile     blocks, integers of the draws, the loss around the network; kept in " in told
    assert "training step: compiled 5 graph(s) in " in told
    assert "held-out loss: compiled 1 graph(s) in " in told
    (seconds,) = re.findall(r"training step: compiled 5 graph\(s\) in ([\d.]+) s", told)
    first, second = column(folder, "step_ms")
    assert CYCLE * first < 1e3 * float(seconds)  # that is no time of the steps
    assert second > 1  # nor is that of the held-out loss, and it is taken from nothing else


def test_so_does_a_process_that_goes_on_whose_first_batch_is_a_checkpoints_probe(
    digits: Digits, folder: Path
) -> None:
    """The probe is of another size than training batches, which have their own graph all the same."""
    given = cycling(digits, folder, engine="local")
    given["train"]["steps"] += 2
    seen = cycle(given, "eager")
    assert seen.parts == ["checkpoint", "training step"]
    few_graphs(seen, first=0)


def test_eagerly_compiled_code_trains_to_the_same_bits(digits: Digits, folder: Path, tmp_path: Path) -> None:
    """What is compiled is what runs without: the same operations, where the backend is torch's own eager one."""
    go(cycling(digits, tmp_path, engine="local", train={"compile": False}))
    rows = [metrics(folder)[:2], metrics(tmp_path)[:2]]
    for name in ("loss", "grad_norm", "batch_hash"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_at_every_stage_with_and_without_checkpointing(
    digits: Digits, ranks: Server, tmp_path: Path, stage: int
) -> None:
    for checkpointed in (False, True):
        given = cycling(
            digits,
            tmp_path / str(checkpointed),
            zero={"stage": stage},
            model={"checkpoint_blocks": checkpointed},
        )
        for seen in ranks.run(2, cycle, given, "aot_eager"):
            few_graphs(seen)
