"""Groups of rate, decay and eps under ZeRO: μP trains at every stage as in plain torch, and goes on so."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import Values, at_step, column, differing, go, state, values
from tests.train.short_runs import short_runs

STAGES = [0, 1, 2, 3]
WIDE = {"size": None, "width": 96, "depth": 1, "heads": 3}


def wide(digits: Digits, run_dir: Path, base: int | None = 32, **sections: Any) -> Values:
    """A run of width 96; base None is the standard parametrization."""
    kind = {"name": "standard"} if base is None else {"name": "mup", "base_width": base}
    optim = {"weight_decay": 0.5, "clip": 0.5, "eps": 1e-5, "warmup": 0}
    train = {"steps": 4, "freeze": ["blocks.0.attention.qkv.*"]}
    given = values(digits, run_dir, model={**WIDE, "parametrization": kind}, optim=optim, train=train)
    return {**given, "checkpoint": {"every": 2, "keep": 0}, **sections}


@pytest.mark.slow
def test_at_every_stage_the_weights_are_plain_torchs(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    alone = [wide(digits, tmp_path / f"alone{base}", base, engine="local") for base in (32, None)]
    sharded = [wide(digits, tmp_path / f"stage{stage}", zero={"stage": stage}) for stage in STAGES]
    mup, standard = ranks.run(1, short_runs, alone, 4)[0]
    found = ranks.run(2, short_runs, sharded, 4)[0]

    def weights(short: Any) -> torch.Tensor:
        return torch.cat(
            [t.flatten() for name, t in sorted(short.states.items()) if name.startswith("model/")]
        )

    for short in found:
        error = (weights(short) - weights(mup)).norm() / weights(mup).norm()
        assert float(error) < 1e-5
    assert (
        float((weights(standard) - weights(mup)).norm() / weights(mup).norm()) > 1e-2
    )  # or nothing is compared


def test_a_run_goes_on_at_another_stage_as_if_never_stopped(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    ranks.run(1, go, wide(digits, whole, engine="local"))
    shutil.copytree(whole, tmp_path / "cut", ignore=shutil.ignore_patterns(at_step(whole, 4).name))
    ranks.run(2, go, wide(digits, tmp_path / "cut", zero={"stage": 3}))
    expected, found = (state(at_step(run, 4)) for run in (whole, tmp_path / "cut"))
    for name, there in expected.items():
        torch.testing.assert_close(found[name], there, rtol=1e-4, atol=1e-6, msg=name)


def test_at_the_base_width_training_is_the_standard_ones_to_the_bit(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    runs = [tmp_path / "standard", tmp_path / "mup"]
    for run, base in zip(runs, (None, 96), strict=True):
        ranks.run(1, go, wide(digits, run, base, engine="local"))
    assert column(runs[0], "loss") == column(runs[1], "loss")
    assert all(math.isfinite(loss) for loss in column(runs[0], "loss"))
    assert differing(*(state(at_step(run, 4)) for run in runs)) == []


def test_another_base_width_is_another_run(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    ranks.run(1, go, wide(digits, tmp_path / "run", engine="local"))
    with pytest.raises(Exception, match=r"model\.parametrization\.base_width"):
        ranks.run(1, go, wide(digits, tmp_path / "run", base=48, engine="local"))
