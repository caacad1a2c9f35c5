"""hustvl/LightningDiT's weights: its numbers in three variants, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.config import from_dict
from dit.flow.objective import Objective
from dit.flow.predict import ReverseVelocity
from dit.interop import lightningdit
from dit.interop.lightningdit import PATH, LightningArguments, LightningDiT
from dit.interop.weights import OUTPUT, WeightsError
from dit.model.dit import DiTConfig
from tests.gaussian import golden
from tests.interop.goldens import VARIANTS

EXACT = {"rtol": 0.0, "atol": 1e-5}  # numbers up to 4, in float32


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


@pytest.mark.parametrize(("width", "gates"), [(1152, 3072), (1024, 2730), (768, 2048), (48, 128)])
def test_gates_of_swiglu_are_of_mlps_four_times_as_wide(width: int, gates: int) -> None:
    """int(2/3 of 4 times the width), which several widths of MLPs round to."""
    arguments = LightningArguments(hidden_size=width, depth=1, num_heads=16, use_swiglu=True)
    state = {name: torch.empty(shape, device="meta") for name, shape in arguments.shapes().items()}
    assert len(state["blocks.0.mlp.w12.weight"]) == 2 * gates
    assert LightningDiT().infer(state, num_heads=16) == arguments


def test_heads_that_nothing_tells_must_be_said() -> None:
    arguments = LightningArguments(hidden_size=64, depth=1, num_heads=2)
    state = {name: torch.empty(shape, device="meta") for name, shape in arguments.shapes().items()}
    with pytest.raises(WeightsError, match="width 64 is not known: give --num_heads"):
        LightningDiT().infer(state)
    assert LightningDiT().infer(state, num_heads=2) == arguments


def test_output_rows_that_are_discarded_are_left_out(numbers: dict[str, np.ndarray]) -> None:
    state = state_of(numbers, "standard")
    arguments = {**json.loads(str(numbers["standard/config"])), "learn_sigma": True}
    for name in OUTPUT:  # (p p C, ...) to (p p 2C, ...)
        rows = state[name].unflatten(0, (4, 4))
        state[name] = torch.cat([rows, torch.ones_like(rows)], dim=1).flatten(0, 1)
    assert LightningDiT().infer(state).learn_sigma
    found = lightningdit.from_state_dict(state, **arguments)
    x, t, y, out = (torch.from_numpy(numbers[f"standard/{name}"]) for name in ("x", "t", "y", "out"))
    with torch.no_grad():
        torch.testing.assert_close(found.model(x, t, y), out, **EXACT)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"registers": 2}, "registers 0 there, 2 here"),
        ({"position_table": False, "block": {"rope": "halves"}}, "position_table true there, false here"),
        ({"block": {"rope": {"name": "halves", "base": 100.0}}}, "block.rope.base 10000.0 there, 100.0 here"),
        ({"block": {"mlp": {"name": "swiglu", "hidden": 8}}}, "block.mlp.hidden null there, 8 here"),
        ({"block": {"qk_norm": "rms"}}, "block.qk_norm"),
        ({"block": {"value_residual": True}}, "block.value_residual false there, true here"),
    ],
)
def test_what_lightningdit_lacks_is_not_given_out(fields: dict[str, Any], says: str) -> None:
    model = from_dict(DiTConfig, {"width": 32, "depth": 1, "heads": 2, **fields}).build(8, 4, 3)
    with pytest.raises(WeightsError, match=says):
        LightningDiT().theirs(model, Objective(path=PATH, prediction=ReverseVelocity()))
