"""Recomputation at every ZeRO stage on two ranks: the states of a run that keeps every activation, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import Values, values
from tests.train.short_runs import short_runs

KEPT: Values = {}
WAYS: list[Values] = [
    {"checkpoint_blocks": True},
    {"checkpoint_blocks": 1},
    {"checkpoint_blocks": True, "checkpoint_keep": "products"},
]
BLOCK: Values = {"qk_norm": True, "rope": {"name": "halves"}, "mlp": {"name": "swiglu"}}


@pytest.mark.slow
def test_states_are_those_without_recomputation_to_the_bit(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    """Blocks with all that a policy has to tell apart, in fp32 and with bf16 products, one gathered after the other."""
    cases = [
        (stage, precision, way)
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")[: 2 if stage in (0, 3) else 1]
        for way in (KEPT, *WAYS)
    ]
    runs = [
        values(
            digits,
            tmp_path / str(number),
            zero={"stage": stage},
            train={"precision": precision},
            model={**way, "block": BLOCK, "depth": 3, "width": 36, "heads": 3, "size": None},
        )
        for number, (stage, precision, way) in enumerate(cases)
    ]
    found, _ = ranks.run(2, short_runs, runs, 2)
    kept = {case[:2]: short for case, short in zip(cases, found, strict=True) if case[2] == KEPT}
    for case, short in zip(cases, found, strict=True):
        expected = kept[case[:2]]
        assert short.losses == expected.losses, case
        assert short.norms == expected.norms, case
        for name, state in expected.states.items():
            assert torch.equal(short.states[name], state), (case, name)
