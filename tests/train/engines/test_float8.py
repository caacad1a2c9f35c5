"""Runs in float8 (emulated): plain torch's and ZeRO's agree, go on where they stopped, and leave plain checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dit.config import ConfigError
from dit.data.shards.manifest import Manifest
from dit.experiments.parts import make_parts
from dit.experiments.trained import Trained
from dit.ranks import group
from dit.ranks.group import World
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.engines.test_zero_engine import flat, relative
from tests.train.runs import (
    STEPS,
    Values,
    at_step,
    built,
    column,
    differing,
    experiment,
    forked,
    go,
    state,
    values,
)

FP8 = {"name": "tensorwise", "emulate": True}


def float8(digits: Digits, run_dir: Path, fp8: object = FP8, **sections: object) -> Values:
    return values(digits, run_dir, train={"precision": "bf16", "fp8": fp8}, **sections)


@pytest.fixture(scope="module")
def alone(digits: Digits, ranks: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of plain torch in float8, and one in bf16."""
    folder = tmp_path_factory.mktemp("float8")
    for name, fp8 in (("float8", FP8), ("bf16", None)):
        ranks.run(1, go, float8(digits, folder / name, fp8, engine="local"))
    return {name: folder / name for name in ("float8", "bf16")}


def test_it_trains_as_bf16_does_but_for_rounding(alone: dict[str, Path]) -> None:
    assert 1e-5 < relative(column(alone["float8"], "loss"), column(alone["bf16"], "loss")) < 1e-2
    assert 1e-5 < relative(column(alone["float8"], "grad_norm"), column(alone["bf16"], "grad_norm")) < 3e-2
    assert column(alone["float8"], "batch_hash") == column(alone["bf16"], "batch_hash")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_zero_agrees_with_plain_torch(
    digits: Digits, ranks: Server, alone: dict[str, Path], tmp_path: Path, stage: int
) -> None:
    """A scale is of the tokens of a micro-batch, and other samples are together in those of two ranks."""
    ranks.run(2, go, float8(digits, tmp_path, zero={"stage": stage}))
    assert relative(column(tmp_path, "loss"), column(alone["float8"], "loss")) < 2e-3
    a, b = (flat(state(at_step(run, STEPS)), "exp_avg") for run in (alone["float8"], tmp_path))
    assert float((a - b).norm() / a.norm()) < 5e-2


def test_a_checkpoint_is_a_plain_one(
    digits: Digits, ranks: Server, alone: dict[str, Path], tmp_path: Path
) -> None:
    """Of the same names, to draw from and to start from without float8; and a run in float8 goes on bit for bit."""
    found, plain = (state(at_step(alone[name], STEPS)) for name in ("float8", "bf16"))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in plain.items()}
    trained = Trained.load(str(alone["float8"]), "model", torch.device("cpu"))
    assert not [m for m in trained.model.modules() if type(m).__module__.startswith("torchao.")]
    ranks.run(1, go, values(digits, tmp_path / "new", engine="local", init={"from": str(alone["float8"])}))
    again = forked(alone["float8"], STEPS // 2, tmp_path / "again")
    ranks.run(1, go, float8(digits, again, engine="local"))
    assert differing(found, state(at_step(again, STEPS))) == []


def sent_narrow(given: Values, out: Path) -> None:
    """Write the names of the parameters whose gradients DeepSpeed sends in bfloat16."""
    with group.session():
        module = built(given).engine.module
        narrow = [n for n, p in module.named_parameters() if getattr(p, "comm_dtype", None) == torch.bfloat16]
    out.write_text(json.dumps(narrow))


def test_gradients_are_sent_as_those_of_bf16_are(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    found = []
    for name, fp8 in (("float8", FP8), ("bf16", None)):
        given = float8(digits, tmp_path / name, fp8, zero={"stage": 1})
        ranks.run(1, sent_narrow, given, tmp_path / f"{name}.json")
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert found[0] == found[1]
    assert "blocks.0.attention.qkv.weight" in found[0]


def test_what_cannot_be_is_refused_before_a_run_begins(digits: Digits, tmp_path: Path) -> None:
    manifest = Manifest.load(digits.moments)
    with pytest.raises(ConfigError, match=r"train.fp8 is for train.precision: bf16, and it is fp32"):
        experiment(values(digits, tmp_path, train={"fp8": FP8}))
    with pytest.raises(ConfigError, match=r"need a GPU of compute capability 8\.9"):
        make_parts(experiment(float8(digits, tmp_path, "rowwise")), manifest, World())
    with pytest.raises(ConfigError, match="the 136 tokens of a micro-batch are no multiple of 16"):
        make_parts(experiment(float8(digits, tmp_path, model={"registers": 1})), manifest, World())
    parts = make_parts(experiment(float8(digits, tmp_path, model={"mlp_ratio": 4.1})), manifest, World())
    with pytest.raises(ConfigError, match="makes 262 numbers of 64"):
        parts.build()
