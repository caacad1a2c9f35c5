"""hustvl/LightningDiT's weights: its numbers in three variants, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.interop import lightningdit
from dit.interop.weights import WeightsError
from tests.gaussian import golden

EXACT = {"rtol": 0.0, "atol": 1e-5}  # numbers up to 4, in float32
VARIANTS = ("standard", "qknorm_noshift", "layernorm_mlp_rope")


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    return golden("lightningdit")


def state_of(numbers: dict[str, np.ndarray], variant: str) -> dict[str, Tensor]:
    start = f"{variant}/w/"
    return {k.removeprefix(start): torch.from_numpy(w) for k, w in numbers.items() if k.startswith(start)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_gives_the_references_numbers(numbers: dict[str, np.ndarray], variant: str) -> None:
    arguments = json.loads(str(numbers[f"{variant}/config"]))
    found = lightningdit.from_state_dict(state_of(numbers, variant), **arguments)
    x, t, y, out = (torch.from_numpy(numbers[f"{variant}/{name}"]) for name in ("x", "t", "y", "out"))
    with torch.no_grad():
        torch.testing.assert_close(found.model(x, t, y), out, **EXACT)


def test_other_rotary_tables_are_refused(numbers: dict[str, np.ndarray]) -> None:
    state = state_of(numbers, "standard")
    state["feat_rope.freqs_cos"] = state["feat_rope.freqs_cos"].roll(1, 0)
    with pytest.raises(WeightsError, match="interpolated positions are not known"):
        lightningdit.from_state_dict(state, **json.loads(str(numbers["standard/config"])))


def test_arguments_that_do_not_fit_are_named(numbers: dict[str, np.ndarray]) -> None:
    arguments = json.loads(str(numbers["standard/config"]))
    with pytest.raises(WeightsError, match=r"blocks\.0\.mlp\.fc1\.weight"):
        lightningdit.from_state_dict(state_of(numbers, "standard"), **{**arguments, "use_swiglu": False})
