"""The sharded average: equal to an unsharded fp32 one, frozen on skipped updates, swapped in and out (I3, I4)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dit.config import ConfigError, from_dict
from dit.dist import World
from dit.train.ema import Ema, EmaConfig
from dit.train.local import LocalEngine
from dit.train.optim import OptimConfig
from tests.datasets import Digits
from tests.ranks import Server
from tests.train.conftest import Poisoned
from tests.train.on_ranks import steps_beside_reference
from tests.train.runs import values

STEPS = 5


def test_at_every_stage_it_is_an_unsharded_average_and_stands_still_on_skipped_updates(
    digits: Digits, ranks: Server, poisoned: Poisoned, tmp_path: Path
) -> None:
    """NaN in one rank's data: the update is skipped on both ranks, and weights and average keep every bit."""
    runs = [
        values(digits, tmp_path / str(stage), data={"path": str(poisoned.folder)}, zero={"stage": stage})
        for stage in (0, 1, 2, 3)
    ]
    for found in ranks.run(2, steps_beside_reference, runs, STEPS):
        for stage, steps in enumerate(found):
            for step, seen in enumerate(steps):
                applied = step != poisoned.step
                assert seen["applied"] is applied, (stage, step)
                assert seen["weights changed"] is applied, (stage, step)
                assert seen["average changed"] is applied, (stage, step)
                assert seen["average is the reference"], (stage, step)
                assert seen["skipped"] == int(step >= poisoned.step)
                assert seen["in a row"] == int(not applied)
                assert np.isfinite(seen["grad_norm"]) == applied


def test_alone_it_is_an_average_too(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    (found,) = ranks.run(1, steps_beside_reference, [values(digits, tmp_path, engine="local")], 3)
    assert all(step["average is the reference"] and step["average changed"] for step in found[0])


def test_closed_form() -> None:
    """Of weights 1, 2, 3 after a start at 0: the sum of (1 - d) d^(n - i) w_i."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    ema = Ema(LocalEngine(module, OptimConfig(), World()), EmaConfig(decay=0.5))
    for value in (1.0, 2.0, 3.0):
        module.weight.data.fill_(value)
        ema.update()
    assert float(ema.pieces[0]) == 0.5 * 3 + 0.25 * 2 + 0.125 * 1
    with ema.swapped_in():
        assert module.weight.item() == 2.125
    assert module.weight.item() == 3.0
    assert float(ema.pieces[0]) == 2.125


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"ema.decay and ema.also must be in \[0, 1\)"):
        from_dict(EmaConfig, {"decay": decay})
