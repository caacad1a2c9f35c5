"""The step that a CUDA graph holds: on a CPU the same function runs uncaptured, and must be the ordinary step."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit.config import ConfigError
from dit.flow.loss import Loss
from dit.flow.spread import SPREADS
from dit.flow.times import TIMES
from dit.model import cond
from dit.train.engines.plain import PlainEngine
from dit.train.loop import Loop
from dit.train.optim import GuardedAdamW
from dit.train.run import Run
from dit.train.step import StepGraph
from dit.train.task import Samples
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.conftest import Poisoned
from tests.train.runs import Values, built, go, values
from tests.train.short_runs import states


class Forgetful(StepGraph):
    """Spoils all that a replay would not see anew, once it was copied."""

    def __call__(self, samples: Samples, lr: float) -> tuple[list[Loss], bool]:
        return super().__call__(copy.deepcopy(samples), lr)  # the stream has use for its own

    def _take(self, samples: Samples, lr: float) -> None:
        super()._take(samples, lr)
        samples.moments.fill_(math.nan)
        for tensor in (samples.label, samples.draws.slots):
            tensor.fill_(0)
        samples.drop.logical_not_()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = math.nan


def graphed(run: Run) -> StepGraph:
    assert isinstance(run.engine, PlainEngine)
    return Forgetful(run.task, run.engine, run.micro, run.cfg.faults.max_loss)


def steps(given: Values, graph: bool, count: int = 6) -> tuple[list[Any], dict[str, Tensor]]:
    """What the steps of a run told and left. The fifth lacks a sample, as where a block cannot be read."""
    run = built(given)
    run.graph = graphed(run) if graph else None
    seen: list[Any] = []
    for step in range(count):
        batch = run.feed.stream.batch(step)
        if step == 4:
            batch = replace(batch, valid=torch.arange(len(batch.label)) != 1)
        Loop(run).train_step(batch)
        sums = {name: total.tolist() for name, total in run.meters._reduced().items()}
        seen.append((sums, run.engine.grad_norm(), run.engine.updates, run.engine.skipped))
    run.feed.stream.close()
    if run.graph is not None and run.engine.device.type == "cuda":
        assert run.graph._graph is not None
    return seen, states(run)


def both(given: Values, other: Values) -> list[tuple[list[Any], dict[str, Tensor]]]:
    return [steps(given, graph=False), steps(other, graph=True)]


def given(digits: Digits, folder: Path, poisoned: Poisoned, **sections: Any) -> Values:
    """Accumulation, clipping in some steps, groups with rates and eps of their own, a rate that falls, NaN in the third
    step and in the sixth, of the next epoch."""
    train = {"micro_batch": 8, **sections.pop("train", {})}
    model = {"parametrization": {"name": "mup", "base_width": 16}}
    return values(digits, folder, data={"path": str(poisoned.folder)}, model=model, train=train, **sections)


def check_same(found: list[tuple[list[Any], dict[str, Tensor]]]) -> None:
    (expected, weights), (seen, same) = found
    assert repr(seen) == repr(expected)  # NaN is no NaN's equal
    assert [row[3] for row in expected] == [0, 0, 1, 1, 1, 2]
    assert same.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(same[name], weights[name])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_graph_holds_is_the_ordinary_step(
    digits: Digits, ranks: Server, poisoned: Poisoned, tmp_path: Path, precision: str
) -> None:
    """On two ranks, bit for bit: losses, norms, skipped updates, weights, averages, moments."""
    runs = [
        given(digits, tmp_path / name, poisoned, engine="plain", train={"precision": precision})
        for name in ("ordinary", "graph")
    ]
    for found in ranks.run(2, both, *runs):
        check_same(found)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_replays_are_the_ordinary_steps(
    digits: Digits, poisoned: Poisoned, tmp_path: Path, precision: str
) -> None:
    """Steps 4 and 6 to 8 are launched as a graph; the sixth has NaN. Kernels that add atomically round otherwise."""
    runs = [
        given(digits, tmp_path / name, poisoned, engine="plain", train={"precision": precision})
        for name in ("ordinary", "graph")
    ]
    (expected, weights), (seen, same) = (
        steps(runs[0], graph=False, count=8),
        steps(runs[1], graph=True, count=8),
    )
    assert [row[2:] for row in seen] == [row[2:] for row in expected]
    tolerance = 1e-4 if precision == "fp32" else 1e-2
    norms = [[row[1] for row in rows if math.isfinite(row[1])] for rows in (seen, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=tolerance)
    for kind in ("model/", "ema/", "exp_avg/", "exp_avg_sq/"):
        a, b = (
            torch.cat([s[n].flatten() for n in sorted(weights) if n.startswith(kind)])
            for s in (weights, same)
        )
        assert float((a - b).norm() / a.norm()) < tolerance, kind


# --- what a graph could not hold ---------------------------------------------------------------------------


class Waited(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Fails where the host reads a number of a tensor, as it may not while a GPU's stream is captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


ALONE = [
    *(
        {"objective": {"coupling": coupling}}
        for coupling in ("independent", {"name": "sinkhorn", "group": 8})
    ),
    *({"objective": {"spread": name}} for name in SPREADS.names()),
    *({"objective": {"times": name}} for name in TIMES.names()),
]


@pytest.mark.parametrize("sections", ALONE, ids=str)
def test_nothing_in_a_step_waits_for_the_device(
    digits: Digits, tmp_path: Path, sections: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cond, "check_labels", lambda *_: None)  # on a CPU alone labels are looked at
    run = built(values(digits, tmp_path, engine="local", **sections))
    run.graph = graphed(run)
    Loop(run).train_step(run.feed.stream.batch(0))  # what is made once, and kept, may wait
    with NoWaiting():
        run.graph.body()
    assert run.parts.on_host == ""
    with NoWaiting(), pytest.raises(Waited):  # and it would be seen
        Loop(run).train_step(run.feed.stream.batch(1))
    run.feed.stream.close()


def test_addresses_stay_when_a_checkpoint_is_loaded(digits: Digits, tmp_path: Path) -> None:
    """A graph goes on with the addresses that it was captured with."""
    plain = values(digits, tmp_path, engine="local", train={"steps": 2}, checkpoint={"every": 2})
    go(plain)
    run = built({**plain, "train": {**plain["train"], "steps": 4}})

    def addresses() -> list[int]:
        steps = [state["step"] for state in run.engine.optimizer.state.values()]  # type: ignore[attr-defined]
        tensors = [t for f in run.engine.fragments() for t in (f.weight, *f.state.values())]
        return [t.data_ptr() for t in (*tensors, *steps, *run.ema.pieces)]

    before = addresses()
    assert run.resume()
    with run.ema.swapped_in():
        pass
    Loop(run).train_step(run.feed.stream.batch(2))
    assert addresses() == before
    run.feed.stream.close()


def test_an_update_of_another_kind_is_not_captured_as_adamws(digits: Digits, tmp_path: Path) -> None:
    class Another(GuardedAdamW):
        pass

    run = built(values(digits, tmp_path, engine="local"))
    run.feed.stream.close()
    assert isinstance(run.engine, PlainEngine)
    run.engine.optimizer = Another(run.engine.optimizer.param_groups, None, fused=True)
    with pytest.raises(ConfigError, match="captures AdamW's update, and the optimizer is Another"):
        graphed(run)


def test_graphs_are_refused_where_there_can_be_none(digits: Digits, tmp_path: Path) -> None:
    sections: Values = {"engine": "plain", "train": {"graphs": True}}
    with pytest.raises(ConfigError, match="there is no GPU here"):
        go(values(digits, tmp_path, **sections))
    with pytest.raises(ConfigError, match=r"coupling = ot is solved on the CPU, which no CUDA graph"):
        go(values(digits, tmp_path, **sections, objective={"coupling": {"name": "ot", "group": 8}}))
