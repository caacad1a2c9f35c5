"""Small ablations on the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit.config import from_dict, merge
from dit.scaling.ablation.spec import AblationSpec
from tests.datasets import Digits
from tests.train.runs import values

CHANGES: dict[str, Any] = {
    "plain": {},
    "rms": {"model": {"block": {"norm": "rms"}}},
    "guided": {"objective": {"auxiliary": "model_guidance"}},
    "both": ["rms", "guided"],
}


def ablation_values(digits: Digits, out: Path, **keys: Any) -> dict[str, Any]:
    """A spec as its YAML file would have it; keys are merged in."""
    training = values(
        digits,
        Path("unused"),
        model={"size": None, "width": 32, "depth": 1, "heads": 1},
        data={"val": str(digits.moments_val)},
        optim={"warmup": 1},
        val={"samples": 32},
        engine="local",
        train={"micro_batch": None},
    )
    return merge(
        {
            "out": str(out),
            "training": training,
            "changes": CHANGES,
            "baselines": ["plain"],
            "budgets": [2e9],
            "lrs": [1e-3, 4e-3],
            "seeds": [1, 2],
        },
        keys,
    )


def spec_of(digits: Digits, out: Path, **keys: Any) -> AblationSpec:
    return from_dict(AblationSpec, ablation_values(digits, out, **keys))
