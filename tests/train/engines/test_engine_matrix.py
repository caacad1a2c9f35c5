"""Each ZeRO stage, and plain torch on two ranks, against one process, for all of what may interact (I2)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import BATCH, ENGINES, Values, engine_of, go, values
from tests.train.short_runs import Short, short_runs

pytestmark = pytest.mark.slow

STAGES, STEPS = (0, 1, 2, 3), 3
FROZEN = (
    "blocks.0.*",
    "*attention.qkv.weight",
    "patch*",
)  # whole modules, some matrices, some of every group


@dataclass(frozen=True)
class Case:
    """One combination of what may interact."""

    precision: str
    accumulation: int  # micro-batches a step and rank, on two ranks
    clip: float | None
    freeze: tuple[str, ...]

    def values(self, digits: Digits, run_dir: object, **sections: object) -> Values:
        train = {"precision": self.precision, "micro_batch": BATCH // 2 // self.accumulation}
        given = values(digits, run_dir, train=train, optim={"clip": self.clip}, **sections)  # type: ignore[arg-type]
        given["train"]["freeze"] = list(self.freeze)
        return given

    def __str__(self) -> str:
        clip = "clipped" if self.clip else "free"
        return f"{self.precision}-{self.accumulation}-{clip}-{'frozen' if self.freeze else 'all'}"


CASES = [Case(*case) for case in itertools.product(("fp32", "bf16"), (1, 4), (0.3, None), (FROZEN, ()))]


@pytest.fixture(scope="module")
def plain(digits: Digits, ranks: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Short]:
    """Plain torch, on one process."""
    folder = tmp_path_factory.mktemp("plain")
    runs = [case.values(digits, folder / str(case), engine="local") for case in CASES]
    [found] = ranks.run(1, short_runs, runs, STEPS)
    return dict(zip(CASES, found, strict=True))


@pytest.fixture(scope="module", params=ENGINES)
def sharded(
    request: pytest.FixtureRequest, digits: Digits, ranks: Server, tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, Short]:
    """One engine, on two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    chosen = engine_of(request.param)
    found = ranks.run(2, short_runs, [c.values(digits, folder / str(c), **chosen) for c in CASES], STEPS)
    for a, b in zip(*found, strict=True):  # both ranks see the same model
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
        assert a.norms == b.norms
    return dict(zip(CASES, found[0], strict=True))


def relative(found: list[float], expected: list[float]) -> float:
    return float(np.abs(np.array(found) / np.array(expected) - 1).max())


def off(found: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> float:
    """Norm of the difference over the norm, over all tensors of a kind."""
    names = sorted(name for name in expected if name.startswith(kind + "/"))
    a, b = (torch.cat([states[name].flatten() for name in names]) for states in (expected, found))
    return float((a - b).norm() / a.norm())


# Relative. fp32: only the order of sums differs, 1e-7 each. bf16: products are rounded to 2e-3, in other groups of
# samples where micro-batches differ, and ranks' gradients are added up in bf16; over many elements that averages out.
TOLERANCE = {
    "fp32": {"loss": 1e-5, "norm": 1e-5, "model": 1e-5, "ema": 1e-5, "exp_avg": 1e-5, "exp_avg_sq": 1e-5},
    "bf16": {"loss": 2e-4, "norm": 2e-3, "model": 2e-3, "ema": 2e-3, "exp_avg": 1e-2, "exp_avg_sq": 1e-2},
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_combination_is_plain_torchs(
    plain: dict[Case, Short], sharded: dict[Case, Short], case: Case
) -> None:
    expected, found, tolerance = plain[case], sharded[case], TOLERANCE[case.precision]
    assert found.applied == expected.applied == [True] * STEPS
    assert relative(found.losses, expected.losses) < tolerance["loss"]
    assert relative(found.norms, expected.norms) < tolerance["norm"]
    assert found.states.keys() == expected.states.keys()
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        assert off(found.states, expected.states, kind) < tolerance[kind], kind
    for name, weight in found.weights.items():  # what the model computes with is the master
        assert torch.equal(weight, found.states[f"model/{name}"]), name


@pytest.mark.parametrize("case", [c for c in CASES if c.freeze], ids=str)
def test_frozen_parameters_stay_and_the_others_do_not(
    plain: dict[Case, Short], sharded: dict[Case, Short], case: Case
) -> None:
    found = sharded[case].states
    trained = {name.removeprefix("exp_avg/") for name in found if name.startswith("exp_avg/")}
    names = {name.removeprefix("model/") for name in found if name.startswith("model/")}
    assert {"blocks.0.mlp.fc1.weight", "blocks.1.attention.qkv.weight"} <= names - trained
    free = sharded[Case(case.precision, case.accumulation, case.clip, ())]
    assert (
        sharded[case].norms[-1] < free.norms[-1]
    )  # at first the gates' zeros keep gradients from the frozen ones
    for name in names - trained:
        assert torch.equal(found[f"model/{name}"], found[f"ema/{name}"]), name
        assert torch.equal(found[f"model/{name}"], plain[case].states[f"model/{name}"]), name
    moved = free.states["model/blocks.0.modulation.weight"]
    assert not torch.equal(found["model/blocks.0.modulation.weight"], moved)
    assert all(bool(found[f"exp_avg/{name}"].any()) for name in trained)


def test_clipping_acts(plain: dict[Case, Short]) -> None:
    for case in [c for c in CASES if c.clip]:
        free = plain[Case(case.precision, case.accumulation, None, case.freeze)]
        assert plain[case].norms[0] == free.norms[0] > case.clip  # before clipping
        assert off(plain[case].states, free.states, "exp_avg") > 0.1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_master_weights_and_moments_are_fp32(sharded: dict[Case, Short], case: Case) -> None:
    """And not merely in dtype: under bf16 they have bits that bf16 lacks."""
    assert sharded[case].state_dtypes == {torch.float32}
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        states = sharded[case].states
        flat = torch.cat([t.flatten() for n, t in states.items() if n.startswith(kind + "/") and t.any()])
        flat = flat[flat != 0]
        assert float((flat != flat.bfloat16().float()).float().mean()) > 0.5, kind


@pytest.mark.parametrize("communication", ["auto", "fp32"])
def test_many_micro_batches_add_up_in_fp32(
    digits: Digits, ranks: Server, tmp_path: Path, communication: str
) -> None:
    """64 a step: the mean gradient of the layers that bf16 computes is off by no more than with 4. From a model that
    was trained a little (its plain average, not warmed up): while the gates are closed those layers hardly have a
    gradient, and where they are wide open bf16 rounds more."""
    start = tmp_path / "start"
    ranks.run(1, go, values(digits, start, engine="local", ema={"decay": 0.9, "warmup": False}))

    def given(name: str, micro: int, precision: str, **sections: object) -> Values:
        train = {"global_batch": 128, "micro_batch": micro, "precision": precision}
        return values(digits, tmp_path / name, train=train, init={"from": str(start)}, **sections)

    def narrow(run: Short) -> dict[str, Tensor]:
        return {n: t for n, t in run.states.items() if ".mlp." in n or ".attention." in n}

    [[expected]] = ranks.run(1, short_runs, [given("fp32", 32, "fp32", engine="local")], STEPS)
    choices = [(stage, micro) for stage in STAGES for micro in (1, 16)]
    runs = [
        given(f"{stage}-{micro}", micro, "bf16", zero={"stage": stage, "communication": communication})
        for stage, micro in choices
    ]
    found = ranks.run(2, short_runs, runs, STEPS)[0]
    errors = {
        choice: off(narrow(run), narrow(expected), "exp_avg")
        for choice, run in zip(choices, found, strict=True)
    }
    for (stage, micro), error in errors.items():
        assert 1e-4 < error < 4e-3, (stage, micro)
        assert error < 1.5 * errors[stage, 16], (stage, micro)
